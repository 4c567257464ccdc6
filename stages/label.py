"""label: a person labels a sample of a study's own test completions, blind to arm and to the judge: `make label`, or
`make label STUDY=<name>`; `python -m stages.label --help` says what else there is. No stage of the pipeline.

Labels lie in data/raw/, where `judge.labelled` looks for them and DVC sees them change. Those of a study of studies/ lie in
data/raw/<name>/: its workspace is made anew at each run, and would lose them.
"""

import argparse
import json
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from refusal.io.errors import UserError
from refusal.io.files import read_jsonl
from refusal.io.params import Params
from stages import RAW, STORE, stage
from stages.studies import parameters

if TYPE_CHECKING:
    from refusal.report.labels import Session, Text

COMPLETIONS = Path("data/evaluated/completions.jsonl")
PORT = 8017


def main(params: Params, *arguments: str) -> str:
    from refusal.report.label_terminal import ask
    from refusal.report.labels import LabelFile, Session, raters_agree

    asked = options(arguments)
    if asked.agreement:
        files = [Path(path) for path in asked.agreement]
        for path in files:
            if not path.is_file():
                raise UserError(f"{path}: no such file; `make label RATER=<name>` makes one")
        figures = raters_agree(*(LabelFile(path).answers() for path in files))
        print(json.dumps(figures, indent=2))
        return f"{files[0]} and {files[1]}: {figures['n']} texts labelled by both"
    file = LabelFile(RAW / (asked.study or "") / (f"labels-{asked.rater}.csv" if asked.rater else "labels.csv"))
    session = Session(texts(params, asked), file)
    if said := file.repair():
        print(f"label: {said}")
    session.left()  # a damaged file is told of before anything is asked
    if asked.terminal:
        ask(session)
    else:
        on_page(session, asked.port)
    n, left = len(session.texts), len(session.left())
    return f"{n - left} of {n} labelled; {file.path}" + (
        "; the same command goes on" if left else f"; judge.labelled: {file.path}"
    )


def options(arguments: tuple[str, ...]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m stages.label", description="Label a sample of a study's test completions.")
    parser.add_argument("study", nargs="?", help="a study of studies/; the default study when not given")
    parser.add_argument("--terminal", action="store_true", help="ask here, and not on a page")
    parser.add_argument("--n", type=int, default=100, help="how many texts; a greater n keeps those of a smaller (%(default)s)")
    parser.add_argument("--half", choices=("harmful", "safe"), default="harmful", help="of the prompts (%(default)s)")
    parser.add_argument("--rater", help="write labels-<rater>.csv, of the same texts")
    parser.add_argument("--port", type=int, default=PORT, help="another one is taken where it is in use (%(default)s)")
    parser.add_argument("--agreement", nargs=2, metavar=("A", "B"), help="print how far two files of labels agree, and end")
    asked = parser.parse_args(arguments)
    if asked.rater is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", asked.rater):
        parser.error("--rater: use letters, digits, - and _")
    if asked.n < 1 or not 0 <= asked.port < 2**16:
        parser.error("--n is 1 or more, --port 0 to 65535")
    return asked


def texts(params: Params, asked: argparse.Namespace) -> list["Text"]:
    """The sample of the study, by its own seed."""
    from refusal.report.labels import sample

    place, seed, command = Path(), params.seed, "make repro"
    if asked.study:
        seed = parameters(asked.study)["seed"]
        place, command = STORE / "studies" / asked.study, f"make study STUDY={asked.study}"
    if not (place / COMPLETIONS).is_file():
        raise UserError(f"{place / COMPLETIONS}: no completions yet; `{command}` makes them")
    return sample((row for row in read_jsonl(place / COMPLETIONS) if row["half"] == asked.half), asked.n, seed)


def on_page(session: "Session", port: int) -> None:
    """Serve the page until Ctrl-C."""
    from refusal.report.label_page import LabelServer

    with LabelServer(session, port) as server:
        if port not in (0, server.server_port):
            print(f"label: port {port} is in use, so another is taken")
        print(f"label: open {server.url} (Ctrl-C ends; every answer is kept as it is given)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


stage(main)
