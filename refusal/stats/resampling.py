"""Draws a few at a time: more items take more turns and not more memory."""

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

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
