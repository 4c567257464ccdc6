"""Activations of whole sets of prompts, from the model through the resume store into one safetensors file.

Batches are composed before anything is computed, and rows go to their places in the file as they come: an interrupted run
ends in the same bytes, and memory holds one batch, however many prompts there are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load, save

from refusal.io import store as stores
from refusal.io.store import Store
from refusal.lm.checkpoint import Writer
from refusal.method.activations import Prefix, batches, last_token_resid_pre, not_finite

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prompt_sets(
    pairs: Sequence[Mapping[str, Any]], unrelated: Sequence[Mapping[str, Any]], splits: Sequence[str]
) -> dict[str, list[str]]:
    """The prompts of each set: `<split>.harmful` and `<split>.safe` of pairs, `<split>.unrelated` of other safe prompts."""
    return {
        f"{split}.{name}": [row[field] for row in rows if row["split"] == split]
        for split in splits
        for name, rows, field in (("harmful", pairs, "harmful"), ("safe", pairs, "safe"), ("unrelated", unrelated, "safe"))
    }


def collect(
    model: PreTrainedModel,
    weights: str,
    sets: Mapping[str, Sequence[Sequence[int]]],
    method: str,
    pad_id: int,
    batch_size: int,
    store: Store,
    path: Path,
) -> None:
    """Write last-token `resid_pre` of each set of prompts (token ids) to `path`: {set: [prompt, n_layers, d_model]}.

    `weights` is the checkpoint's hash. Batches hold prompts of one set; what all prompts of all sets begin with is
    computed once (`batched`). Raises UserError where an activation is not finite.
    """
    n_layers, d_model = model.config.num_hidden_layers, model.config.hidden_size
    prefix = Prefix(model, [tokens for prompts in sets.values() for tokens in prompts]) if method == "batched" else None
    shared = {
        "weights": weights,
        "method": method,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "pad": pad_id,
        "prefix": prefix and prefix.ids,
    }

    def compute(batch: list[list[int]]) -> bytes:
        found = last_token_resid_pre(model, batch, method, pad_id, prefix)
        if not found.isfinite().all():
            raise not_finite(model)
        return save({"resid_pre": found})

    with Writer(path, {name: (model.dtype, (len(prompts), n_layers, d_model)) for name, prompts in sets.items()}) as out:
        for name, prompts in sets.items():
            skip = len(prefix.ids) if prefix else 0
            plan = batches([len(tokens) - skip for tokens in prompts], method, batch_size)
            chosen = [[list(prompts[i]) for i in batch] for batch in plan]
            jobs = [(stores.key("activations", (last_token_resid_pre,), **shared, ids=batch), batch) for batch in chosen]
            for batch, value in zip(plan, store.run(jobs, compute, f"{method} {name}"), strict=True):
                out.put(name, batch, load(value)["resid_pre"])
