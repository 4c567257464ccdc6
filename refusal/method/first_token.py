"""The paper's three scores of a direction, from the first token of the answer alone.

The refusal score of a prompt is log P - log(1 - P), P the probability that the answer begins with one of the refusal tokens.
Source: Arditi et al. 2024, arXiv 2406.11717, appendix C. Its code adds 1e-8 to both probabilities, which bounds a score by 18.4;
here it is exact. What all prompts of a batch begin with is computed once an intervention.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.store import Store, key
from refusal.lm.batching import in_parts, job_slices
from refusal.lm.engine import hand_out
from refusal.lm.load import LM, render_chats
from refusal.method.activations import Prefix, last_logits, not_finite
from refusal.method.interventions import BASELINE, Addition, Intervention, intervene
from refusal.method.paper_selection import Candidate
from refusal.stats import clustered_mean

# The words that the paper takes refusals to begin with, of Qwen models and of others: "I cannot", "As an AI".
QWEN_WORDS, WORDS = ("I", "As"), ("I",)
BATCH_SIZE = 32  # prompts at once; more are no faster, and pad more
FEW = 16  # prompts that are not worth cutting in two
DIRECTIONS_PER_JOB = 4  # that share one reading of the baseline, and what a kill costs

Prompts = Sequence[Sequence[int]]
Direction = tuple[Intervention, Addition]  # its ablation, and the addition of its raw difference


def refusal_tokens(lm: LM) -> dict[str, int]:
    """The token of each word that the paper takes refusals to begin with; raises UserError as `word_tokens` does."""
    words = QWEN_WORDS if lm.model.config.model_type.startswith("qwen") else WORDS
    return word_tokens(lm, words, "select.by: paper", "set select.by to compliance")


def word_tokens(lm: LM, words: Sequence[str], asked_by: str, otherwise: str) -> dict[str, int]:
    """The token of each word as the first of an answer.

    Where the template ends in a blank or a line break the word stands alone; else a tokenizer may begin a word with a blank, so
    that both forms count. A word that is more than one token, or unknown, is left out. Raises UserError, which says what asked
    for them and what to do otherwise, where none is left, and for a template that opens a thought, whose first token is none of
    the answer.
    """
    tokenizer = lm.tokenizer
    text = render_chats(tokenizer, ["Hello."], lm.system_prompt)[0]
    if text.rstrip().endswith("<think>"):
        raise UserError(
            f"params.yaml: {asked_by} reads the first token of the answer, and this model's template opens a thought before it: "
            f"set model.thinking to false, or {otherwise}"
        )
    forms = [form for word in words for form in ((word,) if text[-1:].isspace() else (word, f" {word}"))]
    before, *after = tokenizer([text, *(text + form for form in forms)], add_special_tokens=False)["input_ids"]
    unknown = getattr(tokenizer, "unk_token_id", None)
    tokens = {form: ids[-1] for form, ids in zip(forms, after, strict=True) if ids[:-1] == before and ids[-1] != unknown}
    if not tokens:
        raise UserError(
            f"{tokenizer.name_or_path}: no token of it is {' or '.join(words)}, which {asked_by} takes an answer to begin with: "
            f"{otherwise} in params.yaml"
        )
    return tokens


def refusal_score(log_probs: Float[Tensor, "batch vocab"], tokens: Sequence[int]) -> Float[Tensor, " batch"]:
    """log P - log(1 - P) of each row, P the probability of all `tokens` together."""
    rest = log_probs.clone()
    rest[:, [*tokens]] = -torch.inf
    return log_probs[:, [*tokens]].logsumexp(-1) - rest.logsumexp(-1)


@torch.inference_mode()
def first_token_log_probs(lm: LM, prompts: Prompts) -> Float[Tensor, "prompt vocab"]:
    """Log probabilities of the first token of each answer, in float64 on the CPU."""
    logits = last_logits(lm, prompts, Prefix(lm.model, prompts).ids, 1)

    def some_rows(first: int, last: int) -> Tensor:
        return logits(first, last)[:, -1].cpu().double().log_softmax(-1)

    return torch.cat(in_parts(some_rows, len(prompts), "first tokens"))


@dataclass(frozen=True)
class _Job:
    """What is computed and stored together. harmless: KL and addition are asked of these prompts too."""

    prompts: Prompts
    directions: Sequence[Direction]
    harmless: bool


@dataclass(frozen=True)
class Scores:
    """Of every prompt, in the order given. harmful, harmless: its refusal score by the baseline. Of each direction:
    `bypass` of the harmful prompts, `induce` and `kl` (nats) of the harmless ones, as `Candidate` has them."""

    harmful: list[float]
    harmless: list[float]
    bypass: list[list[float]]
    induce: list[list[float]]
    kl: list[list[float]]


def scores(
    lm: LM, harmful: Prompts, harmless: Prompts, directions: Sequence[Direction], tokens: Sequence[int], store: Store
) -> Scores:
    """The scores of every direction, through the store: prompts are token ids, `tokens` those of `refusal_tokens`.

    A job is a batch of prompts of one half under DIRECTIONS_PER_JOB directions.
    """
    shared = {**lm.identity, "tokens": [*tokens]}
    jobs, places = [], []
    for half, prompts in enumerate((harmful, harmless)):
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for share in job_slices(len(order), BATCH_SIZE, FEW):
            for first in range(0, len(directions), DIRECTIONS_PER_JOB):
                some = directions[first : first + DIRECTIONS_PER_JOB]
                job = _Job([list(prompts[i]) for i in order[share]], some, bool(half))
                what = [[ablation.fingerprint(), addition.fingerprint() if half else None] for ablation, addition in some]
                jobs.append((key("first token", (_columns,), **shared, prompts=job.prompts, directions=what), job))
                places.append((order[share], first))

    n = [len(harmful), len(harmless)]
    baseline = [[0.0] * n[0], [0.0] * n[1]]
    bypass, induce, kl = ([[0.0] * n[of] for _ in directions] for of in (0, 1, 1))
    compute = partial(_encoded, tokens)
    with hand_out(lm, compute, (_columns,), [job for _, job in jobs], store.done) as (run, pool):
        values = store.run(jobs, run, "selection", "prompt", pool, _size)
        for (_, job), (rows, first), value in zip(jobs, places, values, strict=True):
            before, *columns = json.loads(value)
            _put(baseline[job.harmless], rows, before)
            for d, column in enumerate(columns, first):
                for into, figures in zip((induce, kl) if job.harmless else (bypass,), column, strict=True):
                    _put(into[d], rows, figures)
    return Scores(baseline[0], baseline[1], bypass, induce, kl)


def _size(job: _Job) -> int:
    """How many prompts are read."""
    return len(job.prompts) * (1 + (1 + job.harmless) * len(job.directions))


def _put(into: list[float], rows: Sequence[int], figures: Sequence[float]) -> None:
    for row, figure in zip(rows, figures, strict=True):
        into[row] = figure


def _encoded(tokens: Sequence[int], lm: LM, job: _Job, progress: Callable[[int], None]) -> bytes:
    return json.dumps(_columns(lm, job, tokens, progress)).encode()


def _columns(lm: LM, job: _Job, tokens: Sequence[int], progress: Callable[[int], None]) -> list[Any]:
    """[baseline scores, then of each direction (bypass,) or (induce, KL)], each a list over the job's prompts."""
    done = 0

    def read(acting: Intervention | Addition) -> tuple[Tensor, list[float]]:
        nonlocal done
        with intervene(lm.model, acting) if isinstance(acting, Addition) else acting.on(lm.model):
            log_probs = first_token_log_probs(lm, job.prompts)
        score = refusal_score(log_probs, tokens)
        if not score.isfinite().all():
            raise not_finite(lm.model)
        progress(done := done + len(job.prompts))
        return log_probs, score.tolist()

    before, baseline = read(BASELINE)
    columns: list[Any] = [baseline]
    for ablation, addition in job.directions:
        after, ablated = read(ablation)
        if job.harmless:
            kl = (before.exp() * (before - after)).sum(-1).clamp_min(0)
            columns.append((read(addition)[1], kl.tolist()))
        else:
            columns.append((ablated,))
    return columns


