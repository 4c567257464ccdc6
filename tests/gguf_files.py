"""Tiny GGUF files, written by the gguf package's own writer from models and tokenizers of transformers.

What llama.cpp's converter does to tensors (https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py) is done here once more
from its description: the rows of Llama's queries and keys lie in pairs that are rotated together, and Gemma's norms are 1 + w.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tiny import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/tokenizer.json
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
NAMES = {"gemma3_text": "gemma3"}  # of architectures, where they differ
# Texts that a tokenizer may well split otherwise.
HARD = [
    "Hello,  world's 12345 tests!\n\n\tx",
    "naïve 漢字 🙂 ½",
    "  the theory\r\nthen",
    "<|im_end|> the<|im_start|>",
    "x=1;  ",
    "'S 'll",
]


def byte_pairs(n_merges: int = 60) -> PreTrainedTokenizerFast:
    """A tokenizer as Qwen2's, of the bytes and a few merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIALS) + 256 + n_merges, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["How do I paint the door of the old house?", "the theory, then the other 12 1234 things"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE
    )


def pairs_rotated_together(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Row 2 j + p of a head from row j of its half p."""
    size = len(w) // n_heads
    order = [h * size + p * size // 2 + j for h in range(n_heads) for j in range(size // 2) for p in (0, 1)]
    return w[order]


def tensors_of(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's tensors in float32, as a file has them, by their names there."""
    config, kind = model.config, model.config.model_type
    arch = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == NAMES.get(kind, kind))
    name_of, tensors = gguf.get_tensor_name_map(arch, config.num_hidden_layers), {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        w, (base, suffix) = tensor.float().numpy(), name.rsplit(".", 1)
        if kind == "llama" and base.endswith(("q_proj", "k_proj")):
            w = pairs_rotated_together(w, config.num_attention_heads if "q_proj" in base else config.num_key_value_heads)
        if kind.startswith("gemma") and "norm" in base:
            w = w + 1
        tensors[f"{name_of.get_name(base)}.{suffix}"] = w
    return tensors


def write(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    raw: Mapping[str, tuple[np.ndarray, gguf.GGMLQuantizationType]] | None = None,
    template: str | None = TEMPLATE,
    pre: str = "qwen2",
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """A file of the model in float32, or of the blocks (bytes [rows, n]) that `raw` has of a tensor."""
    config = model.config
    kind = NAMES.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters.get("rope_theta") or 10000.0)
    writer.add_rope_dimension_count(model.model.layers[0].self_attn.head_dim)
    writer.add_key_length(model.model.layers[0].self_attn.head_dim)
    writer.add_value_length(model.model.layers[0].self_attn.head_dim)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    ids = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_token_list([token for token, _ in ids])
    writer.add_token_types([3 if token in SPECIALS else 1 for token, _ in ids])
    writer.add_token_merges([" ".join(merge) for merge in _merges(tokenizer)])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    if template is not None:
        writer.add_chat_template(template)
    for key, value in (extra or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, w in tensors_of(model).items():
        if raw and name in raw:
            writer.add_tensor(name, raw[name][0], raw_dtype=raw[name][1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(w))
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    """Write what the writer was given."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, str]]:
    import json

    return [tuple(merge) for merge in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def chat_model(model_type: str, tokenizer: PreTrainedTokenizerFast, **overrides: Any) -> PreTrainedModel:
    """A tiny model of the tokenizer's vocabulary."""
    settings = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    with torch.no_grad():
        return tiny_model(model_type, **(settings | {"bos_token_id": None} | overrides))
