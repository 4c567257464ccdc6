"""Intervals and tests against their formulas, enumeration, naive resampling, published examples and simulation."""

import itertools
import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusal.stats import (
    cluster_indices,
    clustered_mean,
    cohens_kappa,
    holm,
    independent_difference,
    paired_difference,
    resampled_counts,
    sign_flip_p,
    spearman,
    stratified_difference,
    subsample_indices,
    wilson,
)

STUDENT_T = {19: 2.0930, 29: 2.0452, 39: 2.0227}  # 97.5 % quantiles by degrees of freedom, from a printed table


@given(
    st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n) | st.floats(0.01, n - 0.01), st.just(n))),
    st.sampled_from([0.5, 0.9, 0.95]),
)
def test_wilson_solves_its_equation(counts, confidence):
    """The limits are the rates p whose standard error puts the observed rate z away: (k/n - p)^2 = z^2 p (1 - p) / n."""
    k, n = counts
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    low, high = wilson(k, n, confidence)
    assert 0 <= low <= k / n <= high <= 1
    for limit, extreme in ((low, k == 0), (high, k == n)):
        if extreme:
            assert limit == pytest.approx(round(k / n), abs=1e-12)
        else:
            assert (k / n - limit) ** 2 == pytest.approx(z**2 * limit * (1 - limit) / n, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(
    ("successes", "n", "limits"),
    [  # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
        # four documents of score 0.9, and one: solved by hand, z^2 = 3.8415
        (3.6, 4, (0.4168, 0.9913)),
        (0.9, 1, (0.1677, 0.9975)),
    ],
)
def test_wilson_of_counts_and_of_fractional_scores(successes, n, limits):
    assert wilson(successes, n) == pytest.approx(limits, abs=6e-5)


def naive_means(values, clusters, n_resamples, rng):
    """The mean of each bootstrap resample of whole clusters, item by item, from the draws of a generator like that in use."""
    names = list(dict.fromkeys(clusters))
    means = []
    for counts in rng.multinomial(len(names), [1 / len(names)] * len(names), n_resamples):
        times = dict(zip(names, counts, strict=True))
        drawn = [value for value, cluster in zip(values, clusters, strict=True) for _ in range(times[cluster])]
        means.append(sum(drawn) / len(drawn))
    return np.array(means)


def expanded(resampled, n_clusters):
    """The limits of the expanded percentile interval, to the four digits of the table of Student's t."""
    tail = NormalDist().cdf(-math.sqrt(n_clusters / (n_clusters - 1)) * STUDENT_T[n_clusters - 1])
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return pytest.approx((low, high), abs=1e-3 * (high - low))


def grouped(seed, n_clusters, sizes, spread):
    """Values that share a cluster's own level, and their clusters."""
    rng = np.random.default_rng(seed)
    clusters = [f"topic {c}" for c in range(n_clusters) for _ in range(sizes[c % len(sizes)])]
    levels = {c: 0.5 + spread * rng.standard_normal() for c in dict.fromkeys(clusters)}
    return [float(np.clip(levels[c] + 0.1 * rng.standard_normal(), 0, 1)) for c in clusters], clusters


@pytest.mark.parametrize(("sizes", "spread"), [((1,), 0.2), ((5,), 0.3), ((1, 9, 3), 0.3)])
def test_clustered_mean_equals_naive_resampling(sizes, spread):
    pairs = list(zip(*grouped(0, 30, sizes, spread), strict=True))
    values, clusters = zip(*random.Random(1).sample(pairs, len(pairs)), strict=True)  # clusters need not stand together
    mean, *limits = clustered_mean(values, clusters, 1000, 7)
    assert mean == pytest.approx(sum(values) / len(values))
    assert limits == expanded(naive_means(values, clusters, 1000, np.random.default_rng(7)), 30)


def test_resamples_drawn_in_chunks_are_those_drawn_at_once(monkeypatch):
    cluster_of = cluster_indices("abacbdd")
    assert cluster_of.tolist() == [0, 1, 0, 2, 1, 3, 3]
    (at_once,) = resampled_counts(cluster_of, 50, 3)
    monkeypatch.setattr("refusal.stats.AT_ONCE", 100)
    chunks = list(resampled_counts(cluster_of, 50, 3))
    assert [len(chunk) for chunk in chunks] == [14, 14, 14, 8] and np.array_equal(np.concatenate(chunks), at_once)


@pytest.mark.parametrize(
    ("n_topics", "size", "correlation", "least"),
    [(100, 4, 0.5, 0.92), (20, 10, 0.05, 0.92), (20, 10, 0.3, 0.86)],
)
@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_coverage(rate, n_topics, size, correlation, least):
    """The interval holds the true rate in 92 to 98 % of samples, whose prompts agree within a topic (intraclass correlation).

    Also with as few topics as the study has, where plain percentiles cover 92 %. At the edge, a rate of 0.1 whose 20 topics agree
    strongly, coverage falls to about 91 %: skewed, and in effect 50 items.
    """
    rng, concentration, n_samples = np.random.default_rng(int(100 * rate) + size), 1 / correlation - 1, 700
    topics, held = np.repeat(np.arange(n_topics), size).tolist(), 0
    for sample in range(n_samples):
        levels = rng.beta(rate * concentration, (1 - rate) * concentration, n_topics)
        values = (rng.random((n_topics, size)) < levels[:, None]).astype(float)
        _, low, high = clustered_mean(values.ravel(), topics, 400, sample, bounds=(0, 1))
        held += low <= rate <= high
    assert least < held / n_samples < 0.98  # the simulation's own standard error is 0.8 %


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_equal_values_are_not_certain(value):
    """With nothing seen to differ the interval opens towards what might have been: at most the rule of three over the topics."""
    mean, low, high = clustered_mean([value] * 60, [i % 20 for i in range(60)], 500, 0, bounds=(0, 1))
    assert mean == value == (high if value else low)
    assert 3 / 20 * 0.8 < high - low < 3 / 20 * 1.3
    assert clustered_mean([value] * 10, range(10), 500, 0) == (value, value, value)  # unbounded: nothing can be said
    assert clustered_mean([value, 0.0, 1.0], ["one topic"] * 3, 500, 0, bounds=(0, 1)) == (pytest.approx((value + 1) / 3), 0, 1)


def test_paired_difference_sees_the_pairs():
    """Two arms that vary together: the difference is known far better than either arm."""
    theirs, clusters = grouped(4, 40, (4,), 0.2)
    rng = random.Random(0)
    ours = [min(1.0, value + 0.1 * (rng.random() < 0.5)) for value in theirs]
    difference, *limits = paired_difference(ours, theirs, clusters, 1000, 1)
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert difference == pytest.approx(sum(gaps) / len(gaps))
    assert limits == expanded(naive_means(gaps, clusters, 1000, np.random.default_rng(1)), 40)
    _, theirs_low, theirs_high = clustered_mean(theirs, clusters, 1000, 0)
    assert limits[1] - limits[0] < 0.5 * (theirs_high - theirs_low)
    with pytest.raises(ValueError):
        paired_difference(ours[1:], theirs, clusters[1:], 10, 0)


def test_stratified_difference_equals_naive_resampling():
    rng = random.Random(5)
    theirs = {name: [float(rng.random() < 0.6) for _ in range(n)] for name, n in (("a", 30), ("b", 30), ("large", 200))}
    ours = {name: [v if rng.random() < 0.7 else 1 - v for v in values] for name, values in theirs.items()}
    difference, *limits = stratified_difference(ours, theirs, 1000, 0)
    gaps = [[a - b for a, b in zip(ours[name], theirs[name], strict=True)] for name in ours]
    assert difference == pytest.approx(sum(sum(g) / len(g) for g in gaps) / 3)  # tasks count alike, whatever their size
    rng = np.random.default_rng(0)  # one for all strata, which are independent
    resampled = sum(naive_means(g, range(len(g)), 1000, rng) for g in gaps) / 3
    assert limits == pytest.approx(np.quantile(resampled, [0.025, 0.975]).tolist())


@pytest.mark.parametrize("n_topics", [(20, 30), (30, 20), (30, 30)])
def test_independent_difference_equals_naive_resampling(n_topics):
    sets = [grouped(seed, n, (1, 4), 0.3) for seed, n in enumerate(n_topics)]
    difference, *limits = independent_difference(*sets[0], *sets[1], 1000, 2)
    assert difference == pytest.approx(np.mean(sets[0][0]) - np.mean(sets[1][0]))
    rng = np.random.default_rng(2)
    ours, theirs = (naive_means(*one, 1000, rng) for one in sets)
    assert limits == expanded(ours - theirs, min(n_topics))


def test_equal_arms_differ_by_nothing_but_not_for_certain():
    difference, low, high = paired_difference([1.0, 0.0] * 50, [1.0, 0.0] * 50, range(100), 500, 0)
    assert difference == 0 and -0.06 < low < -0.02 and 0.02 < high < 0.06
    scores = {"a": [1.0, 0.0] * 20, "b": [1.0] * 10}
    difference, low, high = stratified_difference(scores, {name: list(values) for name, values in scores.items()}, 100, 0)
    assert difference == 0 and low < -0.02 and high > 0.02
    of_40, of_60 = ([1.0] * n for n in (40, 60))
    figures = independent_difference(of_40, [i % 20 for i in range(40)], of_60, [i % 20 for i in range(60)], 100, 0)
    assert figures == pytest.approx((0, -0.1611, 0.1611), abs=1e-4)  # Wilson's upper limit for 0 of 20


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


def test_sign_flip_p_is_the_enumeration():
    differences, clusters = [0.5, 1.0, -0.5, 0.0, 1.0, 1.0, 0.5, -1.0], list("aabbccdd")
    sums = [1.5, -0.5, 2.0, -0.5]
    all_signs = list(itertools.product((1, -1), repeat=4))
    exact = sum(abs(sum(s * x for s, x in zip(signs, sums, strict=True))) >= abs(sum(sums)) for signs in all_signs) / 16
    p = sign_flip_p(differences, clusters, 20_000, 0)
    assert p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))
    assert sign_flip_p([0.0] * 6, "aabbcc", 1000, 0) == 1.0


