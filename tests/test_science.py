"""The science stage's arms and tables, on activations whose directions are known."""

import itertools
import random
from statistics import fmean

import numpy as np
import pytest
import torch
from test_statistics import naive_interval

from refusal.arms import BASELINE_ARM, direction_arm
from refusal.directions import difference_in_means
from refusal.estimators import logistic, whitened
from refusal.science import (
    RANKS,
    best_on_val,
    control_arms,
    correct,
    decide,
    planted_arms,
    refusal_three_ways,
    row,
    single_arms,
    spectrum_row,
    subspace_arms,
)
from refusal.subspace import captured
from refusal.verdicts import Judged

YES = Judged("compliance", 1.0, 1.0, False, False)
NO = Judged("refusal", 0.0, 1.0, True, True)
D, LAYERS, N = 24, 4, 80


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    harmful, safe, unrelated = (torch.randn(N, LAYERS, D, generator=generator) for _ in range(3))
    shift = torch.randn(LAYERS, D, generator=generator)
    harmful += 2 * shift
    harmful[:, 0] = safe[:, 0] = unrelated[:, 0] = 1.0  # the first layer is the same for every prompt
    return harmful, safe, unrelated


@pytest.fixture(scope="module")
def found(sets):
    d = difference_in_means(sets[0], sets[1])
    return {"unit": d.unit, "defined": d.defined, "safe_mean": d.safe_mean, "difference": d.difference}


def test_single_arms_are_each_estimator_at_each_defined_layer(sets, found):
    v = torch.randn(D, dtype=torch.float64)
    arms = single_arms(found, sets[0], sets[1], 2, 1.0, v / v.norm(), affine=True, fitted_on=range(N))
    names = ["rank_1", "difference.1", "difference.3", "optimised"]
    names += [f"{family}.{i}" for family in ("logistic", "whitened", "paired_svd", "affine") for i in (1, 2, 3)]
    assert sorted(arm.name for arm in arms) == sorted(names) and arms[0].name == "rank_1"
    by_name = {arm.name: arm for arm in arms}
    assert torch.equal(by_name["rank_1"].basis[0], found["unit"][2]) and all(arm.rank == 1 for arm in arms)
    offset = by_name["affine.3"].cell.offset
    assert torch.allclose(offset, torch.stack([m.double() @ found["unit"][3] for m in sets[1].double().mean(0)]))
    # Another alpha than 1 makes rank_1's layer an arm of its own at alpha 1.
    other = single_arms(found, sets[0], sets[1], 2, 0.75, v / v.norm(), affine=False, fitted_on=range(N))
    assert {"rank_1", "difference.2"} <= {arm.name for arm in other} and not any(arm.family == "affine" for arm in other)
    assert next(arm for arm in other if arm.name == "rank_1").cell.alpha == 0.75


def test_estimators_that_need_all_pairs_at_once_are_fitted_on_the_pairs_given(sets, found):
    whole, few = (
        {a.name: a for a in single_arms(found, sets[0], sets[1], 2, 1.0, found["unit"][1], affine=False, fitted_on=on)}
        for on in (range(N), [1, 4, 9, 16, 25])
    )
    for name in ("logistic.1", "whitened.3"):
        family, layer = name.split(".")
        fit = {"logistic": logistic, "whitened": whitened}[family]
        wanted = fit(*(sets[side][[1, 4, 9, 16, 25], int(layer)] for side in (0, 1)))
        assert torch.allclose(few[name].basis[0], wanted) and not torch.allclose(whole[name].basis[0], wanted)
    assert torch.equal(few["paired_svd.2"].basis, whole["paired_svd.2"].basis)  # all pairs, however many


