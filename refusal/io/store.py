"""A content-addressed store that makes long work cheap to interrupt.

DVC deletes a stage's outputs before the stage runs, so what has been computed must live elsewhere: one SQLite file,
shared by queued experiments and by concurrent processes. A key is a hash of everything that determines the value, and
nothing is ever updated, so a stored value is never stale. Kill it anywhere, run it again: only what is missing runs.
"""

import hashlib
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from refusal.io.code import code_of
from refusal.io.files import set_aside
from refusal.io.progress import progress

T = TypeVar("T")
SETUP = (
    "PRAGMA journal_mode=WAL",
    "PRAGMA synchronous=NORMAL",
    "CREATE TABLE IF NOT EXISTS blobs (key TEXT PRIMARY KEY, digest TEXT, value BLOB) WITHOUT ROWID",
)


def key(kind: str, code: Sequence[Callable], **parts: Any) -> str:
    """The key of a value: SHA-256 over its kind, the code that computes it and the canonical JSON of all else that determines it.

    `code` names the functions that compute the value, and is hashed with all that they use (`refusal.io.code`): a corrected
    function never reads the values of the faulty one. Empty for what no code of ours determines, such as an endpoint's reply.
    """
    text = json.dumps([kind, code_of(*code) if code else "", parts], sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Store:
    """Blobs by key in one SQLite file, safe under kill -9 and for several processes at once.

    Every blob is stored with its SHA-256. A blob that no longer matches it is dropped, and a file that SQLite calls
    malformed is renamed to `<name>.corrupt-<n>`; both are reported on stderr, and the work is done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bar: tqdm | None = None
        self._before = 0  # what the bar shows without the job at hand
        path.parent.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self.connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        self.inode = self.path.stat().st_ino
        for statement in SETUP:
            self._execute(statement)

    def _execute(self, statement: str, *values: str | bytes) -> Any:
        """The first row that a statement gives; of a malformed file, of the new one in its place."""
        try:
            return self.connection.execute(statement, values).fetchone()
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            self.connection.close()
            self._set_aside(error)
            self._open()
            return self._execute(statement, *values)

    def _set_aside(self, error: Exception) -> None:
        # Where another process has set it aside already, the file of this name is a new one, and whole.
        if self.path.exists() and self.path.stat().st_ino == self.inode:
            aside = set_aside(self.path)
            said = f"{self.path} is corrupted ({error}); it is set aside as {aside.name} and its values are computed again."
            print(said, file=sys.stderr)
            for suffix in ("-wal", "-shm"):
                self.path.with_name(self.path.name + suffix).unlink(missing_ok=True)

    def get(self, key: str) -> bytes | None:
        """The value of a key, or None where it is missing or damaged."""
        row = self._execute("SELECT digest, value FROM blobs WHERE key = ?", key)
        if row is None:
            return None
        if hashlib.sha256(row[1]).hexdigest() != row[0]:
            print(f"{self.path}: the value {key[:12]} is damaged; it is dropped and computed again.", file=sys.stderr)
            self._execute("DELETE FROM blobs WHERE key = ?", key)
            return None
        return row[1]

    def put(self, key: str, value: bytes) -> None:
        """Store a value; a key already present keeps its value."""
        digest = hashlib.sha256(value).hexdigest()
        self._execute("INSERT OR IGNORE INTO blobs VALUES (?, ?, ?)", key, digest, value)

    def run(
        self,
        jobs: Sequence[tuple[str, T]],
        compute: Callable[[T], bytes],
        label: str,
        unit: str = "batch",
        pool: Executor | None = None,
        size: Callable[[T], int] = lambda _: 1,
    ) -> Iterator[bytes]:
        """The value of each (key, job) in order, computed where it is not stored; a bar shows rate and time left.

        A job is `size` units long. On a `pool` all are computed before the first is given; elsewhere a job may tell how far it
        is (`done`).
        """
        with progress(sum(size(job) for _, job in jobs), label, unit) as bar:
            if pool is not None:
                futures = {pool.submit(compute, job): (name, size(job)) for name, job in jobs if self.get(name) is None}
                bar.update(bar.total - sum(length for _, length in futures.values()))
                error = None
                for future in as_completed(futures):  # stored as they come, so that a kill costs what is at work alone
                    if future.cancelled():
                        continue
                    if future.exception() is None:
                        name, length = futures[future]
                        self.put(name, future.result())
                        bar.update(length)
                    else:  # what is at work is finished and kept, no more is begun
                        error = error or future.exception()
                        for other in futures:
                            other.cancel()
                if error is not None:
                    raise error
            for name, job in jobs:
                value = self.get(name)
                before = bar.n
                if value is None:
                    self._bar, self._before = None if pool else bar, before
                    value = compute(job)
                    self._bar = None
                    self.put(name, value)
                if pool is None:
                    bar.update(before + size(job) - bar.n)
                yield value

    def done(self, n: int) -> None:
        """So many units of the job at hand are computed: fewer than before where it had to begin anew."""
        if self._bar is not None:
            self._bar.update(self._before + n - self._bar.n)
