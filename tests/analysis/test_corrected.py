"""Corrected rates against pandas, scipy's exact limits, prediction-powered inference in closed form, and simulation."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy.stats import beta, binomtest, norm

from refusal.analysis.corrected import (
    combined,
    corrected_difference,
    corrected_rate,
    errors_differ,
    exact,
    judge_errors,
    labels_of,
    rogan_gladen,
)
from refusal.stats import clustered_rate, intraclass_correlations

RATES = (0.1, 0.5, 0.9, 0.98)


def labelled(verdict, truth, drawn):
    """Labels of both verdicts, of the completions that were drawn."""
    return [labels_of(truth[drawn[verdict[drawn] == said]].tolist(), int((verdict == said).sum())) for said in (True, False)]


def by_verdict(rng, verdict, n):
    """Half of n from each verdict, or all there are."""
    return np.concatenate([rng.permutation(np.flatnonzero(verdict == said))[: n // 2] for said in (True, False)])


def uniform(rng, verdict, n):
    return rng.permutation(len(verdict))[:n]


def judged(rng, truth, sensitivity, specificity):
    x = rng.random(len(truth))
    return np.where(truth, x < sensitivity, x >= specificity)


@pytest.mark.parametrize(("k", "n"), [(0, 15), (3, 15), (15, 15), (1, 2)])
def test_exact_limits_are_scipys(k, n):
    limits = binomtest(k, n).proportion_ci(method="exact")
    assert exact(k, n) == pytest.approx((k / n, limits.low, limits.high))


def test_limits_of_a_sum_are_squared_and_added_and_fall_where_a_part_has_a_negative_sign():
    value, low, high = combined(lambda a, b: 2 * a - b, (0.5, 0.4, 0.8), (0.3, 0.1, 0.7))
    assert (value, low, high) == pytest.approx((0.7, 0.7 - np.hypot(0.2, 0.4), 0.7 + np.hypot(0.6, 0.2)))


@pytest.mark.parametrize("draw", [by_verdict, uniform])
def test_the_rate_is_that_of_prediction_powered_inference_and_so_is_the_width_of_many_labels(draw):
    """The verdicts' mean plus the labelled errors', weighted by verdict; with the variance of a stratified sample."""
    rng = np.random.default_rng(0)
    truth = rng.random(4000) < 0.6
    verdict = judged(rng, truth, 0.9, 0.8)
    drawn = draw(rng, verdict, 800)
    table = pd.DataFrame({"v": verdict, "h": truth})
    some, weight = table.iloc[drawn], table["v"].value_counts(normalize=True)
    rectifier = some["h"].astype(float) - some["v"]
    w = some["v"].map(weight) / some["v"].map(some["v"].value_counts())
    found = corrected_rate(verdict.astype(float), range(4000), 0.0, *labelled(verdict, truth, drawn))
    value, low, high = found.limits
    assert value == pytest.approx(verdict.mean() + (w * rectifier).sum())
    of = some.groupby("v")["h"].agg(["mean", "size"]).join(table.groupby("v").size().rename("of"))
    variance = (weight**2 * of["mean"] * (1 - of["mean"]) / of["size"] * (1 - of["size"] / of["of"])).sum() + value * (
        1 - value
    ) / 4000
    half = norm.ppf(0.975) * np.sqrt(variance)
    assert (high - low) / 2 == pytest.approx(half, rel=0.06)


def test_with_every_label_it_is_the_interval_of_the_labels_and_nothing_is_left_of_the_judge():
    rng = np.random.default_rng(1)
    truth, topics = rng.random(120) < 0.3, np.repeat(range(12), 10).tolist()
    verdict = judged(rng, truth, 0.7, 0.7)
    labels = labelled(verdict, truth, np.arange(120))
    found = corrected_rate(verdict.astype(float), topics, 0.0, *labels)
    assert found.limits == pytest.approx(clustered_rate(truth.astype(float), topics, 0.0))
    kept = np.corrcoef(verdict, truth)[0, 1]
    assert found.kept == pytest.approx(abs(kept))
    clustered = corrected_rate(verdict.astype(float), topics, 0.05, *labels)
    assert clustered.limits == pytest.approx(clustered_rate(truth.astype(float), topics, 0.05 / kept**2))
    table, errors = pd.crosstab(truth, verdict), judge_errors(verdict.mean(), *labels)
    assert errors["accuracy"] == pytest.approx((verdict == truth).mean()) == errors["accuracy_low"]
    assert errors["sensitivity"] == pytest.approx(table.loc[True, True] / table.loc[True].sum()) == errors["sensitivity_high"]
    assert errors["specificity"] == pytest.approx(table.loc[False, False] / table.loc[False].sum())


def test_labels_without_an_error_leave_a_width_and_too_few_of_them_no_rate():
    values, topics = [1.0] * 90 + [0.0] * 10, [*range(20)] * 5
    passed, failed = labels_of([True] * 15, 90), labels_of([False] * 5, 10)
    value, low, high = corrected_rate(values, topics, 0.0, passed, failed).of_labels
    assert value == 0.9
    assert low == pytest.approx(0.9 - 0.9 * (1 - 0.025 ** (1 / 15)) * np.sqrt(1 - 15 / 90))
    assert high == pytest.approx(0.9 + 0.1 * (1 - 0.025 ** (1 / 5)) * np.sqrt(1 - 5 / 10))
    assert corrected_rate(values, topics, 0.0, passed, labels_of([False], 10)) is None
    few = corrected_rate([1.0] * 96 + [0.0] * 4, topics, 0.0, labels_of([True] * 15, 96), labels_of([], 4))
    assert few.of_labels[2] == pytest.approx(0.96 + 0.04)  # a verdict on 4 % that nobody labelled may be wrong on all of them
    assert judge_errors(0.9, labels_of([], 90), labels_of([], 10))["accuracy"] is None


def test_weights_count_as_kish_has_it():
    labels = labels_of([True, False, True], 30, [1, 1, 4])
    assert labels.share == pytest.approx(5 / 6) and labels.effective == pytest.approx(36 / 18)


def study(rng, sensitivity, specificity, n_labels, draw, icc=0.1, n_topics=20, size=10):
    """Arms of every rate on the same 200 prompts, half of which, and half of whose topics, all arms find as easy."""
    topics = np.repeat(np.arange(n_topics), size)
    easy = rng.random(n_topics), rng.random(n_topics * size)
    same = [rng.random((len(RATES), len(x))) < 0.5 for x in easy]
    truth = []
    for i, rate in enumerate(RATES):
        of_topic, of_item = (np.where(same[k][i], easy[k], rng.random(len(easy[k]))) for k in (0, 1))
        truth.append(of_item < beta.ppf(of_topic, rate * (1 - icc) / icc, (1 - rate) * (1 - icc) / icc)[topics])
    verdicts, clusters = [judged(rng, one, sensitivity, specificity) for one in truth], topics.tolist()
    iccs = intraclass_correlations([(one.astype(float), clusters) for one in verdicts])
    arms = [
        corrected_rate(v.astype(float), clusters, own, *labelled(v, h, draw(rng, v, n_labels)))
        for v, h, own in zip(verdicts, truth, iccs, strict=True)
    ]
    differences = [
        arm
        and arms[0]
        and corrected_difference(arm, arms[0], (v.astype(float), verdicts[0].astype(float)), clusters, max(own, iccs[0]))
        for arm, v, own in zip(arms, verdicts, iccs, strict=True)
    ]
    return arms, differences[1:]


def test_coverage_of_rates_and_of_paired_differences():
    """Judges right in 80 to 99 %, of both kinds of errors or more of one: docs/intervals.md has the wider grid."""
    rng, held, n_null, widths = np.random.default_rng(0), {}, {}, {}
    grid = itertools.product((0.8, 0.9, 0.95, 0.99), (0, 0.6, -0.6), (30, 100, 300), (by_verdict, uniform))
    for accuracy, lopsided, n, draw in grid:
        errors = [(1 - accuracy) * (1 + sign * lopsided) for sign in (1, -1)]
        for _ in range(25):
            arms, differences = study(rng, 1 - errors[0], 1 - errors[1], n, draw)
            told = [("rate", rate, arm and arm.limits, rate) for rate, arm in zip(RATES, arms, strict=True)]
            told += [("difference", rate, d, rate - 0.1) for rate, d in zip(RATES[1:], differences, strict=True)]
            for kind, rate, limits, true in told:
                cell = kind, accuracy, n, rate
                n_null.setdefault((n, draw), []).append(limits is None)
                if limits:
                    held.setdefault(cell, []).append(limits[1] <= true <= limits[2])
                    widths.setdefault((kind, n), []).append(limits[2] - limits[1])
    shares = {cell: np.mean(of) for cell, of in held.items() if len(of) >= 50}
    assert len(shares) >= 80 and min(shares.values()) >= 0.93 - 2.5 * 0.021, min(
        shares, key=shares.get
    )  # of 150 draws, but for null
    for kind, n in itertools.product(("rate", "difference"), (30, 100, 300)):
        assert np.mean(np.concatenate([of for cell, of in held.items() if cell[0] == kind and cell[2] == n])) >= 0.95
    assert np.mean(widths["rate", 30]) < 0.3 and np.mean(widths["rate", 100]) < 0.2 and np.mean(widths["difference", 100]) < 0.3
    assert all(np.mean(of) < (0.01 if n > 30 or draw is by_verdict else 0.25) for (n, draw), of in n_null.items())


@pytest.mark.parametrize(
    ("sensitivities", "named"), [([0.9, 0.9, 0.9, 0.9], (0, 0.09)), ([0.9, 0.9, 0.6, 0.9], (0.8, 1))], ids=["alike", "one worse"]
)
def test_a_judge_that_errs_more_in_one_arm_is_told_from_one_that_does_not(sensitivities, named):
    """Arms whose rates differ, which alone is no difference of errors."""
    rng, found = np.random.default_rng(3), []
    for _ in range(120):
        arms = {}
        for rate, sensitivity in zip((0.1, 0.5, 0.9, 0.5), sensitivities, strict=True):
            truth = rng.random(200) < rate
            verdict = judged(rng, truth, sensitivity, 0.9)
            arms[len(arms)] = (verdict.mean(), *labelled(verdict, truth, by_verdict(rng, verdict, 50)))
        found.append(errors_differ(arms, 200, int(rng.integers(2**31))))
    assert named[0] <= np.mean([p["sensitivity"] < 0.05 for p in found]) <= named[1]
    assert np.mean([p["specificity"] < 0.05 for p in found]) <= 0.09
    assert errors_differ(arms, 200, 7) == errors_differ(arms, 200, 7)
    assert errors_differ({"one": arms[0]}, 200, 7) == {"sensitivity": None, "specificity": None}


def test_a_calibration_from_elsewhere_carries_its_own_uncertainty():
    value, low, high = rogan_gladen((0.5, 0.45, 0.55), (90, 100), (160, 200))
    assert value == pytest.approx((0.5 + 0.8 - 1) / 0.7)
    by = [0.05 / 1.96 / 0.7, value * np.sqrt(0.9 * 0.1 / 100) / 0.7, (1 - value) * np.sqrt(0.8 * 0.2 / 200) / 0.7]
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(np.square(by).sum()), rel=0.1)  # by the delta method
    assert rogan_gladen((0.5, 0.4, 0.6), (55, 100), (50, 100)) is rogan_gladen((0.5, 0.4, 0.6), (0, 0), (50, 50)) is None
    assert rogan_gladen((0.1, 0.05, 0.2), (90, 100), (80, 100))[:2] == (0.0, 0.0)  # below what the false positives alone give
    assert rogan_gladen((0.35, 0.3, 0.4), (90, 100), (160, 200), of_difference=True)[0] == pytest.approx(0.5)


def test_coverage_with_a_calibration_from_elsewhere():
    rng, held = np.random.default_rng(4), []
    for rate, se, sp in itertools.product(RATES, (0.8, 0.95), (0.8, 0.95)):
        p = rate * se + (1 - rate) * (1 - sp)
        for _ in range(100):
            k = rng.binomial([200, 60, 60], [p, se, sp])
            judged = clustered_rate([1.0] * k[0] + [0.0] * (200 - k[0]), range(200), 0.0)
            _, low, high = rogan_gladen(judged, (k[1], 60), (k[2], 60))
            held.append((rate, low <= rate <= high))
    assert min(pd.DataFrame(held).groupby(0)[1].mean()) >= 0.93
