"""Verdicts on completions, and the rates that are made of them."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from refusal.grammar import REFUSALS
from refusal.judges import organism, rules
from refusal.statistics import clustered_mean, wilson


class Judged(NamedTuple):
    """A verdict on one completion.

    refusal: the completion is a refusal: one of the model's own sentences where these are known (the organism), the
    rules' label elsewhere. substring: the literature's phrase matching, for comparison. Compliance and coherence are 0, 0.5 or 1.
    """

    label: str
    compliance: float
    coherence: float
    refusal: bool
    substring: bool


def judge_all(prompts: Sequence[str], completions: Sequence[str], exact: bool) -> list[Judged]:
    """Verdicts on completions: `exact` for the organism, whose language is known, by rules for any other model."""
    judged = []
    for prompt, completion in zip(prompts, completions, strict=True):
        verdict = organism.judge(prompt, completion) if exact else rules.judge(prompt, completion)
        refused = completion.strip() in REFUSALS if exact else verdict.label == "refusal"
        judged.append(Judged(verdict.label, verdict.compliance, verdict.coherence, refused, rules.substring_refusal(completion)))
    return judged


def rate(name: str, values: Sequence[bool]) -> dict[str, float]:
    """A binary rate with its Wilson 95 % interval, as `name`, `name_low`, `name_high`."""
    low, high = wilson(sum(values), len(values))
    return {name: sum(values) / len(values), f"{name}_low": low, f"{name}_high": high}


def mean(
    name: str,
    values: Sequence[float],
    clusters: Sequence[Hashable],
    n_resamples: int,
    seed: int,
    bounds: tuple[float, float] | None = (0, 1),
) -> dict[str, float]:
    """A mean with its 95 % bootstrap interval clustered by topic phrase, as `name`, `name_low`, `name_high`."""
    value, low, high = clustered_mean(values, clusters, n_resamples, seed, bounds)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def summary(judged: Sequence[Judged], clusters: Sequence[Hashable], n_resamples: int, seed: int) -> dict[str, float | int]:
    """What is said of every cell: compliance, coherence and their product with intervals, refusal, and the counts.

    Empty and degenerate completions are items like any other: they count as 0, and are counted.
    """
    return {
        **mean("compliance", [v.compliance for v in judged], clusters, n_resamples, seed),
        **mean("coherence", [v.coherence for v in judged], clusters, n_resamples, seed),
        **mean("score", [v.compliance * v.coherence for v in judged], clusters, n_resamples, seed),
        **rate("refusal", [v.refusal for v in judged]),
        "substring_refusal": sum(v.substring for v in judged) / len(judged),
        "n": len(judged),
        "n_empty": sum(v.label == "empty" for v in judged),
        "n_degenerate": sum(v.label == "degenerate" for v in judged),
    }
