"""`refusal compare`: the lines, the JSON, and one sentence for bad input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inspect_files import sample, write_log
from safetensors.torch import load_file, save_file
from tiny import tiny_direction, tiny_model

from refusal.__main__ import main
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, orthogonalize

V = tiny_direction().double()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base, an edit of it, the same with a layer of its own for the direction, and directions by layer."""
    folder = tmp_path_factory.mktemp("compare")
    tiny_model("qwen2", tie_word_embeddings=True).save_pretrained(folder / "base")
    orthogonalize(folder / "base", [Edit(folder / "edited", Intervention("edit", V, 0.75))])
    unit = torch.stack([tiny_direction(seed=7).double(), V, torch.zeros(32)])
    save_file({"a-matched.unit": unit, "a-matched.defined": torch.ones(3)}, folder / "directions.safetensors")
    save_file({"unit": -V.float()}, folder / "one.safetensors")
    return folder


def compared(capsys, folder, base="base", edited="edited", *more: str) -> str:
    main(["compare", str(folder / base), str(folder / edited), *more])
    return capsys.readouterr().out


def test_the_anatomy_of_an_edit(folder, capsys, tmp_path):
    options = ("--json", str(tmp_path / "found.json"), "--directions", str(folder / "directions.safetensors"))
    lines = compared(capsys, folder, "base", "edited", *options).splitlines()
    assert lines[0].startswith("edit: W - W' is alpha V V^T W up to rounding in 7 tensors")
    assert lines[1].startswith("rank 1, the same in all of them; alpha 0.7500")
    assert lines[2] == "norms set back after the edit: none"
    assert lines[3] == "embedding: edited, and the unembedding is a tensor of its own now; 7 tensors differ, 32 do not"
    assert lines[5].split()[:3] == ["0", "0.7500", "0.7500"] and len(lines) == 4 + 1 + 3 + 1
    # sqrt(1 / 32) by chance.
    assert (
        lines[8] == "|cosine| with directions.safetensors:a-matched.unit: 1.0000 at layer 1, the greatest of 2; by chance 0.1768"
    )
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["kind"] == "edit" and found["rank"] == 1 and found["shared"] is True and found["by_layer"] is None
    assert abs(float(torch.tensor(found["basis"][0], dtype=torch.float64) @ V)) > 0.9999
    cosine = abs(float(tiny_direction(seed=7).double() @ V))
    assert found["cosines"]["directions.safetensors:a-matched.unit"] == [pytest.approx(cosine, abs=1e-4), pytest.approx(1), None]
    before, after = (load_file(folder / name / "model.safetensors") for name in ("base", "edited"))
    name = "model.layers.2.mlp.down_proj.weight"
    one, gap = found["tensors"][name], (before[name] - after[name]).double()
    assert (one["layer"], one["writer"], one["kind"], one["rank"], one["norms"]) == (2, True, "edited", 1, None)
    assert one["relative"] == pytest.approx(float(gap.norm() / before[name].double().norm()), rel=1e-4)
    assert one["singular_values"][0] == pytest.approx(float(torch.linalg.svdvals(gap)[0]), rel=1e-4)
    assert found["layers"][2]["mlp"] == pytest.approx(0.75, abs=1e-4) and found["layers"][2]["relative"] >= one["relative"]


def test_one_direction_for_every_layer(folder, capsys):
    last = compared(capsys, folder, "base", "edited", "--directions", str(folder / "one.safetensors")).splitlines()[-1]
    assert last.startswith("|cosine| with one.safetensors:unit: 1.0000 at layer 0, the greatest of 3")


def test_without_an_edit_there_is_no_direction(folder, capsys, tmp_path):
    out = compared(capsys, folder, "base", "base", "--json", str(tmp_path / "found.json"))
    assert out == "identical: all 38 tensors have the base's values\nembedding: same; 0 tensors differ, 38 do not\n"
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(found[key] is None for key in ("rank", "shared", "alpha", "norms_set_back", "basis", "by_layer"))
    assert found["tensors"] == {} and found["layers"] == []


@pytest.mark.parametrize(
    ("base", "edited", "more", "said"),
    [
        ("base", "nothing", [], "nothing: no such folder: give that of a checkpoint, of an adapter, or a .gguf file."),
        ("one.safetensors", "base", [], "one.safetensors: no such folder"),
        ("base", "edited", ["--directions", "{folder}/base/config.json"], "config.json: holds no directions of 32 components"),
        ("base", "edited", ["--json", "{folder}/base"], "base"),
    ],
)
def test_bad_input_is_one_sentence(folder, capsys, base, edited, more, said):
    with pytest.raises(SystemExit) as end:
        compared(capsys, folder, base, edited, *(word.format(folder=folder) for word in more))
    assert said in str(end.value.code) and "\n" not in str(end.value.code) and capsys.readouterr().out == ""


