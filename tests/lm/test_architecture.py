"""The architecture's claims, held against the live models."""

import pytest
import torch
from tiny import PRE_NORM, tiny_config, tiny_model
from transformers import CONFIG_MAPPING

from refusal.io.errors import UserError
from refusal.lm.architecture import SUPPORTED, architecture_of

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_stream_is_the_sum_of_the_named_modules_outputs(model_type):
    model = tiny_model(model_type)
    architecture = architecture_of(model.config)
    blocks = architecture.blocks(model)
    added, entered = [], []

    def keep(_, args, output):
        added.append(output[0] if isinstance(output, tuple) else output)

    for module in [architecture.embedding(model)] + [m for b in blocks for m in (architecture.attn_out(b), architecture.mlp_out(b))]:
        module.register_forward_hook(keep)
    for block in [*blocks, model.model.norm]:
        block.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert len(blocks) == architecture.n_layers == 3
    assert len(added) == 7 and len(entered) == 4
    for layer, resid in enumerate(entered):
        torch.testing.assert_close(resid, sum(added[: 1 + 2 * layer]), rtol=1e-5, atol=1e-5)
    for layer in range(3):
        assert torch.equal(entered[layer], hidden[layer])


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_writer_axis_of_live_parameters(model_type):
    """Every parameter whose output is d_model and that isn't a reader, by moving it: on tiny models only writers have
    an axis of d_model where `writer_axis` says so, and each layer has its attention and MLP writers."""
    overrides = {"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {}
    model = tiny_model(model_type, **overrides)
    architecture = architecture_of(model.config)
    axes = {name: architecture.writer_axis(name) for name, _ in model.named_parameters()}
    writers = {name: axis for name, axis in axes.items() if axis is not None}
    for name, axis in writers.items():
        assert model.get_parameter(name).shape[axis] == 32
    per_layer = 4 if model_type == "llama" else 2
    assert len(writers) == 3 * per_layer
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
    block = "model.layers.0."
    experts = {f"{block}block_sparse_moe.experts.{e}.w2.weight" for e in range(4)}
    assert architecture.missing_writers({block + "self_attn.o_proj.weight"} | experts) == []
    assert architecture.missing_writers(experts) == [block + "self_attn.o_proj.weight"]
    last = block + "block_sparse_moe.experts.3.w2.weight"
    assert architecture.missing_writers({block + "self_attn.o_proj.weight"} | experts - {last}) == [last]


@pytest.mark.parametrize(
    ("model_type", "overrides", "tied"),
    [
        ("gemma", {}, True),
        ("gemma3_text", {}, True),
        ("llama", {}, False),
        ("llama", {"tie_word_embeddings": True}, True),
    ],
)
def test_tied_from_config_and_from_config_json(model_type, overrides, tied):
    config = tiny_config(model_type, **overrides)
    raw = config.to_dict()
    if not overrides:
        raw.pop("tie_word_embeddings")  # real Gemma files leave it to the class default
    assert architecture_of(config) == architecture_of(raw)
    assert architecture_of(raw).tied is tied


def test_unknown_architecture_says_what_to_add_and_where():
    for config in (CONFIG_MAPPING["gpt2"](), {"model_type": "gpt2"}, {"model_type": "nonesuch"}):
        with pytest.raises(UserError, match=r"model_type '\w+'.*refusal/lm/architecture\.py"):
            architecture_of(config)
    with pytest.raises(UserError, match=r"config\.json"):
        architecture_of({"model_type": "qwen2", "hidden_size": "many"})
