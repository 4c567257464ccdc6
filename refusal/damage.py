"""What an edit costs on harmless text: cross-entropy of the base model's own answers, and KL from the base model."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from refusal import activations, anatomy, interventions
from refusal import store as stores
from refusal.activations import left_pad
from refusal.memory import in_parts
from refusal.store import Store

CODE = (activations, anatomy, interventions, sys.modules[__name__])


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


def cost(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int,
    store: Store,
    key: Sequence[object],
    label: str,
    edit: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[list[float], list[float]]:
    """Cross-entropy of each answer under the edited model, and KL(reference || edited), both nats a token.

    `edit` opens the run-time intervention on `model` (which may be `reference` itself); `key` names both in the store.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) + len(answers[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    jobs = [
        (stores.key("cost", *CODE, what=list(key), rows=[[list(prompts[i]), list(answers[i])] for i in batch]), batch)
        for batch in batches
    ]

    def compute(batch: list[int]) -> bytes:
        heads, tails = [prompts[i] for i in batch], [answers[i] for i in batch]
        before = answer_log_probs(reference, heads, tails, pad_id)
        with edit():
            after = answer_log_probs(model, heads, tails, pad_id)
        rows = []
        for p, q, tokens in zip(before, after, tails, strict=True):
            entropy = -q.gather(1, torch.tensor(tokens)[:, None]).mean()
            divergence = kl_div(q, p, reduction="sum", log_target=True) / len(tokens)
            rows.append([float(entropy), max(0.0, float(divergence))])
        return json.dumps(rows).encode()

    found = [[0.0, 0.0] for _ in prompts]
    for batch, value in zip(batches, store.run(jobs, compute, label), strict=True):
        for i, row in zip(batch, json.loads(value), strict=True):
            found[i] = row
    return [row[0] for row in found], [row[1] for row in found]
