"""studies: the same pipeline with other parameters, beside the default study: `make study STUDY=<name>`; no name lists them all.

`studies/<name>.yaml` holds the keys that differ from params.yaml. The pipeline runs in a workspace of its own, which holds the
code and the raw data as they are now, committed or not, and shares the repository's DVC cache and resume store. What may be
committed is then copied to `studies/<name>/`. docs/studies.md says why it is no DVC experiment.
"""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

import yaml

from refusal.io.code import code_of_stages
from refusal.io.edits import OWN
from refusal.io.errors import UserError
from refusal.io.params import Params
from refusal.io.params_file import overlaid
from stages import OWN_HARMLESS, RAW, ROOT, STORE, read_json, stage, write_json, write_text

ENVIRONMENT = dict(os.environ)  # before `stage` says what a stage that is not online may do
STUDIES = Path("studies")
# What a run reads that no stage makes.
SOURCES = (
    ".dvc/config",
    ".dvc/plots",
    ".dvcignore",
    "data/published",
    "data/raw",
    "dvc.yaml",
    "refusal",
    "requirements.lock",
    "stages",
)


def main(params: Params, *arguments: str) -> str:
    if not arguments:
        names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
        for name in names:
            print(f"{name}: {state(name)}")
        return f"{len(names)} studies in {STUDIES}/; `make study STUDY=<name>` runs one"
    name = arguments[0]
    asked = parameters(*arguments)
    place = STORE / "studies" / name
    place.mkdir(parents=True, exist_ok=True)
    with alone(name) as lock:
        made = made_by(name)  # now: the overlay and the code may be edited during the run
        mirror(place, adapted(asked, place))
        run(name, place, lock, ["dvc", "repro"])
        collect(name, place, made)
    return f"{STUDIES / name}/ is ready to commit; the page is {report_of(name)}"


def overlay_of(name: str) -> Path:
    """The overlay of a study. Raises UserError where there is none."""
    names = sorted(path.stem for path in STUDIES.glob("*.yaml"))
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name not in names:
        nearest = get_close_matches(name, names, n=1, cutoff=0)
        raise UserError(f"{STUDIES}/{name}.yaml: no such study" + "".join(f"; the nearest is {other}" for other in nearest))
    return STUDIES / f"{name}.yaml"


def parameters(name: str, given: str | None = None) -> dict[str, Any]:
    """The params.yaml of a study, with the GGUF file `given` in place of the model that it names."""
    raw = overlaid(Path("params.yaml"), overlay_of(name))
    if given is None:
        return raw
    if not given.endswith(".gguf") or not Path(given).is_file():
        raise UserError(f"REAL_MODEL: {given} is no .gguf file; give the path of one, or none to fetch the model from the hub")
    return raw | {"model": raw["model"] | {key: None for key in ("revision", "file") if key in raw["model"]} | {"id": given}}


def adapted(raw: dict[str, Any], place: Path) -> dict[str, Any]:
    """The parameters as they hold in the workspace: a GGUF file by its hash, a folder by its way from there.

    They are committed, and a file's path is nobody else's business.
    """
    model, edits = raw["model"], raw["edits"]
    if model["id"] != "organism" and model["revision"] is None:
        model = model | {"id": reached(model["id"], place)}
    checkpoints: list[Any] = []
    for one in edits["checkpoints"]:
        named = {"id": one} if isinstance(one, str) else one
        if named.get("revision") is None and not OWN.fullmatch(named["id"]):
            named = named | {"id": reached(named["id"], place)}
        checkpoints.append(named["id"] if isinstance(one, str) else named)
    return raw | {"model": model, "edits": edits | {"checkpoints": checkpoints}}


def reached(path: str, place: Path) -> str:
    """A file or folder as it is reached from the workspace; an absolute folder, and what is not there, as it is."""
    there = ROOT / path
    if there.suffix == ".gguf" and there.is_file():
        with there.open("rb") as file:
            link = Path("given", f"{hashlib.file_digest(file, 'sha256').hexdigest()}.gguf")
        (place / "given").mkdir(exist_ok=True)
        (place / link).unlink(missing_ok=True)
        try:
            os.link(there.resolve(), place / link)
        except OSError:  # on another disk, or another's file
            shutil.copyfile(there, place / link)
    elif there.is_dir() and not Path(path).is_absolute():
        link = Path(os.path.relpath(there, place))
    else:
        return path
    return link.as_posix()


