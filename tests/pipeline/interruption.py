"""Runs of a study that are killed and begun again: what is repeated, and whether the end is that of a run left alone."""

import os
import random
import re
import signal
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from pipeline.study import outputs, run, runs, surroundings
from refusal.io.store import Store

STORE = ".refusal-store/store.sqlite"
# SIGKILL of the whole process group, as a power cut; signals to DVC alone, as `kill` and a careless supervisor send them.
SIGNALS = ("KILL group", "KILL dvc", "TERM dvc", "INT dvc")
# SIGKILL of the group within the time that DVC takes to write dvc.lock after the stage.
LOCK, WRITING = "KILL lock", 0.1


def watch_repeats(store: Path) -> None:
    """Have SQLite itself note every value that is brought to the store a second time."""
    connection = Store(store).connection
    connection.executescript(
        "CREATE TABLE repeated (value BLOB);"
        "CREATE TRIGGER note BEFORE INSERT ON blobs WHEN EXISTS (SELECT 1 FROM blobs WHERE key = NEW.key)"
        " BEGIN INSERT INTO repeated VALUES (NEW.value); END;"
    )
    connection.close()


def repeats(store: Path) -> tuple[int, int]:
    """(units of forward passes, API calls) that were done again though their value was stored."""
    connection = sqlite3.connect(store)
    values = [bytes(value) for (value,) in connection.execute("SELECT value FROM repeated")]
    connection.close()
    calls = sum(b'"compliance"' in value and b'"model"' in value for value in values)
    return len(values) - calls, calls


def stage_seconds(folder: Path) -> dict[str, float]:
    """How long each stage of a finished study took, in the order they ran, with a second for the process to start."""
    return {line["stage"]: line["seconds"] + 1.0 for line in runs(folder)}


def running(group: int) -> list[str]:
    """The command lines of what still runs in a process group."""
    commands = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                commands.append(" ".join(process.cmdline()))
        except (ProcessLookupError, psutil.Error):
            pass
    return commands


def restore(folder: Path) -> str:
    """The first step of `make repro`, in this environment; what it says."""
    return run(folder, "make", "-s", "-o", ".venv/ready", "restore")


class Run:
    """A `make repro`, its `dvc repro` in a process group of its own, its output in a file. `restored`: what the first step said."""

    def __init__(self, folder: Path):
        self.restored = restore(folder)
        self.lock = folder / "dvc.lock"
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                ["dvc", "repro"], cwd=folder, env=surroundings(folder), stdout=file, stderr=file, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def reach(self, stage: str, seconds: float) -> bool:
        """Wait for so long after a stage has begun; whether the run is still on."""
        while self.process.poll() is None and f"Running stage '{stage}'" not in self.said:
            time.sleep(0.05)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def write_lock(self, stage: str, seconds: float) -> bool:
        """Wait for so long after DVC has begun to write the lock after a stage; whether the run is still on."""
        while self.process.poll() is None and f"Running stage '{stage}'" not in self.said:
            time.sleep(0.01)
        before = self.lock.read_bytes() if self.lock.is_file() else b""
        while self.process.poll() is None and (self.lock.read_bytes() if self.lock.is_file() else b"") == before:
            pass
        time.sleep(seconds)
        return self.process.poll() is None

    def kill(self, how: str) -> None:
        """Send the signal, and wait until all that belonged to the run is gone; a run that SIGINT does not end goes on to its end."""
        name, whom = how.split()
        number = getattr(signal, f"SIG{name}")
        if whom in ("group", "lock"):
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(600)
        for _ in range(200):
            if not running(self.process.pid):
                return
            time.sleep(0.1)
        raise AssertionError(f"{how}: still there after 20 seconds: {running(self.process.pid)}")


@dataclass
class Report:
    """What a number of kills came to. `by_stage`: the stage that each met; `restored`: files that DVC left cut off, put back."""

    kills: int = 0
    by_signal: Counter[str] = field(default_factory=Counter)
    by_stage: Counter[str] = field(default_factory=Counter)
    repeated_forward_passes: int = 0
    repeated_calls: int = 0
    restored: Counter[str] = field(default_factory=Counter)
    differing_outputs: list[str] = field(default_factory=list)

    def start(self, folder: Path) -> Run:
        """Run the study, and note what had to be put back first."""
        study = Run(folder)
        self.restored.update(re.findall(r"restore: (\S+) was cut off", study.restored))
        return study

    def finish(self, folder: Path, wanted: dict[str, str]) -> None:
        """Run the study to its end, and compare its outputs with those `wanted`."""
        study = self.start(folder)
        assert study.process.wait(1800) == 0, study.said[-4000:]
        passes, calls = repeats(folder / STORE)
        self.repeated_forward_passes += passes
        self.repeated_calls += calls
        made = outputs(folder)
        self.differing_outputs += sorted(path for path in made.keys() | wanted.keys() if made.get(path) != wanted.get(path))


def interrupted(
    fresh: Callable[[], Path],
    wanted: dict[str, str],
    seconds: dict[str, float],
    plan: Sequence[tuple[str, str]],
    seed: int,
    done: Callable[[], object] = lambda: None,
) -> Report:
    """Kill as `plan` says, (stage, signal) each, at a random moment of that stage; then finish, and compare with `wanted`.

    `fresh` makes a study that was never run, `seconds` is how long each stage takes. Where the plan's next stage is behind the last,
    the study is finished first and another one begun.
    """
    rng, report, stages, folder, reached = random.Random(seed), Report(), list(seconds), None, -1
    for stage, how in plan:
        if folder is not None and stages.index(stage) < reached:
            report.finish(folder, wanted)
            folder = None
        if folder is None:
            folder = fresh()
            watch_repeats(folder / STORE)
        reached = stages.index(stage)
        study = report.start(folder)
        moment = rng.uniform(0, WRITING) if how == LOCK else rng.uniform(0.05, seconds[stage])
        if (study.write_lock if how == LOCK else study.reach)(stage, moment):
            report.by_stage[re.findall(r"Running stage '(\w+)'", study.said)[-1]] += 1
            report.by_signal[how] += 1
            report.kills += 1
            study.kill(how)
        else:  # over before its moment came
            assert study.process.returncode == 0, study.said[-4000:]
        done()
    if folder is not None:
        report.finish(folder, wanted)
    return report
