"""Intervals against their formulas, a naive resampling, and simulation."""

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refusal.stats import clustered_mean, paired_difference, stratified_difference, wilson


@given(st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.sampled_from([0.5, 0.9, 0.95]))
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


def test_wilson_of_a_published_table():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I, method 3."""
    for (k, n), limits in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert wilson(k, n) == pytest.approx(limits, abs=6e-5)


STUDENT_T = {19: 2.0930, 29: 2.0452, 39: 2.0227}  # 97.5 % quantiles by degrees of freedom, from a printed table


def naive_interval(values, clusters, n_resamples, seed):
    """Cluster by cluster, item by item, with another generator."""
    rng = random.Random(seed)
    names = sorted(set(clusters))
    members = {name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in names}
    means = []
    for _ in range(n_resamples):
        drawn = [value for _ in names for value in members[rng.choice(names)]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    tail = NormalDist().cdf(-math.sqrt(len(names) / (len(names) - 1)) * STUDENT_T[len(names) - 1])
    return means[round(tail * n_resamples)], means[round((1 - tail) * n_resamples)]


def grouped(seed, n_clusters, sizes, spread):
    """Values that share a cluster's own level, and their clusters."""
    rng = np.random.default_rng(seed)
    values, clusters = [], []
    for c in range(n_clusters):
        level = 0.5 + spread * rng.standard_normal()
        for _ in range(sizes[c % len(sizes)]):
            values.append(float(np.clip(level + 0.1 * rng.standard_normal(), 0, 1)))
            clusters.append(f"topic {c}")
    return values, clusters


@pytest.mark.parametrize(("sizes", "spread"), [((1,), 0.2), ((5,), 0.3), ((1, 9, 3), 0.3)])
def test_clustered_mean_equals_naive_resampling(sizes, spread):
    values, clusters = grouped(0, 30, sizes, spread)
    order = random.Random(1).sample(range(len(values)), len(values))  # clusters need not stand together
    values, clusters = [values[i] for i in order], [clusters[i] for i in order]
    mean, low, high = clustered_mean(values, clusters, 4000, 0)
    assert mean == pytest.approx(sum(values) / len(values))
    width = high - low
    assert (low, high) == pytest.approx(naive_interval(values, clusters, 4000, 0), abs=0.07 * width)


def test_items_that_share_a_topic_count_for_less():
    values, clusters = grouped(2, 20, (10,), 0.3)
    _, low, high = clustered_mean(values, clusters, 1000, 0)
    _, naive_low, naive_high = clustered_mean(values, range(len(values)), 1000, 0)
    assert high - low > 2 * (naive_high - naive_low)


@pytest.mark.parametrize(("rate", "size"), [(0.1, 1), (0.1, 4), (0.5, 4), (0.9, 1), (0.9, 4)])
def test_coverage(rate, size):
    """100 topics: the interval holds the true rate in 93 to 97 % of samples, whether a topic's items agree or not."""
    rng = np.random.default_rng(int(100 * rate) + size)
    n_samples, n_topics = 800, 100
    held = 0
    for sample in range(n_samples):
        # Half of the topics are of one mind, the others' items independent; either way each item is 1 at `rate`.
        own, shared = rng.random((n_topics, size)) < rate, rng.random((n_topics, 1)) < rate
        values = np.where(np.arange(n_topics)[:, None] % 2 == 0, shared, own).astype(float)
        _, low, high = clustered_mean(values.ravel(), np.repeat(np.arange(n_topics), size).tolist(), 400, sample, bounds=(0, 1))
        held += low <= rate <= high
    assert 0.92 < held / n_samples < 0.98  # the simulation's own standard error is 0.8 %


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_coverage_with_as_few_topics_as_the_study_has(rate):
    """20 topics of 10 prompts that agree a little (intraclass correlation 0.05): plain percentiles cover 92 % there.

    At the edge, a rate of 0.1 whose topics agree strongly (0.3), coverage falls to about 91 %: skewed, and in effect 50 items.
    """
    rng = np.random.default_rng(int(100 * rate))
    held = {0.05: 0, 0.3: 0}
    n_samples = 600
    for correlation in held:
        concentration = 1 / correlation - 1
        for sample in range(n_samples):
            levels = rng.beta(rate * concentration, (1 - rate) * concentration, 20)
            values = (rng.random((20, 10)) < levels[:, None]).astype(float)
            _, low, high = clustered_mean(values.ravel(), np.repeat(np.arange(20), 10).tolist(), 400, sample, bounds=(0, 1))
            held[correlation] += low <= rate <= high
    assert 0.92 < held[0.05] / n_samples < 0.98
    assert held[0.3] / n_samples > 0.86


