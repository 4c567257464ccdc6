"""Intervals, of which every reported rate carries one, tests of differences, and the bootstrap that both are computed from."""

import math
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import ndtr, ndtri, stdtrit  # scipy.stats takes longer to import than a stage to compute

AT_ONCE = 2**22  # numbers, 32 MB


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a rate, without continuity correction; n is at least 1.

    `successes` may be fractional: a sum of scores within 0 and 1. The closed form, since scipy's `binomtest` takes whole numbers
    alone, and 300 times as long. Source: Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    z, p = float(ndtri((1 + confidence) / 2)), successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return (max(0.0, low) if successes > 0 else 0.0), (min(1.0, high) if successes < n else 1.0)


def identical_values(value: float, n: int, bounds: tuple[float, float]) -> tuple[float, float]:
    """The interval (low, high) of a mean of n items that all equal `value` and might have been anything within `bounds`.

    A bootstrap of equal values has no width, which would claim certainty. Up to a share w of unseen items may differ,
    Wilson's upper limit for 0 of n, and each by as much as the bounds allow.
    """
    _, w = wilson(0, n)
    return value - w * (value - bounds[0]), value + w * (bounds[1] - value)


def cluster_indices(clusters: Sequence[Hashable]) -> Int[ndarray, " item"]:
    """The cluster of each item as a whole number from 0, in the order in which clusters first occur."""
    index = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}
    return np.array([index[cluster] for cluster in clusters], dtype=np.int64)


def resampled_counts(
    cluster_of: Int[ndarray, " item"], n_resamples: int, seed: int | np.random.Generator
) -> Iterator[Int[ndarray, "resample cluster"]]:
    """How often each cluster is drawn in each bootstrap resample of whole clusters; `cluster_of` is from `cluster_indices`.

    In chunks of resamples that hold no more than AT_ONCE numbers when they are spread over the items. `seed` may be a generator,
    so that several sets draw from one.
    """
    rng, n_clusters = np.random.default_rng(seed), int(cluster_of.max()) + 1
    chunk = max(1, AT_ONCE // len(cluster_of))
    for first in range(0, n_resamples, chunk):
        yield rng.multinomial(n_clusters, np.full(n_clusters, 1 / n_clusters), size=min(chunk, n_resamples - first))


def resampled_sums(
    values: Float[ndarray, "item column"], clusters: Sequence[Hashable], n_resamples: int, seed: int | np.random.Generator
) -> Float[ndarray, "resample column"]:
    """The sum of each column over each bootstrap resample of whole clusters."""
    cluster_of = cluster_indices(clusters)
    sums = np.zeros((int(cluster_of.max()) + 1, values.shape[1]))
    np.add.at(sums, cluster_of, values)
    return np.concatenate([drawn @ sums for drawn in resampled_counts(cluster_of, n_resamples, seed)])


def resampled_means(
    values: Sequence[float] | ndarray, clusters: Sequence[Hashable], n_resamples: int, seed: int | np.random.Generator
) -> Float[ndarray, " resample"]:
    """The mean over each bootstrap resample of whole clusters."""
    total, n = resampled_sums(np.stack([values, np.ones(len(values))], axis=1), clusters, n_resamples, seed).T
    return total / n


def expanded_quantiles(n_clusters: int) -> tuple[float, float]:
    """The two quantiles of a percentile bootstrap of `n_clusters` that make its 95 % interval as wide as Student's t.

    The plain ones, 0.025 and 0.975, take the spread of a small sample for the population's: with 20 clusters they
    cover the truth in 92 % of cases. Source: Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The
    American Statistician 69, on the expanded percentile interval. One cluster, which has no spread, gets the extremes.
    """
    if n_clusters < 2:
        return 0.0, 1.0
    tail = float(ndtr(-math.sqrt(n_clusters / (n_clusters - 1)) * stdtrit(n_clusters - 1, 0.975)))
    return tail, 1 - tail


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int, bounds: tuple[float, float] | None = None
) -> tuple[float, float, float]:
    """Mean and expanded percentile bootstrap 95 % interval (mean, low, high), whole clusters drawn with replacement.

    Prompts that share a topic phrase are not independent, so the clusters are topic phrases. Source: Davison and
    Hinkley 1997, "Bootstrap Methods and their Application", section 3.8; `expanded_quantiles`. Where all values are equal
    and `bounds` says what they might have been, the interval is that of `identical_values` with n the number of clusters.
    """
    data, n_clusters = np.asarray(values, dtype=np.float64), len(set(clusters))
    mean = float(data.mean())
    if bounds is not None and data.min() == data.max():
        return float(data[0]), *identical_values(float(data[0]), n_clusters, bounds)
    if n_clusters < 2:  # one topic alone says nothing of the next
        return mean, *(bounds or (float(data.min()), float(data.max())))
    low, high = np.quantile(resampled_means(data, clusters, n_resamples, seed), expanded_quantiles(n_clusters))
    return mean, float(low), float(high)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of ours - theirs over the same items, both within 0 and 1, with the interval of `clustered_mean`."""
    return clustered_mean([a - b for a, b in zip(ours, theirs, strict=True)], clusters, n_resamples, seed, bounds=(-1, 1))


def stratified_difference(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Unweighted mean over strata (tasks) of the mean paired difference, documents drawn again within each stratum.

    Scores are within 0 and 1. Where no document differs at all, the interval is that of `identical_values` over all documents.
    """
    gaps = [[a - b for a, b in zip(ours[name], theirs[name], strict=True)] for name in ours]
    if not any(map(any, gaps)):
        return 0.0, *identical_values(0.0, sum(map(len, gaps)), (-1, 1))
    rng = np.random.default_rng(seed)
    resampled = np.mean([resampled_means(gap, range(len(gap)), n_resamples, rng) for gap in gaps], axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean([np.mean(gap) for gap in gaps])), float(low), float(high)