def test_subspace_arms_hold_the_ranks_that_the_layers_allow(sets, found):
    arms = {arm.name: arm for arm in subspace_arms(found, sets[0], sets[1], 2, [2, 3, 1], "resid_pre")}
    assert set(arms) == {"svd_2", "svd_3", "svd_5", "qr_2", "qr_3", "per_layer"}
    assert [arms[f"svd_{k}"].rank for k in RANKS] == [2, 3, 5]
    assert captured(arms["qr_2"].basis, found["unit"][2]) == pytest.approx(1) == captured(arms["qr_2"].basis, found["unit"][3])
    assert captured(arms["qr_2"].basis, found["unit"][1]) < 0.95
    # The singular vectors are those of the layer given, by numpy; their signs are nobody's.
    for layer in (1, 2):
        made = {arm.name: arm for arm in subspace_arms(found, sets[0], sets[1], layer, [2, 3, 1], "resid_pre")}
        vectors = np.linalg.svd((sets[0].double() - sets[1].double())[:, layer].numpy(), full_matrices=False)[2]
        for k in RANKS:
            arm = made[f"svd_{k}"]
            assert arm.layer == layer and arm.alpha == 1.0 and torch.equal(arm.cell.direction, arm.basis)
            assert np.abs(arm.basis.numpy() @ vectors[:k].T) == pytest.approx(np.eye(k), abs=1e-8)


def test_control_arms(sets):
    harmless = vars(difference_in_means(sets[2], sets[1]))
    arms = control_arms(harmless, 10, 2, 2, 0)
    counts = {family: sum(arm.family == family for arm in arms) for family in ("harmless", "random_1", "random_2", "random_5")}
    assert counts == {"harmless": 1, "random_1": 10, "random_2": 2, "random_5": 2}
    expected = sets[2][:, 2].double().mean(0) - sets[1][:, 2].double().mean(0)
    assert captured(arms[0].basis, expected) == pytest.approx(1)
    assert not arms[0].cell.fixed and all(arm.cell.fixed for arm in arms[1:])
    for arm in arms:
        rank = 1 if arm.family == "harmless" else int(arm.family.removeprefix("random_"))
        assert arm.rank == rank and arm.alpha == arm.cell.alpha == 1.0
        assert torch.atleast_2d(arm.cell.direction).shape == (rank, D)
        assert torch.allclose(arm.basis @ arm.basis.T, torch.eye(rank, dtype=torch.float64), atol=1e-9)
    # No two are alike, of one rank or another, and another seed draws others.
    first = [arm.basis[0] for arm in arms[1:]]
    first += [arm.basis[0] for arm in control_arms(harmless, 10, 2, 2, 1)[1:]]
    assert torch.corrcoef(torch.stack(first)).fill_diagonal_(0).abs().max() < 0.9


def test_planted_arms_leave_nothing_of_the_truth_in_the_rest(found):
    truth = torch.nn.functional.normalize(torch.randn(D, dtype=torch.float64), dim=0)
    arms = planted_arms(truth, found)
    assert [arm.name for arm in arms] == ["planted", "less_planted.1", "less_planted.2", "less_planted.3"]
    for arm in arms[1:]:
        assert captured(arm.basis, truth) < 1e-9
        assert captured(torch.stack([arm.basis[0], truth]), found["unit"][arm.layer]) == pytest.approx(1)


def test_best_on_val_is_the_best_score_and_the_first_of_those_that_tie(sets, found):
    arms = single_arms(found, sets[0], sets[1], 2, 1.0, found["unit"][1], affine=False, fitted_on=range(N))
    half = Judged("compliance", 1.0, 0.5, False, False)
    judged = {arm.name: [NO, NO] for arm in arms} | {
        "logistic.1": [YES, None],
        "whitened.3": [YES, YES],
        "difference.1": [half, YES],
    }
    assert best_on_val(arms, judged).name == "logistic.1"
    assert best_on_val([arm for arm in arms if arm.family == "difference"], judged).name == "difference.1"
    assert best_on_val(arms, {arm.name: [NO] for arm in arms}).name == "rank_1"


TOPICS = [i % 20 for i in range(60)]


