"""A Qwen-1 checkpoint (Qwen/Qwen-1_8B-Chat and kin) in native Qwen2 layout, with a fast tokenizer and no remote code.

transformers 5 knows no `model_type: qwen`, the hub's own code for it no longer runs there, and TransformerLens's adapter
drops the rotary embedding. But every Qwen-1 tensor is a tensor of Qwen2, so nothing is computed: `c_attn` holds the
rows Q|K|V, `w1` is the up projection, `w2` the gate, and the converted file has the same values under other names.

Source of the method: `modeling_qwen.py`, `configuration_qwen.py` and `tokenization_qwen.py` of the Qwen release. Dynamic NTK
and log-n attention act past `seq_length` alone, which becomes the longest input allowed.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config

from refusal.io.errors import UserError
from refusal.io.files import write_whole
from refusal.io.progress import progress
from refusal.lm.checkpoint import INDEX, SINGLE, Shard, read_json, read_shards, real_file
from refusal.lm.qwen1_tokenizer import chat_tokenizer

RANKS = "qwen.tiktoken"

# Names of the first release, and what they were called later.
_EARLY = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}
_SIZES = (*_EARLY.values(), "kv_channels", "seq_length")
_NUMBERS = {"rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6}  # and their defaults
# Where anything else would be another architecture.
_ONLY: dict[str, tuple] = {
    "model_type": ("qwen",),
    "architectures": (["QWenLMHeadModel"],),
    "no_bias": (True,),
    "rotary_pct": (1.0,),
    "scale_attn_weights": (True,),
    "tie_word_embeddings": (False,),
    "use_cache_quantization": (False, None),
    "activation": ("swiglu",),
    "pos_emb": ("rotary",),
    "apply_residual_connection_post_layernorm": (False,),
    "n_inner": (None,),
}
# What changes neither a forward pass in float32 nor an input up to seq_length.
_INERT = re.compile(
    r"(attn|resid|embd)_pdrop|(attn|emb)_dropout_prob|bias_dropout_fusion|bf16|fp16|fp32|softmax_in_fp32|((torch|params)_)?dtype"
    r"|use_(flash_attn|dynamic_ntk|logn_attn|cache|cache_kernel)|onnx_safe|initializer_range|max_position_embeddings|n_positions"
    r"|summary_\w+|auto_map|tokenizer_(class|type)|transformers_version|_name_or_path|(bos|eos|pad)_token_id"
)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFERS = re.compile(r".*(inv_freq|logn_tensor|masked_bias)")


def is_qwen1(folder: Path) -> bool:
    """Whether a checkpoint folder's config.json says `model_type: qwen`. Raises UserError where it is no JSON object."""
    return read_json(folder, "config.json").get("model_type") == "qwen"


