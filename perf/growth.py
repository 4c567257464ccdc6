"""Time and memory over a factor of 16 in prompts, cells and tokens: a table, and plots/growth.csv for `dvc plots show`."""

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from perf import extraction, harness, workload
from refusal.io.files import csv_text, write_whole

PLOT = Path("plots/growth.csv")
FACTORS = (1, 2, 4, 8, 16)
PROMPTS = 32  # extracted, at factor 1
CELLS, CELL_TOKENS = 1, 8  # swept, with the new tokens of each
TOKENS = 8  # generated
ROWS = 16  # prompts of a sweep, and of its batches: a batch is full at every factor


def run(console: Console, rounds: int = 3) -> dict[str, float]:
    """Time all points, print them, write the plot's data; scalars: time of the last doubling (2: linear), memory's growth."""
    from perf import sweep

    model = workload.model()
    with tempfile.TemporaryDirectory() as name:
        prompts = {PROMPTS * f: partial(extraction.ours, model, workload.prompts(PROMPTS * f), Path(name)) for f in FACTORS}
        cells = {CELLS * f: sweep.growth(model, ROWS, CELLS * f, CELL_TOKENS, ROWS) for f in FACTORS}
        tokens = {TOKENS * f: sweep.growth(model, ROWS, 1, TOKENS * f, ROWS) for f in FACTORS}
        points = []
        for quantity, arms in (("prompts", prompts), ("cells", cells), ("tokens", tokens)):
            points += measure(quantity, arms, console, rounds)
    console.print(table(points))
    write_whole(PLOT, csv_text(points).encode())
    return scalars(points)


def measure(quantity: str, arms: dict[int, Callable[[], object]], console: Console, rounds: int) -> list[dict[str, Any]]:
    """A row of the table for each size."""
    measured, least = harness.measure({str(n): arm for n, arm in arms.items()}, console, rounds), min(arms)
    return [
        {
            "quantity": quantity,
            "n": n,
            "factor": n // least,
            "seconds": round(measured.median(str(n)), 4),
            "times_as_long": round(measured.median(str(n)) / measured.median(str(least)), 3),
            "peak_mb": round(measured.peak_mb[str(n)], 1),
        }
        for n in arms
    ]


def table(points: list[dict[str, Any]]) -> Table:
    shown = Table(title="growth", title_justify="left", caption="peak MB: anonymous memory beyond the model")
    for name in points[0]:
        shown.add_column(name.replace("_", " "), justify="left" if name == "quantity" else "right")
    for point in points:
        shown.add_row(*map(str, point.values()), end_section=point["factor"] == FACTORS[-1])
    return shown


def scalars(points: list[dict[str, Any]]) -> dict[str, float]:
    """For each quantity: how long the last doubling took, and how much more memory 16 times as much took."""
    figures = {}
    for quantity in dict.fromkeys(point["quantity"] for point in points):
        first, *_, before, last = (point for point in points if point["quantity"] == quantity)
        figures[f"{quantity}_last_doubling"] = round(last["seconds"] / before["seconds"], 3)
        figures[f"{quantity}_peak_mb_growth"] = round(last["peak_mb"] - first["peak_mb"], 1)
    return figures
