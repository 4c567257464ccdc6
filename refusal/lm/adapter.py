"""Rank-1 adapters in PEFT's published format (https://huggingface.co/docs/peft, LoRA): W + B A, without PEFT.

A weight [d_model, in] gets A = v^T W [1, in] and B = -alpha v [d_model, 1]; the embedding [vocab, d_model] gets
A = (E v)^T [1, vocab] and B = -alpha v. The adapter changes what the embedding looks up and never the unembedding, also where
the two share a tensor. What has no place in it (biases, experts that the model holds fused) is refused by
`refusal.method.orthogonalize`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from refusal.io.errors import UserError
from refusal.lm.checkpoint import read_json, read_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."  # PEFT wraps the model twice


def adapter_files(
    target: Path, source: Path, components: Mapping[str, Tensor], update: Float[Tensor, " d_model"], embedding_name: str
) -> dict[str, bytes]:
    """The two files of an adapter to lie in `target`: components {tensor name: v^T W or E v}, update -alpha v.

    The base is named by its path from `target`, so that the two can move together and no machine's path is in them.
    """
    tensors, modules = {}, set()
    for name, component in components.items():
        module = name.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        key = f"{_ROOT}{module}."
        a, b = ("lora_embedding_A", "lora_embedding_B") if name == embedding_name else ("lora_A.weight", "lora_B.weight")
        tensors[key + a], tensors[key + b] = component[None].contiguous(), update.to(component.dtype)[:, None].contiguous()
    config = {
        "base_model_name_or_path": os.path.relpath(source, target),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 1,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    return {CONFIG: (json.dumps(config, indent=2) + "\n").encode(), WEIGHTS: save(tensors)}


def base_folder(folder: Path) -> Path | None:
    """The checkpoint that an adapter's folder names; None for a folder that is no adapter.

    Raises UserError where that checkpoint is not there.
    """
    if not (folder / CONFIG).is_file():
        return None
    base = folder / str(read_json(folder, CONFIG).get("base_model_name_or_path"))
    if not (base / "config.json").is_file():
        raise UserError(f"{folder / CONFIG}: base_model_name_or_path leads to {base}, which is no checkpoint: put it there.")
    return base


@torch.no_grad()
def merge(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Put W + B A for W into a model of `base`, computed from the checkpoint's own tensors in float32 at least and cast
    once to its dtype: the same bits as in the edited checkpoint. A tied embedding is untied first.
    """
    adapter = load_file(folder / WEIGHTS)
    holder = {entry.name: shard.path for shard in read_shards(base) for entry in shard.entries}
    for key, a in adapter.items():
        module, _, kind = key.removeprefix(_ROOT).partition(".lora_")
        if kind not in ("A.weight", "embedding_A"):
            continue
        b = adapter[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        name = f"{module}.weight"
        if name not in holder or a.shape[0] != 1:
            raise UserError(f"{folder / WEIGHTS}: {key} does not fit {base}: write the adapter anew.")
        if kind == "embedding_A" and model.lm_head.weight is model.get_parameter(name):
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        with safe_open(holder[name], framework="pt") as file:
            before = file.get_tensor(name)
        rows, columns = (a[0], b[:, 0]) if kind == "embedding_A" else (b[:, 0], a[0])
        model.get_parameter(name).copy_(torch.addr(before.to(a.dtype), rows, columns).to(before.dtype))
