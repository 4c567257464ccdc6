"""python -m stages.rebuilt: on another processor, its own lock and last digits in place of the committed ones.

`dvc.lock` holds hashes of activations, which another processor rounds otherwise, so that a rebuild would leave files changed
though no figure is another. `make verify committed` leaves the tree as Git knows it and keeps what was rebuilt beside the store;
`make repro` begins with this, and so finds nothing to do.
"""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dvc.utils import strictyaml

from refusal.io.files import write_whole

FOLDER = Path(".refusal-store/rebuilt")
FOR = FOLDER / "for"  # the hash of the committed lock in whose place what lies here was rebuilt
LOCK = Path("dvc.lock")


def set_aside(figures: Sequence[str], inputs: Sequence[str]) -> bool:
    """The committed text of `dvc.lock` and `figures`, what was rebuilt kept in FOLDER; whether anything differed.

    Not where the committed lock is of other `inputs`, or of other parameters: then it is the lock that wants a commit.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    changed = _git("diff", "HEAD", "--name-only", "--relative", "--", str(LOCK), *figures).splitlines()
    if not changed or _given(_git("show", f"HEAD:./{LOCK}"), inputs) != _given(LOCK.read_text(), inputs):
        return False
    for name in changed:
        write_whole(FOLDER / name, Path(name).read_bytes())
    _git("checkout", "HEAD", "--", *changed)
    write_whole(FOR, _hash(LOCK).encode())
    return True


def main() -> None:
    if FOR.is_file() and LOCK.is_file() and FOR.read_text() == _hash(LOCK):
        kept = [path.relative_to(FOLDER) for path in sorted(FOLDER.rglob("*")) if path.is_file() and path != FOR]
        names = [name for name in kept if not _git("diff", "HEAD", "--name-only", "--", str(name))]  # changed since: stays
        for name in names:
            write_whole(name, (FOLDER / name).read_bytes())
        print(f"rebuilt: {len(names)} files as this processor rounds them, in place of the committed ones", file=sys.stderr)


def _given(lock: str, inputs: Sequence[str]) -> dict[str, tuple[object, object, object]]:
    """Of every stage in a lock what it was given: command, parameters, and hashes of `inputs`."""
    stages = strictyaml.parse_yaml(lock, LOCK.name)["stages"]
    return {
        name: (
            stage["cmd"],
            stage.get("params"),
            [dep for dep in stage.get("deps", ()) if any(Path(dep["path"]).is_relative_to(each) for each in inputs)],
        )
        for name, stage in stages.items()
    }


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _git(*command: str) -> str:
    return subprocess.run(["git", *command], capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    main()
