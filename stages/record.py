"""The log of what ran where, `.refusal-store/runs.jsonl`: outside DVC's outputs, since no two runs take the same time."""

import json
import os
import platform
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from refusal.params import Params

KILOBYTES = 1 << 20 if sys.platform == "darwin" else 1 << 10  # macOS counts bytes
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "dvc", "lm-eval")


def record(log: Path, stage: str, params: Params, seconds: float) -> None:
    """Append one line: the stage, what it took, and what it ran on.

    `passes` and `tokens` are those that were computed and not found in the store; `batch_sizes_found` those that auto gave, or
    that running out of memory did; `peak_memory_mb` is the process's own.
    """
    tally = sys.modules.get("refusal.tally")  # not imported: no model was loaded
    counts = dict(tally.COUNTS) if tally else {"passes": 0, "tokens": 0}
    found = dict(tally.SIZES) if tally else {}
    line = {
        "stage": stage,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KILOBYTES),
        **counts,
        "batch_sizes_found": found,
        "commit": _git("rev-parse", "HEAD"),
        "changed_files": len(_git("status", "--porcelain", "--untracked-files=no").splitlines()),
        "model": params.model.model_dump(),
        "threads": params.compute.threads,
        "seeds": _seeds(params.model_dump()),
        "machine": {"platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")  # one write of one line: processes side by side do not mix


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    return done.stdout.strip()


def _seeds(params: dict[str, Any], at: str = "") -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in params.items():
        if isinstance(value, dict):
            found |= _seeds(value, f"{at}{name}.")
        elif name.endswith("seed"):
            found[at + name] = value
    return found
