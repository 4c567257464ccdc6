"""python -m perf [section ...]: measure, print tables, and merge the scalars into metrics/perf.json."""

import argparse
import json
import os
import sys
import time
from importlib import import_module
from pathlib import Path

from rich.console import Console

from refusal.io.errors import UserError
from refusal.io.files import write_whole

SECTIONS = ("extraction", "sweep", "orthogonalize", "pipeline", "growth", "engine")
METRICS = Path("metrics/perf.json")


def merge(path: Path, machine: dict[str, object], section: str, scalars: dict[str, object]) -> list[str]:
    """Put a section's scalars into the file, whole or not at all; the sections dropped, which another machine measured."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    dropped = [] if known.get("machine", machine) == machine else [name for name in known if name not in ("machine", section)]
    merged = ({} if dropped else known) | {"machine": machine, section: scalars}
    ordered = {name: merged[name] for name in ("machine", *SECTIONS) if name in merged}
    write_whole(path, (json.dumps(ordered, indent=2, allow_nan=False) + "\n").encode())
    return dropped


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m perf", description="Speed and memory of the package, compared with common practice."
    )
    parser.add_argument("sections", nargs="*", metavar="section", help=f"{', '.join(SECTIONS)}; all by default")
    chosen = parser.parse_args().sections or list(SECTIONS)
    if unknown := [name for name in chosen if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]}: choose among {', '.join(SECTIONS)}")
    # As the stages do: idle threads sleep, and nothing is fetched.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import torch

    from perf import workload

    torch.set_num_threads(workload.THREADS)
    console, machine = Console(), workload.machine()
    console.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    for name in chosen:
        started = time.monotonic()
        console.rule(name)
        try:
            scalars = import_module(f"perf.{name}").run(console)
        except UserError as error:
            sys.exit(f"{name}: {error}")
        for section in merge(METRICS, machine, name, scalars):
            console.print(f"{METRICS}: {section} was measured on another machine and is taken out; run it again", style="bold")
        console.print(f"{name}: {time.monotonic() - started:.0f} s", style="dim", highlight=False)


if __name__ == "__main__":
    main()