def table(**arms):
    reference = torch.eye(D, dtype=torch.float64)[0]
    rows = {
        name: row(arm, judged, TOPICS, judged, TOPICS, arms["baseline"][1], reference, None, 200, 0, False)
        for name, (arm, judged) in arms.items()
    }
    correct(rows)
    return rows


def test_a_table_and_its_verdict(sets, found):
    arms = single_arms(found, sets[0], sets[1], 2, 1.0, found["unit"][1], affine=False, fitted_on=range(N))
    single, weak = arms[0], arms[1]
    several = subspace_arms(found, sets[0], sets[1], 2, [2, 3, 1], "resid_pre")[0]
    yes, no = [YES] * 60, [NO] * 60
    some = [YES if i % 3 else NO for i in range(60)]
    rows = table(baseline=(BASELINE_ARM, no), rank_1=(single, yes), weak=(weak, no), svd_2=(several, some))
    assert rows["rank_1"]["difference"] == 1.0 and rows["rank_1"]["p_holm"] == pytest.approx(4 * rows["rank_1"]["p"])
    assert rows["weak"]["p_holm"] == 1.0 and rows["weak"]["difference"] == 0.0
    assert rows["svd_2"]["compliance"] == pytest.approx(2 / 3) and rows["svd_2"]["val_minus_test"] == 0
    assert rows["rank_1"]["cosine_planted"] is None and rows["baseline"]["cosine_rank_1"] is None
    few = list(range(0, 60))
    controls = {k: [(few, no), (few, no)] for k in (1, 2)}
    test = {"rank_1": yes, "svd_2": some, "weak": no}
    found_ = decide(rows, single, single, several, test, controls, TOPICS, 200, 0)
    assert (found_["verdict"], found_["by"]) == ("single", "rank_1")
    assert found_["difference"]["name"] == "rank_1" and found_["difference"]["mediates"]
    # A random direction that does it too takes the verdict away; so does a single arm that does nothing.
    same = {1: [(few, yes)], 2: controls[2]}
    assert decide(rows, single, single, several, test, same, TOPICS, 200, 0)["verdict"] != "single"
    # An arm that does nothing leaves the verdict to the subspace.
    rows[weak.name], test[weak.name] = rows["weak"], no
    found_ = decide(rows, single, weak, several, test, controls, TOPICS, 200, 0)
    assert (found_["verdict"], found_["by"], found_["single"]["mediates"]) == ("subspace", "svd_2", False)
    rows["svd_2"], test["svd_2"] = rows["weak"], no
    assert decide(rows, single, weak, several, test, controls, TOPICS, 200, 0)["reason"] == "no_mediation"


