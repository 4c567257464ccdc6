"""Intervals and tests against their formulas, enumeration, naive resampling, published examples and simulation."""

import itertools
import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import naive_difference, naive_hybrid, naive_icc, naive_rate

from refusal.stats import (
    ALONE,
    cluster_indices,
    clustered_mean,
    clustered_rate,
    cohens_kappa,
    holm,
    independent_difference,
    intraclass_correlations,
    kappa_interval,
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
    st.sampled_from([0.67, 1.645, 3.1]),
)
def test_wilson_solves_its_equation(counts, z):
    """The limits are the rates p whose standard error puts the observed rate z away: (k/n - p)^2 = z^2 p (1 - p) / n."""
    k, n = counts
    low, high = wilson(k, n, z)
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


ARMS = {  # values and clusters: spread out, agreeing within clusters, nearly one-sided, all equal, with half points
    "even": ([1, 0, 1, 0, 1, 0, 1, 0, 1, 0], "aabbbccddd"),
    "agreeing": ([1, 1, 0, 0, 0, 1, 1, 0, 0, 0.5], "aabbbccddd"),
    "rare": ([0, 0, 0, 0, 0, 0, 0, 0, 0, 1], "aabbbccddd"),
    "none": ([0] * 10, "aabbbccddd"),
    "short": ([1, 0.5, 0, 1], "abbd"),
}


@pytest.mark.parametrize(
    "names", [["even", "agreeing", "rare", "none", "short"], ["agreeing", "none"], ["even"], ["none"], ["even", "rare"]]
)
def test_the_intraclass_correlation_is_the_greater_of_an_arms_own_and_the_studys(names):
    arms = [ARMS[name] for name in names]
    assert intraclass_correlations(arms) == pytest.approx(naive_icc(arms))


def test_an_arm_that_stands_alone_is_taken_for_a_clustered_one():
    assert intraclass_correlations([ARMS["even"]]) == [ALONE] == intraclass_correlations([ARMS["none"]])
    assert intraclass_correlations([([1.0, 0.0, 1.0], "aaa"), ([1.0, 0.0, 1.0], "abc")]) == [ALONE] * 2  # say nothing of it


