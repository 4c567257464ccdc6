"""Tiny random models of every supported architecture, for tests: 3 layers, d_model 32, seconds to nothing.

Weights are far larger than a fresh initialisation's, and norms and biases are random too: with small or zero ones
an intervention changes next to nothing, and any test of it passes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from refusal.lm.architecture import auto_class
from refusal.lm.load import LM

# What every identity is tested on ...
SUPPORTED = ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "qwen3_moe")
PRE_NORM = tuple(t for t in SUPPORTED if t not in ("gemma2", "gemma3_text"))
# ... and what structure, sums, edits and batches are: blocks of every kind, in four layers.
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MLA = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 4}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
OTHERS = {
    "cohere": {},
    "deepseek_v3": MLA | ROUTED | {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "falcon_h1": MAMBA | {"attention_out_multiplier": 0.5, "ssm_out_multiplier": 0.7, "embedding_multiplier": 5.0},
    "gemma3": {},
    "glm4": {"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "granite": {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.1, "logits_scaling": 2.0},
    "llama4_text": {
        "intermediate_size_mlp": 48,
        "num_local_experts": 4,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 1, 0],
        "layer_types": ["chunked_attention"] * 3 + ["full_attention"],
        "attention_chunk_size": 64,
    },
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "qwen2_5_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "qwen3_5_text": LINEAR,
    "qwen3_next": MOE | LINEAR | {"shared_expert_intermediate_size": 24},
    "qwen3_vl": {"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}},
    "smollm3": {},
}
NORM_AFTER = {"gemma2", "gemma3", "gemma3_text", "glm4", "olmo2", "olmo3"}  # a norm between writer and stream
ADDED = {"gemma", "gemma2", "gemma3", "gemma3_text", "qwen3_next", "qwen3_5_text"}  # their norms scale by 1 + w
_VISION = {
    "gemma3": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8},
    "qwen2_5_vl": {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32},
    "qwen3_vl": {"hidden_size": 16, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32},
}
_EXTRA = OTHERS | {
    "qwen3_moe": MOE | {"mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8},
}


def tiny_config(model_type: str, **overrides) -> PreTrainedConfig:
    """A config of 3 layers (4 of OTHERS), d_model 32, 4 heads, vocabulary 96; the architecture's own default for tied embeddings.
    Of a multimodal one, of its language part, beside a vision tower of one layer."""
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4 if model_type in OTHERS else 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text = common | _EXTRA.get(model_type, {}) | overrides
    if model_type in _VISION:
        return CONFIG_MAPPING[model_type](text_config=text, vision_config=_VISION[model_type] | {"patch_size": 4})
    return CONFIG_MAPPING[model_type](**text)


def tiny_model(model_type: str, seed: int = 0, dtype: torch.dtype = torch.float32, **overrides) -> PreTrainedModel:
    """A random model of `tiny_config`, in eval mode; the same weights for the same seed, in any process."""
    with torch.random.fork_rng(devices=[]):
        config = tiny_config(model_type, **overrides)
        model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("A_log", "dt_bias")):  # how fast a state decays, which random numbers would blow up
                continue
            gain = any(word in name for word in ("norm", "ln_")) and (model_type not in ADDED or "linear_attn" in name)
            centre = 1.0 if gain and not name.endswith("bias") else 0.0
            std = 0.5 if any(word in name for word in ("embed_tokens", "wte")) else 0.2
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