@pytest.mark.parametrize("n_resamples", [99, 1000])
def test_p_counts_the_observed_one_among_the_resamples(n_resamples):
    """Forty topics of one sign: no random signs agree so (chance 2^-39), and p is the least that so many resamples can say."""
    assert sign_flip_p([1.0] * 40, range(40), n_resamples, 0) == 1 / (n_resamples + 1)


def test_false_differences_are_as_frequent_as_the_level():
    rng = np.random.default_rng(0)
    n_false, n_samples = 0, 800
    for sample in range(n_samples):
        shared = rng.choice([-1.0, 0.0, 1.0], 20)  # prompts of a topic all alike: only the number of topics counts
        n_false += sign_flip_p(np.repeat(shared, 5), np.repeat(np.arange(20), 5).tolist(), 400, sample) <= 0.05
    assert 0.02 < n_false / n_samples < 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_samples)


def test_holm():
    """Worked through by hand: the smallest times 4, the next times 3, and never below the one before."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0} and holm({}) == {}


def test_agreement_of_raters():
    """Cohen's formula on a table, with labels of any kind; Spearman's on ranks without ties, and null where nothing can be said."""
    first, second = [0.5] * 25 + ["no"] * 25, [0.5] * 20 + ["no"] * 5 + [0.5] * 10 + ["no"] * 15
    assert cohens_kappa(first, second) == pytest.approx((35 / 50 - 0.5) / (1 - 0.5))
    assert cohens_kappa([1, 1], [2, 2]) == 0 and cohens_kappa([1, 1], [1, 1]) is None and cohens_kappa([], []) is None
    assert spearman([1, 5, 9, 7], [0.1, 0.3, 0.2, 0.4]) == pytest.approx(1 - 6 * (0 + 1 + 4 + 1) / (4 * 15))
    assert spearman([1, 1], [1, 2]) is None and spearman([], []) is None


def test_a_subsample_meets_every_topic_of_a_cycle():
    chosen = subsample_indices(200, 40, 0)
    assert len(set(chosen)) == 40 and chosen == sorted(chosen) == subsample_indices(200, 40, 0) != subsample_indices(200, 40, 1)
    assert len({i % 20 for i in chosen}) > 15  # every fifth prompt would meet four of twenty topics
    assert subsample_indices(5, None, 0) == subsample_indices(5, 9, 0) == [0, 1, 2, 3, 4]
