"""The architecture's claims, held against the live models."""

from pathlib import Path

import pytest
import torch
from tiny import PRE_NORM, tiny_config, tiny_model
from transformers import CONFIG_MAPPING

from refusal.io.errors import UserError
from refusal.lm.architecture import SUPPORTED, architecture_of

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_stream_is_the_sum_of_the_named_modules_outputs(model_type):
    model = tiny_model(model_type)
    architecture = architecture_of(model.config)
    blocks = architecture.blocks(model)
    writers = [m for b in blocks for m in (architecture.attn_out(b), architecture.mlp_out(b))]
    added, entered = [], []
    for module in [architecture.embedding(model), *writers]:
        module.register_forward_hook(lambda _, args, out: added.append(out[0] if isinstance(out, tuple) else out))
    for block in [*blocks, model.model.norm]:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert len(blocks) == architecture.n_layers == 3
    assert len(added) == 7 and len(entered) == 4
    for layer, resid in enumerate(entered):
        torch.testing.assert_close(resid, sum(added[: 1 + 2 * layer]), rtol=1e-5, atol=1e-5)
        assert layer == 3 or torch.equal(resid, hidden[layer])


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_writer_axis_of_live_parameters(model_type):
    """Writers have an axis of d_model where `writer_axis` says so; each layer has those of attention and MLP, and no reader."""
    model = tiny_model(model_type, **({"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}))
    architecture = architecture_of(model.config)
    axes = {name: architecture.writer_axis(name) for name, _ in model.named_parameters()}
    writers = {name: axis for name, axis in axes.items() if axis is not None}
    assert all(model.get_parameter(name).shape[axis] == 32 for name, axis in writers.items())
    assert len(writers) == 3 * (4 if model_type == "llama" else 2)
    assert not any(word in name for name in writers for word in ("gate", "up_proj", "norm", "qkv", "router"))
    assert architecture.writer_axis("model.embed_tokens.weight") is None
    assert architecture.writer_axis("model.embed_tokens.weight", include_embedding=True) == -1
    assert architecture.writer_axis("lm_head.weight", include_embedding=True) is None
    assert architecture.norm_after_writer == (model_type not in PRE_NORM)
    assert architecture.missing_writers(set(axes)) == []


@pytest.mark.parametrize(
    ("model_type", "name", "axis"),
    [
        ("llama", "model.layers.11.self_attn.o_proj.bias", -1),
        ("llama", "model.layers.11.mlp.down_proj.bias", -1),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w2.weight", -2),
        ("mixtral", "model.layers.0.block_sparse_moe.experts.7.w1.weight", None),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", -2),
        ("qwen3_moe", "model.layers.0.mlp.experts.100.down_proj.weight", -2),
        ("qwen3_moe", "model.layers.0.mlp.experts.gate_up_proj", None),
        ("qwen2", "model.layers.0.self_attn.v_proj.weight", None),
        ("qwen2", "model.layers.0.self_attn.o_proj.weight_scale_inv", None),
        ("qwen2", "x.model.layers.0.self_attn.o_proj.weight", None),
    ],
)
def test_writer_axis_of_names_on_disk(model_type, name, axis):
    assert architecture_of(tiny_config(model_type)).writer_axis(name) == axis


def test_missing_writers_are_named():
    architecture = architecture_of(tiny_config("mixtral", num_hidden_layers=1))
    attention = "model.layers.0.self_attn.o_proj.weight"
    experts = [f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]
    assert architecture.missing_writers({attention, *experts}) == []
    assert architecture.missing_writers({*experts}) == [attention]
    assert architecture.missing_writers({attention, *experts[:3]}) == experts[3:]


CASES = [("gemma", {}, True), ("gemma3_text", {}, True), ("llama", {}, False), ("llama", {"tie_word_embeddings": True}, True)]


@pytest.mark.parametrize(("model_type", "overrides", "tied"), CASES)
def test_tied_from_config_and_from_config_json(model_type, overrides, tied):
    config = tiny_config(model_type, **overrides)
    raw = config.to_dict()
    if not overrides:
        raw.pop("tie_word_embeddings")  # real Gemma files leave it to the class default
    assert architecture_of(config) == architecture_of(raw)
    assert architecture_of(raw).tied is tied


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (CONFIG_MAPPING["gpt2"](), r"model_type 'gpt2'.*refusal/lm/architecture\.py"),
        ({"model_type": "gpt2"}, r"/a/config\.json: model_type 'gpt2'.*refusal/lm/architecture\.py"),
        ({"model_type": ["llama"]}, r"/a/config\.json: model_type \['llama'\] is not supported"),
        ({"model_type": "qwen2", "hidden_size": "many"}, r"/a/config\.json: transformers cannot read it as qwen2"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, r"/a/config\.json: quantization_config: quantized"),
    ],
    ids=range(5),
)
def test_a_config_that_cannot_be_used_is_refused(config, says):
    with pytest.raises(UserError, match=says):
        architecture_of(config, Path("/a"))