def independent_difference(
    ours: Sequence[float],
    our_clusters: Sequence[Hashable],
    theirs: Sequence[float],
    their_clusters: Sequence[Hashable],
    n_resamples: int,
    seed: int,
) -> tuple[float, float, float]:
    """Mean of ours minus mean of theirs on other prompts, with an expanded percentile bootstrap interval, both clustered.

    Values are within 0 and 1. Expanded for the smaller number of clusters; where each set holds one value alone, its own interval
    is that of `identical_values`, and the difference's reaches from the one's low to the other's high limit.
    """
    sets = ((ours, our_clusters), (theirs, their_clusters))
    if len(set(ours)) == len(set(theirs)) == 1:
        mine, other = (identical_values(values[0], len(set(clusters)), (0, 1)) for values, clusters in sets)
        return ours[0] - theirs[0], mine[0] - other[1], mine[1] - other[0]
    rng = np.random.default_rng(seed)
    first, second = (resampled_means(values, clusters, n_resamples, rng) for values, clusters in sets)
    low, high = np.quantile(first - second, expanded_quantiles(min(len(set(clusters)) for _, clusters in sets)))
    return float(np.mean(ours) - np.mean(theirs)), float(low), float(high)


def sign_flip_p(differences: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int) -> float:
    """Two-sided p of "the two arms do not differ", from flipping the sign of whole clusters' differences at random.

    Under the null the labels of the two arms may be swapped within a topic phrase. Monte Carlo, the observed one counted
    in: p is never below 1 / (n_resamples + 1). Source: Good 2005, "Permutation, Parametric and Bootstrap Tests", section 3.
    """
    sums, rng = np.bincount(cluster_indices(clusters), np.asarray(differences, dtype=np.float64)), np.random.default_rng(seed)
    flipped = (rng.integers(0, 2, (n_resamples, len(sums))) * 2 - 1) @ sums
    return (int((np.abs(flipped) >= abs(sums.sum()) - 1e-9).sum()) + 1) / (n_resamples + 1)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p values corrected for their number, so that the chance of any false one stays below the level (Holm 1979)."""
    order = sorted(p, key=lambda name: p[name])
    scaled = [min(1.0, (len(p) - i) * p[name]) for i, name in enumerate(order)]
    corrected = dict(zip(order, np.maximum.accumulate(scaled).tolist(), strict=True))
    return {name: corrected[name] for name in p}


def cohens_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float | None:
    """Agreement of two raters on the same items beyond chance (Cohen 1960).

    None where chance agreement is complete already, or where there are no items.
    """
    from sklearn.metrics import cohen_kappa_score

    labels = cluster_indices([*first, *second])
    return float(cohen_kappa_score(labels[: len(first)], labels[len(first) :])) if len(set(labels)) > 1 else None


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation of two raters on the same items, ties averaged; None where either gives one value alone."""
    from scipy.stats import spearmanr

    return float(spearmanr(first, second).statistic) if len(set(first)) > 1 and len(set(second)) > 1 else None


def subsample_indices(n_items: int, n: int | None, seed: int) -> list[int]:
    """`n` of the indices below `n_items`, in order, drawn once by `seed`; all where n is None or too large.

    Drawn, not one at every so many: prompts come in a cycle of topic phrases, and a stride would meet few of them.
    """
    if n is None or n >= n_items:
        return list(range(n_items))
    return sorted(random.Random(seed).sample(range(n_items), n))
