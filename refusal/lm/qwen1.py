"""A Qwen-1 checkpoint (Qwen/Qwen-1_8B-Chat and kin) in native Qwen2 layout, with a fast tokenizer and no remote code.

transformers 5 knows no `model_type: qwen`, the hub's own code for it no longer runs there, and TransformerLens's adapter
drops the rotary embedding. But every Qwen-1 tensor is a tensor of Qwen2, so nothing is computed: `c_attn` holds the
rows Q|K|V, `w1` is the up projection, `w2` the gate, and the converted file has the same bytes under other names.

Source of the method: `modeling_qwen.py`, `configuration_qwen.py` and `tokenization_qwen.py` of the Qwen release. Dynamic NTK
and log-n attention act past `seq_length` alone, which becomes the longest input allowed.
"""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from refusal.io.errors import UserError
from refusal.io.files import sync, write_whole
from refusal.io.store import progress
from refusal.lm.checkpoint import INDEX, SINGLE, Entry, Shard, data_of, header_bytes, read_json, read_shards, real_file
from refusal.lm.qwen1_tokenizer import CHATML, END, SPECIALS, TURN_END, fast_tokenizer

RANKS = "qwen.tiktoken"

# Names of the first release, and what they were called later.
_EARLY = {
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_layer": "num_hidden_layers",
    "ffn_hidden_size": "intermediate_size",
    "padded_vocab_size": "vocab_size",
}
_SIZES = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "kv_channels",
    "seq_length",
)
# Where anything else would be another architecture; the first value is what a missing key means.
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
    r"|rotary_emb_base|layer_norm_epsilon"
)
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BUFFERS = re.compile(r".*(inv_freq|logn_tensor|masked_bias)")
_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(.+)")
_NAMES = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "ln_1.weight": "input_layernorm.weight",
    "ln_2.weight": "post_attention_layernorm.weight",
    "attn.c_proj.weight": "self_attn.o_proj.weight",
    "mlp.w1.weight": "mlp.up_proj.weight",
    "mlp.w2.weight": "mlp.gate_proj.weight",
    "mlp.c_proj.weight": "mlp.down_proj.weight",
}


def is_qwen1(folder: Path) -> bool:
    """Whether a checkpoint folder's config.json says `model_type: qwen`. Raises UserError where it is no JSON object."""
    return read_json(folder, "config.json").get("model_type") == "qwen"


def convert(source: Path, target: Path) -> None:
    """Write the Qwen-1 checkpoint `source` to the folder `target` (made anew) in native Qwen2 layout.

    Shards and dtype stay as they are; tensors go from file to file one by one, so memory does not grow with the model.
    Adds tokenizer.json, tokenizer_config.json with the ChatML template, and generation_config.json, whose stop tokens are
    <|im_end|> and <|endoftext|>.

    Raises UserError, with nothing written, naming the key of config.json or the tensor that is not understood.
    """
    config = read_config(source)
    shards = read_shards(source)
    wanted = _tensors(config)
    plans = [(shard, [part for entry in shard.entries for part in _parts(shard, entry, wanted)]) for shard in shards]
    if wanted:
        raise UserError(f"{source}: tensor {next(iter(wanted))} of a Qwen-1 checkpoint is missing: download it again.")
    entries = [entry for _, parts in plans for entry, *_ in parts]
    dtypes = {entry.dtype for entry in entries}
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        raise UserError(f"{source}: weights are {', '.join(sorted(dtypes))}, not one of {', '.join(_DTYPES)} throughout.")
    tokenizer = fast_tokenizer(real_file(source, RANKS))
    if tokenizer.get_vocab_size() > config["vocab_size"]:
        raise UserError(f"{source / RANKS}: {tokenizer.get_vocab_size()} tokens, and vocab_size is {config['vocab_size']}.")

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    weight_map: dict[str, str] = {}
    total = sum(entry.n_bytes for entry in entries)
    with progress(total, "Qwen-1 to Qwen2 layout", "B") as bar:
        for shard, parts in plans:
            _write_shard(shard, parts, target, bar)
            weight_map |= {entry.name: shard.name for entry, *_ in parts}
    if [shard.name for shard in shards] != [SINGLE]:
        _write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})
    end, turn_end = tokenizer.encode(END + TURN_END).ids
    _write_json(target / "config.json", qwen2_config(config, _DTYPES[dtypes.pop()], end))
    _write_json(
        target / "generation_config.json",
        {"bos_token_id": end, "eos_token_id": [turn_end, end], "pad_token_id": end},
    )
    tokenizer.save(str(target / "tokenizer.json"), pretty=False)
    _write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": config["seq_length"],
            "eos_token": TURN_END,
            "pad_token": END,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHATML,
        },
    )
    sync(target)