def test_debug_shows_the_traceback(folder, capsys, monkeypatch):
    monkeypatch.setenv("REFUSAL_DEBUG", "1")
    with pytest.raises(SystemExit):
        compared(capsys, folder, "base", "nothing")
    assert "Traceback" in capsys.readouterr().err


def test_a_file_that_is_cut_off(folder, capsys, tmp_path):
    cut = shutil.copytree(folder / "edited", tmp_path / "cut")
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit, match=r"model.safetensors: no whole safetensors file"):
        main(["compare", str(folder / "base"), str(cut)])


def test_samples_of_lm_eval(tmp_path, capsys):
    """Scores by the same command; tests/analysis/test_samples.py holds the figures."""
    for name, right in (("base", {1, 2, 3, 4, 5, 6, 7, 8}), ("edited", {1, 9})):
        (tmp_path / name).mkdir()
        rows = [{"doc_id": i, "doc_hash": f"h{i}", "filter": "none", "acc": float(i in right)} for i in range(10)]
        (tmp_path / name / "samples_toy_2026-01-01T00-00-00.000001.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = compared(capsys, tmp_path, "base", "edited", "--json", str(tmp_path / "found.json"))
    assert out.splitlines()[1].split()[:4] == ["toy", "10", "0.8000", "0.2000"]
    row = json.loads((tmp_path / "found.json").read_text())["tasks"]["toy"]
    assert (row["n_gained"], row["n_lost"]) == (1, 7) and row["p"] == pytest.approx(2 * (1 + 8) / 2**8)
    with pytest.raises(SystemExit, match="scores have none"):
        compared(capsys, tmp_path, "base", "edited", "--directions", "x")


@pytest.mark.parametrize("suffix", ["json", "eval"])
def test_logs_of_inspect(tmp_path, suffix):
    """As typed, in a process of its own; tests/analysis/test_inspect_logs.py holds the figures."""
    for name, right in (("base", {1, 2, 3, 4, 5, 6, 7, 8}), ("edited", {1, 9})):
        rows = [sample(i, {"match": "C" if i in right else "I", "graded": {"tone": 0.5}}) for i in range(10)]
        write_log(tmp_path / f"{name}.{suffix}", rows, status="success" if name == "base" else "cancelled")
    names = [f"base.{suffix}", f"edited.{suffix}", "--json", "found.json"]
    command = [sys.executable, "-m", "refusal", "compare", *names]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stderr == ""
    docs = (Path(__file__).parents[2] / "docs/edits.md").read_text()
    assert done.stdout.replace(f".{suffix}", ".eval") in docs
    title, first, second, *notes = done.stdout.splitlines()
    assert title.startswith("scorer ") and first.split()[:5] == ["match", "10", "0.8000", "0.2000", "-0.6000"]
    assert second.split()[:5] == ["graded/tone", "10", "0.5000", "0.5000", "+0.0000"] and second.split()[-2:] == ["-", "-"]
    assert notes == [f"edited.{suffix}: its status is cancelled: it is not complete"]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["scorers"]["match"]["p"] == pytest.approx(2 * (1 + 8) / 2**8) and found["notes"] == notes
    (tmp_path / f"edited.{suffix}").write_text("{")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"edited.{suffix}: no log of inspect (")


def test_two_of_one_kind(folder, tmp_path, capsys):
    log = str(write_log(tmp_path / "log.json", [sample(1, {"s": 1})]))
    (tmp_path / "metrics").mkdir()
    (tmp_path / "metrics/evaluate.json").write_text("{}")  # as studies/<name>/ holds, without completions
    for base, edited, said in (
        (log, str(folder / "base"), r"log.json is a log of inspect, and .*base a checkpoint: give two of one kind"),
        (str(tmp_path), log, r"is a study, and .*log.json a log of inspect"),
        (str(tmp_path), str(tmp_path), r"completions.jsonl: no such file: run `dvc repro` there, or give the folder where"),
    ):
        with pytest.raises(SystemExit, match=said):
            main(["compare", base, edited])
    with pytest.raises(SystemExit, match="scores have none"):
        main(["compare", log, log, "--directions", "x"])


def test_help_needs_no_torch(capsys, monkeypatch):
    """So that a mistyped option is told at once."""
    monkeypatch.setitem(sys.modules, "refusal.analysis.edits", None)
    with pytest.raises(SystemExit) as end:
        main(["compare", "-h"])
    assert end.value.code == 0 and "BASE EDITED" in capsys.readouterr().out
