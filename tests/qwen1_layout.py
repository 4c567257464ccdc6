"""Tiny random Qwen-1 checkpoints in the exact upstream layout, and a plain-torch forward of that layout.

The forward is written from the architecture's description (RMSNorm, joint Q|K|V with bias, rotary embedding on halves,
`c_proj(w1(x) * silu(w2(x)))`) and shares nothing with the converter or with transformers.
"""

import base64
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BOTH = {
    "architectures": ["QWenLMHeadModel"],
    "initializer_range": 0.02,
    "kv_channels": 8,
    "model_type": "qwen",
    "no_bias": True,
    "rotary_pct": 1.0,
    "scale_attn_weights": True,
    "seq_length": 64,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_dynamic_ntk": True,
    "use_flash_attn": "auto",
    "use_logn_attn": True,
}
LATE = BOTH | {
    "auto_map": {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"},
    **dict.fromkeys(("attn_dropout_prob", "emb_dropout_prob"), 0.0),
    **dict.fromkeys(("bf16", "fp16", "fp32", "use_cache_kernel", "use_cache_quantization"), False),
    "hidden_size": 32,
    "intermediate_size": 96,
    "layer_norm_epsilon": 1e-06,
    "max_position_embeddings": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "onnx_safe": None,
    "rotary_emb_base": 10000,
    "tokenizer_class": "QWenTokenizer",
    "transformers_version": "4.32.0",
    "vocab_size": 512,
}
EARLY = BOTH | {
    "activation": "swiglu",
    **dict.fromkeys(("apply_residual_connection_post_layernorm", "fp16"), False),
    **{"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.1},
    **dict.fromkeys(("bf16", "bias_dropout_fusion"), True),
    **dict.fromkeys(("bos_token_id", "eos_token_id"), 151643),
    "ffn_hidden_size": 96,
    "layer_norm_epsilon": 1e-05,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 3,
    "n_positions": 6144,
    "padded_vocab_size": 512,
    "params_dtype": "torch.bfloat16",
    "pos_emb": "rotary",
    "rotary_emb_base": 500,
    "tokenizer_type": "QWenTokenizer",
    "transformers_version": "4.31.0",
    "vocab_size": 470,
}
# 256 bytes and some merges; the specials come after them.
TOKENS = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the", b"in", b"ing", b"\n\n", b"us", b"user", b"ass", b"ist"]


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """Weights of both configs. Large and random, norms and biases too, or a wrong conversion would pass."""
    g = torch.Generator().manual_seed(seed)
    block = {"ln_1.weight": [32], "ln_2.weight": [32], "attn.c_attn.weight": [96, 32], "attn.c_attn.bias": [96]}
    block |= {"attn.c_proj.weight": [32, 32], "mlp.c_proj.weight": [32, 48], "mlp.w1.weight": [48, 32], "mlp.w2.weight": [48, 32]}
    shapes = {"transformer.wte.weight": [512, 32], "lm_head.weight": [512, 32], "transformer.ln_f.weight": [32]}
    shapes |= {f"transformer.h.{i}.{name}": shape for i in range(3) for name, shape in block.items()}
    noise = {name: (0.5 if "wte" in name else 0.2) * torch.randn(*shape, generator=g) for name, shape in shapes.items()}
    return {name: 1 + values if "ln_" in name else values for name, values in noise.items()}


def write(folder: Path, config: dict, weights: dict[str, Tensor], n_shards: int = 2, buffers: bool = True) -> Path:
    """The checkpoint as the hub has it: shards and index (or one file), config.json, qwen.tiktoken, and code to ignore."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, fields in {
        "config.json": config,
        "generation_config.json": {"chat_format": "chatml", "eos_token_id": 151643, "pad_token_id": 151643},
        "tokenizer_config.json": {"tokenizer_class": "QWenTokenizer", "model_max_length": 8192},
    }.items():
        (folder / name).write_text(json.dumps(fields))
    (folder / "modeling_qwen.py").write_text("raise SystemExit('code of a checkpoint was run')\n")
    (folder / "qwen.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(TOKENS)))
    if buffers:
        weights = weights | {"transformer.rotary_emb.inv_freq": torch.ones(4), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    if n_shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    weight_map = {}
    for i in range(n_shards):
        name, held = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors", sorted(weights)[i::n_shards]
        save_file({n: weights[n] for n in held}, folder / name)
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def forward(config: dict, w: dict[str, Tensor], ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """Logits [batch, seq, vocab] and the residual stream before each block, list of [batch, seq, d_model].

    Positions count from the first column, padding included, as upstream: the rotary embedding is relative.
    """
    heads = config.get("num_attention_heads", config.get("n_head"))
    size, eps, base = config["kv_channels"], config["layer_norm_epsilon"], config["rotary_emb_base"]
    batch, seq = ids.shape

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight

    angle = torch.arange(seq)[:, None] / base ** (torch.arange(0, size, 2) / size)[None]  # [seq, size / 2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]

    def rotate(x: Tensor) -> Tensor:  # [batch, seq, heads, size], first half with second half
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    allowed = torch.ones(seq, seq).tril().bool()[None, None]
    if mask is not None:
        allowed = allowed & mask[:, None, None, :].bool()
    r, stream = w["transformer.wte.weight"][ids], []
    for i in range(3):
        stream.append(r)
        h = f"transformer.h.{i}."
        joint = norm(r, w[h + "ln_1.weight"]) @ w[h + "attn.c_attn.weight"].T + w[h + "attn.c_attn.bias"]
        q, k, v = (part.reshape(batch, seq, heads, size) for part in joint.split(heads * size, dim=-1))
        scores = torch.einsum("bqhs,bkhs->bhqk", rotate(q), rotate(k)) / math.sqrt(size)
        pattern = scores.masked_fill(~allowed, -1e30).softmax(-1)
        mixed = torch.einsum("bhqk,bkhs->bqhs", pattern, v).reshape(batch, seq, -1)
        r = r + mixed @ w[h + "attn.c_proj.weight"].T
        x = norm(r, w[h + "ln_2.weight"])
        gate = x @ w[h + "mlp.w2.weight"].T
        r = r + (x @ w[h + "mlp.w1.weight"].T * (gate * torch.sigmoid(gate))) @ w[h + "mlp.c_proj.weight"].T
    return norm(r, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T, stream
