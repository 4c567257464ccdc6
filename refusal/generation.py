"""Greedy completions, many prompts and many interventions in one batch.

A row of a batch is a prompt with its own direction and alpha, so cells of a sweep, their baseline and their controls
run side by side. Rows that have ended leave the batch; only the last position's logits are computed.
"""

from collections.abc import Collection, Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from refusal.activations import left_pad
from refusal.interventions import Ablation, Addition, intervene


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
    every decoded token makes garbage that substring matching calls refusal.
    """
    ids, mask = left_pad(prompts, pad_id)
    ids, mask = ids.to(model.device), mask.to(model.device)
    padded = not bool(mask.all())
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    stops = torch.tensor(sorted(stop), device=model.device)
    cache = DynamicCache(config=model.config)
    live = torch.arange(len(prompts), device=model.device)
    completions: list[list[int]] = [[] for _ in prompts]
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
            cache.batch_select_indices(keep)
            live, tokens, positions, mask = live[keep], tokens[keep], positions[keep], mask[keep]
            if ablation is not None:
                ablation.select(keep)
        ids = tokens[:, None]
        positions = positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return completions
