"""label-check: the labelled completions in data/labels/ beside those of the studies run here, and the rules beside the labels."""

import hashlib
import json
from pathlib import Path

from refusal.io.files import read_jsonl
from refusal.io.params import Params
from refusal.judges.roles import roles
from refusal.judges.rules import SELECTED, label_of
from stages import STORE, stage

LABELS = Path("data/labels")


def main(params: Params) -> str:
    """One line a study, and what the agreement means. A completion is known again by its hash."""
    for file in sorted(LABELS.glob("*.jsonl")):
        print(f"{file.stem}: {checked(file, STORE / 'studies' / file.stem / 'data')}")
    return "the labels are a language model's, not people's: docs/judges.md"


def checked(file: Path, data: Path) -> str:
    """How many of a file's labelled completions a study's data hold, and on how many of those the rules agree."""
    found = [data / stage / "completions.jsonl" for stage in ("evaluated", "sweep")]
    texts = {digest(row["prompt"], row["completion"]): row for path in found if path.is_file() for row in read_jsonl(path)}
    labelled = read_jsonl(file)
    if not texts:
        return f"{len(labelled)} labels, and no completions here to compare: run `make study STUDY={file.stem}` first"
    here = [(row, texts[row["sha256"]]) for row in labelled if row["sha256"] in texts]
    said = [(row["final"], label_of(roles(text["prompt"], text["completion"]), SELECTED)) for row, text in here]
    agree = sum((final == "compliance") == (label == "compliance") for final, label in said)
    stale = sum(set(row["roles"]) != roles(text["prompt"], text["completion"]) for row, text in here)
    return (
        f"{len(here)} of {len(labelled)} labelled completions are here ({len(here) / len(labelled):.1%}); the rules agree "
        f"on {agree} of them whether it complied; the committed roles of {stale} are not those of today's patterns"
    )


def digest(prompt: str, completion: str) -> str:
    """The name of a completion in data/labels/."""
    return hashlib.sha256(json.dumps([prompt, completion]).encode()).hexdigest()


if __name__ == "__main__":
    stage(main)
