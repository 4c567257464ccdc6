"""Rank-1 adapters: the same edit as the checkpoint's, by PEFT, by a merge of plain torch, and by our own loading."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import PRE_NORM, tiny_direction, tiny_model
from transformers import AutoModelForCausalLM

from refusal.io.errors import UserError
from refusal.lm.adapter import base_folder
from refusal.lm.architecture import SUPPORTED
from refusal.lm.checkpoint import Reader
from refusal.lm.load import load_model, weights_hash
from refusal.method.orthogonalize import Edit, Report, orthogonalize

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
V = tiny_direction()
DENSE = sorted(set(SUPPORTED) - {"mixtral", "qwen3_moe"})
CASES = [(t, {}) for t in DENSE] + [("llama", {"tie_word_embeddings": True}), ("gemma", {"tie_word_embeddings": False})]


def both(folder: Path, model_type="qwen2", alpha=1.5, include_embedding=True, **options) -> tuple[Report, Report]:
    """The edit written both ways, folder/whole and folder/lora, of folder/base."""
    tiny_model(model_type, **options).save_pretrained(folder / "base")
    edits = [
        Edit(folder / name, V, alpha, include_embedding, form) for name, form in (("whole", "safetensors"), ("lora", "lora"))
    ]
    whole, lora = orthogonalize(folder / "base", edits)
    return whole, lora


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("include_embedding", [True, False])
@pytest.mark.parametrize(("model_type", "options"), CASES)
def test_equals_the_edited_checkpoint_in_logits(tmp_path, model_type, options, include_embedding):
    """As PEFT runs it, and as load_model merges it; the base alone differs."""
    from peft import PeftModel

    both(tmp_path, model_type, include_embedding=include_embedding, **options)
    expected, base = logits(load_model(tmp_path / "whole")), AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (logits(base) - expected).abs().max() > 0.5
    assert torch.equal(logits(load_model(tmp_path / "lora")), expected)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    assert (logits(adapted) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])
def test_equals_a_merge_in_plain_torch(tmp_path, model_type):
    """W + B A and E + (B A)^T in float64, from the files and the format's definition alone."""
    both(tmp_path, model_type, alpha=0.75)
    whole, base = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "base"))
    adapter = load_file(tmp_path / "lora/adapter_model.safetensors")
    merged = {name: tensor.double() for name, tensor in base.items()}
    for key in [key for key in adapter if "_A" in key]:
        a, b = adapter[key].double(), adapter[key.replace("_A", "_B")].double()
        name = key.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"
        assert a.shape[0] == b.shape[1] == 1
        merged[name] += (b @ a).T if "embedding" in key else b @ a
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] == 1
    assert set(config["target_modules"]) == {"o_proj", "down_proj", "embed_tokens"}
    assert len(adapter) == 2 * 7
    for name, tensor in merged.items():
        assert (whole[name].double() - tensor).abs().max() < 1e-6, name
        assert ((tensor - base[name]).abs().max() > 1e-3) == (
            f"base_model.model.{name}".replace(".weight", "") in str(list(adapter))
        )


@pytest.mark.parametrize("on_disk", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
@pytest.mark.parametrize("alpha", [0.75, 1.0, 2.5])
def test_loads_to_the_bits_of_the_edited_checkpoint(tmp_path, on_disk, loaded, alpha):
    both(tmp_path, "qwen2", alpha, dtype=on_disk)
    whole, lora = (load_model(tmp_path / name, loaded).state_dict() for name in ("whole", "lora"))
    assert list(whole) == list(lora) and all(torch.equal(whole[name], lora[name]) for name in whole)


def test_a_tied_embedding_is_untied_where_it_is_merged(tmp_path):
    both(tmp_path, "llama", tie_word_embeddings=True)
    base, merged = load_model(tmp_path / "base"), load_model(tmp_path / "lora")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight) and not merged.config.tie_word_embeddings
    assert not torch.equal(merged.model.embed_tokens.weight, base.lm_head.weight)


def test_reports_agree_and_size_does_not(tmp_path):
    whole, lora = both(tmp_path, hidden_size=32, vocab_size=4096)
    assert lora.residuals == whole.residuals and lora.deviations == whole.deviations and lora.n_copied == whole.n_copied
    files = sorted((tmp_path / "lora").iterdir())
    assert [path.name for path in files] == ["adapter_config.json", "adapter_model.safetensors"]
    assert lora.bytes_written == sum(path.stat().st_size for path in files) < whole.bytes_written / 20
    # Of a model of 7 billion: 4096 + 11008 + 2 x 4096 numbers a block and 32000 + 4096 for the embedding, in float32.
    assert 7e9 * 2 / (4 * (32 * (4096 + 11008 + 2 * 4096) + 32000 + 4096)) > 4000


def test_only_the_writers_are_read_for_an_adapter(tmp_path, monkeypatch):
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    read, take = [], Reader.take
    monkeypatch.setattr(Reader, "take", lambda self, n: read.append(n) or take(self, n))
    orthogonalize(tmp_path / "base", [Edit(tmp_path / "lora", V, 1.0, format="lora")])
    assert sum(read) == 4 * (96 * 32 + 3 * (32 * 32 + 32 * 48))


@pytest.mark.parametrize(
    ("model_type", "options", "alpha", "words"),
    [
        ("llama", {"mlp_bias": True}, 1.0, "mlp.down_proj.bias is a bias"),
        ("llama", {"attention_bias": True}, 1.0, "self_attn.o_proj.bias is a bias"),
        ("mixtral", {}, 1.0, "is an expert"),
        ("qwen3_moe", {}, 1.0, "is an expert"),
        ("qwen2", {}, 0.0, "alpha is 0"),
    ],
)
def test_what_no_adapter_can_say_is_refused_before_anything_is_written(tmp_path, model_type, options, alpha, words):
    tiny_model(model_type, **options).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=words):
        orthogonalize(tmp_path / "base", [Edit(tmp_path / "lora", V, alpha, format="lora")])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    assert set(PRE_NORM) - set(DENSE) == {"mixtral", "qwen3_moe"}


def test_the_hash_sees_base_and_adapter(tmp_path):
    both(tmp_path)
    hashes = {weights_hash(tmp_path / name) for name in ("base", "whole", "lora")}
    orthogonalize(tmp_path / "base", [Edit(tmp_path / "lora", V, 1.0, format="lora")])  # an adapter is replaced
    hashes.add(weights_hash(tmp_path / "lora"))
    tiny_model("qwen2", seed=1).save_pretrained(tmp_path / "base")
    hashes |= {weights_hash(tmp_path / name) for name in ("base", "lora")}
    assert len(hashes) == 6


def test_base_and_adapter_move_together_and_no_place_is_in_the_files(tmp_path):
    both(tmp_path / "one")
    files = {path.name: path.read_bytes() for path in (tmp_path / "one/lora").iterdir()}
    assert not any(str(tmp_path).encode() in content for content in files.values())
    expected = weights_hash(tmp_path / "one/lora")
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert base_folder(tmp_path / "two/lora").samefile(tmp_path / "two/base")
    assert weights_hash(tmp_path / "two/lora") == expected
    shutil.rmtree(tmp_path / "two/base")
    with pytest.raises(UserError, match=r"adapter_config.json: base_model_name_or_path leads to .* which is no checkpoint"):
        load_model(tmp_path / "two/lora")


def test_an_adapter_of_another_model_is_refused(tmp_path):
    both(tmp_path)
    tiny_model("qwen2", num_hidden_layers=2).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match="does not fit"):
        load_model(tmp_path / "lora")
