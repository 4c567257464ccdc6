"""A disk that fills up: one sentence, nothing corrupted, and after making room the run ends as one that never met it."""

import json
import shutil
import subprocess

import pytest
import yaml

from pipeline.study import ROOT, digests, run, stages_run
from refusal.io.params import load_params
from refusal.io.store import Store
from stages import _sentence
from stages.record import record

FULL = "the disk is full: make room"
# SQLite itself notes what is brought to the store.
NOTE = """CREATE TABLE computed (key TEXT);
CREATE TRIGGER note BEFORE INSERT ON blobs BEGIN INSERT INTO computed VALUES (NEW.key); END;"""


class Disk:
    """A file system in memory, of as many kilobytes as it is given."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a small file system can be mounted by root alone: {done.stderr.strip()}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def resize(self, kilobytes=65536):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", self.folder], check=True)

    def leave(self, kilobytes):
        """Room for so much beside what is there."""
        usage = shutil.disk_usage(self.folder)
        self.resize(usage.used // 1024 + kilobytes)


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
    tops = ("data", "models", "metrics", "plots", "report")
    return digests(folder, *tops) | {"dvc.lock": (folder / "dvc.lock").read_text()}


def forget(study, stage):
    """Take the results of a stage out of the workspace and of DVC's cache, so that it must run again."""
    for out in yaml.safe_load((study / "dvc.lock").read_text())["stages"][stage]["outs"]:
        (study / ".dvc/cache/files/md5" / out["md5"][:2] / out["md5"][2:]).unlink(missing_ok=True)
        if (study / out["path"]).is_dir():
            shutil.rmtree(study / out["path"])


def fails(study, stage):
    output = run(study, "dvc", "repro", ok=False)
    assert output.count(f"{stage}: {FULL}") == 1 and "Traceback" not in output


def completes(study, stage, wanted):
    assert stages_run(run(study, "dvc", "repro"))[0] == stage
    assert results(study) == wanted


def test_the_store_fills_up_while_the_model_runs(study, disk, finished):
    wanted = results(finished[0])
    forget(study, "activations")
    for path in (study / ".refusal-store").glob("store.sqlite*"):
        path.unlink()
    disk.leave(180)
    fails(study, "activations")
    disk.resize()
    store = Store(study / ".refusal-store/store.sqlite")
    kept = {key for (key,) in store.connection.execute("SELECT key FROM blobs")}
    store.connection.executescript(NOTE)
    completes(study, "activations", wanted)
    assert kept and store.connection.execute("SELECT count(*) FROM computed").fetchone()[0] > 0
    assert not kept & {key for (key,) in store.connection.execute("SELECT key FROM computed")}
    store.connection.close()


def test_an_output_fills_the_disk(study, disk, finished):
    wanted = results(finished[0])
    forget(study, "orthogonalize")
    disk.leave(700)
    fails(study, "orthogonalize")
    assert not any((study / "models/ablated").iterdir())  # what would not fit is gone, and with it the room that it took
    disk.resize()
    completes(study, "orthogonalize", wanted)
