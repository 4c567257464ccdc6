"""One module a stage: read params and inputs, call the library, write outputs. No mathematics here.

`stage` is what they share: the check of the environment, threads, an end when DVC ends, and errors that a person can read.
"""

import gc
import hashlib
import io
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def _check_environment() -> None:
    """Refuse a python without the pinned versions, such as the system's in a shell where .venv is not active."""
    pins = dict(line.split("==") for line in Path("requirements.lock").read_text().splitlines() if "==" in line)
    for package in ("torch", "transformers", "pydantic", "numpy"):
        try:
            installed = version(package).split("+")[0]
        except PackageNotFoundError:
            installed = "no version"
        if installed != pins[package]:
            sys.exit(
                f"{sys.executable} has {installed} of {package}, and requirements.lock pins {pins[package]}; "
                "run `source .venv/bin/activate` first, or use `make repro`"
            )


_check_environment()  # before the library is imported, which would fail there with a traceback

import psutil  # noqa: E402

from refusal.io.command import in_one_sentence, sentence_of  # noqa: E402
from refusal.io.errors import UserError  # noqa: E402
from refusal.io.files import rounded, write_whole  # noqa: E402
from refusal.io.params import Params  # noqa: E402
from refusal.io.params_file import load_params  # noqa: E402
from stages.record import record  # noqa: E402

ROOT = Path(os.environ.get("DVC_ROOT", ".")).resolve()
# Outside DVC's outputs, and in the main checkout for queued and temporary experiments too: what was computed survives. A study
# of studies/ is told where that is.
STORE = Path(os.environ.get("REFUSAL_STORE", ROOT / ".refusal-store")).resolve()
LOCK_KEPT = ROOT / ".refusal-store/dvc.lock"  # stages/restore.py says what for
RAW = Path("data/raw")
OWN_HARMLESS = RAW / "harmless.jsonl"  # the package's own, which go with harmful prompts where no others are named


def stage(
    main: Callable[..., str],
    online: Callable[[Params], bool] = lambda params: False,
    read: Callable[[], Params] = lambda: load_params(Path("params.yaml")),
) -> None:
    """Run a stage's `main(params, *arguments)`, print the line it returns, and turn bad input into one sentence.

    The hub's clients stay offline unless `online` says that these params ask for the network; HF_HUB_OFFLINE overrides it.
    The sentence goes to stderr with exit status 1, so that DVC stops. A traceback is shown with REFUSAL_DEBUG=1, and of an
    error that no sentence is written for.
    """
    gc.set_threshold(50_000, 20, 50)  # imports make a million objects that stay: looking through them less saves a second
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 stops no stage
    name = Path(sys.modules["__main__"].__file__ or "stage").stem
    started = time.monotonic()
    if "DVC_STAGE" in os.environ:
        _exit_with_dvc(name)
    with in_one_sentence(name, _sentence):
        params = read()
        _set_environment(params.compute.threads, online(params))
        line = main(params, *sys.argv[1:])
        record(STORE / "runs.jsonl", name, params, time.monotonic() - started)
        if "DVC_STAGE" in os.environ and Path.cwd() == ROOT and Path("dvc.lock").is_file():
            # DVC has read it, and writes it again when this stage is over.
            write_whole(LOCK_KEPT, Path("dvc.lock").read_bytes())
    print(f"{name}: {line} ({time.monotonic() - started:.0f} s)", flush=True)
    gc.freeze()  # else the interpreter looks through all objects once more at its end, for two seconds


