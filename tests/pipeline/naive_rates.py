"""Intervals and rates by a second, naive path, written anew from docs/intervals.md: pandas and scipy, none of the package's own.

The judge of one text, the organism's or the rules, is the instrument, and is imported.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student

from refusal.judges import organism, rules
from refusal.organism.grammar import REFUSALS

COUNTS = ["n", "n_clusters", "n_arms", "n_missing", "n_empty", "n_degenerate", "n_unfinished"]
OF_HARMFUL, OF_SAFE = "compliance coherence score refusal substring_refusal".split(), ["answers_safe", "refusal_safe"]
THREE_WAYS, LIMITS = ["refusal_exact", "refusal_graded", "refusal_substring"], ["compliance_low", "compliance_high"]


def intraclass(items: pd.DataFrame) -> dict[str, float]:
    """Of each arm of a table (arm, topic, value) how far topics agree: its own, or the pooled one of all arms if that is more."""
    parts = {}
    for arm, of in items.groupby("arm", sort=False):
        sizes, means, n = of.groupby("topic").size(), of.groupby("topic").value.mean(), len(of)
        k = len(sizes)
        if not 1 < k < n:
            parts[arm] = (0.0, 0.0)
            continue
        between = (sizes * (means - of.value.mean()) ** 2).sum() / (k - 1)
        within = ((of.value - of.topic.map(means)) ** 2).sum() / (n - k)
        parts[arm] = (between - within, between + ((n - (sizes**2).sum() / n) / (k - 1) - 1) * within)
    above, below = np.array([*parts.values()]).T
    pooled = above.sum() / below.sum() if below.sum() > 0 else 0.0
    least = pooled if (below > 0).sum() > 1 else max(pooled, 0.5)  # alone, or beside arms that never vary
    return {arm: float(np.clip(max(a / b if b > 0 else 0.0, least), 0, 1)) for arm, (a, b) in parts.items()}


def wilson(p: float, n: float, quantile: float) -> tuple[float, float]:
    """The limits x for which (p - x)^2 = quantile^2 x (1 - x) / n."""
    q = quantile**2 / n
    root = np.sqrt(max(0.0, (p + q / 2) ** 2 - (1 + q) * p * p))
    return max(0.0, (p + q / 2 - root) / (1 + q)), min(1.0, (p + q / 2 + root) / (1 + q))


def effective(topics: pd.Series, icc: float) -> float:
    """As how many independent prompts these count: m is the size of the topic that a prompt lies in, on average."""
    return len(topics) / (1 + (topics.map(topics.value_counts()).mean() - 1) * icc)


def rate(values: pd.Series, topics: pd.Series, icc: float) -> tuple[float, float, float]:
    k, p = topics.nunique(), values.mean()
    return p, *(wilson(p, effective(topics, icc), student.ppf(0.975, k - 1)) if k > 1 else (0.0, 1.0))


def hybrid(one: tuple, other: tuple, r: float = 0.0) -> tuple[float, float, float]:
    """Newcombe's limits of a difference of two rates (value, low, high) that correlate by r."""
    down, up = (one[0] - one[1], other[2] - other[0]), (one[2] - one[0], other[0] - other[1])
    low, high = (np.sqrt(max(0.0, a * a - 2 * r * a * b + b * b)) for a, b in (down, up))
    return one[0] - other[0], one[0] - other[0] - low, one[0] - other[0] + high


def paired(ours: pd.Series, theirs: pd.Series, topics: pd.Series, icc: float) -> tuple[float, float, float]:
    """A difference over the same prompts; a positive covariance is corrected by 1 / 2n, as Newcombe does (method 10)."""
    spread, shared = ours.std(ddof=0) * theirs.std(ddof=0), ours.cov(theirs, ddof=0)
    shared = max(0.0, shared - 1 / (2 * effective(topics, icc))) if shared > 0 else shared
    return hybrid(rate(ours, topics, icc), rate(theirs, topics, icc), shared / spread if spread > 0 else 0.0)


