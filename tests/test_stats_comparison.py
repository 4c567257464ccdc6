"""Corrections and p values against enumeration, a published example and simulation."""

import itertools
import math

import numpy as np
import pytest

from refusal.stats import holm, independent_difference, sign_flip_p, subsample_indices


def test_sign_flip_p_is_the_enumeration():
    differences, clusters = [0.5, 1.0, -0.5, 0.0, 1.0, 1.0, 0.5, -1.0], list("aabbccdd")
    sums = [1.5, -0.5, 2.0, -0.5]
    all_signs = list(itertools.product((1, -1), repeat=4))
    exact = sum(abs(sum(s * x for s, x in zip(signs, sums, strict=True))) >= abs(sum(sums)) for signs in all_signs) / 16
    p = sign_flip_p(differences, clusters, 20_000, 0)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sign_flip_p([0.0] * 6, "aabbcc", 1000, 0) == 1.0


def test_p_counts_the_observed_one_among_the_resamples():
    """Forty topics of one mind: no random signs agree so (chance 2^-39), and p is the least that so many resamples can say."""
    for n_resamples in (99, 1000):
        assert sign_flip_p([1.0] * 40, range(40), n_resamples, 0) == 1 / (n_resamples + 1)


def test_a_false_difference_is_found_no_oftener_than_the_level():
    rng = np.random.default_rng(0)
    n_false, n_samples = 0, 800
    for sample in range(n_samples):
        shared = rng.choice([-1.0, 0.0, 1.0], 20)  # topics of one mind: only their number counts
        n_false += sign_flip_p(np.repeat(shared, 5), np.repeat(np.arange(20), 5).tolist(), 400, sample) <= 0.05
    assert n_false / n_samples < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_samples)
    assert n_false / n_samples > 0.02


def test_holm():
    """Worked through by hand: the smallest times 4, the next times 3, and never below the one before."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}


def test_holm_keeps_the_chance_of_any_false_one_at_the_level():
    rng = np.random.default_rng(1)
    runs = [holm(dict(enumerate(rng.random(15)))) for _ in range(2000)]
    share = sum(min(run.values()) <= 0.05 for run in runs) / 2000
    assert 0.03 < share < 0.05 + 3 * math.sqrt(0.05 * 0.95 / 2000)


def test_the_interval_of_val_minus_test_covers_zero_as_often_as_it_says():
    rng, held, n_samples = np.random.default_rng(2), 0, 500
    topics = np.repeat(np.arange(20), 5).tolist()
    for sample in range(n_samples):
        levels = rng.beta(4, 4, (2, 20))
        ours, theirs = ((rng.random((20, 5)) < level[:, None]).astype(float).ravel() for level in levels)
        value, low, high = independent_difference(ours, topics, theirs, topics, 400, sample)
        assert value == pytest.approx(ours.mean() - theirs.mean())
        held += low <= 0 <= high
    assert 0.92 < held / n_samples < 0.98


def test_the_winner_of_a_selection_is_flattered_and_val_minus_test_shows_it():
    """Twenty cells of the same true rate: the best on val looks better there than on test."""
    rng, gaps = np.random.default_rng(3), []
    for _ in range(200):
        val, test = rng.random((20, 60)) < 0.5, rng.random((20, 60)) < 0.5
        best = int(val.mean(1).argmax())
        gaps.append(independent_difference(val[best], range(60), test[best], range(60), 2, 0)[0])
    assert 0.05 < np.mean(gaps) < 0.2


def test_two_unanimous_sets_are_not_certain():
    value, low, high = independent_difference(
        [1.0] * 40, [i % 20 for i in range(40)], [1.0] * 60, [i % 20 for i in range(60)], 100, 0
    )
    assert (value, low, high) == pytest.approx((0, -0.1611, 0.1611), abs=1e-4)  # Wilson's upper limit for 0 of 20


def test_part_meets_every_topic_of_a_cycle():
    chosen = subsample_indices(200, 40, 0)
    assert len(set(chosen)) == 40 and chosen == sorted(chosen) == subsample_indices(200, 40, 0) != subsample_indices(200, 40, 1)
    assert len({i % 20 for i in chosen}) > 15  # every fifth prompt would meet four of twenty topics
    assert subsample_indices(5, None, 0) == subsample_indices(5, 9, 0) == [0, 1, 2, 3, 4]
