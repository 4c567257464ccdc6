"""What a set of pairs is like: how long its halves are, and how far surface words alone tell them apart."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from refusal.data.near_duplicates import words

FOLDS, LEAST = 10, 3


def lengths(pairs: Sequence[tuple[str, str]]) -> tuple[float, float, float]:
    """Mean words of the harmful and of the safe halves, and the mean absolute difference within a pair."""
    n = np.array([[len(half.split()) for half in pair] for pair in pairs])
    return float(n[:, 0].mean()), float(n[:, 1].mean()), float(np.abs(n[:, 0] - n[:, 1]).mean())


def word_auroc(pairs: Sequence[tuple[str, str]], n_resamples: int, seed: int) -> tuple[float, float, float]:
    """AUROC and 95 % limits of a logistic regression on bags of words that tells harmful from safe halves, of (harmful, safe).

    Its words are those in at least three safe halves: any other marks the intent and is no confound. The mean of ten folds of
    whole pairs, each scored by a fit to the others: pooled, scores of unlike fits would be compared. Limits are percentiles over
    pairs drawn anew.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    counts = Counter(word for _, safe in pairs for word in words(safe))
    vocabulary = sorted(word for word, n in counts.items() if n >= LEAST)
    bags = np.array([[[float(word in half) for word in vocabulary] for half in map(words, pair)] for pair in pairs])
    rng = np.random.default_rng(seed)
    fold = rng.permutation(np.arange(len(pairs)) % FOLDS)
    score = np.empty((len(pairs), 2))
    for k in range(FOLDS):
        train, test = bags[fold != k], fold == k
        fit = LogisticRegression(max_iter=1000).fit(train.reshape(-1, len(vocabulary)), [1, 0] * len(train))
        score[test] = fit.decision_function(bags[test].reshape(-1, len(vocabulary))).reshape(-1, 2)

    def auroc(of: np.ndarray) -> float:
        by_fold = [score[of[fold[of] == k]] for k in range(FOLDS)]
        return float(np.mean([roc_auc_score([1, 0] * len(some), some.reshape(-1)) for some in by_fold if len(some)]))

    drawn = [auroc(rng.integers(len(pairs), size=len(pairs))) for _ in range(n_resamples)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return auroc(np.arange(len(pairs))), float(low), float(high)
