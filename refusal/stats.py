"""Intervals, of which every rate the package reports carries one, tests of differences, and the draws that both are made of."""

import math
import random
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit  # scipy.stats takes longer to import than a stage to compute

AT_ONCE = 2**22  # numbers, 32 MB


def chunk_sizes(n_draws: int, n: int) -> Iterator[int]:
    """`n_draws` draws of `n` numbers each, cut into as few turns as hold no more than AT_ONCE numbers, or one draw."""
    most = max(1, AT_ONCE // max(1, n))
    for first in range(0, n_draws, most):
        yield min(most, n_draws - first)


def counts(rng: np.random.Generator, n: int, n_resamples: int) -> Iterator[np.ndarray]:
    """How often each of `n` items occurs in each bootstrap resample of them, a turn at a time: [resample, item]."""
    for size in chunk_sizes(n_resamples, n):
        yield rng.multinomial(n, np.full(n, 1 / n), size=size)


def numbered(clusters: Sequence[Hashable]) -> tuple[np.ndarray, int]:
    """The cluster of each item as a whole number, in the order in which clusters first occur, and how many there are."""
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([index[cluster] for cluster in clusters], dtype=np.int64), len(index)


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
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


def sign_flip_p(differences: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int) -> float:
    """Two-sided p of "the two arms do not differ", from flipping the sign of whole clusters' differences at random.

    Under the null the labels of the two arms may be swapped within a topic phrase. Monte Carlo, the observed one counted
    in: p is never below 1 / (n_resamples + 1). Source: Good 2005, "Permutation, Parametric and Bootstrap Tests", section 3.
    """
    of, n_clusters = numbered(clusters)
    sums, rng = np.bincount(of, np.asarray(differences, dtype=np.float64)), np.random.default_rng(seed)
    as_large = 0
    for size in chunk_sizes(n_resamples, n_clusters):
        signs = rng.integers(0, 2, (size, n_clusters)) * 2 - 1
        as_large += int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return (as_large + 1) / (n_resamples + 1)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number, so that the chance of any false one stays below the level (Holm 1979)."""
    found: dict[str, float] = {}
    running = 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):
        running = max(running, min(1.0, (len(p) - i) * p[name]))
        found[name] = running
    return {name: found[name] for name in p}


def independent_difference(
    ours: Sequence[float],
    our_clusters: Sequence[Hashable],
    theirs: Sequence[float],
    their_clusters: Sequence[Hashable],
    n_resamples: int,
    seed: int,
) -> tuple[float, float, float]:
    """Mean of ours minus mean of theirs on other prompts, with an expanded percentile bootstrap interval, both clustered.

    Values are within 0 and 1. Expanded for the smaller number of clusters; where each set holds one value alone, its own
    interval is `unanimous`, and the difference's reaches from the one's low to the other's high limit.
    """
    if len(set(ours)) == len(set(theirs)) == 1:
        mine, other = (unanimous(v[0], len(set(c)), (0, 1)) for v, c in ((ours, our_clusters), (theirs, their_clusters)))
        return ours[0] - theirs[0], mine[0] - other[1], mine[1] - other[0]
    rng = np.random.default_rng(seed)
    resampled, means = [], []
    for values, clusters in ((ours, our_clusters), (theirs, their_clusters)):
        of, _ = numbered(clusters)
        sums, sizes = np.bincount(of, np.asarray(values, dtype=np.float64)), np.bincount(of)
        resampled.append(resampled_means(sums, sizes, rng, n_resamples))
        means.append(sums.sum() / sizes.sum())
    fewest = min(len(set(our_clusters)), len(set(their_clusters)))
    low, high = np.quantile(resampled[0] - resampled[1], expanded(fewest) if fewest > 1 else (0.0, 1.0))
    return float(means[0] - means[1]), float(low), float(high)


def subsample_indices(n_items: int, n: int | None, seed: int) -> list[int]:
    """`n` of the indices below `n_items`, in order, drawn once by `seed`; all where n is None or too large.

    Drawn, not every so-manieth: prompts come in a cycle of topic phrases, and a stride would meet few of them.
    """
    if n is None or n >= n_items:
        return list(range(n_items))
    return sorted(random.Random(seed).sample(range(n_items), n))
