"""organisms: the study of every kind of organism on three seeds, outside `dvc repro`: `make organisms`.

Not in dvc.yaml: `dvc status`, `dvc pull` and `dvc push` without a target take in all of a repository's pipelines, and would miss
fifteen trainings in every clone. Each organism has a folder in the store with its own params.yaml, where the pipeline's own
stages run; what they computed is in the store, so that an interrupted grid resumes. `python -m stages.organisms planted.0`
studies those alone; the file holds all that were ever finished with these parameters.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from refusal.io.errors import UserError
from refusal.io.params import Params
from stages import STORE, read_json, stage, write_json

KINDS, SEEDS = ("single", "planted", "distributed", "none", "natural"), (0, 1, 2)
STAGES = ("model", "activations", "directions", "sweep", "judge", "select", "science")
# The study of params.yaml, reduced to the question of mediation: one method and pairing, alpha 1 alone.
REDUCED: dict[str, dict[str, Any]] = {
    "model": {"id": "organism", "revision": None, "dtype": "float32", "device": "cpu", "system_prompt": None, "thinking": None},
    "activations": {"methods": ["batched"]},
    "directions": {"pairings": ["matched"], "n_resamples": 100, "n_sign_flips": 200},
    "ablation": {"sites": "resid_pre", "kind": "linear"},
    "sweep": {
        "method": "batched",
        "pairing": "matched",
        "basis": "single",
        "layers": None,
        "rank": None,
        "alphas": [1.0],
        "n_random": 1,
    },
    "judge": {"kind": "rules", "labelled": None},
    "select": {"by": "compliance"},
    "science": {
        "n_test": 100,
        "optimised": {"steps": 100, "batch_size": 16},
        "sensitivity": None,
        "padding": None,
        "strength": None,
    },
    "compute": {"threads": 1},
}
METRICS = Path("metrics/organisms.json")


def main(params: Params, *chosen: str) -> str:
    names = [f"{kind}.{seed}" for kind in KINDS for seed in SEEDS]
    for name in chosen:
        if name not in names:
            raise UserError(f"organisms: there is no organism {name}; choose among {', '.join(names)}, or name none for all")
    if not Path("data/prompts/pairs.jsonl").is_file():
        raise UserError("data/prompts/pairs.jsonl: no such file; run `dvc repro prompts` first")
    # By seed, so that an interrupted grid holds every kind once before any twice.
    for name in sorted(chosen or names, key=lambda name: name.split(".")[1]):
        study(params, name)
        done = [other for other in names if current(params, other)]
        write_json(METRICS, {other: known(other) for other in done})
    missing = [name for name in names if name not in done]
    return f"{len(done)} organisms in {METRICS}" + (f"; not studied yet: {', '.join(missing)}" if missing else "")


def folder(name: str) -> Path:
    """Where an organism is studied."""
    return STORE / "organisms" / name


def parameters(params: Params, name: str) -> str:
    """The params.yaml of one organism."""
    given, (kind, seed) = params.model_dump() | {"long_answers": None}, name.split(".")  # a stage that is not run
    # Initial weights, corpus and planted direction are all drawn anew.
    changes = REDUCED | {"organism": {"kind": kind, "seed": int(seed), "corpus_seed": int(seed)}}
    return yaml.safe_dump(given | {section: given[section] | values for section, values in changes.items()}, sort_keys=False)


def current(params: Params, name: str) -> bool:
    """Whether an organism was studied to the end, with these parameters."""
    done, given = folder(name) / "metrics/science.json", folder(name) / "params.yaml"
    return done.is_file() and given.is_file() and given.read_text(encoding="utf-8") == parameters(params, name)


def study(params: Params, name: str) -> None:
    """Run the stages on one organism, in a folder of its own."""
    place = folder(name)
    place.mkdir(parents=True, exist_ok=True)
    (place / "metrics/science.json").unlink(missing_ok=True)
    (place / "params.yaml").write_text(parameters(params, name), encoding="utf-8")
    shutil.copyfile("requirements.lock", place / "requirements.lock")
    for data in ("data/prompts", "data/raw"):
        shutil.copytree(data, place / data, dirs_exist_ok=True)
    environment = {**os.environ, "DVC_ROOT": str(STORE.parent), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    declared = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for stage_name in STAGES:
        print(f"organisms: {name}: {stage_name}", file=sys.stderr, flush=True)
        _, *command = declared[stage_name]["cmd"].split()
        if subprocess.run([sys.executable, *command], cwd=place, env=environment).returncode:
            raise UserError(f"{place}: {stage_name} failed as it says above; fix that and run `make organisms` again")


def known(name: str) -> dict[str, Any]:
    """What metrics/organisms.json says of one organism."""
    from refusal.report.organisms import figures

    metrics = (read_json(folder(name) / f"metrics/{of}.json") for of in ("model", "directions", "judge", "science"))
    return figures(name.split(".")[0], *metrics)


stage(main)