def read_config(source: Path) -> dict[str, Any]:
    """The fields of config.json under their later names, each key understood or refused; weights need not be there yet.

    Raises UserError naming the key, and for a base model, which generation_config.json calls `chat_format: raw`.
    """
    raw, where = read_json(source, "config.json"), source / "config.json"
    config: dict[str, Any] = {"rotary_emb_base": 10000, "layer_norm_epsilon": 1e-6, "seq_length": None}
    for key in sorted(raw, key=lambda key: key in _EARLY):  # padded_vocab_size is the one that holds, where both stand
        value = raw[key]
        if key in _ONLY:
            if value not in _ONLY[key]:
                raise UserError(f"{where}: {key} is {value!r}, and only {_ONLY[key][0]!r} can be converted.")
        elif (name := _EARLY.get(key, key)) in _SIZES:
            if type(value) is not int or value < 1:
                raise UserError(f"{where}: {key} is {value!r}, not a positive whole number.")
            if key in _EARLY and name != "vocab_size" and raw.get(name, value) != value:
                raise UserError(f"{where}: {key} is {value} and {name} {raw[name]}: they should be the same.")
            config[name] = value
        elif not _INERT.fullmatch(key):
            raise UserError(f"{where}: {key} is not understood, so this checkpoint is not converted.")
    for key in ("rotary_emb_base", "layer_norm_epsilon"):
        config[key] = raw.get(key, config[key])
        if isinstance(config[key], bool) or not isinstance(config[key], int | float) or config[key] <= 0:
            raise UserError(f"{where}: {key} is {config[key]!r}, not a positive number.")
    for key in _SIZES:
        if config.get(key) is None:
            raise UserError(f"{where}: {key} is missing, which every Qwen-1 checkpoint has.")
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


def peek(source: Path) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """The tokenizer and the fields of config.json as `convert` will write them; weights need not be there yet."""
    config = read_config(source)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast_tokenizer(real_file(source, RANKS)),
        eos_token=TURN_END,
        pad_token=END,
        chat_template=CHATML,
        model_max_length=config["seq_length"],
    )
    return tokenizer, qwen2_config(config, "bfloat16", len(tokenizer) - len(SPECIALS))


def _tensors(c: dict[str, Any]) -> dict[str, list[int]]:
    """{name: shape} of all that a checkpoint of this config holds."""
    d, inner = c["hidden_size"], c["intermediate_size"] // 2  # the config counts both halves of the gated MLP
    shapes = {
        "transformer.wte.weight": [c["vocab_size"], d],
        "transformer.ln_f.weight": [d],
        "lm_head.weight": [c["vocab_size"], d],
    }
    block = {"ln_1.weight": [d], "ln_2.weight": [d], "attn.c_attn.weight": [3 * d, d], "attn.c_attn.bias": [3 * d],
             "attn.c_proj.weight": [d, d], "mlp.w1.weight": [inner, d], "mlp.w2.weight": [inner, d],
             "mlp.c_proj.weight": [d, inner]}  # fmt: skip
    return shapes | {f"transformer.h.{i}.{name}": shape for i in range(c["num_hidden_layers"]) for name, shape in block.items()}


def _parts(shard: Shard, entry: Entry, wanted: dict[str, list[int]]) -> list[tuple[Entry, str, int]]:
    """The tensors of the new layout that an old one becomes, each with its name and the first of its rows that they are; takes
    it off `wanted`."""
    if _BUFFERS.fullmatch(entry.name):
        return []
    shape = wanted.pop(entry.name, None)
    if shape is None:
        raise UserError(f"{shard.where}: tensor {entry.name} is not one of a Qwen-1 checkpoint, so it is not converted.")
    if list(entry.shape) != shape:
        raise UserError(f"{shard.where}: {entry.name} is {list(entry.shape)}, and config.json makes it {shape}.")
    block = _BLOCK.fullmatch(entry.name)
    if block is None:
        return [(replace(entry, name=_NAMES[entry.name]), entry.name, 0)]
    prefix, name = f"model.layers.{block[1]}.", block[2]
    if not name.startswith("attn.c_attn."):
        return [(replace(entry, name=prefix + _IN_BLOCK[name]), entry.name, 0)]
    third, rest = entry.shape[0] // 3, entry.shape[1:]
    return [
        (
            Entry(f"{prefix}self_attn.{of}_proj.{name.rpartition('.')[2]}", entry.dtype, (third, *rest), entry.n_bytes // 3),
            entry.name,
            i * third,
        )
        for i, of in enumerate("qkv")
    ]


def _write_shard(shard: Shard, parts: list[tuple[Entry, str, int]], target: Path, bar: tqdm) -> None:
    with shard.open() as file, (target / shard.name).open("wb") as out:
        out.write(header_bytes([entry for entry, *_ in parts], {"format": "pt"}))
        for entry, name, first in parts:
            out.write(data_of(file.get_tensor(name)[first : first + entry.shape[0]]))
            bar.update(entry.n_bytes)


def qwen2_config(c: dict[str, Any], dtype: str, end: int) -> dict[str, Any]:
    same = ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **{key: c[key] for key in same},
        "num_key_value_heads": c["num_attention_heads"],
        "intermediate_size": c["intermediate_size"] // 2,
        "hidden_act": "silu",
        "rms_norm_eps": c["layer_norm_epsilon"],
        "rope_parameters": {"rope_type": "default", "rope_theta": float(c["rotary_emb_base"])},
        "max_position_embeddings": c["seq_length"],
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "eos_token_id": end,
        "dtype": dtype,
    }


def _write_json(path: Path, value: dict) -> None:
    write_whole(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())
