"""python -m stages.restore: puts back what DVC was killed in the middle of writing; `make repro` and its like begin with it.

DVC writes `dvc.lock` and `.dvc/tmp/rwlock` in place and reads them before any stage runs, so that one of them cut off would stop
every later command. Each stage keeps a copy of the lock beside the store as it ends.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.lock import LockError
from dvc.repo import Repo
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils import strictyaml

from refusal.io.files import write_whole
from stages import LOCK_KEPT, ROOT

_MD5 = re.compile(r"[0-9a-f]{32}(\.dir)?")

LOCK, RWLOCK = ROOT / "dvc.lock", ROOT / ".dvc/tmp/rwlock"


def main() -> None:
    try:
        with Repo(str(ROOT)).lock:  # else another DVC may be writing just now
            if RWLOCK.is_file() and not _is_json(RWLOCK):
                RWLOCK.unlink()
                print("restore: .dvc/tmp/rwlock was cut off: removed, since no DVC runs", file=sys.stderr)
            if LOCK.is_file() and not _is_lock(LOCK):
                print(f"restore: dvc.lock was cut off: {_put_back()}", file=sys.stderr)
    except LockError:
        pass  # DVC itself says who holds it


def _put_back() -> str:
    """Restore the lock from the copy of the last stage that ended, or the committed one; what was done."""
    if LOCK_KEPT.is_file() and _is_lock(LOCK_KEPT):
        write_whole(LOCK, LOCK_KEPT.read_bytes())
        return f"put back as it was when the last stage ended ({LOCK_KEPT.relative_to(ROOT)})"
    committed = subprocess.run(["git", "show", "HEAD:./dvc.lock"], cwd=ROOT, capture_output=True)
    if committed.returncode == 0:
        write_whole(LOCK, committed.stdout)
        return "put back as it is committed"
    LOCK.unlink()
    return "removed; no stage had ended before"


def _is_lock(path: Path) -> bool:
    """Whether DVC itself would read it. Its schema leaves out what a hash looks like: one cut off may be a number."""
    try:
        lock, _ = strictyaml.load(str(path), COMPILED_LOCKFILE_SCHEMA)
    except (DvcException, UnicodeDecodeError):
        return False
    stages = (lock or {}).get("stages", {}).values()
    files = [file for stage in stages for side in ("deps", "outs") for file in stage.get(side, ())]
    return all(_MD5.fullmatch(str(file.get("md5"))) and file.get("hash") == "md5" for file in files)


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_bytes()), dict)
    except ValueError:
        return False


if __name__ == "__main__":
    main()
