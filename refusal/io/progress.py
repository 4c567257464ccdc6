"""Bars that show how far work is, on a terminal and in a log file. They determine no value: no key of the store has them."""

import sys
from typing import Any

from tqdm import tqdm


class _Lines:
    """Standard error as a log file: every update of a bar is a line of its own, not a carriage return."""

    def write(self, text: str) -> None:
        for line in text.replace("\r", "\n").split("\n"):
            if line.strip():
                sys.stderr.write(f"{line.rstrip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


class _LogBar(tqdm):
    """A bar in a log file: nothing for work of under two seconds, a line every quarter of a minute, a last line at the end."""

    delay: float

    def close(self) -> None:
        if not self.disable and self._time() - self.start_t >= self.delay:
            self.delay = 0  # tqdm would leave out the last line of a bar that no update has shown yet
        super().close()


def progress(total: int, label: str, unit: str, done: int = 0) -> tqdm:
    """A bar on stderr: done, rate and time left. The rate leaves out the first `done`, of an earlier run. Unit "B": bytes."""
    size: dict[str, Any] = {"total": total, "desc": label, "unit": unit, "unit_scale": unit == "B", "initial": done}
    if sys.stderr.isatty():
        return tqdm(**size, mininterval=0.5, delay=1.0, dynamic_ncols=True)
    return _LogBar(**size, mininterval=15.0, miniters=1, delay=2.0, file=_Lines())
