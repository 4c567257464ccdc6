"""Intervals: every rate the package reports carries one."""

from collections.abc import Hashable, Sequence

import numpy as np
from scipy.stats import binomtest


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a binomial rate, without continuity correction; n is at least 1."""
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int, confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean and percentile bootstrap interval (mean, low, high), whole clusters drawn with replacement.

    Prompts that share a topic phrase are not independent, so the clusters are topic phrases. Source: Davison and
    Hinkley 1997, "Bootstrap Methods and their Application", section 3.8. One cluster alone gives no interval: low and
    high are then the least and the greatest possible, the values' own.
    """
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    of = np.array([index[cluster] for cluster in clusters])
    data = np.asarray(values, dtype=np.float64)
    if len(index) < 2:
        return float(data.mean()), float(data.min()), float(data.max())
    sums, sizes = np.bincount(of, data), np.bincount(of)
    drawn = np.random.default_rng(seed).multinomial(len(index), np.full(len(index), 1 / len(index)), size=n_resamples)
    means = (drawn @ sums) / (drawn @ sizes)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(data.mean()), float(low), float(high)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of ours - theirs over the same items, with the interval of `clustered_mean`."""
    return clustered_mean([a - b for a, b in zip(ours, theirs, strict=True)], clusters, n_resamples, seed)


def stratified_difference(
    ours: dict[str, Sequence[float]], theirs: dict[str, Sequence[float]], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Unweighted mean over strata (tasks) of the mean paired difference, documents drawn again within each stratum."""
    rng = np.random.default_rng(seed)
    points, resampled = [], np.zeros(n_resamples)
    for name in ours:
        difference = np.asarray(ours[name], dtype=np.float64) - np.asarray(theirs[name], dtype=np.float64)
        n = len(difference)
        points.append(difference.mean())
        resampled += rng.multinomial(n, np.full(n, 1 / n), size=n_resamples) @ difference / n / len(ours)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean(points)), float(low), float(high)