def figures(
    found: Scores, layers: Sequence[int], topics: Mapping[str, Sequence[Hashable]], n_resamples: int, seed: int
) -> tuple[list[Candidate], dict[str, Any], list[dict[str, float]]]:
    """(candidates by layer; baseline mean scores of both halves, with n; each candidate's 95 % intervals).

    Intervals are bootstraps clustered by topic, of `topics["harmful"]` and `topics["harmless"]`, one of each prompt.
    """

    def mean(values: Sequence[float], half: str, name: str) -> dict[str, float]:
        value, low, high = clustered_mean(values, topics[half], n_resamples, seed)
        return {name: value, f"{name}_low": low, f"{name}_high": high}

    rows = [
        mean(bypass, "harmful", "bypass") | mean(induce, "harmless", "induce") | mean(kl, "harmless", "kl")
        for bypass, induce, kl in zip(found.bypass, found.induce, found.kl, strict=True)
    ]
    candidates = [Candidate(layer, row["bypass"], row["induce"], row["kl"]) for layer, row in zip(layers, rows, strict=True)]
    baseline = {
        half: mean(values, half, "refusal_score") | {"n": len(values)}
        for half, values in (("harmful", found.harmful), ("harmless", found.harmless))
    }
    limits = [{name: value for name, value in row.items() if name.endswith(("_low", "_high"))} for row in rows]
    return candidates, baseline, limits
