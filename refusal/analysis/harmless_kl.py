"""What an edit costs on harmless text: cross-entropy of the base model's own answers, and KL from the base model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div

from refusal.io import store as stores
from refusal.io.store import Store
from refusal.lm.memory import in_parts
from refusal.lm.replicas import crew, shares
from refusal.method.activations import left_pad

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS = 32  # a batch: more are no faster, and pad more
FEW = 16  # rows that are not worth cutting in two
LOG_PROBS = 1 << 28  # bytes of log probabilities that a batch may hold, of the reference and of an edited model each


@torch.inference_mode()
def answer_log_probs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int
) -> list[Float[Tensor, "answer vocab"]]:
    """Log probabilities over the vocabulary at each position that predicts a token of the answer, float32."""
    ids, mask = left_pad([[*p, *a] for p, a in zip(prompts, answers, strict=True)], pad_id)
    keep = max(map(len, answers)) + 1
    positions = (mask.cumsum(-1) - 1).clamp_min(0)

    def rows(first: int, last: int) -> list[Tensor]:
        some = slice(first, last)
        logits = model(
            input_ids=ids[some].to(model.device),
            attention_mask=mask[some].to(model.device),
            position_ids=positions[some].to(model.device),
            use_cache=False,
            logits_to_keep=keep,
        ).logits.float()
        return [row[-len(a) - 1 : -1].log_softmax(-1).cpu() for row, a in zip(logits, answers[some], strict=True)]

    return [row for part in in_parts(rows, len(ids), "log probabilities") for row in part]


@dataclass(frozen=True)
class Edited:
    """A model as it is inside `edit(model)`, such as a run-time intervention; `key` names both in the store."""

    model: PreTrainedModel
    key: Sequence[object]
    edit: Callable[[Any], AbstractContextManager] = nullcontext


def costs(
    edited: Mapping[str, Edited],
    reference: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
    store: Store,
    key: Sequence[object],
    label: str,
) -> dict[str, tuple[list[float], list[float]]]:
    """Of each edited model: cross-entropy of each answer, and KL(reference || edited), both nats a token.

    A batch, of at most `batch_size`, runs the reference once, whatever the number of edits (of which the model may be
    `reference` itself); `key` names the reference in the store.
    """
    row = 4 * (max(map(len, answers), default=0) + 1) * reference.config.vocab_size
    batch_size = max(1, min(batch_size, ROWS, LOG_PROBS // row))
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    batches = [order[share] for share in shares(len(order), batch_size, FEW)]
    shared = {"reference": list(key), "edited": [list(e.key) for e in edited.values()]}
    jobs = [
        (
            stores.key("cost", (answer_log_probs, costs), **shared, rows=[[list(prompts[i]), list(answers[i])] for i in batch]),
            batch,
        )
        for batch in batches
    ]

    distinct = list({id(m): m for m in (reference, *(e.model for e in edited.values()))}.values())
    place = {id(m): i for i, m in enumerate(distinct)}

    def compute(models: Any, batch: list[int]) -> bytes:
        heads, tails = [prompts[i] for i in batch], [answers[i] for i in batch]
        before = answer_log_probs(models[0], heads, tails, pad_id)
        figures = []
        for e in edited.values():
            model = models[place[id(e.model)]]
            with e.edit(model):
                after = answer_log_probs(model, heads, tails, pad_id)
            rows = []
            for p, q, tokens in zip(before, after, tails, strict=True):
                entropy = -q.gather(1, torch.tensor(tokens)[:, None]).mean()
                divergence = kl_div(q, p, reduction="sum", log_target=True) / len(tokens)
                rows.append([float(entropy), max(0.0, float(divergence))])
            figures.append(rows)
        return json.dumps(figures).encode()

    found = {name: ([0.0] * len(prompts), [0.0] * len(prompts)) for name in edited}
    with crew(nn.ModuleList(distinct), compute, len(jobs)) as (run, pool):
        for batch, value in zip(batches, store.run(jobs, run, label, pool=pool), strict=True):
            for (entropies, divergences), rows in zip(found.values(), json.loads(value), strict=True):
                for i, row in zip(batch, rows, strict=True):
                    entropies[i], divergences[i] = row
    return found
