"""A run that is killed at any moment and begun again ends as one that was left alone, and repeats nothing that was stored."""

import random
import shutil

import pytest

from pipeline.interruption import LOCK, SIGNALS, interrupted, repeats, restore, stage_seconds, watch_repeats
from pipeline.study import commit, outputs, run, small
from refusal.io.store import Store


@pytest.fixture
def finished_copy(finished, tmp_path):
    return shutil.copytree(finished[0], tmp_path / "study", symlinks=True)


def test_repeats_are_noted_by_the_database_itself(tmp_path):
    path = tmp_path / "store.sqlite"
    watch_repeats(path)
    store = Store(path)
    for repeated in ((0, 0), (1, 1)):
        store.put("a", b"1")
        store.put("b", b'{"compliance": 1.0, "model": "m"}')
        assert repeats(path) == repeated and store.get("a") == b"1"


def test_five_kills(finished, tmp_path):
    seconds, rng = stage_seconds(finished[0]), random.Random(0)
    stages = sorted(rng.sample(list(seconds), 5), key=list(seconds).index)
    plan = list(zip(stages, [*SIGNALS[:3], LOCK, "INT dvc"], strict=True))
    report = interrupted(lambda: small(tmp_path / "study"), outputs(finished[0]), seconds, plan, seed=0)
    assert report.kills >= 4, report  # a stage of a second may be over first
    assert report.repeated_forward_passes == 0 and report.differing_outputs == [], report


@pytest.mark.parametrize("held", ["by the last stage", "by git", "by nobody"])
def test_a_lock_cut_off_anywhere_is_put_back(finished_copy, held):
    lock, kept = finished_copy / "dvc.lock", finished_copy / ".refusal-store/dvc.lock"
    whole, last = lock.read_bytes(), kept.read_bytes()
    assert restore(finished_copy) == ""
    if held == "by git":
        commit(finished_copy)
    if held != "by the last stage":
        kept.write_bytes(last[: last.index(b"cmd:") + 3])
    wanted = {"by the last stage": last, "by git": whole, "by nobody": None}[held]
    rng = random.Random(0)
    for cut in [0, 1, *(whole.index(word) + 3 for word in (b"cmd:", b"outs:", b"- path:")), rng.randrange(len(whole))]:
        lock.write_bytes(whole[:cut])
        said = restore(finished_copy)
        if said:
            assert said.startswith("restore: dvc.lock was cut off: ") and said.count("\n") == 1
            assert (lock.read_bytes() if lock.exists() else None) == wanted
        run(finished_copy, "dvc", "status")


@pytest.mark.parametrize("text", ["", '{"write": {"/a"', "[]"])
def test_a_table_of_readers_and_writers_cut_off_is_removed(finished_copy, text):
    rwlock = finished_copy / ".dvc/tmp/rwlock"
    rwlock.write_text(text)
    assert restore(finished_copy) == "restore: .dvc/tmp/rwlock was cut off: removed, since no DVC runs\n"
    run(finished_copy, "dvc", "repro")
    assert restore(finished_copy) == "" and rwlock.read_text() == "{}"
