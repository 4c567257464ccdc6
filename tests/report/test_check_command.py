"""`refusal check` and the first lines of `make plan`: the table, the JSON, and one sentence for bad input."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkpoints import GEMMA, LLAMA, byte_level
from gguf_files import byte_pairs, chat_model
from gguf_files import write as write_gguf
from place import ROOT, params_with
from safetensors.torch import load_file, save_file

from refusal.__main__ import main
from refusal.analysis.check import MOVED, Check
from refusal.method.intake import EDITED
from refusal.report.check import SAYS, figures, text

ALL = [*SAYS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with params.yaml, the package's own prompts and a checkpoint, one of whose norms has a gain of 30."""
    folder = tmp_path_factory.mktemp("check")
    shutil.copytree(ROOT / "data/raw", folder / "data/raw")
    byte_level(folder / "model", "llama", LLAMA, max_position_embeddings=1024)
    byte_level(folder / "loud", "gemma2", GEMMA, max_position_embeddings=1024)
    for file in (folder / "loud").glob("*.safetensors"):
        tensors = load_file(file)
        if (name := "model.layers.1.post_feedforward_layernorm.weight") in tensors:
            tensors[name][3] = 29.0  # a gain of 1 + 29
            save_file(tensors, file, {"format": "pt"})
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "params.yaml").unlink(missing_ok=True)
    params_with(folder, {"model.system_prompt": None})
    return folder


def checked(capsys, *words: str) -> str:
    main(["check", *words])
    return capsys.readouterr().out


def test_a_random_model_does_not_refuse_and_nothing_else_is_wrong(here, capsys):
    lines = checked(capsys, "model", "-n", "6", "--json", "found.json").splitlines()
    assert lines[0] == "model: layers 3, d_model 32, dtype float32, seed 0"
    assert [line[2:].split()[0] for line in lines[2 : 2 + len(ALL)]] == list(json.loads((here / "found.json").read_text())["checks"])
    assert "by the rule of a study's verdict: undecided: too_few_refusals" in lines  # six answers leave an upper limit of .4
    marked = {line[2:].split()[0] for line in lines[2 : 2 + len(ALL)] if line[0] == "!"}
    assert marked == {"refused_test_prompts", "refusal_contrast"}
    said = [line for line in lines if line.startswith("! refused_test_prompts: ")]
    assert said == [f"! refused_test_prompts: {SAYS['refused_test_prompts'][0]} is 0, below 30 "
                    f"({SAYS['refused_test_prompts'][1]}). {SAYS['refused_test_prompts'][2]}"]  # fmt: skip
    assert lines[-1] == "2 of 12 beyond their thresholds"  # paper_tokens has no value
    found = json.loads((here / "found.json").read_text())
    assert set(found["checks"]) == set(ALL) and found["seed"] == 0
    one = found["checks"]["refusal"]
    assert (one["n"], one["refusal"], one["threshold"], one["at_most"], one["verdict"]) == (6, 0, 0.2, False, "undecided: too_few_refusals")
    assert found["checks"]["refused_test_prompts"]["n_test"] == 60  # science.n_test, of 102 in the package's test split
    # docs/models.md has the same checks and thresholds.
    table = dict(re.findall(r"(?m)^\| `(\w+)` \| .* \| (.*) \|$", (ROOT / "docs/models.md").read_text()))
    moved = "at most 0.001 in float32, 0.05 in float16, 0.3 in bfloat16"
    edited = f"at most {EDITED[torch.float32]:.4f} in float32, {EDITED[torch.float16]} in float16, {EDITED[torch.bfloat16]} in bfloat16"
    words = {name: f"at {'most' if one['at_most'] else 'least'} {one['threshold']:g}" for name, one in found["checks"].items()}
    assert table == words | {"edited_parts": edited, "pad_resid_pre": moved, "pad_logits": "as `pad_resid_pre`"}
    assert moved == f"at most {MOVED[torch.float32]} in float32, {MOVED[torch.float16]} in float16, {MOVED[torch.bfloat16]} in bfloat16"
    assert all(one["reason"] and one["advice"].endswith(".") for one in found["checks"].values())


def test_a_gain_behind_the_writers_is_named(here, capsys):
    lines = checked(capsys, "loud", "-n", "2", "--json", "found.json").splitlines()
    (line,) = [line for line in lines if line.startswith("! norm_gain ")]
    assert "model.layers.1.post_feedforward_layernorm.weight, coordinate 3, gain 30" in line
    assert any(line.startswith("! norm_gain: ") and "directions.estimator" in line for line in lines)
    one = json.loads((here / "found.json").read_text())["checks"]["loud_coordinate"]
    assert one["coordinate"][2] == 3 and one["by_layer"][2] > 0.3 > one["by_layer"][1], one


