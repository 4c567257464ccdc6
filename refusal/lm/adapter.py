"""Low-rank adapters in PEFT's published format (https://huggingface.co/docs/peft, LoRA), read without PEFT: W + B A.

They are written by `refusal.method.orthogonalize`: a weight [d_model, n] gets A = B_o W [k, n] and B = -alpha B_o^T [d_model, k],
with B_o the basis that is taken out; the embedding [vocab, d_model] gets the same of its transpose.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from refusal.io.errors import UserError
from refusal.lm.checkpoint import read_json, read_shards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."  # PEFT wraps the model twice


def add_product(
    w: Float[Tensor, "*lead d n"], b: Float[Tensor, "d k"], a: Float[Tensor, "*lead k n"]
) -> Float[Tensor, "*lead d n"]:
    """W + B A, one rank after another and element by element: no bit depends on which columns are computed together."""
    for column, row in zip(b.unbind(-1), a.unbind(-2), strict=True):
        w = torch.addcmul(w, column[:, None], row[..., None, :])
    return w


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

    Raises UserError for an adapter that cannot be read, or is of another model.
    """
    try:
        adapter = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}): run orthogonalize again.") from None
    shard_of = {entry.name: shard for shard in read_shards(base) for entry in shard.entries}
    for key, a in adapter.items():
        module, _, kind = key.removeprefix(ROOT).partition(".lora_")
        if kind not in ("A.weight", "embedding_A"):
            continue
        name, b = f"{module}.weight", adapter[key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")]
        embedding = kind == "embedding_A"
        if name not in shard_of:
            raise UserError(f"{folder / WEIGHTS}: {key} does not fit {base}: run orthogonalize again.")
        if embedding and model.lm_head.weight is model.get_parameter(name):
            model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        before = shard_of[name].tensor(name)
        w = before.mT if embedding else before
        if w.shape != (len(b), a.shape[-1]):
            raise UserError(f"{folder / WEIGHTS}: {key} does not fit {base}: run orthogonalize again.")
        after = add_product(w.to(a.dtype), b, a).to(before.dtype)
        model.get_parameter(name).copy_(after.mT if embedding else after)