@pytest.mark.parametrize("n", [100, 200, 600])
def test_wilson_covers_exactly(n):
    """Coverage summed over the binomial distribution, no simulation: 93 to 97 % for rates of 0.1 to 0.9, less at the edge."""
    limits = [wilson(k, n) for k in range(n + 1)]

    def coverage(p):
        return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, (low, high) in enumerate(limits) if low <= p <= high)

    assert all(0.93 < coverage(i / 100) < 0.97 for i in range(10, 91))
    assert all(coverage(p) > 0.9 for p in (0.01, 0.02, 0.05, 0.95, 0.98, 0.99))


def test_a_unanimous_sample_is_not_certain():
    """With nothing seen to differ the interval opens towards what might have been: at most the rule of three over the topics."""
    for value, seed in ((1.0, 0), (0.0, 1)):
        mean, low, high = clustered_mean([value] * 60, [i % 20 for i in range(60)], 500, seed, bounds=(0, 1))
        assert mean == value
        open_side = 1 - low if value else high
        assert high == 1 if value else low == 0
        assert 3 / 20 * 0.8 < open_side < 3 / 20 * 1.3
    assert clustered_mean([0.5] * 10, range(10), 500, 0) == (0.5, 0.5, 0.5)  # unbounded: nothing can be said


def test_one_topic_alone_claims_no_certainty():
    mean, low, high = clustered_mean([0.0, 1.0, 1.0, 0.5], ["same"] * 4, 500, 0, bounds=(0, 1))
    assert mean == 0.625
    assert low < mean - 0.1 and high > mean + 0.1


def test_a_seed_determines_the_interval():
    values, clusters = grouped(3, 20, (3,), 0.2)
    assert clustered_mean(values, clusters, 200, 5) == clustered_mean(values, clusters, 200, 5)
    assert clustered_mean(values, clusters, 200, 5) != clustered_mean(values, clusters, 200, 6)


def test_paired_difference_sees_the_pairs():
    """Two arms that vary together: the difference is known far better than either arm."""
    theirs, clusters = grouped(4, 40, (4,), 0.2)
    rng = random.Random(0)
    ours = [min(1.0, value + 0.1 * (rng.random() < 0.5)) for value in theirs]
    difference, low, high = paired_difference(ours, theirs, clusters, 3000, 0)
    assert difference == pytest.approx(sum(ours) / len(ours) - sum(theirs) / len(theirs))
    gaps = [a - b for a, b in zip(ours, theirs, strict=True)]
    assert (low, high) == pytest.approx(naive_interval(gaps, clusters, 3000, 1), abs=0.08 * (high - low))
    _, theirs_low, theirs_high = clustered_mean(theirs, clusters, 3000, 0)
    assert high - low < 0.5 * (theirs_high - theirs_low)
    assert paired_difference(theirs, ours, clusters, 3000, 0)[0] == pytest.approx(-difference)


def test_equal_arms_differ_by_nothing_but_not_for_certain():
    difference, low, high = paired_difference([1.0, 0.0] * 50, [1.0, 0.0] * 50, range(100), 500, 0)
    assert difference == 0 and -0.06 < low < -0.02 and 0.02 < high < 0.06


def test_arms_of_unequal_length_are_an_error():
    with pytest.raises(ValueError):
        paired_difference([1.0], [1.0, 0.0], ["a", "b"], 10, 0)


def test_stratified_difference_equals_naive_resampling():
    rng = random.Random(5)
    theirs = {"small": [float(rng.random() < 0.5) for _ in range(30)], "large": [float(rng.random() < 0.8) for _ in range(300)]}
    ours = {name: [v if rng.random() < 0.7 else 1 - v for v in values] for name, values in theirs.items()}
    difference, low, high = stratified_difference(ours, theirs, 4000, 0)
    gaps = {name: [a - b for a, b in zip(ours[name], theirs[name], strict=True)] for name in ours}
    assert difference == pytest.approx(sum(sum(g) / len(g) for g in gaps.values()) / 2)  # tasks count alike, whatever their size
    resampled = sorted(sum(sum(rng.choices(g, k=len(g))) / len(g) for g in gaps.values()) / 2 for _ in range(4000))
    assert (low, high) == pytest.approx((resampled[100], resampled[3900]), abs=0.08 * (high - low))


def test_stratified_difference_of_equals():
    scores = {"a": [1.0, 0.0] * 20, "b": [1.0] * 10}
    difference, low, high = stratified_difference(scores, {name: list(values) for name, values in scores.items()}, 100, 0)
    assert difference == 0 and low < -0.02 and high > 0.02
