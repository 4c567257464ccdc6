"""Files that are there whole or not at all, rows as JSON lines and CSV, and JSON that says each thing once."""

import json
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, Self

SYNC_EVERY = 1 << 26  # bytes written between two calls of fsync


def write_whole(path: Path, *pieces: bytes | memoryview) -> None:
    """Write a file under another name, fsync it and rename it: a half-written one is never taken for it. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)  # where the disk is full, and with it the room that it took


class SyncedFile:
    """A file that goes to disk while more of it is computed: else nearly all of it would wait for the end."""

    def __init__(self, path: Path):
        self._file, self._thread, self._synced = path.open("wb"), ThreadPoolExecutor(1), 0
        self._syncs: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> None:
        """Append to the file."""
        self._file.write(data)
        if self._file.tell() - self._synced > SYNC_EVERY and all(one.done() for one in self._syncs):
            self._synced = self._file.tell()
            self._syncs.append(self._thread.submit(os.fsync, self._file.fileno()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file, self._thread:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                for one in self._syncs:
                    one.result()


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


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, keys in the order given."""
    write_whole(path, *((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read rows written by `write_jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def rounded(value: Any) -> Any:
    """A value of JSON, its floats to six significant digits: what rounding leaves of float32 sums on another processor."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, list | tuple) else value


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """CSV of rows, the form that DVC draws; floats `rounded` and in their shortest form, missing values empty."""
    import pandas  # half a second

    return pandas.DataFrame(rounded(rows), dtype=object).to_csv(index=False, lineterminator="\n")


def read_csv(path: Path | IO[str]) -> list[dict[str, Any]]:
    """Read rows written by `csv_text`, numbers as numbers and missing values as None."""
    import pandas

    table = pandas.read_csv(path).astype(object)
    return table.where(table.notna(), None).to_dict("records")
