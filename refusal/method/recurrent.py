"""Greedy completions of models that carry a state besides keys and values: linear attention, state-space layers, convolutions.

Their state after a token holds all that came before, so that no row can enter a batch that runs, and what is padded behind a
prompt would stay in it. Prompts are padded in front, where the model's own mask keeps padding out of the state; a batch runs
until its last row has ended, in transformers' own cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from transformers import DynamicCache

from refusal.lm.load import LM
from refusal.method.activations import left_pad, not_finite
from refusal.method.interventions import Ablation, Addition, intervene


def complete_in_turn(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    limits: tuple[int, int],
    ablation: Ablation | None,
    rows: Sequence[int],
    addition: Addition | None,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """The completion of each prompt, as `refusal.method.generate.generate` says, batch by batch in order of length.
    limits: (new tokens of each, prompts at once)."""
    completions: list[list[int]] = [[] for _ in prompts]
    max_new_tokens, batch_size = limits
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        if ablation is not None and len(ablation) > 1:
            ablation.assign(torch.tensor([rows[i] for i in batch]))
        steps = _steps(lm, [prompts[i] for i in batch], addition)
        going = set(batch)
        for tokens in steps:
            for i, token in zip(batch, tokens, strict=True):
                if i in going and token not in lm.stop:
                    completions[i].append(token)
                if token in lm.stop or len(completions[i]) == max_new_tokens:
                    going.discard(i)
            left = sum(max_new_tokens - len(completions[i]) for i in [*going, *order[first + batch_size :]])
            progress(max_new_tokens * len(prompts) - left)
            if not going:
                break
    return completions


def _steps(lm: LM, prompts: Sequence[Sequence[int]], addition: Addition | None):
    """The next token of every row, step by step, for as long as it is asked."""
    model, cache = cast(Any, lm.model), DynamicCache(config=lm.model.config)
    ids, mask = (tensor.to(model.device) for tensor in left_pad(prompts, lm.pad_id))
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    where = None if addition is None else addition.positions

    def adding(here: bool) -> AbstractContextManager:
        return intervene(model, addition) if addition is not None and here else nullcontext()

    if ids.shape[1] > 1:
        with adding(where != "last_prompt_token"):
            model.base_model(
                input_ids=ids[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                use_cache=True,
            )
    token, position, is_first = ids[:, -1:], positions[:, -1:], True
    while True:
        with adding(is_first or where == "all"):
            logits = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        best = logits.argmax(-1)
        if logits.gather(-1, best[:, None]).isnan().any():  # NaN is the largest of all to argmax
            raise not_finite(model)
        yield best.tolist()
        token, position, is_first = best[:, None], position + 1, False
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
