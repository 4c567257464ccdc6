"""Folders of small checkpoints, as somebody else's tools write them."""

import json
from pathlib import Path

import torch
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# As Llama 3.2's: a system block with the day of the run, headers, and an end of turn that is not the end of text.
LLAMA = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ day }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<|begin_of_text|>"
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<start_of_turn>", "<end_of_turn>"]


def byte_level(folder: Path, model_type: str, template: str, **overrides: object) -> None:
    """A random model with a byte-level tokenizer of its own, no padding token, and this chat template; weights in shards."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIALS[0], eos_token=SPECIALS[1], chat_template=template, model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    settings = {"vocab_size": len(tokenizer), "max_position_embeddings": 512, "pad_token_id": None} | overrides
    tiny_model(model_type, **settings).save_pretrained(folder, max_shard_size="50KB")


def word_level(folder: Path, template: str | None, pad: str | None = "<pad>", weights: bool = False) -> None:
    """A tokenizer of ten letters and this template, and a config with room for 40 tokens; with `weights`, a whole Llama."""
    words = ["<pad>", "<end>", "[UNK]", *"abcdefghij"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token=pad, chat_template=template)
    tokenizer.save_pretrained(folder)
    if weights:
        tiny_model("llama", vocab_size=96).save_pretrained(folder)
    else:
        (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 40}))


def arm_of(difference: torch.Tensor) -> dict[str, torch.Tensor]:
    """What models/directions.safetensors holds of these differences [n_layers, d_model], of which layer 0 has none."""
    difference = difference * (torch.arange(len(difference)) > 0)[:, None]
    arm = {"difference": difference, "unit": difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-9)}
    return arm | {"safe_mean": torch.zeros_like(difference), "defined": torch.arange(len(difference)) > 0}