def test_the_intervals_of_a_row_draw_whole_topics_of_its_own_set(found):
    """Prompts of a topic agree; val has other topics than test, in another order. Against naive loops over topics."""
    half = Judged("partial_refusal", 0.5, 1.0, False, True)
    val_topics, test_topics = [f"val {i // 5}" for i in range(100)], TOPICS
    val = [(YES, YES, half, NO)[i // 5 * 7 % 20 % 4] for i in range(100)]
    test, baseline = [(YES, half, NO)[topic % 3] for topic in TOPICS], [half if topic % 4 else NO for topic in TOPICS]
    truth = torch.eye(D, dtype=torch.float64)[1]
    arm = direction_arm("one", "difference", torch.eye(D, dtype=torch.float64)[0] * 0.6 + truth * 0.8, 0.75, 3)
    # Verdicts that are missing take their topics along.
    val[0] = test[3] = baseline[4] = None
    made = row(arm, val, val_topics, test, test_topics, baseline, torch.eye(D)[0], truth, 4000, 0, False)
    assert {k: made[k] for k in ("family", "layer", "alpha", "rank", "n_val", "n")} == {
        "family": "difference",
        "layer": 3,
        "alpha": 0.75,
        "rank": 1,
        "n_val": 99,
        "n": 59,
    }
    assert (made["cosine_rank_1"], made["cosine_planted"]) == pytest.approx((0.6, 0.8))
    ours, theirs = (
        [(v.compliance, t) for v, t in zip(*both, strict=True) if v] for both in ((val, val_topics), (test, test_topics))
    )
    gaps = [(a.compliance - b.compliance, t) for a, b, t in zip(test, baseline, test_topics, strict=True) if a and b]
    assert made["difference"] == pytest.approx(fmean(gap for gap, _ in gaps)) and len(gaps) == 58
    low, high = naive_interval(*zip(*gaps, strict=True), 4000, 1)
    assert [made["difference_low"], made["difference_high"]] == pytest.approx([low, high], abs=0.08 * (high - low))
    means = [fmean(value for value, _ in items) for items in (ours, theirs)]
    assert (made["compliance_val"], made["val_minus_test"]) == pytest.approx((means[0], means[0] - means[1]))
    resampled = []
    for seed in range(2000):
        drawn = []
        for items in (ours, theirs):
            members: dict = {}
            for value, topic in items:
                members.setdefault(topic, []).append(value)
            pick = random.Random(f"{seed} {len(items)}")
            drawn.append(fmean(v for group in pick.choices(list(members.values()), k=20) for v in group))
        resampled.append(drawn[0] - drawn[1])
    # Quantiles of 20 topics, expanded to Student's t: of z = 2.1473 and not 1.96.
    low, high = np.quantile(resampled, [0.01588, 0.98412])
    limits = [made["val_minus_test_low"], made["val_minus_test_high"]]
    assert limits == pytest.approx([low, high], abs=0.08 * (high - low))
    unseen = row(arm, None, [], test, test_topics, baseline, torch.eye(D)[0], None, 50, 0, False)
    nothing = ("compliance_val", "n_val", "val_minus_test", "val_minus_test_low", "val_minus_test_high", "cosine_planted")
    assert [unseen[k] for k in nothing] == [None] * 6


def test_each_arm_is_measured_against_the_controls_of_its_own_rank(sets, found):
    """Controls of another rank must not count, each control faces the prompts that it ran on, and a missing verdict no prompt."""
    single = single_arms(found, sets[0], sets[1], 2, 1.0, found["unit"][1], affine=False, fitted_on=range(N))[0]
    several = subspace_arms(found, sets[0], sets[1], 2, [2, 3, 1], "resid_pre")[0]
    yes, no = [YES] * 60, [NO] * 60
    rows = table(baseline=(BASELINE_ARM, no), rank_1=(single, yes), svd_2=(several, yes))
    test, few = {"rank_1": yes, "svd_2": yes}, list(range(40))
    for works, verdict, by in ((2, "single", "rank_1"), (1, "subspace", "svd_2")):
        controls = {k: [(few, [YES if k == works else NO] * 40)] for k in (1, 2)}
        found_ = decide(rows, single, single, several, test, controls, TOPICS, 200, 0)
        assert (found_["verdict"], found_["by"]) == (verdict, by)
        for arm, k in (("single", 1), ("subspace", 2)):
            assert found_[arm]["mediates"] is (k != works) and found_[arm]["name"] == {1: "rank_1", 2: "svd_2"}[k]
            assert found_[arm]["p_holm"] == rows[found_[arm]["name"]]["p_holm"] < 0.05
            assert found_[arm]["difference_low"] == rows[found_[arm]["name"]]["difference_low"] > 0.5
            assert (found_[arm]["above_random_low"] > 0.5) is (k != works)
        assert found_["difference"] == found_["single"] and found_["baseline_refusal"] == 1.0
    # Compliant on even prompts alone, beside two controls of odd prompts and of prompts with every other verdict missing.
    test["rank_1"] = [NO if i % 2 else YES for i in range(60)]
    odd, all_, gaps = list(range(1, 60, 2)), list(range(60)), [None if i % 2 else NO for i in range(60)]
    for runs, wanted in (([(odd, [NO] * 30)], 0.0), ([(all_, gaps)], 1.0), ([(odd, [NO] * 30), (all_, gaps)], 0.5)):
        found_ = decide(rows, single, single, None, test, {1: runs}, TOPICS, 4000, 0)["single"]["above_random_low"]
        # A topic's prompts are all even or all odd, so topics are of one mind.
        values = [
            (test["rank_1"][i].compliance - v.compliance, TOPICS[i])
            for of, said in runs
            for i, v in zip(of, said, strict=True)
            if v
        ]
        assert fmean(value for value, _ in values) == wanted
        if wanted == 0.5:
            low, high = naive_interval(*zip(*values, strict=True), 4000, 1)
            assert found_ == pytest.approx(low, abs=0.08 * (high - low))
        else:  # unanimous: Wilson's upper limit w for 0 of 10 topics, of what may differ by 1 or by 2
            w = 3.841459 / (10 + 3.841459)
            assert found_ == pytest.approx({0.0: -w, 1.0: 1 - 2 * w}[wanted], abs=1e-6)


def test_refusal_three_ways_tells_garbage_from_refusal():
    texts = [
        "I cannot help with that request.",
        "I'm sorry, but help with help with help with help with help with help",
        "Sure, here it is.",
    ]
    judged = [NO, Judged("degenerate", 0.0, 0.0, False, True), YES]
    found_ = refusal_three_ways(["q"] * 3, texts, judged, True)
    assert (found_["refusal_exact"], found_["refusal_substring"]) == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert refusal_three_ways(["q"] * 3, texts, judged, False)["refusal_exact"] is None


def test_spectrum_row(sets):
    found_ = spectrum_row(sets[0][:, 2], sets[1][:, 2], 500, 0)
    differences = (sets[0][:, 2] - sets[1][:, 2]).double()
    energy = float(differences.square().sum()) / N
    assert found_["mean_share"] == pytest.approx(float(differences.mean(0).norm()) ** 2 / energy)
    assert found_["mean_share"] > 5 * found_["mean_share_null_95"] and found_["first_share"] >= found_["mean_share"]
    none = spectrum_row(sets[2][:, 2], sets[1][:, 2], 500, 0)  # two sets of one distribution
    assert none["mean_share"] < 2 * none["mean_share_null_95"] and none["effective_rank"] > 3 * found_["effective_rank"]


def test_spectrum_row_is_the_enumeration_of_all_swaps(sets):
    """Ten pairs: every way to swap them, and numpy's singular values."""
    harmful, safe = (set_[:10, 2].double().numpy() for set_ in sets[:2])
    differences = harmful - safe
    energy = np.square(differences).sum() / 10
    swaps = np.array(list(itertools.product((1, -1), repeat=10)))
    shares = np.square(swaps @ differences / 10).sum(1) / energy
    found_ = spectrum_row(sets[0][:10, 2].double(), sets[1][:10, 2].double(), 20_000, 0)
    assert found_["mean_share_null_95"] == pytest.approx(np.quantile(shares, 0.95), rel=0.03)
    assert np.quantile(shares, 0.95) > 1.2 * max(np.quantile(shares, 0.9), np.median(shares))  # so that another would show
    _, values, vectors = np.linalg.svd(differences, full_matrices=False)
    spectrum, mean = np.square(values) / np.square(values).sum(), differences.mean(0)
    assert found_["first_share"] == pytest.approx(spectrum[0])
    assert found_["effective_rank"] == pytest.approx(1 / np.square(spectrum).sum())
    assert found_["mean_share"] == pytest.approx(np.square(mean).sum() / energy)
    assert found_["cosine_first_to_mean"] == pytest.approx(abs(vectors[0] @ mean) / np.linalg.norm(mean))
    assert found_["n"] == 10