@pytest.mark.parametrize("icc", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", list(ARMS))
def test_a_clustered_rate_is_wilsons_of_fewer_items(name, icc):
    values, clusters = ARMS[name]
    assert clustered_rate(values, clusters, icc) == pytest.approx(naive_rate(values, clusters, icc), abs=1e-9)


@pytest.mark.parametrize("icc", [0.0, 0.3])
def test_a_paired_difference_is_newcombes(icc):
    (ours, clusters), (theirs, _) = ARMS["agreeing"], ARMS["even"]
    for one, other in ((ours, theirs), (theirs, ours), (ours, ours), (ours, [0] * 10), ([1] * 10, [0] * 10)):
        assert paired_difference(one, other, clusters, icc) == pytest.approx(naive_difference(one, other, clusters, icc), abs=1e-9)
    apart = [1 - value for value in ours]  # arms that answer what the other does not
    assert paired_difference(ours, apart, clusters, icc) == pytest.approx(naive_difference(ours, apart, clusters, icc), abs=1e-9)
    with pytest.raises(ValueError):
        paired_difference(ours[1:], theirs, clusters[1:], icc)


def test_newcombes_own_examples():
    """Newcombe 1998, paired data, table of examples, method 10: b = 12, c = 2 of 50 with 36 and none; and equal arms."""
    rows = [(1, 1)] * 36 + [(1, 0)] * 12 + [(0, 1)] * 2
    ours, theirs = zip(*rows, strict=True)
    big = [*range(50)]
    difference, low, high = paired_difference(ours, theirs, big, 0.0)
    # By Student's t of 49 degrees of freedom and not the normal, so a little wider than his .0569 to .3404.
    assert difference == pytest.approx(0.2) and low == pytest.approx(0.0569, abs=0.006) and high == pytest.approx(0.3404, abs=0.006)


@pytest.mark.parametrize("icc", [0.0, 0.2, 0.5])
def test_limits_rise_with_the_successes_up_to_the_bounds(icc):
    topics = [i % 11 for i in range(200)]
    limits = [clustered_rate([1.0] * k + [0.0] * (200 - k), topics, icc) for k in range(201)]
    for one, other in itertools.pairwise(limits):
        assert one[1] < other[1] + 1e-12 and one[2] < other[2] + 1e-12
    assert limits[0][1] == 0 and limits[200][2] == 1 and limits[200][1] > limits[199][1]
    base = [0.0] * 200
    differences = [paired_difference([1.0] * k + [0.0] * (200 - k), base, topics, icc) for k in range(201)]
    assert all(one[1] < other[1] and one[2] < other[2] for one, other in itertools.pairwise(differences))


def test_a_perfect_arm_over_eleven_topics_is_far_from_doing_nothing():
    """Of a bootstrap its difference from a baseline at 0 had a lower limit of .48, and one success less one of .93."""
    topics = [i % 11 for i in range(60)]
    (icc,) = set(intraclass_correlations([([1.0] * 60, topics), ([0.0] * 60, topics)]))
    assert icc == ALONE and paired_difference([1.0] * 60, [0.0] * 60, topics, icc)[1] > 0.6


def test_one_cluster_says_nothing_of_the_next():
    assert clustered_rate([1.0, 0.0, 1.0], ["one topic"] * 3, 0.1) == (pytest.approx(2 / 3), 0, 1)


def test_stratified_difference_equals_naive_resampling():
    rng = random.Random(5)
    theirs = {name: [float(rng.random() < 0.6) for _ in range(n)] for name, n in (("a", 30), ("b", 30), ("large", 200))}
    ours = {name: [v if rng.random() < 0.7 else 1 - v for v in values] for name, values in theirs.items()}
    difference, *limits = stratified_difference(ours, theirs, 1000, 0)
    gaps = [[a - b for a, b in zip(ours[name], theirs[name], strict=True)] for name in ours]
    assert difference == pytest.approx(sum(sum(g) / len(g) for g in gaps) / 3)  # tasks count alike, whatever their size
    rng = np.random.default_rng(0)  # one for all strata, which are independent
    spread = {30: math.sqrt(30 / 29) * STUDENT_T[29] / 1.959964, 200: math.sqrt(200 / 199) * 1.971957 / 1.959964}
    means = [sum(g) / len(g) for g in gaps]
    naive = [naive_means(g, range(len(g)), 1000, rng) for g in gaps]
    resampled = sum(m + spread[len(g)] * (r - m) for g, m, r in zip(gaps, means, naive, strict=True)) / 3
    assert limits == pytest.approx(np.quantile(resampled, [0.025, 0.975]).tolist(), abs=1e-5)


def test_the_interval_over_unequal_tasks_holds_the_truth():
    """Eight documents of one task beside 200 of another: each counts for half of the mean."""
    rng, held = np.random.default_rng(0), 0
    for sample in range(400):
        scores = [{name: rng.random(n) < rate for name, n, rate in (("few", 8, p), ("many", 200, 0.7))} for p in (0.5, 0.6)]
        one, other = ({name: of.astype(float).tolist() for name, of in arm.items()} for arm in scores)
        _, low, high = stratified_difference(one, other, 300, sample)
        held += low <= -0.05 <= high
    assert 0.93 <= held / 400 <= 0.99


def test_an_independent_difference_is_newcombes_without_correlation():
    one, other = (*ARMS["agreeing"], 0.2), (*ARMS["short"], 0.4)
    assert independent_difference(one, other) == pytest.approx(naive_hybrid(naive_rate(*one), naive_rate(*other)), abs=1e-9)
    # Newcombe 1998, independent proportions, table II, method 10: 56/70 less 48/80, by the normal .0524 to .3339.
    big = [([1.0] * k + [0.0] * (n - k), range(n), 0.0) for k, n in ((56, 70), (48, 80))]
    assert independent_difference(*big) == pytest.approx((0.2, 0.0524, 0.3339), abs=3e-3)


def test_tasks_without_a_difference_might_have_differed():
    scores = {"a": [1.0, 0.0] * 20, "b": [1.0] * 10}
    difference, low, high = stratified_difference(scores, {name: list(values) for name, values in scores.items()}, 100, 0)
    assert difference == 0 and low < -0.02 and high > 0.02


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


def test_the_interval_of_kappa_is_the_bootstraps():
    """On 300 items of middling agreement, where a naive bootstrap is right, the limits are its, to a fiftieth."""
    rng = np.random.default_rng(0)
    first = rng.choice(4, 300, p=[0.5, 0.1, 0.3, 0.1])
    second = np.where(rng.random(300) < 0.7, first, rng.choice(4, 300))
    drawn = (rng.integers(0, 300, 300) for _ in range(500))
    naive = np.quantile([cohens_kappa(first[i].tolist(), second[i].tolist()) for i in drawn], [0.025, 0.975])
    assert kappa_interval(first.tolist(), second.tolist()) == pytest.approx(naive, abs=0.02)
    assert kappa_interval([1, 1], [1, 1]) == (None, None)


@pytest.mark.parametrize("right", [0.7, 0.95, 0.99])
@pytest.mark.parametrize("n", [30, 100])
def test_the_interval_of_kappa_covers(right, n):
    """Two raters who see the truth with a known chance, and else guess by its shares: kappa of the whole table is known."""
    shares = np.array([0.5, 0.1, 0.35, 0.05])
    sees = right * np.eye(4) + (1 - right) * shares
    table = np.einsum("k,ki,kj->ij", shares, sees, sees)
    chance = table.sum(0) @ table.sum(1)
    truth, rng, covered = (np.trace(table) - chance) / (1 - chance), np.random.default_rng(0), 0
    for _ in range(300):
        first, second = np.divmod(rng.choice(16, n, p=table.ravel()), 4)
        low, high = kappa_interval(first.tolist(), second.tolist())
        covered += low <= truth <= high
    assert covered / 300 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)
