"""What needs no pipeline: `refusal compare BASE EDITED`, what was done to a checkpoint, or how the scores of two models or two
studies differ; `refusal check MODEL`, what of a model could spoil a study of it. Here alone, outside the library's folders, is
known where a study's files lie."""

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from refusal.io.command import in_one_sentence
from refusal.io.errors import UserError
from refusal.io.files import rounded, write_whole

if TYPE_CHECKING:
    from refusal.io.params import Params

# Where a folder with a params.yaml keeps its own prompts, and the model that a study brought in.
RAW, BASE = Path("data", "raw"), Path("models", "base")
N_ACTIVATIONS, N_PADDED, N_SUMMED = 8, 8, 2  # prompts of each half whose activations are read; padded; added up
COMPLETIONS, METRICS = "data/evaluated/completions.jsonl", "metrics/evaluate.json"
PROMPTS = ("data/prompts/pairs.jsonl", "data/prompts/unrelated.jsonl")
KINDS = {"weights": "a checkpoint", "samples": "samples of lm-eval", "log": "a log of inspect", "study": "a study"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("refusal", description="What needs no pipeline.")
    commands = parser.add_subparsers(required=True, metavar="compare | check")
    command = commands.add_parser("compare", help="what was done to a checkpoint, or how the scores of two models differ")
    command.add_argument("base", type=Path, metavar="BASE", help="a checkpoint, samples of lm-eval, a log of inspect, or a study")
    command.add_argument("edited", type=Path, metavar="EDITED", help="the same of the other model, or an adapter to BASE")
    command.add_argument("--directions", type=Path, metavar="FILE", help="directions by layer to compare the edit's with")
    command.set_defaults(run=_compared)
    check = commands.add_parser("check", help="what of a model could spoil a study of it")
    check.add_argument("model", type=Path, nargs="?", metavar="MODEL", help="a checkpoint's folder or .gguf; none: params.yaml's")
    check.add_argument("-n", type=int, default=32, metavar="N", help="prompts of each half that are answered (32)")
    check.set_defaults(run=_checked)
    for each in (command, check):
        each.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    with in_one_sentence():
        found, shown = options.run(options)
        if options.json is not None:
            write_whole(options.json, (json.dumps(rounded(found), indent=2, allow_nan=False) + "\n").encode())
        print(shown, end="")


def _compared(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    kind = _kind(options.base)
    if kind != _kind(options.edited):
        said = f"{options.base} is {KINDS[kind]}, and {options.edited} {KINDS[_kind(options.edited)]}"
        raise UserError(f"{said}: give two of one kind.")
    if kind == "weights":
        return _weights(options.base, options.edited, options.directions)
    if options.directions is not None:
        raise UserError(f"--directions {options.directions}: scores have none: leave it out.")
    return _scores(kind, options.base, options.edited)


def _kind(path: Path) -> str:
    """Which of KINDS a path is; where it is none of the others, what reads weights says what is wrong."""
    if (path / COMPLETIONS).is_file() or (path / METRICS).is_file():
        return "study"
    if path.is_dir():
        return "samples" if not any(path.glob("*config.json")) and any(path.rglob("samples_*.jsonl")) else "weights"
    return {".jsonl": "samples", ".json": "log", ".eval": "log"}.get(path.suffix, "weights")


def _scores(kind: str, base: Path, edited: Path) -> tuple[dict[str, Any], str]:
    from refusal.report.compare import scores_text

    notes: list[str] = []
    if kind == "samples":
        from refusal.analysis.samples import compare_samples, read_samples

        table = compare_samples(read_samples(base), read_samples(edited))
    elif kind == "log":
        from refusal.analysis.inspect_logs import compare_logs, read_log

        table, notes = compare_logs(read_log(base), read_log(edited))
    else:
        from refusal.analysis.two_studies import compare_studies, read_study

        studies = [
            read_study(path / COMPLETIONS, [path / one for one in PROMPTS], path / "dvc.lock", ("judge", "generation"))
            for path in (base, edited)
        ]
        table, notes = compare_studies(*studies)
    name = {"samples": "task", "log": "scorer", "study": "arm"}[kind]
    return {f"{name}s": table, "notes": notes}, scores_text(table, name, notes)


def _weights(base: Path, edited: Path, directions: Path | None) -> tuple[dict[str, Any], str]:
    from refusal.analysis.anatomy import figures
    from refusal.analysis.edits import compare
    from refusal.lm.weights import open_weights
    from refusal.report.compare import text
    from refusal.report.published import read_vectors

    with open_weights(base) as ours, open_weights(edited, base) as theirs:
        vectors = {}
        if directions is not None:
            by_layer, single = read_vectors(directions)
            d_model, n_layers = ours.architecture.d_model, ours.architecture.n_layers
            vectors = by_layer | {name: v.expand(n_layers, -1) for name, v in single.items() if len(v) == d_model}
            if not vectors:
                raise UserError(f"{directions}: holds no directions of {d_model} components: give a file that does.")
        found = compare(ours, theirs)
        made = figures(found, {name: found.cosines(each) for name, each in vectors.items()})
    return made, text(made)


def _checked(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Of a MODEL the package's own prompts are asked, of the model of params.yaml its own."""
    from refusal.io.params_file import load_params

    params = load_params(Path("params.yaml"))
    if options.n < 2:
        raise UserError(f"-n {options.n}: so few answers give no rate: give 2 or more, such as 32.")
    own = options.model is not None
    model = options.model if own else _model_of(params)
    prompts, topics, n_test = _prompts_of(params, own, options.n)

    from refusal.analysis import check
    from refusal.lm.load import load_lm
    from refusal.lm.weights import open_weights
    from refusal.report.check import figures, text

    with _checkpoint(model, params) as folder:
        with open_weights(folder) as weights:
            found = check.look_at_weights(weights)
        lm = load_lm(folder, **params.model.loading)
    harmful, safe = (lm.encode(prompts[half], check.MAX_NEW_TOKENS) for half in ("harmful", "safe"))
    found |= check.look_at_stream(lm, harmful[:N_ACTIVATIONS], safe[:N_ACTIVATIONS])
    found |= check.look_at_writes(lm, [*harmful[:N_SUMMED], *safe[:N_SUMMED]])
    found |= check.look_at_padding(lm, [*harmful[: N_PADDED // 2], *safe[: N_PADDED // 2]])
    exact = not own and params.model.id == "organism"
    found |= check.look_at_refusals(lm, prompts, topics, n_test, exact)
    about = {"layers": lm.n_layers, "d_model": lm.d_model, "dtype": params.model.dtype, "seed": params.seed}
    return figures(found, str(model), about), text(found, str(model), about)


def _model_of(params: "Params") -> Path:
    """Where the model of params.yaml lies."""
    path = Path(params.model.id)
    if params.model.id != "organism" and params.model.revision is None:
        return path
    trained = (BASE / "training.json").is_file()
    if not (BASE / "config.json").is_file() or trained != (params.model.id == "organism"):
        raise UserError(
            f"params.yaml: model.id: {params.model.id} is not in {BASE} yet: run `dvc repro model` first, or give MODEL."
        )
    return BASE


def _prompts_of(params: "Params", own: bool, n: int) -> tuple[dict[str, list[str]], dict[str, list[str]], int]:
    """(prompts, topics) of at most n val prompts of each half, by the seed, and how many harmful test prompts a verdict has."""
    from refusal.data.prompts import prompts_of

    p, harmless = params.prompts, RAW / "harmless.jsonl"
    if own:
        files = {"source": str(RAW / "pairs.jsonl"), "unrelated": str(harmless), "harmful": None, "harmless": None}
        p = p.model_copy(update=files | {"n_pairs": None, "n_unrelated": None})
    elif "api" in (p.source, p.unrelated):
        raise UserError("params.yaml: prompts: an endpoint has yet to write these: give MODEL, which is asked the package's own.")
    pairs, unrelated, _ = prompts_of(p, harmless)
    prompts, topics = {}, {}
    for half, rows in (("harmful", pairs), ("safe", unrelated)):
        rows = [row for row in rows if row["split"] == "val"]
        rows = random.Random(params.seed).sample(rows, min(n, len(rows)))  # in no order: the first of them are of all kinds
        prompts[half], topics[half] = [row[half] for row in rows], [row["topic"] for row in rows]
    n_test = sum(row["split"] == "test" for row in pairs)
    return prompts, topics, min(n_test, params.science.n_test or n_test)


@contextmanager
def _checkpoint(model: Path, params: "Params") -> Iterator[Path]:
    """The model as a folder of safetensors: itself, or a temporary one that a .gguf file or Qwen-1's layout becomes."""
    from refusal.lm import gguf, qwen1
    from refusal.lm.validate import validate_checkpoint

    if not model.is_dir() and not (model.suffix == ".gguf" and model.is_file()):
        raise UserError(f"{model}: no such folder or .gguf file: give a checkpoint's.")
    ready = partial(validate_checkpoint, system_prompt=params.model.system_prompt, thinking=params.model.thinking)
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if model.is_file():
            gguf.convert(model, folder, params.model.dtype, ready)
        else:
            ready(model)
            if qwen1.is_qwen1(model):
                qwen1.convert(model, folder)
            else:
                folder = model
        yield folder


if __name__ == "__main__":
    main()
