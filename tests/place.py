"""A folder in which a user runs stages and DVC, each in a process of its own, and params.yaml with values of a test's own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
COMMITTED = (ROOT / "params.yaml").read_text(encoding="utf-8")
REMOVED = object()
PAIRS = [
    {"id": f"pair-{i}", "split": "val", "harmful": f"Pick lock {i}?", "safe": f"Paint lock {i}?", "topic": "lock"}
    for i in range(3)
]
IDENTITY = {
    f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (("NAME", "t"), ("EMAIL", "t@localhost"))
}


def params_with(folder: Path, changes: dict[str, object]) -> Path:
    """The folder's params.yaml, the committed one where it has none, with these keys (dotted) set or REMOVED."""
    file = folder / "params.yaml"
    params = yaml.safe_load(file.read_text(encoding="utf-8") if file.exists() else COMMITTED)
    for dotted, value in changes.items():
        *sections, key = dotted.split(".")
        place = params
        for section in sections:
            place = place[section]
        if value is REMOVED:
            del place[key]
        else:
            place[key] = value
    file.write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")
    return file


class Result(NamedTuple):
    status: int
    said: str


class Place:
    """A folder with params.yaml, three prompts and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GIT_", "REFUSAL_", "DVC_"))} | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder / "home"),  # no identity of Git's, no token of the hub's
            "GIT_CONFIG_NOSYSTEM": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("params.yaml", "requirements.lock", "Makefile"):
            shutil.copyfile(ROOT / name, folder / name)
        self.set("compute", threads=1)
        for name in ("pairs", "unrelated"):
            self.write_rows(f"data/prompts/{name}.jsonl", PAIRS)

    def set(self, section: str, **values: object) -> None:
        params_with(self.folder, {f"{section}.{key}": value for key, value in values.items()})

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def write_rows(self, name: str, rows: Iterable[Mapping[str, object]]) -> Path:
        return self.write(name, "".join(json.dumps(row) + "\n" for row in rows))

    def run(self, *command: str, **environment: str) -> Result:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, timeout=800
        )
        return Result(done.returncode, done.stdout + done.stderr)

    def stage(self, name: str, **environment: str) -> Result:
        return self.run(sys.executable, "-m", f"stages.{name}", **environment)

    def dvc(self, *command: str, **environment: str) -> Result:
        """A DVC command in a project with one stage, which sleeps as long as the file `wait` says and copies params.yaml."""
        if not (self.folder / ".git").exists():
            stages = "stages:\n  a:\n    cmd: sleep $(cat wait); cp params.yaml out\n    params: [sweep]\n    outs: [out]\n"
            self.write("dvc.yaml", stages)
            self.write("wait", "0")
            for line in ("git init -q", "dvc init -q", "dvc config core.analytics false", "git add dvc.yaml params.yaml .dvc"):
                self.run(*line.split())
            self.run(*"git commit -qm start".split(), **IDENTITY)
        return self.run("dvc", *command, **environment)
