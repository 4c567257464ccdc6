"""The pipeline as a user runs it: the complete study in a fresh clone, a second run that finds nothing to do, one variant.

What each stage took is read from the log that stages keep outside DVC's outputs.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
VARIANT = "sweep.method=batched_unmasked"


def run(console: Console) -> dict[str, float]:
    """`repro_seconds`, `variant_seconds`; medians of three: `noop_seconds` of `dvc repro`, `status_seconds`; the stages' own.

    The clone is of the last commit, with this environment and an empty store. Raises CalledProcessError where a command fails.
    """
    with tempfile.TemporaryDirectory(prefix="pipeline-") as name:
        clone = Path(name) / "clone"
        _timed(console, ROOT, "git", "clone", "-q", str(ROOT), str(clone))
        for setting in (("user.name", "perf"), ("user.email", "perf@localhost")):
            _timed(console, clone, "git", "config", *setting)
        found = {"repro_seconds": _timed(console, clone, "dvc", "repro")}
        console.print(_stages(clone / ".refusal-store/runs.jsonl"))
        found["noop_seconds"] = median(_timed(console, clone, "dvc", "repro") for _ in range(3))
        found["status_seconds"] = median(_timed(console, clone, "dvc", "status") for _ in range(3))
        found["variant_seconds"] = _timed(console, clone, "dvc", "exp", "run", "-S", VARIANT)
    table = Table(title="the pipeline", title_justify="left")
    table.add_column("command")
    table.add_column("seconds", justify="right")
    for key, what in (
        ("repro_seconds", "dvc repro, in a fresh clone with an empty store"),
        ("variant_seconds", f"dvc exp run -S {VARIANT}"),
        ("noop_seconds", "dvc repro, with nothing to do"),
        ("status_seconds", "dvc status"),
    ):
        table.add_row(what, f"{found[key]:.1f}")
    console.print(table)
    return {key: round(value, 2) for key, value in found.items()}


def _timed(console: Console, folder: Path, *command: str) -> float:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # The stages' own settings, not this process's.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "HF_", "DVC_"))}
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, env=environment | {"PATH": path}, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    console.print(f"  {' '.join(command[:3])}: {seconds:.1f} s", style="dim", highlight=False)
    return seconds


def _stages(log: Path) -> Table:
    """What each stage took: wall time, peak memory, and tokens through the model (training is not counted)."""
    table = Table(title="stages", title_justify="left", caption="tokens: padding included, training not")
    table.add_column("stage")
    for name in ("seconds", "peak MB", "forward passes", "tokens", "tokens/s"):
        table.add_column(name, justify="right")
    for line in map(json.loads, log.read_text(encoding="utf-8").splitlines()):
        speed = f"{line['tokens'] / line['seconds']:,.0f}" if line["tokens"] and line["seconds"] else "-"
        figures = (f"{line['seconds']:.1f}", f"{line['peak_memory_mb']:,}", f"{line['passes']:,}", f"{line['tokens']:,}", speed)
        table.add_row(line["stage"], *figures)
    return table
