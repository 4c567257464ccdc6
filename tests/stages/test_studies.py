"""The overlays that lie ready in studies/: each is planned and brought in, on a hub on loopback that has small stand-ins."""

import hashlib
import json
import os
import shutil
import signal
import sys

import pytest
import yaml
from checkpoints import GEMMA, LLAMA, byte_level
from hub_server import Hub, serve
from place import ROOT, Place, params_with
from qwen1_layout import LATE, tensors, write

from refusal.io.params_file import load_params, overlaid
from stages import studies

CHATML = (
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
)
# What stands in for the model of each overlay: the same architecture, three layers of random weights.
STAND_INS = {
    "qwen-1_8b-chat": lambda folder: write(folder, LATE | {"seq_length": 512}, tensors(), buffers=False),
    "qwen2.5-7b-instruct": lambda folder: byte_level(folder, "qwen2", CHATML),
    "llama-3.2-1b-instruct": lambda folder: byte_level(folder, "llama", LLAMA, tie_word_embeddings=True),
    "gemma-2-2b-it": lambda folder: byte_level(folder, "gemma2", GEMMA),
}


@pytest.fixture
def place(tmp_path):
    """A folder with the studies, and pairs and harmless prompts of few words."""
    shutil.copytree(ROOT / "studies", tmp_path / "studies")
    place = Place(tmp_path)
    pairs = [{"harmful": f"Pick lock w{i} x{i}?", "safe": f"Paint wall y{i} z{i}?"} for i in range(30)]
    place.write_rows("data/raw/pairs.jsonl", pairs)
    place.write_rows("data/raw/harmless.jsonl", ({"prompt": f"Bake cake u{i} v{i}."} for i in range(30)))
    return place


def test_every_overlay_that_lies_ready_is_tested_here():
    found = {path.stem for path in (ROOT / "studies").glob("*.yaml")}
    # Two are small enough to run as they are.
    assert found - {"qwen2.5-coder-0.5b-instruct", "smollm2-135m-instruct"} == set(STAND_INS)
    table = (ROOT / "docs/studies.md").read_text()
    for name in found:
        assert f"| `{name}` |" in table and overlaid(ROOT / "params.yaml", ROOT / f"studies/{name}.yaml")


@pytest.mark.parametrize("name", STAND_INS)
def test_a_study_of_a_gpu_is_planned_and_its_model_brought_in(tmp_path, place, name):
    STAND_INS[name](tmp_path / "source")
    model = overlaid(tmp_path / "params.yaml", tmp_path / f"studies/{name}.yaml")["model"]
    with serve(Hub({model["id"]: {path.name: path.read_bytes() for path in (tmp_path / "source").iterdir()}})) as hub:
        hub.commit = model["revision"]
        planned = place.run(sys.executable, "-m", "stages.plan", name, HF_ENDPOINT=hub.url)
        assert planned.status == 0, planned.said
        assert f"{model['id']}: " in planned.said and ", 3 layers, " in planned.said
        assert "4 adapters of kilobytes" in planned.said
        assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]
        # As the workspace of the study has it, but for the GPU.
        params = overlaid(tmp_path / "params.yaml", tmp_path / f"studies/{name}.yaml")
        (tmp_path / "params.yaml").write_text(json.dumps(params))
        params_with(tmp_path, {"model.device": "cpu", "generation.max_new_tokens": 4})
        brought_in = place.stage("model", HF_ENDPOINT=hub.url)
        assert brought_in.status == 0, brought_in.said
    found = json.loads((tmp_path / "metrics/model.json").read_text())
    assert (found["id"], found["commit"], found["n"]) == (model["id"], model["revision"], 3)


def test_a_given_file_is_named_by_its_hash(place, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    digest = hashlib.sha256(b"GGUF").hexdigest()
    given = place.write("elsewhere/a model.gguf", "GGUF")
    for path in (str(given), "elsewhere/a model.gguf"):  # a second run finds it there
        asked = studies.parameters("llama-3.2-1b-instruct", path)
        assert (asked["model"]["id"], asked["model"]["revision"], asked["model"]["device"]) == (path, None, "cuda")
        adapted = studies.adapted(asked, work)
        assert adapted == asked | {"model": asked["model"] | {"id": f"given/{digest}.gguf"}}
        assert (work / adapted["model"]["id"]).read_bytes() == b"GGUF"
    monkeypatch.setattr(studies.os, "link", lambda *_: (_ for _ in ()).throw(OSError))  # another disk
    assert studies.adapted(asked, work) == adapted and (work / adapted["model"]["id"]).read_bytes() == b"GGUF"


def test_a_folder_is_that_of_the_repository(tmp_path, monkeypatch):
    work = tmp_path / ".refusal-store/studies/mine"
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "checkpoints/mine").mkdir(parents=True)
    for model, wanted in (
        ({"id": "checkpoints/mine", "revision": None}, "../../../checkpoints/mine"),
        ({"id": f"{tmp_path}/checkpoints/mine", "revision": None}, f"{tmp_path}/checkpoints/mine"),
        ({"id": "checkpoints/none", "revision": None}, "checkpoints/none"),
        ({"id": "organism", "revision": None}, "organism"),
        ({"id": "owner/name", "revision": "v1.0"}, "owner/name"),
    ):
        raw = {"model": model, "edits": {"checkpoints": []}}
        assert studies.adapted(raw, work)["model"]["id"] == wanted


