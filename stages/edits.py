"""edits: checkpoints that are edits of the model: what was done to each, and what became of it. Of none it computes nothing."""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from refusal.io.edits import EditedCheckpoint
from refusal.io.errors import UserError
from refusal.io.files import write_jsonl
from refusal.io.params import Params
from stages import STORE, read_json, stage, use_transformers, write_json

if TYPE_CHECKING:
    from refusal.analysis.study import Study

BASE, ABLATED, OUT = Path("models/base"), Path("models/ablated"), Path("data/edits")
METRICS, SCALARS = Path("metrics/edits.json"), Path("metrics/edits_summary.json")
NONE = "edits.checkpoints names none: nothing was compared"


def main(params: Params) -> str:
    if not params.edits.checkpoints:
        return write({"note": NONE, "checkpoints": {}}, {}, [])
    use_transformers(params)
    from refusal.analysis.anatomy import in_short
    from refusal.analysis.edited_checkpoints import OWN_ARMS, beside, claimed, measure
    from refusal.lm.edited import with_weights
    from stages.study import load_study

    made, device = read_json(Path("metrics/orthogonalize.json")), (params.model.dtype, params.model.device)
    found = [locate(one, made) for one in params.edits.checkpoints]  # before anything that takes time
    study = load_study(params, params.evaluate)
    own = {word: ABLATED / made[word]["name"] for word in OWN_ARMS}
    arms = beside(study, {word: lambda at=at: with_weights(study.lm, at, *device) for word, at in own.items()})  # type: ignore[misc]
    figures, anatomies, rows = dict[str, Any](), dict[str, Any](), list[dict[str, Any]]()
    for one, (path, commit) in zip(params.edits.checkpoints, found, strict=True):
        with brought_in(one, path) as (folder, kind):
            anatomies[one.name], cosines = anatomy(params, study, path if kind == "adapter" else folder)
            behaviour, asked = measure(study, arms, one.name, with_weights(study.lm, folder, *device))
            scores = benchmark(params, one, folder)
        figures[one.name] = {
            "made_by": "orthogonalize" if one.own else kind,
            "revision": one.revision,
            "commit": commit,
            "anatomy": in_short(anatomies[one.name]),
            "cosines": cosines,
            "behaviour": behaviour,
            "benchmark": scores,
            "claims": one.claims and claimed(one.claims, behaviour),
        }
        rows += asked
    return write({"note": None, "checkpoints": figures}, anatomies, rows)


def locate(one: EditedCheckpoint, made: dict[str, Any]) -> tuple[Path, str | None]:
    """Where a checkpoint lies, and the hub's commit. Raises UserError where it lies nowhere, or is not to be had."""
    from refusal.lm import download as hub
    from refusal.lm.edited import look

    if one.own:
        if one.id not in made:
            raise UserError(f"params.yaml: edits.checkpoints: {one.id} was not made; made were {', '.join(made)}")
        return ABLATED / made[one.id]["name"], None
    if one.revision is None:
        if not Path(one.id).exists():
            raise UserError(
                f"params.yaml: edits.checkpoints: {one.id} is not here: give rank_1, random, the path of a checkpoint's or an "
                "adapter's folder or of a .gguf file, or a hub id with revision, a commit hash or tag"
            )
        again = "after a change of it run `dvc repro -f edits`"
        print(f"edits: DVC cannot see whether {one.id} changes; {again}", file=sys.stderr)
        return Path(one.id), None
    STORE.mkdir(parents=True, exist_ok=True)
    try:
        if one.file is not None:
            return hub.fetch_file(one.id, one.revision, one.file, STORE)
        return hub.fetch(one.id, one.revision, lambda folder: look(folder, BASE), STORE)
    except UserError as error:  # the same sentences as of model.id
        said = re.sub(r"params\.yaml: model\.", "params.yaml: edits.checkpoints: ", str(error))
        raise UserError(re.sub(r"\bmodel\.(id|revision|file)\b", r"the checkpoint's \1", said)) from None


@contextmanager
def brought_in(one: EditedCheckpoint, path: Path) -> Iterator[tuple[Path, str]]:
    """The folder to load, and what lies at `path`; the study's own, which may be an adapter to the base, is loaded as it is."""
    from refusal.lm.adapter import CONFIG
    from refusal.lm.edited import as_checkpoint

    if one.own:
        yield path, "adapter" if (path / CONFIG).is_file() else "checkpoint"
        return
    with as_checkpoint(path, BASE, OUT) as found:
        yield found


def anatomy(params: Params, study: "Study", path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was done to a checkpoint, and how near that is to the study's directions."""
    from refusal.analysis.anatomy import beside_directions, figures
    from refusal.analysis.edits import compare
    from refusal.io.prompts import resolve_pairing
    from refusal.lm.weights import open_weights

    with open_weights(BASE) as base, open_weights(path, BASE) as edited:
        found = compare(base, edited)
    described = read_json(Path("metrics/directions.json"))
    directions, s = {arm: m for arm, m in described.items() if m is not None}, params.sweep  # null where prompts are no pairs
    arm = f"{s.method}-{resolve_pairing(s.pairing, s.method, directions)}"
    return figures(found, {}), beside_directions(found, study.directions["unit"], directions[arm]["reliability"])


def benchmark(params: Params, one: EditedCheckpoint, folder: Path) -> dict[str, Any]:
    """lm-eval's scores, paired with the base's; of the study's own they are those of the stage benchmark."""
    if one.own:
        of_rank = read_json(Path("metrics/benchmark.json"))[one.id]
        return {key: value for key, value in of_rank.items() if key != "name"}
    import logging

    from refusal.analysis.benchmark import fetch, score_checkpoints, table, tasks_of
    from refusal.io.store import Store

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that comes loaded
    b = params.benchmark
    fetch(tasks_of(b.suite))
    scores = score_checkpoints({"baseline": BASE, one.name: folder}, BASE, b, params.model, Store(STORE / "store.sqlite"))
    return table(scores, b.n_resamples, b.seed)[one.name]


def write(metrics: dict[str, Any], anatomies: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """All outputs, and the line that the stage ends with."""
    from refusal.analysis.edited_checkpoints import scalars

    write_jsonl(OUT / "completions.jsonl", rows)
    write_json(OUT / "anatomy.json", anatomies)
    write_json(METRICS, metrics)
    few = {name: scalars(of) for name, of in metrics["checkpoints"].items()}
    write_json(SCALARS, {"edits": few})
    number = {"alpha": "alpha {:.2f}", "cosine": "cosine {:.3f}", "compliance": "compliance {:.2f}"}
    said = {name: [text.format(of[key]) for key, text in number.items() if of[key] is not None] for name, of in few.items()}
    kinds = {name: of["anatomy"]["kind"] for name, of in metrics["checkpoints"].items()}
    return "; ".join(f"{name}: {', '.join([kinds[name], *said[name]])}" for name in few) or NONE


def online(params: Params) -> bool:
    """Whether a checkpoint may come from the hub, or the documents of a task that it is scored on."""
    others = [one for one in params.edits.checkpoints if not one.own]
    return any(one.revision for one in others) or (bool(others) and params.benchmark.suite != "organism")


stage(main, online=online)
