"""Arms timed alternately (A B C A B C ...), so that a slow minute of the machine falls on all of them."""

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
    """`rounds` rounds of all arms, one after another; each run is timed and its memory sampled, its first value kept."""
    measured = Measured({arm: [] for arm in arms}, dict.fromkeys(arms, 0.0))
    for n in range(rounds):
        for arm, run in arms.items():
            with Peak() as peak:
                started = time.perf_counter()
                value = run()
                measured.seconds[arm].append(time.perf_counter() - started)
            measured.values.setdefault(arm, value)
            measured.peak_mb[arm] = max(measured.peak_mb[arm], peak.mb)
            console.print(f"  round {n + 1} of {rounds}: {arm} {measured.seconds[arm][-1]:.3f} s", style="dim", highlight=False)
            del value
    return measured


class Peak:
    """The high-water mark of this process's anonymous memory inside a `with`, in MB over where it began; of another's, all of it.

    Anonymous is what a program really takes: the page cache and mapped files can be dropped.
    """

    def __init__(self, process: int | None = None):
        self._process, self._stop, self.start = psutil.Process(process), threading.Event(), 0
        if process is None:
            gc.collect()
            if sys.platform == "linux":  # otherwise memory freed by an earlier arm would be taken again without being seen
                ctypes.CDLL(None).malloc_trim(0)
            self.start = self._anonymous()
        self.high = self.start

    def _anonymous(self) -> int:
        try:
            info = self._process.memory_info()
        except psutil.Error:  # it ended
            return 0
        return info.rss - getattr(info, "shared", 0)

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            self.high = max(self.high, self._anonymous())

    def __enter__(self) -> "Peak":
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mb = (max(self.high, self._anonymous()) - self.start) / 1e6


def in_subprocess(arguments: Sequence[str]) -> tuple[str, float, float]:
    """Run `python *arguments`: its stdout, its wall time in seconds, and its peak anonymous memory in MB.

    Raises subprocess.CalledProcessError where it fails.
    """
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    with Peak(child.pid) as peak:
        output, _ = child.communicate()
    seconds = time.perf_counter() - started
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, child.args, output)
    return output, seconds, peak.mb
