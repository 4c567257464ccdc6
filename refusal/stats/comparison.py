"""Arms beside each other: differences paired by prompt, corrected for how many there are, and what selection flattered."""

import random
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from refusal.stats.resampling import chunk_sizes, numbered
from refusal.stats.statistics import expanded, resampled_means, unanimous


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
