"""A checkpoint's name becomes a path: no other than those that the pipeline gives does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refusal.io.errors import UserError
from refusal.method.select import cell_name, checked

ROOT = Path(__file__).parents[2]
FOLDER = Path("models/ablated")


@given(st.sampled_from(["sequential", "batched", "batched_unmasked", "random"]), st.integers(0, 200), st.floats(0, 3))
def test_names_that_the_pipeline_gives_pass(method, layer, alpha):
    name = f"{method}_{cell_name(layer, alpha)}"
    assert checked({"rank_1": {"name": name}})["rank_1"]["name"] == name


@given(st.text(st.sampled_from("a_/.\\\0\n0layer_alpha")) | st.from_regex(r"[a-z./]+_layer_[0-9/.]+_alpha_[0-9]+[/.\n]?"))
@example("a_layer_1_alpha_1\n")
@example("../../x")
@example("..")
@example("")
def test_a_name_is_one_folder_in_its_place_or_refused(name):
    try:
        found = checked({"rank_1": {"name": name}})["rank_1"]["name"]
    except UserError:
        return
    assert (FOLDER / found).parent == FOLDER and (FOLDER / found).name == found and found.isprintable()


@pytest.mark.parametrize("stage", ["orthogonalize", "evaluate", "benchmark"])
def test_a_stage_that_meets_another_name_stops(stage, tmp_path):
    """With a folder there that it would have written to or read from."""
    for name in ("params.yaml", "requirements.lock"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    outside = tmp_path / "x"
    outside.mkdir()
    source = "metrics/orthogonalize.json" if stage == "benchmark" else "metrics/select.json"
    (tmp_path / "metrics").mkdir()
    (tmp_path / source).write_text(json.dumps({"rank_1": {"layer": 1, "alpha": 1.0, "name": "../../x"}}))
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    said = f"{stage}: '../../x' is no name of a cell, and would be a path: run `dvc repro select`, which writes the names"
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == said
    assert not any(outside.iterdir()) and not (tmp_path / "models").exists()
