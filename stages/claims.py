"""claims: what others say of refusal directions beside the same quantity here: `make claims`, `make claims CLAIM=pairing`.

Not in dvc.yaml, as `make organisms` is not: no other stage reads its figures. `python -m stages.claims pairing` measures what no
stage of the study does, in the folder of a study that has come as far as `select`; with no name the table alone is made, of the
committed figures of every study. What was computed is in the store, so that an interrupted run goes on.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from refusal.io.errors import UserError
from refusal.io.params import Params
from stages import STORE, read_json, stage, use_transformers, write_json, write_text

LIST, PAGE, TABLE = Path("data/claims.yaml"), Path("docs/claims.md"), Path("metrics/claims.json")
MEASURED = Path("metrics/claims")
FILES = ("evaluate", "generalization", "science", "directions", "select", "long_answers")


def main(params: Params, *chosen: str) -> str:
    study, chosen = (chosen[1], chosen[2:]) if chosen[:1] == ("--study",) and len(chosen) > 1 else (None, chosen)
    for name in chosen:
        if name not in CONTESTS:
            raise UserError(f"claims: there is no {name} to measure: choose among {', '.join(CONTESTS)}, or name none")
    if study:
        return of_study(study, chosen or [*CONTESTS])
    for name in chosen:
        measure(params, name)
    return f"{MEASURED}/: {', '.join(chosen)}" if chosen else table()


def of_study(name: str, chosen: Sequence[str]) -> str:
    """Measure in the workspace of a study that was run here, and put the figures beside its own."""
    from stages.studies import STUDIES, adapted, alone, mirror, overlay_of, parameters, run

    overlay_of(name)
    place = STORE / "studies" / name
    if not (place / "metrics/select.json").is_file():
        raise UserError(f"studies: {name} was not run here as far as select: run `make study STUDY={name}` first")
    with alone(name) as lock:
        model = json.loads((place / "params.yaml").read_text(encoding="utf-8"))["model"]
        mirror(place, adapted(parameters(name), place) | {"model": model})  # the very file that it was given
        run(name, place, lock, ["stages.claims", *chosen])
    for one in chosen:
        write_json(STUDIES / name / MEASURED / f"{one}.json", read_json(place / MEASURED / f"{one}.json"))
    return f"{STUDIES / name / MEASURED}/: {', '.join(chosen)}"


def measure(params: Params, name: str) -> None:
    """Measure one, in the study whose files are here."""
    use_transformers(params)
    from stages.study import load_study

    if params.prompts.keep != "all":
        raise UserError(
            "params.yaml: prompts.keep: claims are measured with all train prompts and with those that behave: set all"
        )
    dtype = params.claims.dtype or params.model.dtype
    params = params.model_copy(update={"model": params.model.model_copy(update={"dtype": dtype})})
    figures = CONTESTS[name](params, load_study(params, params.claims))
    write_json(MEASURED / f"{name}.json", {"dtype": dtype} | figures)


def pairing(params: Params, study: Any) -> dict[str, Any]:
    """Which safe prompts to subtract."""
    from refusal.analysis.pairing import contest
    from refusal.method.activations_file import read_activations

    return contest(study, read_activations(Path(f"data/activations/{params.sweep.method}.safetensors")))


def selection(params: Params, study: Any) -> dict[str, Any]:
    """Which score foretells what a direction does."""
    from refusal.analysis.selection_scores import contest
    from refusal.io.prompts import resolve_pairing

    judged, directions = (read_json(Path(f"metrics/{name}.json")) for name in ("judge", "directions"))
    s, known = params.sweep, [name for name, of in directions.items() if of is not None]
    return contest(study, judged, directions[f"{s.method}-{resolve_pairing(s.pairing, s.method, known)}"]["separation"])


def harmfulness(params: Params, study: Any) -> dict[str, Any]:
    """Harmfulness and refusal, at two positions."""
    from refusal.analysis.harmfulness import apart

    return apart(study)


CONTESTS = {"pairing": pairing, "selection": selection, "harmfulness": harmfulness}


def table() -> str:
    """The table of the committed figures of every study, the default one first, and its page."""
    from refusal.analysis.claims import MEASURES, beside
    from refusal.io.claims import read
    from refusal.report.claims import page
    from stages.models import ORGANISMS, current
    from stages.studies import STUDIES

    claims = read(yaml.safe_load(LIST.read_text(encoding="utf-8")), MEASURES, LIST.as_posix())
    names = sorted(made.parent.name for made in STUDIES.glob("*/study.json"))
    folders = {"organism": Path("metrics")} | {name: STUDIES / name / "metrics" for name in names}
    found = {name: beside(claims, metrics_of(folder)) for name, folder in folders.items()}
    write_json(TABLE, found)
    write_text(PAGE, page(claims, read_json(TABLE), read_json(ORGANISMS), [name for name in names if not current(name)]))
    return f"{PAGE}: {len(claims)} claims, {len(found)} studies"


def metrics_of(folder: Path) -> dict[str, Any]:
    """The metrics of a study, by the name of the file; those that `make claims` measured, where it has."""
    measured = {name: folder / f"claims/{name}.json" for name in CONTESTS}
    here = {name: path for name, path in measured.items() if path.is_file()}
    return {name: read_json(path) for name, path in ({of: folder / f"{of}.json" for of in FILES} | here).items()}


if __name__ == "__main__":
    stage(main)