def convert(source: Path, target: Path) -> None:
    """Write the Qwen-1 checkpoint `source` to the folder `target` (made anew) in native Qwen2 layout.

    Shards and dtype stay as they are; memory holds one shard. Adds the fast tokenizer with the ChatML template, and
    generation_config.json, whose stop tokens are <|im_end|> and <|endoftext|>.

    Raises UserError, with nothing written, naming the key of config.json or the tensor that is not understood.
    """
    fields = read_config(source)
    shards, layout = read_shards(source), _layout(fields)
    dtype = _check_tensors(source, shards, layout)
    tokenizer, config = peek(source)
    config.dtype = dtype

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = sum(shard.path.stat().st_size for shard in shards)
    with progress(total, "Qwen-1 to Qwen2 layout", "B") as bar:
        for shard in shards:
            tensors: dict[str, Tensor] = {}
            with safe_open(shard.path, "pt") as file:
                for entry in shard.entries:
                    if entry.name in layout:
                        name, _ = layout[entry.name]
                        parts = file.get_tensor(entry.name).chunk(3 if "{}" in name else 1)
                        tensors |= {name.format(which): part for which, part in zip("qkv", parts, strict=False)}
            save_file(tensors, target / shard.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(sorted(tensors), shard.name)
            bar.update(shard.path.stat().st_size)
    if [shard.name for shard in shards] != [SINGLE]:
        n_bytes = sum(entry.n_bytes for shard in shards for entry in shard.entries if entry.name in layout)
        index = {"metadata": {"total_size": n_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_whole(target / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    config.save_pretrained(target)
    end = tokenizer.pad_token_id
    GenerationConfig(bos_token_id=end, eos_token_id=[tokenizer.eos_token_id, end], pad_token_id=end).save_pretrained(target)
    tokenizer.save_pretrained(target)


def peek(source: Path) -> tuple[PreTrainedTokenizerFast, Qwen2Config]:
    """The tokenizer and config that `convert` writes, here of bfloat16; weights need not be there yet. Raises as it does."""
    c = read_config(source)
    tokenizer = chat_tokenizer(real_file(source, RANKS), c["seq_length"])
    if len(tokenizer) > c["vocab_size"]:
        raise UserError(f"{source / RANKS}: {len(tokenizer)} tokens, and vocab_size is {c['vocab_size']}: download it again.")
    return tokenizer, Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"] // 2,  # Qwen-1 counts both halves of the gated MLP
        num_hidden_layers=c["num_hidden_layers"],
        num_attention_heads=c["num_attention_heads"],
        num_key_value_heads=c["num_attention_heads"],
        vocab_size=c["vocab_size"],
        rms_norm_eps=c["layer_norm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": float(c["rotary_emb_base"])},
        max_position_embeddings=c["seq_length"],
        tie_word_embeddings=False,
        bos_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )


def read_config(source: Path) -> dict[str, Any]:
    """The fields of config.json under their later names, each key understood or refused; weights need not be there yet.

    Raises UserError naming the key, and for a base model, which generation_config.json calls `chat_format: raw`.
    """
    where, config = source / "config.json", _NUMBERS | read_json(source, "config.json")
    for early, name in _EARLY.items():
        if early in config:
            value = config.pop(early)
            # padded_vocab_size is the one that holds, where both are given.
            if name != "vocab_size" and config.get(name, value) != value:
                raise UserError(f"{where}: {early} is {value} and {name} {config[name]}: they should be the same.")
            config[name] = value
    for key, value in config.items():
        if key in _ONLY:
            if value not in _ONLY[key]:
                raise UserError(f"{where}: {key} is {value!r}, and only {_ONLY[key][0]!r} can be converted.")
        elif key in _SIZES:
            if type(value) is not int or value < 1:
                raise UserError(f"{where}: {key} is {value!r}, not a positive whole number.")
        elif key in _NUMBERS:
            if type(value) not in (int, float) or not value > 0:
                raise UserError(f"{where}: {key} is {value!r}, not a positive number.")
        elif not _INERT.fullmatch(key):
            raise UserError(f"{where}: {key} is not understood, so this checkpoint is not converted.")
    if missing := [key for key in _SIZES if key not in config]:
        raise UserError(f"{where}: {missing[0]} is missing, which every Qwen-1 checkpoint has.")
    if config["kv_channels"] * config["num_attention_heads"] != config["hidden_size"]:
        raise UserError(f"{where}: kv_channels times num_attention_heads is not hidden_size: not a Qwen-1 shape.")
    if config["intermediate_size"] % 2 or config["kv_channels"] % 2:
        raise UserError(f"{where}: intermediate_size and kv_channels must be even in a Qwen-1 checkpoint.")
    if (source / "generation_config.json").exists():
        given = read_json(source, "generation_config.json").get("chat_format", "chatml")
        if given != "chatml":
            raise UserError(
                f"{source / 'generation_config.json'}: chat_format is {given!r}; this is a base model: "
                "set model.id to its chat version, which has chatml."
            )
    return config


def _layout(c: dict[str, Any]) -> dict[str, tuple[str, list[int]]]:
    """{a tensor of Qwen-1: (its name in Qwen2, its shape)}, with {} for q, k and v, whose rows it holds one after another."""
    d, vocab, inner = c["hidden_size"], c["vocab_size"], c["intermediate_size"] // 2
    layout = {
        "transformer.wte.weight": ("model.embed_tokens.weight", [vocab, d]),
        "transformer.ln_f.weight": ("model.norm.weight", [d]),
        "lm_head.weight": ("lm_head.weight", [vocab, d]),
    }
    block = {
        "ln_1.weight": ("input_layernorm.weight", [d]),
        "ln_2.weight": ("post_attention_layernorm.weight", [d]),
        "attn.c_attn.weight": ("self_attn.{}_proj.weight", [3 * d, d]),
        "attn.c_attn.bias": ("self_attn.{}_proj.bias", [3 * d]),
        "attn.c_proj.weight": ("self_attn.o_proj.weight", [d, d]),
        "mlp.w1.weight": ("mlp.up_proj.weight", [inner, d]),
        "mlp.w2.weight": ("mlp.gate_proj.weight", [inner, d]),
        "mlp.c_proj.weight": ("mlp.down_proj.weight", [d, inner]),
    }
    for i in range(c["num_hidden_layers"]):
        layout |= {f"transformer.h.{i}.{old}": (f"model.layers.{i}.{new}", shape) for old, (new, shape) in block.items()}
    return layout


def _check_tensors(source: Path, shards: list[Shard], layout: dict[str, tuple[str, list[int]]]) -> str:
    """The one dtype of the weights. Raises UserError for a tensor too many, missing, or of another shape, and for more dtypes."""
    entries = {e.name: (shard.where, e) for shard in shards for e in shard.entries if not _BUFFERS.fullmatch(e.name)}
    for name, (where, entry) in entries.items():
        if name not in layout:
            raise UserError(f"{where}: tensor {name} is not one of a Qwen-1 checkpoint, so it is not converted.")
        if list(entry.shape) != layout[name][1]:
            raise UserError(f"{where}: {name} is {list(entry.shape)}, and config.json makes it {layout[name][1]}.")
    if missing := [name for name in layout if name not in entries]:
        raise UserError(f"{source}: tensor {missing[0]} of a Qwen-1 checkpoint is missing: download it again.")
    dtypes = sorted({entry.dtype for _, entry in entries.values()})
    if len(dtypes) > 1 or dtypes[0] not in _DTYPES:
        raise UserError(f"{source}: weights are {', '.join(dtypes)}, not one of {', '.join(_DTYPES)} throughout.")
    return _DTYPES[dtypes[0]]
