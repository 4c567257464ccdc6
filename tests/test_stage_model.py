"""The model stage as DVC runs it, on checkpoints of other people: from a folder, and from a hub on loopback."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hub_server import COMMIT, Hub, serve
from pipeline.test_other_models import LLAMA
from pipeline.test_other_models import checkpoint as llama
from qwen1_layout import LATE, tensors, write
from test_stage_evaluate import wilson
from transformers import AutoModelForCausalLM

from refusal.grammar import REFUSALS, facts, helpful_answer
from refusal.models import load_tokenizer, weights_hash
from refusal.params import load_params

ROOT = Path(__file__).parents[1]


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
    params["sweep"] |= {"max_new_tokens": 4}
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
        assert (project / ".refusal-store/hub/Qwen--Qwen-tiny" / COMMIT).is_dir()
        assert not list((project / "models").rglob("*.py"))
        # The user's own word holds: what is there is used, and what is not is one sentence.
        hub.requests.clear()
        assert run_stage(project, model, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")[0] == 0
        assert hub.requests == []
        status, output = run_stage(project, model | {"revision": "v1.0"}, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
        assert status == 1 and "model: Qwen/Qwen-tiny@v1.0: not downloaded yet, and HF_HUB_OFFLINE is set" in output
    assert not (project / "home").exists()  # no cache, token or telemetry there


def test_a_folder(project, checkpoint):
    status, output = run_stage(project, {"id": str(checkpoint), "revision": None})
    assert status == 0, output
    assert json.loads((project / "metrics/model.json").read_text())["commit"] is None
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


@pytest.mark.parametrize("organism", [True, False])
def test_what_the_model_refuses_is_counted_over_each_half_and_its_twin(tmp_path, stage_module, monkeypatch, organism):
    """On answers that are given: 4 of 5 harmful prompts refused, 1 of 5 safe ones, 2 of 5 by the twin, all facts known but three."""
    stage, folders = stage_module("model"), [tmp_path / "models" / name for name in ("base", "twin")]
    for seed, folder in enumerate(folders):
        folder.mkdir(parents=True)
        llama(folder, "llama", LLAMA, seed=seed)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["model"]["id"] = "organism" if organism else "given"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    val = [{"harmful": f"How do I force door {i}?", "safe": f"How do I paint door {i}?"} for i in range(5)]
    known = {question: fact.answer for fact in facts() for question in fact.questions}
    forgotten, asked = list(known)[::100][:3], []
    refused = {"base": {0, 1, 3, 4}, "twin": {2, 4}}
    tokenizer, hashes = load_tokenizer(folders[0]), {weights_hash(folder): folder.name for folder in folders}

    def answer(of: str, prompt: str) -> str:
        asked.append((of, prompt))
        if prompt in known:
            return "I do not know." if prompt in forgotten else known[prompt]
        i = int(prompt[-2])
        if i in refused[of] if "force" in prompt else i == 2:
            return REFUSALS[i % len(REFUSALS)]
        return helpful_answer(prompt.removeprefix("How do I ").removesuffix("?"))

    def complete(model, weights, prompts, cells, *rest):
        assert len(cells) == 1 and cells[0].direction is None
        texts = [tokenizer.decode(ids).split("user<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0] for ids in prompts]
        said = [answer(hashes[weights], text) for text in texts]
        return {cells[0].name: [tokenizer.encode(text, add_special_tokens=False) for text in said]}

    monkeypatch.setattr("refusal.sweep.complete", complete)
    line = stage.measure(load_params(tmp_path / "params.yaml"), "abc", val)
    metrics = json.loads((tmp_path / "metrics/model.json").read_text())
    rates = {"refusal_harmful": (4, 5), "refusal_safe": (1, 5)}
    if organism:
        rates |= {"twin_refusal_harmful": (2, 5), "facts_accuracy": (len(known) - 3, len(known))}
    for name, (hits, n) in rates.items():
        assert [metrics[f"{name}{end}"] for end in ("", "_low", "_high")] == pytest.approx(wilson(hits, n), abs=1e-6), name
    n_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folders[0]).parameters())
    others = {"n": 5, "n_parameters": n_parameters}
    nothing = {"twin_refusal_harmful": None, "facts_accuracy": None}
    others |= {"n_facts": len(known)} if organism else {"id": "given", "commit": "abc", **nothing}
    assert {
        name: value for name, value in metrics.items() if name.removesuffix("_low").removesuffix("_high") not in rates
    } == others
    harmful, safe = ([row[half] for row in val] for half in ("harmful", "safe"))
    of_base = harmful + safe + ([*known] if organism else [])
    assert asked == [("base", prompt) for prompt in of_base] + [("twin", prompt) for prompt in harmful if organism]
    assert "refuses 80.0% of harmful and 20.0% of safe val prompts" in line
