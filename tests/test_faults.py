"""Faults that once went unnoticed, each put into a copy of the package: a test must fail. `make faults`, ten minutes.

faults.jsonl: the file, what stands there once, what the fault puts in its place, and the tests that are to notice. A change of the
code that takes a line away takes its fault along, or gives it the new words.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pipeline.study import clone
from place import ROOT

FAULTS = [json.loads(line) for line in (ROOT / "tests/faults.jsonl").read_text(encoding="utf-8").splitlines()]


def test_every_fault_fits_the_code():
    for fault in FAULTS:
        assert (ROOT / fault["file"]).read_text(encoding="utf-8").count(fault["old"]) == 1, fault
        assert fault["new"] != fault["old"] and all((ROOT / path).exists() for path in fault["tests"].split()), fault


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository, with what its tests need."""
    return clone(tmp_path_factory.mktemp("faults") / "repository")


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fault", FAULTS, ids=[f"{Path(fault['file']).stem}-{i}" for i, fault in enumerate(FAULTS)])
def test_a_fault_fails_a_test(copy, fault):
    path = copy / fault["file"]
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(fault["old"], fault["new"]), encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *fault["tests"].split()]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    finally:
        path.write_text(right, encoding="utf-8")
    assert done.returncode == 1, f"{fault}\n{done.stdout[-2000:]}"