def test_edited_checkpoints_are_reached_as_the_model_is(tmp_path, monkeypatch):
    work = tmp_path / ".refusal-store/studies/mine"
    work.mkdir(parents=True)
    monkeypatch.setattr(studies, "ROOT", tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs.gguf").write_bytes(b"GGUF")
    asked = ["rank_1", "theirs", "theirs.gguf", {"id": "theirs", "claims": {"kl": 0.1}}, {"id": "theirs", "revision": "v1.0"}]
    found = studies.adapted({"model": {"id": "organism", "revision": None}, "edits": {"checkpoints": asked}}, work)["edits"]["checkpoints"]
    file, there = f"given/{hashlib.sha256(b'GGUF').hexdigest()}.gguf", "../../../theirs"
    assert found == ["rank_1", there, file, {"id": there, "claims": {"kl": 0.1}}, asked[-1]] and (work / file).read_bytes() == b"GGUF"


def test_a_workspace_has_all_that_the_pipeline_reads_and_no_stage_makes():
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].values()
    made = {out if isinstance(out, str) else next(iter(out)) for stage in stages for out in stage["outs"]}
    read = {dep for stage in stages for dep in stage["deps"]} - made
    assert [path for path in read if not any(path == source or path.startswith(f"{source}/") for source in studies.SOURCES)] == []


def test_what_a_workspace_reads_as_yaml_is_what_was_asked(tmp_path):
    """Text that would read as a number, and letters beyond the first plane."""
    asked = yaml.safe_load((ROOT / "params.yaml").read_text())
    asked["model"]["system_prompt"] = "1e5"
    asked["prompts"]["source"] = "data/raw/\U0001f512 ü.jsonl"
    (tmp_path / "params.yaml").write_text(json.dumps(asked, indent=2, ensure_ascii=False), encoding="utf-8")
    params = load_params(tmp_path / "params.yaml")
    assert params.model.system_prompt == "1e5" and params.prompts.source == "data/raw/\U0001f512 ü.jsonl"


def test_make_real_hands_on_a_path_with_blanks(place):
    said = place.run("make", "-n", "--no-print-directory", "-o", ".venv/ready", "plan", "STUDY=x", "REAL_MODEL=/a b/c.gguf").said
    assert said.split("stages.plan ")[1].strip() == 'x "/a b/c.gguf"'
    said = place.run("make", "-n", "--no-print-directory", "-o", ".venv/ready", "real", "REAL_MODEL=/a b/c.gguf").said
    assert said.split("stages.studies ")[1].strip() == 'qwen2.5-coder-0.5b-instruct "/a b/c.gguf"'
    assert place.run("make", "-n", "--no-print-directory", "-o", ".venv/ready", "real").said.split()[-1] == "qwen2.5-coder-0.5b-instruct"


def test_a_folder_of_copies_reaches_the_workspace_wherever_that_is(tmp_path, monkeypatch):
    (tmp_path / "work/stages").mkdir(parents=True)
    (tmp_path / "work/stages/__init__.py").touch()
    for command in ("stages/restore.py", "dvc.py"):
        (tmp_path / "work" / command).write_text("import os; open('seen', 'a').write(os.environ['REAL_SETS'] + '\\n')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(studies.ENVIRONMENT, "REAL_SETS", "copies")
    handler = signal.getsignal(signal.SIGTERM)
    with open(os.devnull) as lock:
        studies.run("a", tmp_path / "work", lock.fileno(), ["dvc", "repro"])
    signal.signal(signal.SIGTERM, handler)
    assert (tmp_path / "work/seen").read_text().splitlines() == [str(tmp_path / "copies")] * 2


def test_claims_of_a_study_are_measured_in_its_workspace(tmp_path, monkeypatch):
    """With the very file that the study was given, and put beside its figures."""
    from stages import claims

    place = tmp_path / "store/studies/a"
    (place / "metrics").mkdir(parents=True)
    (place / "metrics/select.json").touch()
    (place / "params.yaml").write_text(json.dumps({"model": {"id": "given/1.gguf"}}))
    (tmp_path / "studies").mkdir()
    (tmp_path / "studies/a.yaml").touch()
    monkeypatch.chdir(tmp_path)
    for module in (claims, studies):
        monkeypatch.setattr(module, "STORE", tmp_path / "store")
    monkeypatch.setattr(studies, "parameters", lambda name: {"model": {"id": "theirs"}, "sweep": {}})
    monkeypatch.setattr(studies, "adapted", lambda raw, place: raw)
    done = []
    monkeypatch.setattr(studies, "mirror", lambda place, raw: done.append(raw))

    def run(name, place, lock, module):
        done.append(module)
        (place / "metrics/claims").mkdir()
        (place / "metrics/claims/pairing.json").write_text('{"n": 1}')

    monkeypatch.setattr(studies, "run", run)
    claims.of_study("a", ["pairing"])
    assert done == [{"model": {"id": "given/1.gguf"}, "sweep": {}}, ["stages.claims", "pairing"]]
    assert json.loads((tmp_path / "studies/a/metrics/claims/pairing.json").read_text()) == {"n": 1}
