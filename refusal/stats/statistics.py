"""Intervals, of which every rate the package reports carries one, and agreement between raters."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit  # scipy.stats takes longer to import than a stage to compute

from refusal.stats.resampling import counts, numbered


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a binomial rate, without continuity correction; n is at least 1.

    Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z, p = float(ndtri((1 + confidence) / 2)), successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return (low if successes > 0 else 0.0), (high if successes < n else 1.0)


def unanimous(value: float, n: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval of a mean of n items that all equal `value` and might have been anything within `bounds`.

    A bootstrap of equal values has no width, which would claim certainty. Up to a share w of unseen items may differ,
    Wilson's upper limit for 0 of n, and each by as much as the bounds allow.
    """
    _, w = wilson(0, n)
    return value - w * (value - bounds[0]), value + w * (bounds[1] - value)


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int, bounds: tuple[float, float] | None = None
) -> tuple[float, float, float]:
    """Mean and expanded percentile bootstrap 95 % interval (mean, low, high), whole clusters drawn with replacement.

    Prompts that share a topic phrase are not independent, so the clusters are topic phrases. Source: Davison and
    Hinkley 1997, "Bootstrap Methods and their Application", section 3.8; the quantiles are `expanded`. Where all values
    are equal and `bounds` says what they might have been, the interval is `unanimous` with n the number of clusters.
    """
    of, n_clusters = numbered(clusters)
    data = np.asarray(values, dtype=np.float64)
    if bounds is not None and data.min() == data.max():
        return float(data[0]), *unanimous(float(data[0]), n_clusters, bounds)
    if n_clusters < 2:  # one topic alone says nothing of the next
        return float(data.mean()), *(bounds or (float(data.min()), float(data.max())))
    sums, sizes = np.bincount(of, data), np.bincount(of)
    means = resampled_means(sums, sizes, np.random.default_rng(seed), n_resamples)
    low, high = np.quantile(means, expanded(n_clusters))
    return float(data.mean()), float(low), float(high)


def resampled_means(sums: np.ndarray, sizes: np.ndarray, rng: np.random.Generator, n_resamples: int) -> np.ndarray:
    """The mean of each bootstrap resample of whole clusters, of which sums and sizes are given."""
    return np.concatenate([(drawn @ sums) / (drawn @ sizes) for drawn in counts(rng, len(sums), n_resamples)])


def expanded(n_clusters: int) -> tuple[float, float]:
    """The two quantiles of a percentile bootstrap of `n_clusters` that make its 95 % interval as wide as Student's t.

    The plain ones, 0.025 and 0.975, take the spread of a small sample for the population's: with 20 clusters they
    cover the truth in 92 % of cases. Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The
    American Statistician 69, on the expanded percentile interval.
    """
    tail = float(ndtr(-math.sqrt(n_clusters / (n_clusters - 1)) * stdtrit(n_clusters - 1, 0.975)))
    return tail, 1 - tail


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters on the same items beyond chance (Cohen 1960).

    None where chance agreement is complete already, or where there are no items.
    """
    n = len(first)
    if n == 0:
        return None
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / n
    ours, theirs = Counter(first), Counter(second)
    chance = sum(ours[value] * theirs[value] for value in ours) / n**2
    return None if chance == 1 else (observed - chance) / (1 - chance)


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation of two raters on the same items, ties averaged; None where either gives one value alone."""
    from scipy.stats import spearmanr

    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of ours - theirs over the same items, both within 0 and 1, with the interval of `clustered_mean`."""
    return clustered_mean([a - b for a, b in zip(ours, theirs, strict=True)], clusters, n_resamples, seed, bounds=(-1, 1))


def stratified_difference(
    ours: dict[str, Sequence[float]], theirs: dict[str, Sequence[float]], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Unweighted mean over strata (tasks) of the mean paired difference, documents drawn again within each stratum.

    Scores are within 0 and 1. Where no document differs at all, the interval is `unanimous` over all documents.
    """
    if all(list(ours[name]) == list(theirs[name]) for name in ours):
        return 0.0, *unanimous(0.0, sum(map(len, ours.values())), (-1, 1))
    rng = np.random.default_rng(seed)
    points, resampled = [], np.zeros(n_resamples)
    for name in ours:
        difference = np.asarray(ours[name], dtype=np.float64) - np.asarray(theirs[name], dtype=np.float64)
        n = len(difference)
        points.append(difference.mean())
        resampled += np.concatenate([drawn @ difference for drawn in counts(rng, n, n_resamples)]) / n / len(ours)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean(points)), float(low), float(high)