def _exit_with_dvc(name: str) -> None:
    """End this process soon after the DVC that started it: a new run would else meet the old one's stage still at work."""
    parents = psutil.Process().parents()
    # Without a `dvc` among them, DVC is a library of another program.
    dvc = next((i for i, p in enumerate(parents) if any(Path(word).stem == "dvc" for word in p.cmdline())), 0)

    def runs(process: psutil.Process) -> bool:
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def watch() -> None:
        while all(map(runs, parents[: dvc + 1])):
            time.sleep(0.5)
        print(f"{name}: dvc is gone; what is computed is kept, the same command goes on", file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _sentence(error: Exception) -> str | None:
    """What is wrong and what to do, of an error that a user can fix; None for an error of this package."""
    if isinstance(error, UserError):
        return str(error)
    # The writers of safetensors and SQLite have errors of their own for a full disk.
    full = any(text in str(error) for text in ("No space left on device", "database or disk is full"))
    if full or getattr(error, "sqlite_errorname", None) == "SQLITE_IOERR_SHMSIZE":
        return "the disk is full: make room (`dvc gc --workspace` drops old results) and run `dvc repro` again to go on"
    if "torch" in sys.modules:
        from refusal.lm.batching import is_out_of_memory  # imports torch

        if is_out_of_memory(error):
            return "params.yaml: model.dtype and model.device: the model does not fit: use bfloat16, or device: auto to spread it"
    if isinstance(error, sqlite3.OperationalError):
        return f"{STORE}: {error}: is another run using it? Wait for its end, and run `dvc repro` again to go on"
    if isinstance(error, FileNotFoundError) and error.filename is not None:
        return f"{error.filename}: no such file: run `dvc repro`, which makes what is missing, or `dvc pull`, which fetches it"
    said = sentence_of(error)
    return said and f"{said}: fix this and run `dvc repro`; nothing computed is lost"


def _set_environment(threads: int, online: bool) -> None:
    # Nothing is fetched unless asked for, and idle threads sleep: on shared cores, spinning makes all 20 times slower.
    for key, value in {
        "HF_HUB_OFFLINE": "0" if online else "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "HF_DATASETS_CACHE": str(STORE / "datasets"),
        # Bars of other packages: in a log file few lines, and none of work that takes no time.
        **({} if sys.stderr.isatty() else {"TQDM_MININTERVAL": "15", "TQDM_DELAY": "2"}),
    }.items():
        os.environ.setdefault(key, value)


def use_torch(params: Params) -> None:
    """Set torch's threads and determinism. Imports torch, so only stages that compute call it."""
    import torch

    torch.set_num_threads(params.compute.threads)
    torch.set_deterministic_debug_mode("warn")  # use_deterministic_algorithms imports the compiler too, two seconds


def in_raw(path: str) -> bool:
    """Whether a file lies in data/raw/, where DVC sees it change."""
    return Path(path).resolve().is_relative_to(RAW.resolve())


def warn_unless_in_raw(path: str, name: str) -> None:
    """Say what to do after an edit of a file that the stage `name` reads and DVC does not see."""
    if not in_raw(path):
        again = f"after an edit run `dvc repro -f {name}`"
        print(f"{name}: {path} is not in {RAW}/, so DVC cannot see it change; {again}", file=sys.stderr)


def use_transformers(params: Params) -> None:
    """`use_torch` for a stage that runs a model: transformers' own bars and warnings are off."""
    use_torch(params)
    from transformers.utils import logging

    from refusal.lm import engine

    engine.use(params.compute)
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def write_json(path: Path, value: Any) -> None:
    """Write metrics whole or not at all, numbers as `rounded`. NaN and infinity are refused, missing values are null."""
    write_text(path, json.dumps(rounded(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_whole(path, text.encode())


def read_json(path: Path) -> Any:
    """Read a metrics file of an earlier stage."""
    return json.loads(path.read_text(encoding="utf-8"))


def hashes(paths: Iterable[Path], label: str) -> dict[str, str]:
    """The SHA-256 of each file, by its path."""
    from refusal.io.progress import progress

    digests, paths = {}, list(paths)
    with progress(len(paths), f"{label}: hashes", "file") as bar:  # a model's weights may take minutes
        for path in paths:
            with path.open("rb") as file:
                digests[path.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
            bar.update()
    return digests
