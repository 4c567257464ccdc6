"""Greedy completions, many prompts and many interventions in one batch.

A row of a batch is a prompt with its own direction and alpha, so cells of a sweep, their baseline and their controls
run side by side. Rows that have ended leave the batch; only the last position's logits are computed.
"""

from collections.abc import Collection, Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from refusal.activations import left_pad
from refusal.interventions import Ablation, Addition, intervene
from refusal.memory import in_parts


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    stop: Collection[int],
    max_new_tokens: int,
    pad_id: int,
    ablation: Ablation | None = None,
    addition: Addition | None = None,
) -> list[list[int]]:
    """Greedy completion of each prompt, without its stop token, at most `max_new_tokens` tokens.

    `ablation` acts on prompt and completion alike; `addition` acts on the prompt alone (at prefill), since adding at
    every decoded token makes garbage that substring matching calls refusal. An ablation with a row for each prompt is taken
    as constructed. Where memory runs out the rows are decoded in parts, padded as they would have been together.
    """
    ids, mask = left_pad(prompts, pad_id)
    padded = not bool(mask.all())

    def rows(first: int, last: int) -> list[list[int]]:
        whole = last - first == len(prompts)
        if ablation is not None and len(ablation.basis) > 1 and not whole:
            ablation.assign(torch.arange(first, last))
        added = addition
        if addition is not None and len(addition.vector) > 1 and not whole:
            added = Addition(addition.vector[first:last, 0], addition.layer)
        return _decode(model, ids[first:last], mask[first:last], padded, stop, max_new_tokens, ablation, added)

    return [completion for part in in_parts(rows, len(prompts), "generation") for completion in part]


def _decode(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch seq"],
    mask: Int[Tensor, "batch seq"],
    padded: bool,
    stop: Collection[int],
    max_new_tokens: int,
    ablation: Ablation | None,
    addition: Addition | None,
) -> list[list[int]]:
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    stops = torch.tensor(sorted(stop), device=model.device)
    cache = DynamicCache(config=model.config)
    live = torch.arange(len(ids), device=model.device)
    completions: list[list[int]] = [[] for _ in ids]
    always = [] if ablation is None else [ablation]
    prefill = always if addition is None else [*always, addition]

    for step in range(max_new_tokens):
        with intervene(model, *(always if step else prefill)):
            logits = model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=mask if padded else None,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        tokens = logits.argmax(-1)
        going = ~torch.isin(tokens, stops)
        for row, token, goes in zip(live.tolist(), tokens.tolist(), going.tolist(), strict=True):
            if goes:
                completions[row].append(token)
        if not bool(going.any()):
            break
        if not bool(going.all()):
            keep = going.nonzero().flatten()
            cache.batch_select_indices(keep.cpu())  # an index of any device: layers may lie on several
            live, tokens, positions, mask = live[keep], tokens[keep], positions[keep], mask[keep]
            if ablation is not None:
                ablation.select(keep)
        ids = tokens[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return completions
