"""Adding a direction's raw difference: at the whole prompt, at its last token, or at every token, generated ones too.

`sweep.complete` adds at the prompt alone, which is what the study does. The other two are here to be compared with it,
by transformers' own greedy generation under a hook: the last token is known by the prefill being the only long forward.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor

from refusal import activations, anatomy, interventions
from refusal import store as stores
from refusal.activations import left_pad
from refusal.interventions import Addition, intervene
from refusal.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Where = Literal["prefill", "last", "all"]
WHERE: tuple[Where, ...] = ("prefill", "last", "all")


class _Placed(Addition):
    """The addition at some positions only."""

    def __init__(self, vector: Tensor, layer: int, where: Where):
        super().__init__(vector, layer)
        self.where = where

    def apply(self, r: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        if self.where == "all":
            return super().apply(r)
        if r.shape[1] == 1:  # a generated token
            return r
        return super().apply(r) if self.where == "prefill" else torch.cat([r[:, :-1], super().apply(r[:, -1:])], dim=1)


def added(
    model: PreTrainedModel,
    weights: str,
    prompts: Sequence[Sequence[int]],
    vector: Float[Tensor, " d_model"],
    layer: int,
    where: Where,
    stop: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    store: Store,
) -> list[list[int]]:
    """Greedy completions, without their stop token, of prompts of two tokens or more under the addition."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    shared = {
        "weights": weights,
        "dtype": str(model.dtype),
        "device": model.device.type,
        "vector": vector.double().tolist(),
        "layer": layer,
        "where": where,
        "stop": sorted(stop),
        "max_new_tokens": max_new_tokens,
    }
    code = (activations, anatomy, interventions, sys.modules[__name__])
    jobs = [(stores.key("added", *code, **shared, rows=[list(prompts[i]) for i in batch]), batch) for batch in batches]

    def compute(batch: list[int]) -> bytes:
        ids, mask = (t.to(model.device) for t in left_pad([prompts[i] for i in batch], pad_id))
        with torch.inference_mode(), intervene(model, _Placed(vector, layer, where)):
            out = cast(Any, model).generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=sorted(stop),
                pad_token_id=pad_id,
            )
        rows = []
        for tokens in out[:, ids.shape[1] :].tolist():
            end = next((i for i, token in enumerate(tokens) if token in stop), len(tokens))
            rows.append(tokens[:end])
        return json.dumps(rows).encode()

    found: list[list[int]] = [[] for _ in prompts]
    for batch, value in zip(batches, store.run(jobs, compute, f"addition, {where}"), strict=True):
        for i, tokens in zip(batch, json.loads(value), strict=True):
            found[i] = tokens
    return found
