"""A disk that fills up: one sentence, nothing corrupted, and after making room the run ends as one that never met it."""

import json
import shutil

import pytest
import yaml
from disk import Disk
from place import ROOT

from pipeline.interruption import STORE, repeats, watch_repeats
from pipeline.study import digests, run, stages_run
from refusal.io.params_file import load_params
from refusal.io.store import Store
from stages import _sentence
from stages.record import record

FULL = "the disk is full: make room"


@pytest.fixture
def disk(tmp_path):
    with Disk(tmp_path / "disk") as disk:
        yield disk


@pytest.mark.parametrize("kilobytes", [8, 32, 36, 40, 64, 196])  # the file, its shared memory, its log: each in turn has no room
def test_a_store_on_a_full_disk_keeps_what_it_took_and_says_so(disk, kilobytes):
    disk.resize(kilobytes)
    path, taken = disk.folder / "store.sqlite", 0
    with pytest.raises(Exception) as caught:
        store = Store(path)
        for taken in range(1000):
            store.put(f"key {taken}", b"%d" % taken * 1000)
    assert _sentence(caught.value).startswith(FULL)
    del caught
    disk.resize()
    store = Store(path)
    kept = [i for i in range(taken + 1) if store.get(f"key {i}") is not None]
    assert kept == list(range(taken)) and all(store.get(f"key {i}") == b"%d" % i * 1000 for i in kept)
    assert store.connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert not list(disk.folder.glob("*corrupt*"))
    store.connection.close()


def test_the_log_holds_no_half_line(disk):
    disk.resize(8)
    log, params = disk.folder / "runs.jsonl", load_params(ROOT / "params.yaml")
    with pytest.raises(OSError) as caught:
        for _ in range(100):
            record(log, "select", params, 1.0)
    assert _sentence(caught.value).startswith(FULL)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    disk.resize()
    record(log, "select", params, 2.0)
    assert [json.loads(line)["seconds"] for line in log.read_text().splitlines()] == [1.0] * len(lines) + [2.0] and lines


@pytest.fixture
def study(finished, disk):
    """The finished study on the small disk, which DVC's cache of runs would else spare the stage that is to run again."""
    folder = disk.folder / "study"
    shutil.copytree(finished[0], folder, symlinks=True, ignore=lambda path, names: {"runs"} & set(names))
    return folder


def results(folder):
    return digests(folder, "data", "models", "metrics", "plots", "report") | {"dvc.lock": (folder / "dvc.lock").read_text()}


def fails(study, disk, stage, kilobytes):
    """The stage, its results taken out of the workspace and of DVC's cache, runs on a disk with so little room."""
    for out in yaml.safe_load((study / "dvc.lock").read_text())["stages"][stage]["outs"]:
        (study / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).unlink(missing_ok=True)
        if (study / out["path"]).is_dir():
            shutil.rmtree(study / out["path"])
    disk.leave(kilobytes)
    output = run(study, "dvc", "repro", ok=False)
    assert output.count(f"{stage}: {FULL}") == 1 and "Traceback" not in output
    disk.resize()


def completes(study, stage, wanted):
    assert stages_run(run(study, "dvc", "repro"))[0] == stage
    assert results(study) == wanted


def test_the_store_fills_up_while_the_model_runs(study, disk, finished):
    for path in (study / ".refusal-store").glob("store.sqlite*"):
        path.unlink()
    fails(study, disk, "activations", 180)
    watch_repeats(study / STORE)
    store = Store(study / STORE)
    (kept,) = store.connection.execute("SELECT count(*) FROM blobs").fetchone()
    completes(study, "activations", results(finished[0]))
    assert 0 < kept < store.connection.execute("SELECT count(*) FROM blobs").fetchone()[0]
    assert repeats(study / STORE) == (0, 0)
    store.connection.close()


def test_an_output_fills_the_disk(study, disk, finished):
    fails(study, disk, "orthogonalize", 700)
    assert not any((study / "models/ablated").iterdir())  # what would not fit is gone, and with it the room that it took
    completes(study, "orthogonalize", results(finished[0]))
