"""`refusal compare BASE EDITED`: what was done to a checkpoint, or how the scores of two models or two studies differ, without a
pipeline. Here alone, outside the library's folders, is known where a study's files lie."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refusal.io.command import in_one_sentence
from refusal.io.errors import UserError
from refusal.io.files import rounded, write_whole

COMPLETIONS, METRICS = "data/evaluated/completions.jsonl", "metrics/evaluate.json"
PROMPTS = ("data/prompts/pairs.jsonl", "data/prompts/unrelated.jsonl")
KINDS = {"weights": "a checkpoint", "samples": "samples of lm-eval", "log": "a log of inspect", "study": "a study"}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("refusal", description="What needs no pipeline.")
    commands = parser.add_subparsers(required=True, metavar="compare")
    command = commands.add_parser("compare", help="what was done to a checkpoint, or how the scores of two models differ")
    command.add_argument("base", type=Path, metavar="BASE", help="a checkpoint, samples of lm-eval, a log of inspect, or a study")
    command.add_argument("edited", type=Path, metavar="EDITED", help="the same of the other model, or an adapter to BASE")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    command.add_argument("--directions", type=Path, metavar="FILE", help="directions by layer to compare the edit's with")
    options = parser.parse_args(arguments)
    with in_one_sentence():
        kind = _kind(options.base)
        if kind != _kind(options.edited):
            said = f"{options.base} is {KINDS[kind]}, and {options.edited} {KINDS[_kind(options.edited)]}"
            raise UserError(f"{said}: give two of one kind.")
        if kind == "weights":
            found, shown = _weights(options.base, options.edited, options.directions)
        elif options.directions is not None:
            raise UserError(f"--directions {options.directions}: scores have none: leave it out.")
        else:
            found, shown = _scores(kind, options.base, options.edited)
        if options.json is not None:
            write_whole(options.json, (json.dumps(rounded(found), indent=2, allow_nan=False) + "\n").encode())
        print(shown, end="")


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
    from refusal.analysis.edits import compare
    from refusal.lm.weights import open_weights
    from refusal.report.compare import figures, text
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


if __name__ == "__main__":
    main()
