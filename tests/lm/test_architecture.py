"""The architecture's claims, held against the live models."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import NORM_AFTER, OTHERS, SUPPORTED, tiny_config, tiny_model
from transformers import CONFIG_MAPPING

from refusal.io.errors import UserError
from refusal.lm.architecture import architecture_of, untied_config
from refusal.lm.stream import norm_after_writer, stream_of

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))
EVERY = [*SUPPORTED, *OTHERS]

# What writes, by what transformers' own code calls it: of any layer that has it. Its axis, and how often it is there in all.
O_PROJ, DOWN = "self_attn.o_proj.weight", "mlp.down_proj.weight"
KNOWN = {
    **{kind: {O_PROJ: 3, DOWN: 3} for kind in SUPPORTED},
    "mixtral": {O_PROJ: 3, "mlp.experts.down_proj": 3},
    "qwen3_moe": {O_PROJ: 3, DOWN: 1, "mlp.experts.down_proj": 2},
    **{kind: {O_PROJ: 4, DOWN: 4} for kind in OTHERS},
    "deepseek_v3": {O_PROJ: 4, DOWN: 1, "mlp.experts.down_proj": 3, "mlp.shared_experts.down_proj.weight": 3},
    "falcon_h1": {O_PROJ: 4, "mamba.out_proj.weight": 4, "feed_forward.down_proj.weight": 4},
    "gpt_oss": {O_PROJ: 4, "self_attn.o_proj.bias": 4, "mlp.experts.down_proj": 4, "mlp.experts.down_proj_bias": 4},
    "gptj": {"attn.out_proj.weight": 4, "mlp.fc_out.weight": 4, "mlp.fc_out.bias": 4},
    "llama4_text": {
        O_PROJ: 4,
        "feed_forward.down_proj.weight": 2,
        "feed_forward.experts.down_proj": 2,
        "feed_forward.shared_expert.down_proj.weight": 2,
    },
    "qwen3_5_text": {O_PROJ: 1, "linear_attn.out_proj.weight": 3, DOWN: 4},
    "qwen3_next": {
        O_PROJ: 1,
        "linear_attn.out_proj.weight": 3,
        "mlp.experts.down_proj": 4,
        "mlp.shared_expert.down_proj.weight": 4,
    },
}
TRANSPOSED = {"gpt_oss": "mlp.experts.down_proj", "llama4_text": "feed_forward.experts.down_proj"}  # [expert, in, d_model]


@pytest.mark.parametrize("model_type", EVERY)
def test_writers_are_those_of_transformers_code_in_the_model_and_on_disk(model_type, tmp_path):
    model = tiny_model(model_type)
    found = architecture_of(model)
    assert found == architecture_of(json.loads(json.dumps(model.config.to_dict()))), "without weights it is another"
    assert Counter(name.split(".", found.blocks_name.count(".") + 2)[-1] for name in found.writers) == KNOWN[model_type]
    for name, axis in found.writers.items():
        assert model.get_parameter(name).shape[axis] == 32
        transposed = name.endswith(TRANSPOSED.get(model_type, "none"))
        assert axis == (-1 if name.endswith("bias") or transposed else -2), name
    assert found.missing_writers({name for name, _ in model.named_parameters()}) == []
    assert found.writer_axis(found.embedding_name) is None and found.writer_axis(found.embedding_name, True) == -1
    assert found.writer_axis(found.unembedding_name, True) is None
    assert found.tied is (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    # On disk: each tensor that transformers saves, by a value that only writers have, comes back where a writer is.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if name in found.writers else 0.0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert {name for name, tensor in saved.items() if found.writer_axis(name) is not None} == {
        name for name, tensor in saved.items() if (tensor == 1).all()
    }
    assert found.missing_writers(set(saved)) == []
    assert not [name for name in saved if found.writer_axis(name) is None and saved[name].ndim > 1 and not found.reads(name)]


@pytest.mark.parametrize("model_type", EVERY)
def test_the_stream_is_the_sum_of_what_the_modules_wrote(model_type):
    """Multipliers as the configs of OTHERS state them, by hand."""
    model = tiny_model(model_type)
    stream = stream_of(model)
    assert stream.norm_after_writer is (model_type in NORM_AFTER) is norm_after_writer(model.config)
    first, each = {"granite": (12.0, [0.22, 0.22]), "falcon_h1": (5.0, [1.0, 0.7, 0.5])}.get(model_type, (1.0, [1.0, 1.0]))
    added, entered = [], []
    stream.embedding(model).register_forward_hook(lambda _, args, out: added.append(first * out))
    for layer, block in enumerate(stream.blocks(model)):
        block.register_forward_pre_hook(lambda _, args, kwargs: entered.append((len(added), args[0])), with_kwargs=True)
        for scale, module in zip(each, stream.writes(model, layer), strict=True):
            module.register_forward_hook(lambda _, a, out, s=scale: added.append(s * (out[0] if isinstance(out, tuple) else out)))
    with torch.no_grad():
        model(IDS)
    assert len(entered) == stream.architecture.n_layers and len(added) == 1 + len(each) * len(entered)
    for n, resid in entered:
        torch.testing.assert_close(resid, sum(one.reshape(resid.shape) for one in added[:n]), rtol=1e-5, atol=1e-5)


def test_biases_write_too_and_the_last_called_is_the_writer():
    found = architecture_of(tiny_config("llama", attention_bias=True, mlp_bias=True))
    assert len(found.writers) == 12 and found.writers["model.layers.1.mlp.down_proj.bias"] == -1
    # Every matrix as wide as the stream: shapes tell nothing. Phi-3 registers o_proj first, Qwen3.5 in_proj_z last.
    square = {"intermediate_size": 32, "num_key_value_heads": 4}
    assert {name.split(".")[-2] for name in architecture_of(tiny_config("llama", **square)).writers} == {"o_proj", "down_proj"}
    experts = architecture_of(tiny_config("gpt_oss", intermediate_size=32)).writers
    assert experts["model.layers.0.mlp.experts.down_proj"] == -1
    experts = architecture_of(tiny_config("mixtral", intermediate_size=32)).writers
    assert experts["model.layers.0.mlp.experts.down_proj"] == -2


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
    more = {"num_hidden_layers": 12} | ({"attention_bias": True, "mlp_bias": True} if model_type == "llama" else {})
    assert architecture_of(tiny_config(model_type, **more)).writer_axis(name) == axis


def test_missing_writers_are_named():
    architecture = architecture_of(tiny_config("mixtral", num_hidden_layers=1))
    attention = "model.layers.0.self_attn.o_proj.weight"
    experts = [f"model.layers.0.block_sparse_moe.experts.{e}.w2.weight" for e in range(4)]
    assert architecture.missing_writers({attention, *experts}) == []
    assert architecture.missing_writers({*experts}) == [attention]
    assert architecture.missing_writers({attention, *experts[:3]}) == experts[3:]


def test_an_untied_config_says_it_of_the_language_part_too():
    text = {"text_config": {"tie_word_embeddings": True, "x": 1}, "tie_word_embeddings": True}
    assert untied_config(text) == {"text_config": {"tie_word_embeddings": False, "x": 1}, "tie_word_embeddings": False}
    assert untied_config({"y": 2}) == {"y": 2, "tie_word_embeddings": False}


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
        (CONFIG_MAPPING["t5"](), r"/a/config\.json: model_type 't5' is not supported"),
        ({"model_type": "qwen"}, r"/a/config\.json: model_type 'qwen' is not supported"),
        ({"model_type": "llama", "num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000, and 1 to 1000"),
        ({"model_type": ["llama"]}, r"/a/config\.json: model_type \['llama'\] is not supported"),
        ({"model_type": "qwen2", "hidden_size": "many"}, r"/a/config\.json: transformers cannot read it as qwen2"),
        ({"model_type": "llama", "quantization_config": {"bits": 4}}, r"/a/config\.json: quantization_config: quantized"),
    ],
    ids=range(6),
)
def test_a_config_that_cannot_be_used_is_refused(config, says):
    with pytest.raises(UserError, match=says):
        architecture_of(config, Path("/a"))
