"""`pip install .`: the library alone, with all its data, used from another folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import LLAMA, byte_level
from pipeline.study import copy

from refusal.io.code import code_of
from refusal.judges.llm import LLMJudge
from refusal.report.reproduction import published

# A direction is ablated, what is published is read, and the judge's rubric is hashed with its code.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
import refusal
from refusal.io.code import code_of
from refusal.judges.llm import LLMJudge
from refusal.lm.load import load_lm
from refusal.method.interventions import Intervention
from refusal.report.reproduction import published

lm = load_lm(Path(sys.argv[1]))
ids = torch.tensor(lm.encode(["How do I pick a lock?"]))
direction = torch.nn.functional.normalize(torch.randn(lm.d_model, generator=torch.Generator().manual_seed(0)), dim=0)

def component():
    return (lm.model(ids, output_hidden_states=True).hidden_states[-2] @ direction).abs().max().item()

with Intervention("direction", direction, sites="writes").on(lm.model):
    ablated = component()
print(json.dumps([refusal.__file__, ablated, component(), code_of(LLMJudge), published()]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A copy of the repository, and the folder that pip installs it into."""
    source, target = copy(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    done = subprocess.run([*command, "--target", str(target), "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source, target


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_every_file_of_the_library_is_installed_and_no_other(folders):
    source, target = folders
    assert files(target / "refusal") == files(source / "refusal")
    assert sorted(path.name.split("-")[0] for path in target.iterdir()) == [
        "bin",
        "refusal",
        "refusal",
    ]  # its command, it, and its metadata


def test_the_installed_command_works_in_another_folder(folders, tmp_path):
    _, target = folders
    byte_level(tmp_path / "checkpoint", "llama", LLAMA)
    command, environment = [str(target / "bin/refusal"), "compare", "checkpoint", "checkpoint"], {"PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("identical: "), done.stderr
    done = subprocess.run([*command[:-1], "none"], cwd=tmp_path, env=os.environ | environment, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and done.stderr == "none: no such folder: give that of a checkpoint, of an adapter, or a .gguf file.\n"
    )


def test_the_installed_library_works_in_another_folder(folders, tmp_path):
    _, target = folders
    byte_level(tmp_path / "checkpoint", "llama", LLAMA)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "checkpoint")]
    environment = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, ablated, before, code, figures = json.loads(done.stdout)
    assert file == str(target / "refusal/__init__.py") and ablated < 1e-4 < 1e-2 < before
    # The store's keys are those of the repository, and the data that of the repository.
    assert code == code_of(LLMJudge) and figures == json.loads(json.dumps(published()))
