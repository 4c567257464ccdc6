"""Intervals, of which every reported rate carries one, tests of differences, and the bootstrap that both are computed from."""

import math
import random
from collections.abc import Hashable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from scipy.special import ndtr, ndtri, stdtrit  # scipy.stats takes longer to import than a stage to compute

AT_ONCE = 2**22  # numbers, 32 MB
Z = float(ndtri(0.975))
# The intraclass correlation of a rate that no other rate of its study tells of: more than any that was seen.
ALONE = 0.5


def wilson(successes: float, n: float, quantile: float = Z) -> tuple[float, float]:
    """The Wilson score interval (low, high) of a rate, without continuity correction; 95 % unless `quantile` is another.

    `successes` may be fractional, a sum of scores within 0 and 1, and so may n be, an effective number. The closed form, since
    scipy's `binomtest` takes whole numbers alone, and 300 times as long. Source: Wilson 1927, "Probable Inference, the Law of
    Succession, and Statistical Inference".
    """
    z, p = quantile, successes / n
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + side * half) / (1 + z * z / n) for side in (-1, 1))
    return (max(0.0, low) if successes > 0 else 0.0), (min(1.0, high) if successes < n else 1.0)


def intraclass_correlations(arms: Sequence[tuple[Sequence[float], Sequence[Hashable]]]) -> list[float]:
    """How far items of one cluster agree, within 0 and 1, for each arm (values within 0 and 1, and their clusters) of a study.

    The greater of the arm's own estimate and the one pooled over all arms, since a few clusters say little of it, and a rate near
    0 or 1 next to nothing. Where fewer than two arms vary at all it is at least ALONE. The estimate is that of a one-way analysis
    of variance: (MSB - MSW) / (MSB + (m0 - 1) MSW). Source: Donner 1986, "A Review of Inference Procedures for the Intraclass
    Correlation Coefficient in the One-Way Random Effects Model", International Statistical Review 54.
    """
    parts = np.array([_variance_between(np.asarray(values, dtype=np.float64), clusters) for values, clusters in arms])
    above, below = parts.T
    own = np.divide(above, below, out=np.zeros(len(arms)), where=below > 0)
    pooled = above.sum() / below.sum() if below.sum() > 0 else 0.0
    least = max(float(pooled), ALONE if np.count_nonzero(below) < 2 else 0.0)
    return np.clip(np.maximum(own, least), 0.0, 1.0).tolist()


def _variance_between(values: Float[ndarray, " item"], clusters: Sequence[Hashable]) -> tuple[float, float]:
    """Numerator and denominator of the intraclass correlation; 0 and 0 where values or clusters say nothing of it."""
    cluster_of, n = cluster_indices(clusters), len(values)
    sizes = np.bincount(cluster_of)
    if not 1 < len(sizes) < n:
        return 0.0, 0.0
    means = np.bincount(cluster_of, values) / sizes
    between = float(sizes @ (means - values.mean()) ** 2) / (len(sizes) - 1)
    within = float(((values - means[cluster_of]) ** 2).sum()) / (n - len(sizes))
    m0 = (n - float(sizes @ sizes) / n) / (len(sizes) - 1)
    return between - within, between + (m0 - 1) * within


def clustered_rate(values: Sequence[float], clusters: Sequence[Hashable], icc: float) -> tuple[float, float, float]:
    """A mean of values within 0 and 1 (rate, low, high): Wilson's interval on the effective number of items, with Student's t.

    `icc` is from `intraclass_correlations`. For one icc the limits rise with the rate, up to 0 and 1. Values between 0 and 1 vary
    less than the formula has it. One cluster says nothing of the next. Coverage by simulation: tests/test_coverage.py. Source:
    Korn and Graubard 1998, "Confidence Intervals for Proportions with Small Expected Number of Positive Counts Estimated from
    Survey Data", Survey Methodology 24, on the effective number and on Student's t of the clusters less one.
    """
    rate = float(np.mean(values))
    return rate, *rate_limits(rate, clusters, icc)


def rate_limits(rate: float, clusters: Sequence[Hashable], icc: float) -> tuple[float, float]:
    """The limits of `clustered_rate` around a rate of items of these clusters."""
    if (n_clusters := len(set(clusters))) < 2:
        return 0.0, 1.0
    n = effective_number(clusters, icc)
    return wilson(rate * n, n, float(stdtrit(n_clusters - 1, 0.975)))


def effective_number(clusters: Sequence[Hashable], icc: float) -> float:
    """As how many independent items these count: n / (1 + (m - 1) icc), where m is the mean size of an item's cluster."""
    sizes = np.bincount(cluster_indices(clusters))
    return len(clusters) / (1 + (float(sizes @ sizes) / len(clusters) - 1) * icc)


