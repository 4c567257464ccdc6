"""A study small enough to run whole in a test: copies of this repository, changed parameters, and DVC's own output."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
# In the environment of every command, and never to be seen again; in pieces here, since copies hold this file.
CANARY = "-".join(("sk", "canary", "0f8a63d1c7"))
SECRETS = {"DEEPSEEK_API_KEY": CANARY, "HF_TOKEN": CANARY}


def surroundings(folder: Path) -> dict[str, str]:
    """The environment of a command: its programs come first on PATH, and connections asked for are noted beside the folder."""
    return {
        **os.environ,
        **SECRETS,
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


def outputs(folder: Path) -> dict[str, str]:
    """DVC's hash of every output of every stage, metrics and plots included."""
    locked = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in locked.values() for out in stage["outs"]}


def digests(folder: Path, *tops: str) -> dict[str, str]:
    """A hash of every file below these folders, so that two that differ are told by name."""
    paths = (path for top in tops for path in sorted((folder / top).rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in paths}


def copy(folder: Path) -> Path:
    """The files of this repository as they are now, without results."""
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith(("metrics/", "plots/")) and name != "dvc.lock":
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    return folder


def small(folder: Path) -> Path:
    """A Git repository of a copy, with a small study in its params.yaml."""
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params["prompts"] |= {"n_pairs": 60, "n_unrelated": 60}
    params["organism"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "ablation_layer": 2,
    }
    params["organism"]["phase_1"] |= {"steps": 60, "batch_size": 8}
    params["organism"]["phase_2"] |= {"steps": 64, "batch_size": 8}
    params["directions"] |= {"n_resamples": 20, "n_sign_flips": 20}
    params["sweep"] |= {"alphas": [1.0, 2.0], "n_random": 1, "max_new_tokens": 6}
    for section in ("judge", "evaluate", "science", "benchmark"):
        params[section]["n_resamples"] = 20
    params["benchmark"] |= {"suite": ["organism_capitals"], "limit": 6}
    params["compute"]["threads"] = 1
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "t")
    run(folder, "git", "config", "user.email", "t@localhost")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "start")
    return folder


def change(folder: Path, section: str, **values: object) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section] |= values
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
