"""Runs of a study that are killed and begun again: what is repeated, and whether the end is that of a run left alone."""

import json
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

from pipeline.study import outputs, run, surroundings
from refusal.io.store import Store

STORE = ".refusal-store/store.sqlite"
# SIGKILL of the whole process group, as a power cut; signals to DVC alone, as `kill` and a careless supervisor send them.
SIGNALS = ("KILL group", "KILL dvc", "TERM dvc", "INT dvc")


@dataclass
class Report:
    """What a number of kills came to. `by_stage`: the stage that each met."""

    kills: int = 0
    by_signal: Counter[str] = field(default_factory=Counter)
    by_stage: Counter[str] = field(default_factory=Counter)
    repeated_forward_passes: int = 0
    repeated_calls: int = 0
    broken_locks: int = 0
    differing_outputs: list[str] = field(default_factory=list)


def watch_repeats(store: Path) -> None:
    """Have SQLite itself note every value that is brought to the store a second time."""
    Store(store).connection.close()
    with sqlite3.connect(store) as connection:
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


def left(group: int) -> list[str]:
    """The command lines of what still runs in a process group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (ProcessLookupError, psutil.Error):
            pass
    return found


class Run:
    """A `dvc repro` in a process group of its own, its output in a file."""

    def __init__(self, folder: Path):
        self.log = folder.parent / f"{folder.name}.log"
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                ["dvc", "repro"], cwd=folder, env=surroundings(folder), stdout=file, stderr=file, start_new_session=True
            )

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def stage(self) -> str:
        """The stage that runs, or ran last; empty before the first."""
        return (re.findall(r"Running stage '(\w+)'", self.said) or [""])[-1]

    def reach(self, stage: str, seconds: float) -> bool:
        """Wait for so long after a stage has begun; whether the run is still on."""
        while self.process.poll() is None and f"Running stage '{stage}'" not in self.said:
            time.sleep(0.05)
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return True
        return False

    def kill(self, how: str) -> None:
        """Send the signal, and wait until all that belonged to the run is gone; a run that SIGINT leaves cold goes on to its end."""
        name, whom = how.split()
        number = getattr(signal, f"SIG{name}")
        if whom == "group":
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        self.process.wait(600)
        for _ in range(200):
            if not left(self.process.pid):
                return
            time.sleep(0.1)
        raise AssertionError(f"{how}: still there after 20 seconds: {left(self.process.pid)}")


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
            _finish(folder, wanted, report)
            folder = None
        if folder is None:
            folder = fresh()
            watch_repeats(folder / STORE)
        reached = stages.index(stage)
        study = Run(folder)
        if study.reach(stage, rng.uniform(0.05, seconds[stage])):
            report.by_stage[study.stage] += 1
            report.by_signal[how] += 1
            report.kills += 1
            study.kill(how)
        else:  # over before its moment came
            _mend(folder, study.said, report)
        done()
    if folder is not None:
        _finish(folder, wanted, report)
    return report


def _mend(folder: Path, said: str, report: Report) -> None:
    """What docs/promises.md tells a user to do about a file that DVC itself was killed in the middle of writing."""
    for name in ("dvc.lock", ".dvc/tmp/rwlock"):
        if "ERROR" in said and name in said:
            report.broken_locks += 1
            (folder / name).unlink()


def _finish(folder: Path, wanted: dict[str, str], report: Report) -> None:
    study = Run(folder)
    if study.process.wait(1800):
        _mend(folder, study.said, report)
        run(folder, "dvc", "repro")
    passes, calls = repeats(folder / STORE)
    report.repeated_forward_passes += passes
    report.repeated_calls += calls
    found = outputs(folder)
    report.differing_outputs += sorted(path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path))


def stage_seconds(folder: Path) -> dict[str, float]:
    """How long each stage of a finished study took, in the order they ran, with a second for the process to start."""
    lines = map(json.loads, (folder / ".refusal-store/runs.jsonl").read_text().splitlines())
    return {line["stage"]: line["seconds"] + 1.0 for line in lines}
