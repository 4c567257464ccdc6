"""A study small enough to run whole in a test: copies of this repository, changed parameters, and DVC's own output."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from place import ROOT, params_with

# In the environment of every command, and never to be seen again; in pieces here, since copies hold this file.
CANARY = "-".join(("sk", "canary", "0f8a63d1c7"))
SMALL = {
    **{"prompts.n_pairs": 60, "prompts.n_unrelated": 60},
    **{"organism.hidden_size": 32, "organism.intermediate_size": 48, "organism.num_hidden_layers": 3},
    **{"organism.num_attention_heads": 2, "organism.ablation_layer": 2},
    **{"organism.phase_1.steps": 60, "organism.phase_1.batch_size": 8},
    **{"organism.phase_2.steps": 64, "organism.phase_2.batch_size": 8},
    **{"generation.max_new_tokens": 6, "long_answers.max_new_tokens": 130, "sweep.alphas": [1.0, 2.0], "sweep.n_random": 1},
    **{"n_resamples": 20, "evaluate.n_resamples": 20, "benchmark.n_resamples": 20, "directions.n_sign_flips": 20},
    **{"benchmark.suite": ["organism_capitals"], "benchmark.limit": 6, "compute.threads": 1},
}


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a command: its programs come first on PATH, and connections asked for are noted beside the folder."""
    return {
        **os.environ,
        **{"DEEPSEEK_API_KEY": CANARY, "HF_TOKEN": CANARY},
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "tests/audit"),
        "CONNECTIONS": str(folder.parent / "connections"),
    }


def run(folder: Path, *command: str, ok: bool = True, **environment: str) -> str:
    """Run a command in a folder; its output, which shows no secret."""
    done = subprocess.run(command, cwd=folder, env=surroundings(folder) | environment, capture_output=True, text=True)
    assert (done.returncode == 0) is ok, done.stdout[-4000:] + done.stderr[-4000:]
    assert CANARY not in done.stdout + done.stderr
    return done.stdout + done.stderr


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def metrics(folder: Path, name: str) -> Any:
    return json.loads((folder / "metrics" / f"{name}.json").read_text())


def outputs(folder: Path) -> dict[str, str]:
    """DVC's hash of every output of every stage, metrics and plots included."""
    locked = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in locked.values() for out in stage["outs"]}


def runs(folder: Path) -> list[dict[str, Any]]:
    """The log of what ran."""
    return [json.loads(line) for line in (folder / ".refusal-store/runs.jsonl").read_text().splitlines()]


def digests(folder: Path, *tops: str) -> dict[str, str]:
    """A hash of every file below these folders, so that two that differ are told by name."""
    paths = (path for top in tops for path in sorted((folder / top).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in paths}


def copy(folder: Path) -> Path:
    """The files of this repository as they are now, without results."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("metrics/", "plots/", "remote/")) and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def clone(folder: Path) -> Path:
    """A Git repository of all that this one tracks, as it is now: figures, lock and remote, and nothing that was computed."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "t")
    run(folder, "git", "config", "user.email", "t@localhost")
    run(folder, "git", "add", "-A")
    run(folder, "git", "add", "--force", "remote")
    run(folder, "git", "commit", "-qm", "all")
    return folder


def small(folder: Path) -> Path:
    """A Git repository of a copy made into `folder`, with a small study in its params.yaml."""
    params_with(copy(folder), SMALL)
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "t")
    run(folder, "git", "config", "user.email", "t@localhost")
    commit(folder)
    return folder


def commit(folder: Path) -> None:
    """All that Git does not ignore, where anything changed."""
    run(folder, "git", "add", "-A")
    if run(folder, "git", "status", "--porcelain"):
        run(folder, "git", "commit", "-qm", "results")


@contextmanager
def changed(folder: Path, changes: dict[str, object]) -> Iterator[None]:
    """Other values in params.yaml (dotted keys) for the length of a `with`."""
    before = (folder / "params.yaml").read_text()
    params_with(folder, changes)
    yield
    (folder / "params.yaml").write_text(before)
