"""What an intervention costs: KL and cross-entropy on harmless prompts, of the baseline model's own answers to them."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import kl_div

from refusal.io.store import Store, key
from refusal.lm.batching import in_parts, job_slices, model_replicas
from refusal.lm.load import LM
from refusal.method.activations import Prefix, last_logits
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE, Intervention
from refusal.method.sweep import complete
from refusal.stats import clustered_mean

BATCH_SIZE = 32  # more rows are no faster, and pad more
FEW = 16  # rows that are not worth cutting in two
LOG_PROBS = 1 << 28  # bytes of log probabilities that a batch may hold, of the reference and of an edited model each

Costs = dict[str, tuple[list[float], list[float]]]  # cross-entropy and KL of each text, in nats a token


@dataclass(frozen=True)
class Texts:
    """Harmless prompts and the baseline's answers to them, as token ids, and the topic of each: a mean's clusters."""

    prompts: Sequence[Sequence[int]]
    answers: Sequence[Sequence[int]]
    topics: Sequence[Hashable]


def harmless_texts(lm: LM, rows: Sequence[Mapping[str, Any]], decoding: Decoding, store: Store, label: str) -> Texts:
    """The texts of `rows` (`safe`, a prompt, and `topic`) whose answer by the baseline is not empty."""
    prompts = lm.encode([row["safe"] for row in rows], decoding.max_new_tokens)
    answers = complete(lm, prompts, [BASELINE], decoding, store, label)[BASELINE.name]
    kept = [i for i, answer in enumerate(answers) if answer]
    return Texts([prompts[i] for i in kept], [answers[i] for i in kept], [rows[i]["topic"] for i in kept])


def harmless_kl(
    reference: LM, edited: Mapping[str, tuple[LM, Intervention]], texts: Texts, batch_size: int, store: Store, label: str
) -> Costs:
    """Of each edited model, an LM under an intervention: cross-entropy of each answer, and KL(reference || edited).

    A batch runs the reference once, whatever the number of edits (the LM of which may be the reference). Those that are the same
    in every study of the model have batches of their own, which another study finds in the store.
    """
    independent = {name: e for name, e in edited.items() if e[0] is reference and e[1].direction_independent}
    rest = {name: e for name, e in edited.items() if name not in independent}
    costs: Costs = {}
    for group, of in ((independent, ": controls"), (rest, "")):
        if group and texts.prompts:
            costs |= _in_batches(reference, group, texts, batch_size, store, label + of)
    return {name: costs.get(name, ([], [])) for name in edited}


def _in_batches(
    reference: LM, edited: Mapping[str, tuple[LM, Intervention]], texts: Texts, batch_size: int, store: Store, label: str
) -> Costs:
    row = 4 * (max(map(len, texts.answers)) + 1) * reference.model.config.vocab_size
    batch_size = max(1, min(batch_size, BATCH_SIZE, LOG_PROBS // row))
    order = sorted(range(len(texts.prompts)), key=lambda i: len(texts.prompts[i]) + len(texts.answers[i]))
    batches = [order[share] for share in job_slices(len(order), batch_size, FEW)]
    shared = {
        "reference": reference.identity,
        "edited": [[lm.identity, intervention.fingerprint()] for lm, intervention in edited.values()],
    }
    jobs = []
    for batch in batches:
        rows = [(list(texts.prompts[i]), list(texts.answers[i])) for i in batch]
        jobs.append((key("harmless KL", (_costs,), **shared, rows=rows), rows))
    distinct = list({id(lm.model): lm.model for lm in (reference, *(lm for lm, _ in edited.values()))}.values())
    place = {id(model): i for i, model in enumerate(distinct)}

    def compute(models: Any, rows: list[tuple[list[int], list[int]]]) -> bytes:
        acting = [(replace(lm, model=models[place[id(lm.model)]]), intervention) for lm, intervention in edited.values()]
        return json.dumps(_costs(replace(reference, model=models[0]), acting, rows)).encode()

    costs: Costs = {name: ([0.0] * len(order), [0.0] * len(order)) for name in edited}
    with model_replicas(nn.ModuleList(distinct), compute, len(jobs)) as (run, pool):
        for batch, value in zip(batches, store.run(jobs, run, label, pool=pool), strict=True):
            for (entropies, divergences), figures in zip(costs.values(), json.loads(value), strict=True):
                for i, figure in zip(batch, figures, strict=True):
                    entropies[i], divergences[i] = figure
    return costs


def _costs(
    reference: LM, edited: Sequence[tuple[LM, Intervention]], rows: Sequence[tuple[list[int], list[int]]]
) -> list[list[list[float]]]:
    """[edited model, row, (cross-entropy, KL)] of rows (prompt, answer)."""
    before = answer_log_probs(reference, rows)
    costs = []
    for lm, intervention in edited:
        with intervention.on(lm.model):
            after = answer_log_probs(lm, rows)
        of_rows = []
        for p, q, (_, tokens) in zip(before, after, rows, strict=True):
            entropy = -q.gather(1, torch.tensor(tokens)[:, None]).mean()
            divergence = kl_div(q, p, reduction="sum", log_target=True) / len(tokens)
            of_rows.append([float(entropy), max(0.0, float(divergence))])
        costs.append(of_rows)
    return costs


@torch.inference_mode()
def answer_log_probs(lm: LM, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Float[Tensor, "answer vocab"]]:
    """Of each row (prompt, answer): log probabilities at each position that predicts a token of the answer, float32.

    What all prompts begin with is computed once.
    """
    prefix = Prefix(lm.model, [prompt for prompt, _ in rows]).ids
    logits = last_logits(lm, [[*prompt, *answer] for prompt, answer in rows], prefix, max(len(a) for _, a in rows) + 1)

    def some_rows(first: int, last: int) -> list[Tensor]:
        some = zip(logits(first, last), rows[first:last], strict=True)
        return [row[-len(answer) - 1 : -1].float().log_softmax(-1).cpu() for row, (_, answer) in some]

    return [row for part in in_parts(some_rows, len(rows), "log probabilities") for row in part]


def cost_figures(
    costs: Sequence[tuple[list[float], list[float]]], topics: Sequence[Hashable], n_resamples: int, seed: int
) -> dict[str, float | None]:
    """Mean cross-entropy and KL over all texts of these edits, with intervals; None where there is no text.

    Of one edit the interval is over texts, clustered by topic; of several, drawn at random, it is over edits: what another would
    have cost on these texts.
    """
    if not topics:
        return {"cross_entropy": None, "kl": None}
    figures: dict[str, float | None] = {}
    for i, name in enumerate(("cross_entropy", "kl")):
        values = [cost[i] for cost in costs]
        clusters = [n if len(costs) > 1 else topic for n in range(len(costs)) for topic in topics]
        value, low, high = clustered_mean([*chain(*values)], clusters, n_resamples, seed)
        figures |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return figures
