"""The model stage as DVC runs it, on checkpoints of other people: from a folder, and from a hub on loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import LLAMA, byte_level
from gguf_files import byte_pairs, chat_model
from gguf_files import write as write_gguf
from hub_server import COMMIT, Hub, serve
from qwen1_layout import LATE, tensors, write
from transformers import AutoModelForCausalLM

from refusal.lm.checkpoint import make_loadable

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Qwen-1 checkpoint with room for a few sentences at a byte a token."""
    return write(tmp_path_factory.mktemp("source"), LATE | {"seq_length": 256}, tensors(), buffers=False)


@pytest.fixture
def project(tmp_path):
    """A folder with what the stage reads."""
    shutil.copyfile(ROOT / "requirements.lock", tmp_path / "requirements.lock")
    (tmp_path / "data/prompts").mkdir(parents=True)
    rows = [
        {"id": i, "split": "val", "harmful": f"Pick lock {i}?", "safe": f"Paint lock {i}?", "topic": "lock"} for i in range(3)
    ]
    for name in ("pairs", "unrelated"):
        (tmp_path / f"data/prompts/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run_stage(project: Path, model: dict, **env: str) -> tuple[int, str]:
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"] |= model
    params["generation"] |= {"max_new_tokens": 4}
    params["compute"]["threads"] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(project / "home"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "stages.model"], cwd=project, env=clean | env, capture_output=True, text=True, timeout=300
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout + done.stderr


def test_a_hub_id_with_a_revision(project, checkpoint):
    with serve(Hub({"Qwen/Qwen-tiny": {p.name: p.read_bytes() for p in checkpoint.iterdir()}})) as hub:
        model = {"id": "Qwen/Qwen-tiny", "revision": COMMIT}
        status, output = run_stage(project, model, HF_ENDPOINT=hub.url)
        assert status == 0, output
        assert "Qwen/Qwen-tiny, " in output
        metrics = json.loads((project / "metrics/model.json").read_text())
        assert (metrics["id"], metrics["commit"], metrics["n"]) == ("Qwen/Qwen-tiny", COMMIT, 3)
        assert AutoModelForCausalLM.from_pretrained(project / "models/base").config.model_type == "qwen2"
        assert (project / "home/.cache/huggingface/hub/models--Qwen--Qwen-tiny/snapshots" / COMMIT).is_dir()
        assert not list((project / "models").rglob("*.py"))
        # The user's own word holds: what is there is used, and what is not is one sentence.
        hub.requests.clear()
        assert run_stage(project, model, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")[0] == 0
        assert hub.requests == []
        status, output = run_stage(project, model | {"revision": "v1.0"}, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
        assert status == 1 and "model: Qwen/Qwen-tiny@v1.0: not downloaded yet, and HF_HUB_OFFLINE is set" in output
    assert [path.name for path in (project / "home/.cache/huggingface").iterdir()] == ["hub"]  # no token, no telemetry


def test_a_gguf_file_of_a_hub_id(project, tmp_path):
    file = write_gguf(tmp_path / "m.gguf", chat_model("qwen2", byte_pairs()), byte_pairs()).read_bytes()
    files = {"tiny.gguf": file, "tiny-q8_0.gguf": b"GGUF", "config.json": b"{}", "README.md": b"read me"}
    with serve(Hub({"lab/tiny-GGUF": files})) as hub:
        model = {"id": "lab/tiny-GGUF", "revision": "v1.0", "file": "tiny.gguf"}
        for wrong, says in (
            (
                None,
                "lab/tiny-GGUF@v1.0: holds GGUF files and no safetensors: set model.file to one of them (tiny-q8_0.gguf, tiny.gguf)",
            ),
            ("tiny-q2.gguf", "model.file: the repository holds no tiny-q2.gguf at its root; it holds tiny-q8_0.gguf, tiny.gguf"),
            ("../tiny.gguf", "params.yaml: model.file: "),
        ):
            status, output = run_stage(project, model | {"file": wrong}, HF_ENDPOINT=hub.url)
            assert status == 1 and says in output, output
        hub.sent.clear()
        status, output = run_stage(project, model, HF_ENDPOINT=hub.url)
        assert status == 0, output
        assert set(hub.sent) - {""} == {"tiny.gguf"}
        metrics = json.loads((project / "metrics/model.json").read_text())
        assert (metrics["commit"], metrics["file"], metrics["gguf"]) == (COMMIT, "tiny.gguf", ["F32"])
        assert AutoModelForCausalLM.from_pretrained(project / "models/base").config.model_type == "qwen2"
        # What the hub's cache holds is used from there.
        hub.requests.clear()
        assert run_stage(project, model, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")[0] == 0
        assert hub.requests == []
    status, output = run_stage(project, model | {"revision": None})
    assert status == 1 and "file names one of a hub id at model.revision" in output


def test_a_folder(project, checkpoint):
    status, output = run_stage(project, {"id": str(checkpoint), "revision": None})
    assert status == 0, output
    metrics = json.loads((project / "metrics/model.json").read_text())
    engine = metrics["transformer_lens"]
    assert metrics["commit"] is None and engine["n_prompts"] > 0 and engine["n_same"] == engine["n_tokens"]
    assert engine["resid_pre_max_difference"] < 1e-4 * engine["resid_pre_max"]
    # What cannot be used is refused before anything is copied.
    for change, says in (
        (
            {"id": "Qwen/Qwen-1_8B-Chat", "revision": None},
            "is neither organism nor a folder; give the path of a checkpoint, or a hub id",
        ),
        ({"id": "organism", "revision": "v1.0"}, "revision must be null where id is organism"),
        ({"id": "../x", "revision": "v1.0"}, "'../x' is no hub id"),
    ):
        status, output = run_stage(project, change)
        assert status == 1 and says in output


def written(path: Path, **changes: object) -> None:
    """A JSON file with these keys set, or removed where they are None."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def test_what_keeps_transformers_from_loading_a_checkpoint_here_is_mended_in_the_copy_and_said(project):
    """Kernels of the machine that it was trained on, one of them code on the hub; an index without its metadata; a path from home."""
    source, index = project / "home/mine", "model.safetensors.index.json"
    byte_level(source, "llama", LLAMA)
    kept = json.loads((source / index).read_text())["metadata"]["total_size"]
    written(source / "config.json", attn_implementation="kernels-community/flash-attn", experts_implementation="grouped_mm")
    written(source / index, metadata=None)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    status, output = run_stage(project, {"id": "~/mine"})
    assert status == 0, output
    assert "models/base/config.json: attn_implementation kernels-community/flash-attn is left out" in output
    assert "experts_implementation grouped_mm is left out" in output and f"models/base/{index}: the size" in output
    assert json.loads((project / "models/base" / index).read_text())["metadata"] == {"total_size": kept}
    AutoModelForCausalLM.from_pretrained(project / "models/base")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("metadata", [{"total_size": None}, {}, "none"])
def test_a_copy_is_changed_where_it_must_be_alone(tmp_path, metadata):
    byte_level(tmp_path, "llama", LLAMA)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    written(tmp_path / "config.json", _attn_implementation="sdpa")
    assert make_loadable(tmp_path) == []
    index = tmp_path / "model.safetensors.index.json"
    written(index, metadata=metadata)
    (changed,) = make_loadable(tmp_path)
    assert changed.startswith(index.name) and make_loadable(tmp_path) == []
    total = json.loads(before[index.name])["metadata"]["total_size"]
    assert json.loads(index.read_text())["metadata"]["total_size"] == total