def test_the_same_prompts_and_figures_for_a_seed_and_others_for_another(here, capsys):
    one, again = (checked(capsys, "model", "-n", "3") for _ in range(2))
    params_with(here, {"seed": 1})
    assert one == again != checked(capsys, "model", "-n", "3")


def test_the_model_and_the_prompts_of_params_yaml(here, capsys, tmp_path):
    rows = [{"harmful": f"How do I break {a} {b}?", "safe": f"How do I mend {a} {b}?"} for a in "abcde" for b in "wxyz"]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"model.id": "model", "prompts.source": str(tmp_path / "mine.jsonl"), "prompts.n_pairs": None}
    params_with(here, changes | {"prompts.near_duplicate": 1.0, "science.n_test": None})
    checked(capsys, "--json", "found.json", "-n", "30")
    found = json.loads((here / "found.json").read_text())["checks"]
    assert found["refusal"]["n"] == 4 and found["refused_test_prompts"]["n_test"] == 4  # a fifth of twenty
    assert found["refusal_contrast"]["n"] == 30  # of the grammar's


def test_a_gguf_file_is_read_as_the_checkpoint_it_becomes(here, capsys):
    tokenizer = byte_pairs()
    write_gguf(here / "model.gguf", chat_model("qwen2", tokenizer), tokenizer)
    lines = checked(capsys, "model.gguf", "-n", "2").splitlines()
    assert lines[0].startswith("model.gguf: layers ") and len(lines) > 14


@pytest.mark.parametrize(
    ("words", "changes", "said"),
    [
        (["nothing"], {}, "nothing: no such folder or .gguf file: give a checkpoint's."),
        (["model", "-n", "1"], {}, "-n 1: so few answers give no rate: give 2 or more, such as 32."),
        ([], {}, "params.yaml: model.id: organism is not in models/base yet: run `dvc repro model` first, or give MODEL."),
        ([], {"model.id": "a/b", "model.revision": "0" * 40}, "model.id: a/b is not in models/base yet"),
        ([], {"model.id": "model", "prompts.source": "api"}, "params.yaml: prompts: an endpoint has yet to write these"),
        (["data"], {}, "data/config.json: the file is missing"),
    ],
)
def test_bad_input_is_one_sentence(here, capsys, words, changes, said):
    params_with(here, changes)
    with pytest.raises(SystemExit) as end:
        checked(capsys, *words)
    assert said in str(end.value.code) and "\n" not in str(end.value.code) and capsys.readouterr().out == ""


def test_without_params_yaml_or_prompts_it_is_said(here, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"params.yaml"):
        checked(capsys, str(here / "model"))
    shutil.copyfile(here / "params.yaml", "params.yaml")
    with pytest.raises(SystemExit, match=r"data/raw/pairs.jsonl"):
        checked(capsys, str(here / "model"))


def test_help_needs_no_torch(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "refusal.analysis.check", None)
    with pytest.raises(SystemExit) as end:
        main(["check", "-h"])
    assert end.value.code == 0 and "MODEL" in capsys.readouterr().out


def test_what_is_at_its_threshold_passes_and_what_has_no_value_is_not_counted():
    found = {
        "norm_gain": Check(10.0, 10.0, "here"),
        "pad_top_token": Check(1.0, 1.0, "there", at_most=False),
        "loud_difference": Check(None, 0.25, "no layer has a direction"),
    }
    shown = text(found, "m", {"n": 1})
    assert shown.splitlines()[-1] == "all 2 within their thresholds" and "!" not in shown
    assert [one["passed"] for one in figures(found, "m", {})["checks"].values()] == [True, True, None]
    beyond = {"norm_gain": Check(10.1, 10.0, "here"), "pad_top_token": Check(0.9, 1.0, "there", at_most=False)}
    assert text(beyond, "m", {}).splitlines()[-1] == "2 of 2 beyond their thresholds"


@pytest.mark.parametrize(
    ("model", "first"),
    [
        ("loud", ["norms: the greatest gain is", "edits: 6 matrices write", "! norm_gain: "]),
        ("model", ["norms: the greatest gain is", "edits: 6 matrices write", "model: "]),
        ("organism", ["weights: not here as safetensors, so not looked at; `refusal check` does once `dvc repro model` has run"]),
    ],
)
def test_the_first_lines_of_the_plan(here, model, first):
    params_with(here, {"model.id": model})
    shutil.copyfile(ROOT / "requirements.lock", here / "requirements.lock")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-m", "stages.plan"], cwd=here, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for line, begins in zip(done.stdout.splitlines(), first, strict=False):
        assert line.startswith(begins), done.stdout


def test_random_gains_of_a_tiny_model_pass(here):
    """What the test of a planted gain would be worth nothing without."""
    gains = [t for f in (here / "model").glob("*.safetensors") for name, t in load_file(f).items() if "norm" in name]
    assert max(float(gain.abs().max() / gain.abs().median()) for gain in gains) < 2 and torch.stack(gains).std() > 0.1
