"""python -m stages.pull: brings the trained model and the prompts of this dvc.lock from the repository's own remote.

What is here already stays, and what the remote does not hold is left to `dvc repro`, which makes it. With `refresh` the remote
is made anew, of these outputs alone.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dvc.utils import strictyaml

# No other processor would train the same bytes.
OUTS = ("data/prompts", "models/base", "models/truth", "models/twin")
OBJECTS = Path("remote/files/md5")


def main() -> int:
    if sys.argv[1:] == ["refresh"]:
        shutil.rmtree("remote", ignore_errors=True)
        return subprocess.run(["dvc", "push", "--quiet", "--remote", "repository", *OUTS]).returncode
    locked = strictyaml.load("dvc.lock")[0] if Path("dvc.lock").is_file() else {}
    md5 = {out["path"]: out["md5"] for stage in locked.get("stages", {}).values() for out in stage.get("outs", ())}
    wanted = [out for out in OUTS if not Path(out).exists() and out in md5 and stored(md5[out]).is_file()]
    for out in wanted:
        if damaged := next((name for name in objects(md5[out]) if not whole(name)), None):
            print(f"pull: {stored(damaged)}, of {out}, is damaged or missing: `git checkout HEAD -- remote`", file=sys.stderr)
            return 1
    return subprocess.run(["dvc", "pull", "--quiet", "--remote", "repository", *wanted]).returncode if wanted else 0


def objects(folder: str) -> Iterator[str]:
    """The hashes of a folder and of the files in it."""
    yield folder
    yield from (entry["md5"] for entry in json.loads(stored(folder).read_bytes()))


def whole(md5: str) -> bool:
    return stored(md5).is_file() and hashlib.md5(stored(md5).read_bytes()).hexdigest() == md5.removesuffix(".dir")


def stored(md5: str) -> Path:
    return OBJECTS / md5[:2] / md5[2:]


if __name__ == "__main__":
    sys.exit(main())
