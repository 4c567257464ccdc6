"""Low-rank adapters: the same edit as the checkpoint's, by PEFT and, bit for bit, by our own loading."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import SUPPORTED, tiny_direction, tiny_model
from transformers import AutoModelForCausalLM

from refusal.io.errors import UserError
from refusal.lm.adapter import base_folder
from refusal.lm.load import load_model, weights_hash
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, Report, orthogonalize

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
BASES = {k: torch.linalg.qr(tiny_direction(rows=k).double().T)[0].T for k in (1, 2, 3)}
DENSE = sorted(set(SUPPORTED) - {"mixtral", "qwen3_moe"})
CASES = [(t, {}) for t in DENSE] + [("llama", {"tie_word_embeddings": True}), ("gemma", {"tie_word_embeddings": False})]


def lora(folder: Path, rank: int = 1, alpha: float = 1.0) -> None:
    orthogonalize(folder / "base", [Edit(folder / "lora", Intervention("edit", BASES[rank], alpha), format="lora")])


def both(folder: Path, model_type="qwen2", rank=1, alpha=1.5, include_embedding=True, **options) -> list[Report]:
    """The edit written both ways, folder/whole and folder/lora, of folder/base."""
    tiny_model(model_type, **options).save_pretrained(folder / "base")
    one = Intervention("edit", BASES[rank], alpha)
    formats = {"whole": "safetensors", "lora": "lora"}
    return orthogonalize(folder / "base", [Edit(folder / name, one, include_embedding, of) for name, of in formats.items()])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(("include_embedding", "rank"), [(True, 1), (True, 3), (False, 2)])
@pytest.mark.parametrize(("model_type", "options"), CASES)
def test_equals_the_edited_checkpoint_in_logits(tmp_path, model_type, options, include_embedding, rank):
    """As PEFT runs it, and as load_model merges it; the base alone differs."""
    from peft import PeftModel

    both(tmp_path, model_type, rank, include_embedding=include_embedding, **options)
    expected, base = logits(load_model(tmp_path / "whole")), AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (logits(base) - expected).abs().max() > 0.5
    assert torch.equal(logits(load_model(tmp_path / "lora")), expected)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    assert (logits(adapted) - expected).abs().max() < 1e-4
    config, tensors = adapted.peft_config["default"], load_file(tmp_path / "lora/adapter_model.safetensors")
    assert config.lora_alpha == config.r == rank and len(tensors) == 2 * (6 + include_embedding)
    assert config.target_modules == {"o_proj", "down_proj"} | ({"embed_tokens"} if include_embedding else set())


def test_a_basis_a_layer_is_an_adapter_of_these_layers(tmp_path):
    from peft import PeftModel

    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    basis = tiny_direction(rows=3, seed=4)[:, None]
    basis[0] = 0
    formats = {"whole": "safetensors", "lora": "lora"}
    one = Intervention("edit", basis, 1.5)
    orthogonalize(tmp_path / "base", [Edit(tmp_path / name, one, format=of) for name, of in formats.items()])
    expected, base = logits(load_model(tmp_path / "whole")), AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert (logits(base) - expected).abs().max() > 0.1
    assert torch.equal(logits(load_model(tmp_path / "lora")), expected)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "lora")).eval()
    assert (logits(adapted) - expected).abs().max() < 1e-4
    writers = {f"model.layers.{i}.{name}" for i in (1, 2) for name in ("self_attn.o_proj", "mlp.down_proj")}
    assert adapted.peft_config["default"].target_modules == writers


@pytest.mark.parametrize("on_disk", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loaded", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 0.75), (2, 1.0), (3, 2.5)])
def test_loads_to_the_bits_of_the_edited_checkpoint(tmp_path, monkeypatch, on_disk, loaded, rank, alpha):
    monkeypatch.setattr("refusal.method.orthogonalize._BLOCK", 300)  # the merge is of whole matrices
    both(tmp_path, "qwen2", rank, alpha, dtype=on_disk)
    whole, merged = (load_model(tmp_path / name, loaded).state_dict() for name in ("whole", "lora"))
    assert list(whole) == list(merged) and all(torch.equal(whole[name], merged[name]) for name in whole)


def test_a_tied_embedding_is_untied_where_it_is_merged(tmp_path):
    both(tmp_path, "llama", tie_word_embeddings=True)
    base, merged = load_model(tmp_path / "base"), load_model(tmp_path / "lora")
    assert base.lm_head.weight is base.model.embed_tokens.weight
    assert torch.equal(merged.lm_head.weight, base.lm_head.weight) and not merged.config.tie_word_embeddings
    assert not torch.equal(merged.model.embed_tokens.weight, base.lm_head.weight)


def test_reports_agree_and_size_does_not(tmp_path):
    whole, adapter = both(tmp_path, hidden_size=32, vocab_size=4096)
    assert adapter == whole
    size = {name: sum(path.stat().st_size for path in (tmp_path / name).iterdir()) for name in ("whole", "lora")}
    assert {path.name for path in (tmp_path / "lora").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert size["lora"] < size["whole"] / 20


@pytest.mark.parametrize(
    ("model_type", "options", "alpha", "said"),
    [
        ("llama", {"mlp_bias": True}, 1.0, "mlp.down_proj.bias is a bias"),
        ("llama", {"attention_bias": True}, 1.0, "self_attn.o_proj.bias is a bias"),
        ("mixtral", {}, 1.0, "is an expert"),
        ("qwen3_moe", {}, 1.0, "is an expert"),
        ("qwen2", {}, 0.0, "alpha is 0"),
    ],
)
def test_what_no_adapter_can_say_is_refused_before_anything_is_written(tmp_path, model_type, options, alpha, said):
    tiny_model(model_type, **options).save_pretrained(tmp_path / "base")
    with pytest.raises(UserError, match=said):
        lora(tmp_path, alpha=alpha)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_hash_sees_base_and_adapter(tmp_path):
    both(tmp_path)
    hashes = {weights_hash(tmp_path / name) for name in ("base", "whole", "lora")}
    lora(tmp_path)  # an adapter is replaced
    hashes.add(weights_hash(tmp_path / "lora"))
    tiny_model("qwen2", seed=1).save_pretrained(tmp_path / "base")
    hashes |= {weights_hash(tmp_path / name) for name in ("base", "lora")}
    assert len(hashes) == 6


def test_base_and_adapter_move_together_and_no_place_is_in_the_files(tmp_path):
    both(tmp_path / "one")
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in (tmp_path / "one/lora").iterdir())
    expected = weights_hash(tmp_path / "one/lora")
    shutil.move(tmp_path / "one", tmp_path / "two")
    assert base_folder(tmp_path / "two/lora").samefile(tmp_path / "two/base")
    assert weights_hash(tmp_path / "two/lora") == expected
    shutil.rmtree(tmp_path / "two/base")
    with pytest.raises(UserError, match=r"adapter_config.json: base_model_name_or_path leads to .* which is no checkpoint"):
        load_model(tmp_path / "two/lora")


def cut(folder: Path) -> None:
    path = folder / "lora/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda at: tiny_model("qwen2", num_hidden_layers=2).save_pretrained(at / "base"), "does not fit"),
        (lambda at: tiny_model("qwen2", intermediate_size=64).save_pretrained(at / "base"), "does not fit"),
        (cut, "adapter_model.safetensors: cannot be read"),
    ],
)
def test_an_adapter_that_is_cut_off_or_of_another_model_is_refused(tmp_path, damage, said):
    both(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=said):
        load_model(tmp_path / "lora")
