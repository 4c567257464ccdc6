"""A resident model is, tensor by tensor, what loading each checkpoint by itself gives: on every architecture, tied or not."""

import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.io.errors import UserError
from refusal.lm import resident
from refusal.lm.architecture import SUPPORTED
from refusal.lm.load import load_model
from refusal.lm.resident import SwappableLM
from refusal.method.orthogonalize import Edit, orthogonalize

IDS = torch.tensor([[5, 9, 33, 2, 71]])


def edited(tmp_path, model_type, **options):
    """A base, an edit with the embedding and one without, on disk."""
    base = tmp_path / "base"
    tiny_model(model_type, **options).save_pretrained(base, max_shard_size="30KB")
    edits = [
        Edit(tmp_path / "a", tiny_direction(), 1.0),
        Edit(tmp_path / "b", tiny_direction(seed=1), 0.5, include_embedding=False),
    ]
    orthogonalize(base, edits)
    return base, tmp_path / "a", tmp_path / "b"


@torch.no_grad()
def same(found, folder, dtype) -> bool:
    alone = load_model(folder, dtype)
    ours, theirs = found.state_dict(), alone.state_dict()
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in theirs) and torch.equal(found(IDS).logits, alone(IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_any_edit_may_follow_any(tmp_path, model_type, tied):
    base, a, b = edited(tmp_path, model_type, tie_word_embeddings=tied)
    dtype = "bfloat16" if model_type == "llama" else "float32"
    model = SwappableLM(base, dtype, "cpu")
    for folder in (base, a, b, a, base, b):
        assert same(model.load_weights(folder), folder, dtype), folder.name
    assert not same(model.load_weights(a), base, dtype)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_is_merged_and_taken_out_again(tmp_path, tied):
    base, a, _ = edited(tmp_path, "llama", tie_word_embeddings=tied)
    orthogonalize(base, [Edit(tmp_path / "lora", tiny_direction(), 1.0, format="lora")])
    model = SwappableLM(base, "float32", "cpu")
    for folder in (tmp_path / "lora", base, tmp_path / "lora", a):
        assert same(model.load_weights(folder), folder, "float32"), folder.name


def test_one_load_serves_all(tmp_path, monkeypatch):
    base, a, b = edited(tmp_path, "qwen2")
    loads = []
    monkeypatch.setattr(resident, "load_model", lambda *arguments: loads.append(arguments) or load_model(*arguments))
    model = SwappableLM(base, "float32", "cpu")
    for folder in (a, b, base):
        model.load_weights(folder)
    assert len(loads) == 1


def test_a_checkpoint_of_another_base_is_refused(tmp_path):
    base, *_ = edited(tmp_path, "qwen2")
    tiny_model("qwen2", intermediate_size=56).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="other: holds other tensors than"):
        SwappableLM(base, "float32", "cpu").load_weights(tmp_path / "other")