def paired_difference(
    ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable], icc: float
) -> tuple[float, float, float]:
    """Mean of ours - theirs over the same items, both within 0 and 1 (difference, low, high), from the limits of both rates.

    Source: Newcombe 1998, "Improved Confidence Intervals for the Difference between Binomial Proportions Based on Paired Data",
    method 10, on the limits of `clustered_rate`. Arms that never differed are not certain, by its correction of the correlation.
    """
    together = paired_correlation(ours, theirs, clusters, icc)
    return difference_of(clustered_rate(ours, clusters, icc), clustered_rate(theirs, clusters, icc), together)


def paired_correlation(ours: Sequence[float], theirs: Sequence[float], clusters: Sequence[Hashable], icc: float) -> float:
    """How values of the same items correlate, less a continuity correction where that is positive (Newcombe's method 10)."""
    first, second = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    spread, shared = float(first.std() * second.std()), float(np.cov(first, second, ddof=0)[0, 1])
    if shared > 0:
        shared = max(0.0, shared - 1 / (2 * effective_number(clusters, icc)))
    return shared / spread if spread > 0 else 0.0


def independent_difference(
    ours: tuple[Sequence[float], Sequence[Hashable], float], theirs: tuple[Sequence[float], Sequence[Hashable], float]
) -> tuple[float, float, float]:
    """Mean of ours minus mean of theirs on other items; each is what `clustered_rate` takes.

    Source: Newcombe 1998, "Interval Estimation for the Difference between Independent Proportions", method 10.
    """
    return difference_of(clustered_rate(*ours), clustered_rate(*theirs), 0.0)


def difference_of(
    ours: tuple[float, float, float], theirs: tuple[float, float, float], correlation: float
) -> tuple[float, float, float]:
    """ours - theirs and its limits, from two rates (value, low, high) that correlate: Newcombe's square-and-add."""
    (p, p_low, p_high), (q, q_low, q_high) = ours, theirs

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    return p - q, p - q - distance(p - p_low, q_high - q), p - q + distance(p_high - p, q - q_low)


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
    values: Sequence[float], clusters: Sequence[Hashable], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Mean of values without bounds, and its expanded percentile bootstrap 95 % interval, whole clusters drawn with replacement.

    Source: Davison and Hinkley 1997, "Bootstrap Methods and their Application", section 3.8; `expanded_quantiles`.
    """
    data, n_clusters = np.asarray(values, dtype=np.float64), len(set(clusters))
    low, high = np.quantile(resampled_means(data, clusters, n_resamples, seed), expanded_quantiles(n_clusters))
    return float(data.mean()), float(low), float(high)


def stratified_difference(
    ours: Mapping[str, Sequence[float]], theirs: Mapping[str, Sequence[float]], n_resamples: int, seed: int
) -> tuple[float, float, float]:
    """Unweighted mean over strata (tasks) of the mean paired difference, documents drawn again within each stratum.

    Each stratum's resampled means are spread by what makes a normal interval of so few documents Student's t, as
    `expanded_quantiles` does for one sample. Scores are within 0 and 1. Where no document differs at all, the interval is that of
    `identical_values` over all documents.
    """
    gaps = [[a - b for a, b in zip(ours[name], theirs[name], strict=True)] for name in ours]
    if not any(map(any, gaps)):
        return 0.0, *identical_values(0.0, sum(map(len, gaps)), (-1, 1))
    rng = np.random.default_rng(seed)
    resampled = np.mean([_spread(resampled_means(gap, range(len(gap)), n_resamples, rng), gap) for gap in gaps], axis=0)
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(np.mean([np.mean(gap) for gap in gaps])), float(low), float(high)


def _spread(resampled: Float[ndarray, " resample"], values: Sequence[float]) -> Float[ndarray, " resample"]:
    n, mean = len(values), float(np.mean(values))
    factor = math.sqrt(n / (n - 1)) * float(stdtrit(n - 1, 0.975)) / Z if n > 1 else 1.0
    return mean + factor * (resampled - mean)


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


def kappa_interval(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[float, float] | tuple[None, None]:
    """95 % limits of `cohens_kappa`: Wilson's of the share alike, chance agreement held at what it is; None where kappa is.

    Cohen 1960 holds it so too. The large-sample variance of Fleiss, Cohen and Everitt 1969 leaves no width where raters never
    differ: of 30 items with a true kappa of .98 its interval covers that in one case of three, or of ten, and this one in nine.
    """
    kappa, n = cohens_kappa(first, second), len(first)
    if kappa is None:
        return None, None
    alike = sum(a == b for a, b in zip(first, second, strict=True))
    chance = sum(list(first).count(label) * list(second).count(label) for label in set(first)) / n**2
    low, high = ((limit - chance) / (1 - chance) for limit in wilson(alike, n))
    return max(low, -1.0), high


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
