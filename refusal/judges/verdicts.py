"""Verdicts on completions, and the rates that are made of them."""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from refusal.io.errors import UserError
from refusal.io.progress import progress
from refusal.judges import organism, rules
from refusal.judges.thinking import answer_of
from refusal.organism.grammar import REFUSALS
from refusal.stats import clustered_mean, wilson


class Judged(NamedTuple):
    """A verdict on one completion; where a judge gave none, None stands in its place.

    refusal: the completion is a refusal: one of the model's own sentences where these are known (the organism), the judge's
    label elsewhere. substring: the literature's phrase matching, for comparison. Compliance and coherence are 0, 0.5 or 1.
    """

    label: str
    compliance: float
    coherence: float
    refusal: bool
    substring: bool


# A completion that is all thinking, cut off by the limit: no answer, so neither complied nor refused.
UNFINISHED = Judged("unfinished", 0.0, 0.0, False, False)


def judge_all(prompts: Sequence[str], completions: Sequence[str], exact: bool, label: str = "rules") -> list[Judged]:
    """Verdicts on completions: `exact` for the organism, whose language is known, by rules for any other model.

    Of a completion that thinks aloud, what follows the thinking is judged.
    """
    judged = []
    with progress(len(prompts), label, "verdict") as bar:
        for prompt, completion in zip(prompts, completions, strict=True):
            bar.update()
            if (answer := answer_of(completion)) is None:
                judged.append(UNFINISHED)
                continue
            verdict = organism.judge(prompt, answer) if exact else rules.judge(prompt, answer)
            refused = answer.strip() in REFUSALS if exact else verdict.label == "refusal"
            substring = rules.substring_refusal(answer)
            judged.append(Judged(verdict.label, verdict.compliance, verdict.coherence, refused, substring))
    return judged


def row(verdict: Judged | None) -> dict[str, Any]:
    """A verdict as a row of a file; a missing one has the label `missing` and no values."""
    return dict.fromkeys(Judged._fields) | {"label": "missing"} if verdict is None else verdict._asdict()


def present(judged: Sequence[Judged | None], of: str, allow_missing: bool = False) -> list[tuple[int, Judged]]:
    """(index, verdict) of the completions that have one: what a mean may be taken over.

    `of` says in the sentence what was to be averaged. Raises UserError where fewer than 95 % have a verdict, unless
    `allow_missing`, and where none has.
    """
    verdicts = [(i, verdict) for i, verdict in enumerate(judged) if verdict is not None]
    if len(verdicts) < 0.95 * len(judged) and not allow_missing:
        raise UserError(
            f"{of}: {len(judged) - len(verdicts)} of {len(judged)} completions have no verdict, more than 5 %; run again to ask "
            "for those alone, choose another judge, or set judge.allow_missing: true in params.yaml"
        )
    if not verdicts:
        raise UserError(
            f"{of}: none of {len(judged)} completions has a verdict; run again to ask for them, or choose another judge"
        )
    return verdicts


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


def paired(
    ours: Sequence[Judged | None], theirs: Sequence[Judged | None], clusters: Sequence[Hashable]
) -> tuple[list[float], list[Hashable]]:
    """ours - theirs in compliance, and the clusters, of the prompts where both have a verdict."""
    both = [(a.compliance - b.compliance, c) for a, b, c in zip(ours, theirs, clusters, strict=True) if a and b]
    return [d for d, _ in both], [c for _, c in both]


def difference(
    ours: Sequence[Judged | None], theirs: Sequence[Judged | None], clusters: Sequence[Hashable], n_resamples: int, seed: int
) -> dict[str, float]:
    """Mean of ours - theirs in compliance, paired by prompt, as `difference`, `difference_low`, `difference_high`.

    Over the prompts where both have a verdict. Raises UserError where none has.
    """
    differences, topics = paired(ours, theirs, clusters)
    if not differences:
        raise UserError("no prompt has a verdict in both arms to be compared; run again, or choose another judge")
    return mean("difference", differences, topics, n_resamples, seed, bounds=(-1, 1))


def summary(
    judged: Sequence[Judged | None],
    clusters: Sequence[Hashable],
    n_resamples: int,
    seed: int,
    of: str = "a cell",
    allow_missing: bool = False,
) -> dict[str, float | int]:
    """What is said of every cell: compliance, coherence and their product with intervals, refusal, and the counts.

    Empty, degenerate and unfinished completions are items like any other: they count as 0, and are counted. Missing verdicts are
    left out of every figure and of n, and counted; too many raise UserError as `present` says.
    """
    items = present(judged, of, allow_missing)
    verdicts, topics = [v for _, v in items], [clusters[i] for i, _ in items]
    return {
        **mean("compliance", [v.compliance for v in verdicts], topics, n_resamples, seed),
        **mean("coherence", [v.coherence for v in verdicts], topics, n_resamples, seed),
        **mean("score", [v.compliance * v.coherence for v in verdicts], topics, n_resamples, seed),
        **rate("refusal", [v.refusal for v in verdicts]),
        "substring_refusal": sum(v.substring for v in verdicts) / len(verdicts),
        "n": len(verdicts),
        "n_missing": len(judged) - len(verdicts),
        "n_empty": sum(v.label == "empty" for v in verdicts),
        "n_degenerate": sum(v.label == "degenerate" for v in verdicts),
        "n_unfinished": sum(v.label == "unfinished" for v in verdicts),
    }