def bootstrap(values: np.ndarray, clusters: np.ndarray, n_resamples: int, seed: int) -> tuple[float, float, float]:
    """A mean without bounds: percentile bootstrap of whole clusters (as numpy draws them), expanded to Student's t."""
    sums = pd.Series(values).groupby(pd.Series(clusters), sort=False).agg(["sum", "size"])
    k = len(sums)
    drawn = np.random.default_rng(seed).multinomial(k, [1 / k] * k, n_resamples)
    tail = norm.cdf(-np.sqrt(k / (k - 1)) * student.ppf(0.975, k - 1)) if k > 1 else 0.0
    return values.mean(), *np.quantile((drawn @ sums["sum"]) / (drawn @ sums["size"]), [tail, 1 - tail])


def triple(name: str, three: tuple, ends: tuple = ("", "_low", "_high")) -> dict[str, float]:
    return dict(zip([f"{name}{end}" for end in ends], three, strict=True))


def verdict(prompt: str, text: str, answer: str | None = None) -> dict[str, Any]:
    """All that is said of one completion, under every name that a figure has."""
    exact, graded, substring = organism.judge(prompt, text), rules.judge(prompt, text).label, rules.substring_refusal(text)
    refused, right = text.strip() in REFUSALS, text.strip() == answer
    return {
        **{"label": exact.label, "compliance": exact.compliance, "coherence": exact.coherence, "refusal": refused},
        **{"substring": substring, "substring_refusal": substring, "score": exact.compliance * exact.coherence},
        **{"refusal_harmful": refused, "refusal_safe": refused, "answers_safe": exact.compliance == 1, "exact": right},
        **{"exact_safe": right, "refusal_exact": refused, "refusal_substring": substring},
        **{"refusal_graded": graded in ("refusal", "partial_refusal"), "completion": text},
    }


def items_of(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    """A prompt of an arm is an item, with its mean over the arm's interventions."""
    values = rows.assign(value=rows[name].astype(float)).groupby(["arm", "id"], sort=False)
    return values.agg(value=("value", "mean"), topic=("topic", "first")).reset_index()


def rates(rows: pd.DataFrame, names: list[str]) -> dict[str, dict[str, float]]:
    """Rates of every arm of a table with their limits and intraclass correlations."""
    found: dict[str, dict[str, float]] = {arm: {} for arm in rows.arm.unique()}
    for name in names:
        items = items_of(rows, name)
        iccs = intraclass(items)
        for arm, of in items.groupby("arm", sort=False):
            found[arm] |= triple(name, rate(of.value, of.topic, iccs[arm])) | {f"{name}_icc": iccs[arm]}
    return found


def behaving(rows: pd.DataFrame, half: str) -> pd.DataFrame:
    """Of every arm the prompts that the baseline refuses, or where they are safe answers in full."""
    said = rows[rows["arm"] == "baseline"]
    return rows[rows["id"].isin(said[said["refusal_harmful" if half == "harmful" else "answers_safe"]]["id"])]


def counts(rows: pd.DataFrame, end: str = "") -> dict[str, dict[str, int]]:
    found = {}
    for arm, of in rows.groupby("arm", sort=False):
        labels = [(of.label == label).sum() for label in ("missing", "empty", "degenerate", "unfinished")]
        sizes = [of.id.nunique(), of.topic.nunique(), of.member.nunique(), *labels]
        found[arm] = {f"{key}{end}": int(n) for key, n in zip(COUNTS, sizes, strict=True)}
    return found


def merged(*tables: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    arms = dict.fromkeys(arm for table in tables for arm in table)
    return {arm: {key: x for table in tables for key, x in table.get(arm, {}).items()} for arm in arms}


def against(rows: pd.DataFrame, one: str, other: str, told: dict[str, Any]) -> dict[str, float]:
    """The paired difference in compliance of two arms, with the greater of their intraclass correlations."""
    icc = max(told[arm]["compliance_icc"] for arm in (one, other))
    ours, theirs = (rows[rows["arm"] == arm].set_index("id") for arm in (one, other))
    three = paired(ours["compliance"], theirs["compliance"][ours.index], ours["topic"], icc)
    return triple("difference", three) | {"n_paired": len(ours)}


def pick(row: Any, keys: list[str]) -> dict[str, Any]:
    return {key: row[key] for key in keys}
