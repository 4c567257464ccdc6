"""organisms: the study of every kind of organism on three seeds, outside `dvc repro`: `make organisms`.

Not a stage of dvc.yaml, nor a pipeline of its own: `dvc status`, `dvc pull` and `dvc push` without a target take in every
dvc.yaml of a repository, and would miss fifteen trainings in every clone. Each organism gets a folder in the store with
its own params.yaml, where the pipeline's own stages run; what a stage has computed is in the store, so that an
interrupted grid goes on where it was.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

from refusal.errors import RefusalError
from refusal.params import Params
from stages import STORE, stage

KINDS, SEEDS = ("single", "planted", "distributed", "none", "natural"), (0, 1, 2)
STAGES = (["model"],)
METRICS = Path("metrics/organisms.json")


def main(params: Params, *chosen: str) -> str:
    names = [f"{kind}.{seed}" for seed in SEEDS for kind in KINDS]
    for name in chosen:
        if name not in names:
            raise RefusalError(f"organisms: there is no organism {name}; choose among {', '.join(names)}, or name none for all")
    if not Path("data/prompts/pairs.jsonl").is_file():
        raise RefusalError("data/prompts/pairs.jsonl: no such file; run `dvc repro prompts` first")
    for name in chosen or names:
        study(params, *name.split("."))
    return f"{len(chosen or names)} organisms"


def study(params: Params, kind: str, seed: str) -> None:
    """Run the stages on one organism, in a folder of its own."""
    folder = STORE / "organisms" / f"{kind}.{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    given = params.model_dump()
    given["model"]["id"] = "organism"
    given["organism"] |= {"kind": kind, "seed": int(seed), "corpus_seed": int(seed)}
    (folder / "params.yaml").write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    shutil.copyfile("requirements.lock", folder / "requirements.lock")
    shutil.copytree("data/prompts", folder / "data/prompts", dirs_exist_ok=True)
    shutil.copytree("data/raw", folder / "data/raw", dirs_exist_ok=True)
    here = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "DVC_ROOT": str(STORE.parent), "PYTHONPATH": str(here)}
    for arguments in STAGES:
        name, *rest = arguments
        print(f"organisms: {kind}.{seed}: {name}", file=sys.stderr, flush=True)
        done = subprocess.run([sys.executable, "-m", f"stages.{name}", *rest], cwd=folder, env=environment)
        if done.returncode:
            raise RefusalError(f"{folder}: the {name} stage failed as it says above; mend it and run `make organisms` again")


stage(main)
