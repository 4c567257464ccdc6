"""`refusal compare BASE EDITED`: what was done to a checkpoint, or how two models' lm-eval scores differ, without a pipeline."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refusal.io.command import in_one_sentence
from refusal.io.errors import UserError
from refusal.io.files import rounded, write_whole


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("refusal", description="What needs no pipeline.")
    commands = parser.add_subparsers(required=True, metavar="compare")
    command = commands.add_parser("compare", help="what was done to a checkpoint, or how the scores of two models differ")
    command.add_argument("base", type=Path, metavar="BASE", help="a checkpoint's folder or .gguf, or samples of lm-eval")
    command.add_argument("edited", type=Path, metavar="EDITED", help="the same of the other model, or an adapter to BASE")
    command.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    command.add_argument("--directions", type=Path, metavar="FILE", help="directions by layer to compare the edit's with")
    options = parser.parse_args(arguments)
    with in_one_sentence():
        of_samples = _samples(options.base) and _samples(options.edited)
        found, shown = (_scores if of_samples else _weights)(options.base, options.edited, options.directions)
        if options.json is not None:
            write_whole(options.json, (json.dumps(rounded(found), indent=2, allow_nan=False) + "\n").encode())
        print(shown, end="")


def _samples(path: Path) -> bool:
    """Whether a path is of lm-eval's samples, and of no checkpoint."""
    if path.is_dir():
        return not any(path.glob("*config.json")) and any(path.rglob("samples_*.jsonl"))
    return path.suffix == ".jsonl"


def _scores(base: Path, edited: Path, directions: Path | None) -> tuple[dict[str, Any], str]:
    from refusal.analysis.samples import compare_samples, read_samples
    from refusal.report.compare import samples_text

    if directions is not None:
        raise UserError(f"--directions {directions}: scores have none: leave it out.")
    table = compare_samples(read_samples(base), read_samples(edited))
    return {"tasks": table}, samples_text(table)


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


if __name__ == "__main__":
    main()
