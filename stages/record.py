"""The log of what ran where, `.refusal-store/runs.jsonl`: outside DVC's outputs, since no two runs take the same time."""

import errno
import hashlib
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

import yaml

from refusal.io.params import Params

KILOBYTES = 1 << 20 if sys.platform == "darwin" else 1 << 10  # macOS counts bytes
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scipy", "dvc", "lm-eval")


def record(log: Path, stage: str, params: Params, seconds: float) -> None:
    """Append one line: the stage, what it took, and what it ran on.

    `passes` and `tokens` are those that were computed, not read from the store; `batch_sizes_found` those that `auto` chose, or
    that were left when memory ran out; `peak_memory_mb` is the process's own.
    """
    batching = sys.modules.get("refusal.lm.batching")  # not imported: no model was loaded
    line = {
        "stage": stage,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "seconds": round(seconds, 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / KILOBYTES),
        **(batching.COUNTS if batching else {"passes": 0, "tokens": 0}),
        "batch_sizes_found": batching.BATCH_SIZES if batching else {},
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "model": params.model.model_dump(),
        "threads": params.compute.threads,
        "workers": params.compute.workers if params.compute.engine == "ray" else 1,
        "seeds": _seeds(params.model_dump()),
        "inputs": _inputs(stage),
        "machine": {"platform": platform.platform(), "cpu": cpu_name(), "cores": os.cpu_count(), "gpu": _gpu_name()},
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }
    log.parent.mkdir(parents=True, exist_ok=True)
    data = f"{json.dumps(line)}\n".encode()
    with log.open("ab", buffering=0) as file:
        written = file.write(data)  # one write of one line: processes side by side do not mix
        if written < len(data):  # the disk is full: half a line would make the log unreadable
            file.truncate(file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(log))


def cpu_name() -> str:
    """The processor, by its maker's name where the system tells."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _gpu_name() -> str | None:
    torch = sys.modules.get("torch")  # not imported: no model was run
    return torch.cuda.get_device_name(0) if torch is not None and torch.cuda.is_available() else None


def _seeds(params: dict[str, Any]) -> dict[str, int]:
    """The file's own seed, and those of its sections as `section.seed`."""
    sections = [(f"{name}.", value) for name, value in params.items() if isinstance(value, dict)]
    return {at + key: value for at, keys in [("", params), *sections] for key, value in keys.items() if key.endswith("seed")}


def _inputs(stage: str) -> dict[str, str | None]:
    """The hash of each dependency of a stage as DVC writes it: what an earlier stage made from dvc.lock, the rest read here."""
    dependencies = _stages("dvc.yaml").get(stage, {}).get("deps", [])
    made = {out["path"]: out.get("md5") for entry in _stages("dvc.lock").values() for out in entry.get("outs", [])}
    return {name: made[name] if name in made else _md5(Path(name)) for name in dependencies}


def _stages(file: str) -> dict[str, Any]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # dvc.lock takes 0.8 s without libyaml
    path = Path(file)
    return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)["stages"] if path.is_file() else {}


def _md5(path: Path) -> str | None:
    """DVC's hash of a file, or of a folder: of the list of its files and theirs, without what .dvcignore names."""
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file() and file.suffix != ".pyc"]
        rows = [{"md5": _md5(file), "relpath": file.relative_to(path).as_posix()} for file in files]
        rows.sort(key=lambda row: str(row["relpath"]).split("/"))
        return f"{hashlib.md5(json.dumps(rows, sort_keys=True).encode()).hexdigest()}.dir"
    return hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else None
