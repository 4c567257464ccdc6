"""Low-rank adapters in PEFT's published format (https://huggingface.co/docs/peft, LoRA), read without PEFT: W + B A.

They are written by `refusal.method.orthogonalize`: a weight [d_model, n] gets A = B_o W [k, n] and B = -alpha B_o^T [d_model, k],
with B_o the basis that is taken out; the embedding [vocab, d_model] gets the same of its transpose.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

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


@dataclass(frozen=True)
class Product:
    """What an adapter adds to one weight, B [d, k] times A [k, n]: to its transpose where it is an `embedding`'s.

    misfit: what is said where it does not fit."""

    b: Tensor
    a: Tensor
    embedding: bool
    misfit: str

    def added_to(self, w: Tensor, scale: float = 1.0) -> Tensor:
        """W + scale B A, in A's dtype. Raises UserError where W is of another shape."""
        before = w.mT if self.embedding else w
        if before.shape != (len(self.b), self.a.shape[-1]):
            raise UserError(self.misfit)
        after = add_product(before.to(self.a.dtype), self.b if scale == 1 else scale * self.b, self.a)
        return after.mT if self.embedding else after


def read_products(folder: Path, base: Path, names: Container[str]) -> dict[str, Product]:
    """The products of an adapter by the weight of `base` that each is added to.

    Raises UserError for an adapter that cannot be read, or adds to what is not among the `names` of base's weights.
    """
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be read ({error}): download it, or run orthogonalize, again.") from None
    products = {}
    for key, a in tensors.items():
        module, _, kind = key.removeprefix(ROOT).partition(".lora_")
        name, other = f"{module}.weight", key.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
        fix = "give the base that the adapter names, or run orthogonalize again"
        misfit = f"{folder / WEIGHTS}: {key} does not fit {base}: {fix}."
        if name not in names or other not in tensors:
            raise UserError(misfit)
        if kind in ("A.weight", "embedding_A"):
            products[name] = Product(tensors[other], a, kind == "embedding_A", misfit)
    return products


@torch.no_grad()
def merge(model: PreTrainedModel, folder: Path, base: Path) -> None:
    """Put W + B A for W into a model of `base`, computed from the checkpoint's own tensors in float32 at least and cast
    once to its dtype: the same bits as in the edited checkpoint. A tied embedding is untied first.

    Raises UserError for an adapter that cannot be read, or is of another model.
    """
    shard_of = {entry.name: shard for shard in read_shards(base) for entry in shard.entries}
    for name, product in read_products(folder, base, shard_of).items():
        head = cast(Any, model.get_output_embeddings())
        if product.embedding and head.weight is model.get_parameter(name):
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
            model.config.tie_word_embeddings = False
        before = shard_of[name].tensor(name)
        model.get_parameter(name).copy_(product.added_to(before).to(before.dtype))
