"""The science stage's arms and tables, on activations whose directions are known."""

import pytest
import torch
from refusal.analysis.science import (
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
from refusal.method.arms import BASELINE_ARM

from refusal.analysis.estimators import lda, logistic
from refusal.analysis.subspaces import captured
from refusal.judges.verdicts import Judged
from refusal.method.directions import difference_in_means

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
    names += [f"{family}.{i}" for family in ("logistic", "lda", "paired_svd", "affine") for i in (1, 2, 3)]
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
    for name in ("logistic.1", "lda.3"):
        family, layer = name.split(".")
        fit = {"logistic": logistic, "lda": lda}[family]
        wanted = fit(*(sets[side][[1, 4, 9, 16, 25], int(layer)] for side in (0, 1)))
        assert torch.allclose(few[name].basis[0], wanted) and not torch.allclose(whole[name].basis[0], wanted)
    assert torch.equal(few["paired_svd.2"].basis, whole["paired_svd.2"].basis)  # all pairs, however many


def test_subspace_arms_hold_the_ranks_that_the_layers_allow(sets, found):
    arms = {arm.name: arm for arm in subspace_arms(found, sets[0], sets[1], 2, [2, 3, 1], "resid_pre")}
    assert set(arms) == {"svd_2", "svd_3", "svd_5", "qr_2", "qr_3", "per_layer"}
    assert [arms[f"svd_{k}"].rank for k in RANKS] == [2, 3, 5]
    assert captured(arms["qr_2"].basis, found["unit"][2]) == pytest.approx(1) == captured(arms["qr_2"].basis, found["unit"][3])
    assert captured(arms["qr_2"].basis, found["unit"][1]) < 0.95


def test_control_arms(sets):
    harmless = vars(difference_in_means(sets[2], sets[1]))
    arms = control_arms(harmless, 10, 2, 2, 0)
    counts = {family: sum(arm.family == family for arm in arms) for family in ("harmless", "random_1", "random_2", "random_5")}
    assert counts == {"harmless": 1, "random_1": 10, "random_2": 2, "random_5": 2}
    expected = sets[2][:, 2].double().mean(0) - sets[1][:, 2].double().mean(0)
    assert captured(arms[0].basis, expected) == pytest.approx(1)


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
        "lda.3": [YES, YES],
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
