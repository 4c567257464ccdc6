"""python -m stages.verify: are the figures in metrics/ and plots/ the committed ones? Exits with 1 where one is not.

With `committed` it compares only where parameters, prompts, code and packages are the committed ones, and says where not; where
nothing is out it leaves the tree as Git knows it (`stages.rebuilt`).
"""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from refusal.io.files import read_csv
from refusal.io.params_file import load_params
from refusal.report.verify import MAX_FLIPS, Difference, differences, flips
from stages import rebuilt

COMPLETIONS = Path("metrics/completions.json")
INPUTS = ("params.yaml", "dvc.yaml", "requirements.lock", "refusal", "stages", "data/raw", "data/published")
SHOWN = 10


def main(only_committed: bool) -> int:
    if not COMPLETIONS.is_file() or str(COMPLETIONS) not in figures():
        print("verify: Git holds no figures here to compare with")
        return 0
    if only_committed and (changed := git("status", "--porcelain", "--", *INPUTS)):
        print(f"verify: not compared with the committed figures: {changed.splitlines()[0].split()[-1]} is not as committed")
        return 0
    found, flipped, n = compare()
    for each in found[:SHOWN]:
        print(f"  {each.figure}: {each.committed} committed, {each.rebuilt} here, {each.excess:.2g} of its tolerance")
    for text in flipped[:SHOWN]:
        print(f"  {text}: another completion")
    out = sum(each.excess > 1 for each in found)
    print(f"verify: {len(found)} figures differ in a digit, {out} by more than rounding; {len(flipped)} of {n} texts differ")
    if out or len(flipped) > MAX_FLIPS * n:
        return 1
    kept = only_committed and rebuilt.set_aside(figures(), INPUTS)
    print("verify: everything as committed" + f"; dvc.lock and digits of this processor are kept in {rebuilt.FOLDER}" * kept)
    return 0


def compare() -> tuple[list[Difference], list[str], int]:
    """Figures that differ from the committed ones, worst first; completions that differ; completions compared."""
    committed = {name: git("show", f"HEAD:./{name}") for name in figures()}
    here = {name: Path(name).read_text(encoding="utf-8") if Path(name).is_file() else None for name in committed}
    texts = json.loads(here[str(COMPLETIONS)] or "{}")
    flipped, n = flips(json.loads(committed[str(COMPLETIONS)]), texts)
    dtype = load_params(Path("params.yaml")).model.dtype
    fewest = min((len(arm.split()) for stage in texts.values() for arm in stage.values()), default=1)
    found = []
    for name in committed.keys() - {str(COMPLETIONS)}:
        found += differences(read(name, committed[name]), read(name, here[name]), dtype, name, len(flipped), fewest)
    return sorted(found, key=lambda each: -each.excess), flipped, n


def figures() -> list[str]:
    """The files of figures that Git holds."""
    return [name for name in git("ls-files", "metrics", "plots").splitlines() if name.endswith((".json", ".csv"))]


def read(name: str, text: str | None) -> Any:
    if text is None:
        return None
    return json.loads(text) if name.endswith(".json") else read_csv(io.StringIO(text))


def git(*command: str) -> str:
    """What Git says; nothing where this is no checkout of it."""
    return subprocess.run(["git", *command], capture_output=True, text=True).stdout


if __name__ == "__main__":
    sys.exit(main("committed" in sys.argv[1:]))
