"""Tiny random models of every supported architecture, for tests: 3 layers, d_model 32, seconds to nothing.

Weights are far larger than a fresh initialisation's, and norms and biases are random too: with small or zero ones
an intervention changes next to nothing, and any test of it passes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from refusal.lm.architecture import SUPPORTED
from refusal.lm.load import LM

PRE_NORM = tuple(t for t in SUPPORTED if t not in ("gemma2", "gemma3_text"))

_EXTRA = {
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
}


def tiny_config(model_type: str, **overrides) -> PreTrainedConfig:
    """A config of 3 layers, d_model 32, 4 heads, vocabulary 96; the architecture's own default for tied embeddings."""
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return CONFIG_MAPPING[model_type](**(common | _EXTRA.get(model_type, {}) | overrides))


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A random model of `tiny_config`, in eval mode; the same weights for the same seed, in any process."""
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            centre = 1.0 if "norm" in name and "gemma" not in model_type else 0.0  # Gemma's norms scale by 1 + w
            std = 0.5 if "embed_tokens" in name else 0.2
            parameter.copy_(centre + std * noise)
    return model.to(dtype)


def tiny_direction(d_model: int = 32, seed: int = 0, rows: int | None = None) -> torch.Tensor:
    """A random unit vector [d_model], or [rows, d_model] of them."""
    shape = (d_model,) if rows is None else (rows, d_model)
    return nn.functional.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(1000 + seed)), dim=-1)


def tiny_lm(model: str | PreTrainedModel = "qwen2", weights: str = "w", stop: Iterable[int] = (), **overrides) -> LM:
    """An LM without a tokenizer: of a tiny model by its type, or of the model given. Padding is token 0."""
    return LM(tiny_model(model, **overrides) if isinstance(model, str) else model, None, weights, frozenset(stop), 0)


def tiny_prompts(lengths: Sequence[int] = (7, 3, 12, 7, 1, 9), seed: int = 0) -> list[list[int]]:
    """Prompts of these lengths, of random tokens that neither pad nor begin nor end anything."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


class Ascii:
    """A tokenizer of one token a character, whose chat template is the prompt itself."""

    name_or_path, model_max_length = "ascii", 256
    added_tokens_decoder: ClassVar[dict] = {}

    def apply_chat_template(self, chats: list, **_: Any) -> list[str]:
        return [chat[-1]["content"] for chat in chats]

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [list(text.encode("ascii")) for text in texts]}

    def batch_decode(self, rows: list[list[int]], **_: Any) -> list[str]:
        return [bytes(row).decode("ascii") for row in rows]


def text_lm(weights: str = "w", **how: Any) -> LM:
    """`tiny_lm` of prompts and answers in ASCII."""
    return replace(tiny_lm(weights=weights, vocab_size=128, **how), tokenizer=Ascii())