@contextmanager
def alone(name: str) -> Iterator[int]:
    """A lock on a study, as a file that its DVC holds open too: a run whose parent was killed still has it."""
    with (STORE / "studies" / f"{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"studies: {name} is at work already; wait for its end, or kill its dvc and run this again") from None
        yield file.fileno()


def mirror(place: Path, raw: dict[str, Any]) -> None:
    """Make the workspace one of the code, the data and the parameters as they are now; the results in it stay."""
    from dvc.config import Config
    from dvc.repo import Repo

    for source in SOURCES:
        copy = place / source
        if Path(source).is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)
    write_text(place / "params.yaml", json.dumps(raw, indent=2, ensure_ascii=False) + "\n")  # as YAML strings may read as numbers
    with Repo(str(ROOT)) as repo, Config(str(place / ".dvc")).edit("local") as config:
        # Git ignores the workspace, and DVC would skip a dvc.yaml that Git ignores.
        config["core"] = {"no_scm": True}
        config["cache"] = {key: value for key, value in repo.config["cache"].items() if key in ("type", "shared")}
        config["cache"]["dir"] = repo.cache.local_cache_dir


def run(name: str, place: Path, lock: int, module: list[str]) -> None:
    """Run a module in the workspace. Raises UserError where it stops."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{ENVIRONMENT['PATH']}"
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "DVC_ROOT"} | {
        "REFUSAL_STORE": str(STORE),
        "PATH": path,
    }
    if sets := ENVIRONMENT.get("REAL_SETS"):
        environment["REAL_SETS"] = str(Path(sets).resolve())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else DVC would be left at work
    for command in (["stages.restore"], module):
        with subprocess.Popen([sys.executable, "-m", *command], cwd=place, env=environment, pass_fds=(lock,)) as process:
            try:
                failed = process.wait()
            except BaseException:
                process.terminate()
                raise
        if failed:
            raise UserError(f"{name} stopped as it says above; fix that, and `make study STUDY={name}` goes on")


def collect(name: str, place: Path, made: dict[str, Any]) -> None:
    """Copy what may be committed, and the page, to where they belong; study.json last, which says what made them."""
    target = STUDIES / name
    for folder in ("metrics", "plots"):
        shutil.rmtree(target / folder, ignore_errors=True)
        # What `make claims` measured is of the code of its own day.
        shutil.copytree(place / folder, target / folder, ignore=shutil.ignore_patterns("claims"))
    shutil.copyfile(place / "dvc.lock", target / "dvc.lock")
    report_of(name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(place / "report/index.html", report_of(name))
    write_json(target / "study.json", made)


def report_of(name: str) -> Path:
    """The page of a study, which holds completions and is not committed."""
    return Path("report") / name / "index.html"


def made_by(name: str) -> dict[str, Any]:
    """What makes a study's figures, as hashes: its overlay, the files of prompts and labels that it names, and of each stage the
    parameters and the code."""
    stages = yaml.safe_load(Path("dvc.yaml").read_text(encoding="utf-8"))["stages"]
    values = parameters(name)
    read = {stage: {key: reduce(getitem, key.split("."), values) for key in of.get("params", [])} for stage, of in stages.items()}
    modules = {stage: match[1] for stage, of in stages.items() if (match := re.match(r"python -m (stages\.\w+)", of["cmd"]))}
    named = [value for section in ("prompts", "judge") for value in values[section].values()]
    files = sorted({str(value) for value in [*named, OWN_HARMLESS] if str(value).startswith(f"{RAW}/") and Path(value).is_file()})
    return {
        "overlay": hashlib.sha256(overlay_of(name).read_bytes()).hexdigest(),
        "files": {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files},
        "parameters": {stage: hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest() for stage, of in read.items()},
        "code": code_of_stages(modules, Path()),
    }


def age(made: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is said of figures by what made them and `made_by` now; empty where nothing has changed."""
    if made.get("overlay") != now["overlay"]:
        return "overlay has changed since"
    said = []
    for of, words in (("files", ""), ("parameters", "parameters of "), ("code", "code of ")):
        if names := [name for name, value in now[of].items() if made.get(of, {}).get(name) != value]:
            said.append(f"today's {words}{', '.join(names)}")
    return f"older than {' and '.join(said)}" if said else ""


def state(name: str) -> str:
    """Whether the committed figures of a study are those of its overlay, prompts, parameters and code as they are now."""
    made = STUDIES / name / "study.json"
    return (age(read_json(made), made_by(name)) or "up to date") if made.is_file() else "not run yet"


if __name__ == "__main__":
    stage(main)
