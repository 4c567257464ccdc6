"""Labels joined to completions that several arms share, by simulation, and the figures of a study whose truth is known."""

from collections import Counter

import numpy as np
import pytest

from refusal.analysis.agreement import by_calibration, by_labels, calibration_of, chances, labels_by_arm

SIZES = {"baseline": ["baseline"], "random": ["random_0", "random_1", "random_2"]}


def study(rng, n=120):
    """Rows and verdicts, and by text whether it complies: refusals are texts that all interventions share, of which the judge
    passes some; the rest are texts of their own, which it judges right."""
    rows, verdicts, truth = [], [], {}
    shared = rng.random(n) < 0.6
    passed = rng.random(n) < 0.3
    for arm, names in SIZES.items():
        for name in names:
            for i in range(n):
                text = "I cannot." if shared[i] else f"{name}: turn the key."
                rows.append({"arm": arm, "name": name, "id": str(i), "prompt": f"door {i}", "completion": text})
                verdicts.append(bool(passed[i] or not shared[i]))
                truth[f"door {i}", text] = not shared[i]
    return rows, verdicts, truth


def drawn(rng, rows, verdicts, truth, n):
    """Labels of n rows of each arm and verdict, drawn without looking at their texts."""
    found = {}
    for arm in SIZES:
        for said in (True, False):
            of = [row for row, v in zip(rows, verdicts, strict=True) if row["arm"] == arm and v is said]
            for i in rng.permutation(len(of))[:n]:
                text = of[i]["prompt"], of[i]["completion"]
                found[text] = truth[text]
    return found


def test_a_text_that_several_arms_gave_counts_as_often_as_it_was_given_over_its_chances():
    """The share of compliance among what the judge passed, averaged over draws, is that of all; unweighted it is not."""
    rng = np.random.default_rng(0)
    rows, verdicts, truth = study(rng)
    weighted, plain = {arm: [] for arm in SIZES}, {arm: [] for arm in SIZES}
    for _ in range(60):
        labels = drawn(rng, rows, verdicts, truth, 20)
        of = labels_by_arm(rows, verdicts, labels)
        for arm in SIZES:
            weighted[arm].append(of[arm][1].share)
            own = {(r["prompt"], r["completion"]) for r, v in zip(rows, verdicts, strict=True) if r["arm"] == arm and v}
            plain[arm].append(np.mean([labels[text] for text in own & labels.keys()]))
    for arm in SIZES:
        passed = [truth[r["prompt"], r["completion"]] for r, v in zip(rows, verdicts, strict=True) if r["arm"] == arm and v]
        assert np.mean(weighted[arm]) == pytest.approx(np.mean(passed), abs=0.03)
    assert abs(np.mean(plain["baseline"]) - np.mean(weighted["baseline"])) > 0.05


def test_chances_are_those_of_drawing_as_many_from_each_arm():
    copies = {("p", str(i)): {"a": 1} for i in range(10)} | {("p", "both"): {"a": 1, "b": 4}}
    found = chances(copies, [("p", "0"), ("p", "1"), ("p", "both")])
    assert sum(found.values()) == pytest.approx(3) and found["p", "both"] > 0.9 > 0.25 > found["p", "0"]
    assert set(chances(copies, [*copies]).values()) == {1.0}


def test_every_arm_is_corrected_by_its_own_labels_and_all_labels_give_the_truth():
    rng = np.random.default_rng(1)
    rows, verdicts, truth = study(rng)
    topics = [i // 6 for i in range(120)]
    labels, arms = by_labels(rows, verdicts, topics, truth, 50, 0)
    of = Counter((row["arm"], truth[row["prompt"], row["completion"]]) for row in rows)
    for arm in SIZES:
        rate = of[arm, True] / (of[arm, True] + of[arm, False])
        assert arms[arm]["corrected"] == pytest.approx(rate) and arms[arm]["corrected_low"] < rate < arms[arm]["corrected_high"]
    assert arms["random"]["difference"] == pytest.approx(0) and "difference" not in arms["baseline"]
    right = np.mean([v == truth[r["prompt"], r["completion"]] for r, v in zip(rows, verdicts, strict=True)])
    assert labels["all"]["accuracy"] == pytest.approx(right) and labels["all"]["sensitivity"] == 1
    few = {text: own for text, own in truth.items() if text == ("door 0", rows[0]["completion"])}
    _, arms = by_labels(rows, verdicts, topics, few, 50, 0)
    assert {of["reason"] for of in arms.values()} == {"too few labels"} and arms["random"]["difference"] is None


def test_a_missing_verdict_is_in_no_figure():
    rows, verdicts, truth = study(np.random.default_rng(2))
    p, yes, no = labels_by_arm(rows, [None, *verdicts[1:]], truth)["baseline"]
    assert p == pytest.approx(sum(verdicts[1:120]) / 119) and yes.n_items + no.n_items == 119


def test_a_calibration_counts_partial_compliance_as_none():
    confusion = {
        "compliance": {"compliance": 8, "partial_refusal": 1, "refusal": 1},
        "partial_refusal": {"compliance": 2, "partial_refusal": 1, "refusal": 2},
        "refusal": {"compliance": 0, "partial_refusal": 3, "refusal": 12},
    }
    calibration = calibration_of(confusion)
    assert calibration == {"sensitivity": [8, 10], "specificity": [18, 20]}
    rows, verdicts, _ = study(np.random.default_rng(3))
    arms = by_calibration(rows, verdicts, [i // 6 for i in range(120)], calibration)
    judged = {arm: np.mean([v for r, v in zip(rows, verdicts, strict=True) if r["arm"] == arm]) for arm in SIZES}
    for arm in SIZES:
        assert arms[arm]["corrected"] == pytest.approx((judged[arm] + 0.9 - 1) / (0.8 + 0.9 - 1))
    assert arms["random"]["difference"] == pytest.approx((judged["random"] - judged["baseline"]) / 0.7)
