"""Files that are there whole or not at all, and JSON without duplicate keys."""

import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file beside its place, fsync it and rename it: a half-written one is never taken for it. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        beside.rename(path)
        sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)  # where the disk is full, and with it the room that it took


def sync(folder: Path) -> None:
    """A folder's names, on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def set_aside(path: Path) -> Path:
    """Rename a damaged file to `<name>.corrupt-<n>`, the first n that is free, and return that."""
    n = 1
    while (aside := path.with_name(f"{path.name}.corrupt-{n}")).exists():
        n += 1
    return path.rename(aside)


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json.loads(object_pairs_hook=...): refuses duplicate keys, of which json takes the last."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a duplicate key in an object")
    return dict(pairs)
