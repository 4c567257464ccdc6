"""Arms timed in turns (A B C A B C ...), so that a slow minute of the machine falls on all of them."""

import ctypes
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Ratio:
    """The median of ratios taken round by round, with their least and greatest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass
class Measured:
    """Seconds of each arm by round, its peak memory over what was there before, and what it returned."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_mb: dict[str, float] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def median(self, arm: str) -> float:
        return median(self.seconds[arm])

    def ratio(self, arm: str, over: str) -> Ratio:
        """Seconds of `arm` over seconds of `over`: above 1 where `over` is the faster."""
        ratios = [a / b for a, b in zip(self.seconds[arm], self.seconds[over], strict=True)]
        return Ratio(median(ratios), min(ratios), max(ratios))

    def table(self, title: str, ours: str, notes: Mapping[str, str] | None = None) -> Table:
        """A row an arm: median, spread, ratio to `ours`, peak memory, and a note where there is one."""
        table = Table(title=title, title_justify="left", caption="spread and [ ]: least and greatest of the rounds")
        table.add_column("arm")
        for name in ("seconds", "spread", f"time over {ours}", "peak MB"):
            table.add_column(name, justify="right")
        if notes:
            table.add_column("")
        for arm, seconds in self.seconds.items():
            row = [arm, f"{median(seconds):.3f}", f"{min(seconds):.3f}-{max(seconds):.3f}", str(self.ratio(arm, ours))]
            row.append(f"{self.peak_mb[arm]:.0f}")
            table.add_row(*row, *([notes.get(arm, "")] if notes else []))
        return table


def measure(arms: Mapping[str, Callable[[], Any]], console: Console, rounds: int = 3) -> Measured:
    """`rounds` rounds in which the arms take turns; each run is timed and its memory sampled, its first value kept."""
    found = Measured({arm: [] for arm in arms}, dict.fromkeys(arms, 0.0))
    for n in range(rounds):
        for arm, run in arms.items():
            with Peak() as peak:
                started = time.perf_counter()
                value = run()
                found.seconds[arm].append(time.perf_counter() - started)
            found.values.setdefault(arm, value)
            found.peak_mb[arm] = max(found.peak_mb[arm], peak.mb)
            console.print(f"  round {n + 1} of {rounds}: {arm} {found.seconds[arm][-1]:.3f} s", style="dim", highlight=False)
            del value
    return found


def anonymous_bytes(process: psutil.Process) -> int:
    """Memory that is no file's: what a program really takes (the page cache and mapped files can be dropped)."""
    info = process.memory_info()
    return info.rss - getattr(info, "shared", 0)


class Peak:
    """The high-water mark of this process's anonymous memory inside a `with`, in MB over where it began."""

    def __enter__(self) -> "Peak":
        gc.collect()
        _trim()  # otherwise memory freed by an earlier arm would be taken again without being seen
        self._process, self._stop = psutil.Process(), threading.Event()
        self.start = self.high = anonymous_bytes(self._process)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.high = max(self.high, anonymous_bytes(self._process))

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.high = max(self.high, anonymous_bytes(self._process))
        self.mb = (self.high - self.start) / 1e6


def in_subprocess(arguments: Sequence[str]) -> tuple[str, float, float]:
    """Run `python *arguments`: its stdout, its wall time in seconds, and its peak anonymous memory in MB, all of it counted.

    Raises subprocess.CalledProcessError where it fails.
    """
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    process, high = psutil.Process(child.pid), 0

    def watch() -> None:
        nonlocal high
        while child.poll() is None:
            try:
                high = max(high, anonymous_bytes(process))
            except psutil.Error:  # it ended in between
                return
            time.sleep(0.005)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = child.communicate()
    seconds = time.perf_counter() - started
    watcher.join()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args, output)
    return output, seconds, high / 1e6


def _trim() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
