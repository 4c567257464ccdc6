"""The remote in the repository: the default study's model and prompts, nothing else, taken by what they were trained from."""

import hashlib
import json
import subprocess

import pytest
import yaml
from place import ROOT

from pipeline import study
from pipeline.study import run, stages_run

PULLED = ("data/prompts", "models/base", "models/truth", "models/twin")
STORED = ROOT / "remote/files/md5"


def tracked(*paths: str) -> list[str]:
    return subprocess.run(["git", "ls-files", *paths], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()


@pytest.fixture
def clone(tmp_path):
    return study.clone(tmp_path / "clone")


def test_it_holds_what_dvc_lock_names_and_nothing_else():
    locked = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for stage in locked.values() for out in stage["outs"]}
    wanted = {outs[path] for path in PULLED}
    for name in list(wanted):
        wanted |= {entry["md5"] for entry in json.loads((STORED / name[:2] / name[2:]).read_text())}
    assert sorted(tracked("remote")) == sorted(f"remote/files/md5/{name[:2]}/{name[2:]}" for name in wanted)
    for name in wanted:
        assert hashlib.md5((STORED / name[:2] / name[2:]).read_bytes()).hexdigest() == name.removesuffix(".dir")
    assert sum((STORED / name[:2] / name[2:]).stat().st_size for name in wanted) < 10e6


def test_what_else_is_pushed_stays_out_of_git(clone):
    (clone / "remote/files/md5/00").mkdir(parents=True)
    (clone / "remote/files/md5/00/11").write_text("completions of another study")
    run(clone, "git", "add", "-A")
    assert "remote/" not in run(clone, "git", "diff", "--cached", "--name-only")


def test_a_comment_changed_in_a_fresh_clone_trains_nothing(clone):
    with (clone / "refusal/lm/load.py").open("a") as file:
        file.write("# A comment.\n")
    run(clone, "make", "-o", "restore", "pull")
    assert all((clone / path).is_dir() for path in PULLED)
    run(clone, "make", "-o", ".venv/ready", "refresh")  # of the same lock: the same objects
    assert run(clone, "git", "status", "--porcelain", "remote") == ""
    before = (clone / "models/base/model.safetensors").read_bytes()
    said = run(clone, "dvc", "repro", "model")
    assert stages_run(said)[-1] == "model" and "phase_1" not in said
    assert (clone / "models/base/model.safetensors").read_bytes() == before


def test_a_damaged_object_is_named_and_not_taken(clone):
    outs = yaml.safe_load((clone / "dvc.lock").read_text())["stages"]["model"]["outs"]
    name = next(out["md5"] for out in outs if out["path"] == "models/base")
    entries = json.loads((clone / f"remote/files/md5/{name[:2]}/{name[2:]}").read_text())
    digest = next(entry["md5"] for entry in entries if entry["relpath"] == "model.safetensors")
    weights = clone / f"remote/files/md5/{digest[:2]}/{digest[2:]}"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    said = run(clone, "make", "-o", "restore", "pull", ok=False)
    assert f"remote/files/md5/{digest[:2]}/{digest[2:]}, of models/base, is damaged" in said
    assert not (clone / "models/base").exists()
    run(clone, "git", "checkout", "HEAD", "--", "remote")
    run(clone, "make", "-o", "restore", "pull")
    assert (clone / "models/base/model.safetensors").exists()


def test_without_the_remote_nothing_is_pulled_and_nothing_fails(clone):
    run(clone, "rm", "-r", "remote")
    assert run(clone, "make", "--no-print-directory", "-o", "restore", "pull") == ""
