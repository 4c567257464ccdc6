"""The verdict's criteria case by case, and the evidence that it rests on, counted by hand."""

from dataclasses import replace
from itertools import product

import given
import pytest

from refusal.analysis.study import Judgements
from refusal.analysis.verdict import Evidence, evidence, verdict

YES = Evidence("yes", 0.98, 0.01, 0.9, 0.8, 90)
NO = Evidence("no", 0.98, 0.01, 0.6, 0.49, 90)
REFUSES = {"refusal": 0.57, "refusal_high": 0.65}


def test_the_limit_of_mediation_is_the_one_the_criteria_name():
    for low, mediates in ((0.5, True), (0.4999, False), (None, False)):
        one = replace(YES, above_random_low=low)
        assert one.mediates is mediates and one.shown()["mediates"] is mediates
    shown = {"name": "yes", "removed": 0.98, "partial": 0.01, "above_random": 0.9, "above_random_low": 0.8, "n_paired": 90}
    assert YES.shown() == shown | {"mediates": True}


@pytest.mark.parametrize(
    ("single", "subspace", "gap", "expected"),
    [
        (YES, YES, 0.1, ("single", None, "yes")),
        (YES, YES, 0.11, ("subspace", None, "yes")),
        (YES, NO, 0.1, ("single", None, "yes")),
        (YES, NO, 0.2, ("single", "better_subspace_fails_its_control", "yes")),
        (NO, YES, -0.3, ("subspace", None, "yes")),
        (NO, YES, 0.2, ("subspace", None, "yes")),
        (NO, NO, 0.0, ("none", "no_mediation", None)),
        (NO, NO, 0.2, ("none", "no_mediation", None)),
        (YES, None, None, ("single", None, "yes")),
        (NO, None, None, ("none", "no_mediation", None)),
        (None, YES, None, ("subspace", None, "yes")),
        (None, None, None, ("none", "no_mediation", None)),
    ],
)
def test_every_combination_has_its_outcome(single, subspace, gap, expected):
    decision = verdict(REFUSES, 34, single, subspace, gap)
    assert (decision["verdict"], decision["reason"], decision["by"]) == expected
    assert (decision["baseline_refusal"], decision["n_refused"], decision["subspace_above_single_low"]) == (0.57, 34, gap)
    assert decision["single"] == (single and single.shown()) and decision["subspace"] == (subspace and subspace.shown())


@pytest.mark.parametrize(
    ("high", "n", "expected"),
    [
        (0.19, 3, ("none", "no_refusal")),
        (0.19, 40, ("none", "no_refusal")),
        (0.2, 29, ("undecided", "too_few_refusals")),
        (0.2, 30, ("single", None)),
        (1.0, 29, ("undecided", "too_few_refusals")),
    ],
)
def test_a_model_that_hardly_refuses_has_none_and_few_refusals_decide_nothing(high, n, expected):
    for single, subspace in product((YES,), (YES, NO, None)):
        decision = verdict({"refusal": high / 2, "refusal_high": high}, n, single, subspace, 0.0)
        assert (decision["verdict"], decision["reason"]) == expected


def judgements(**said):
    """What letters say of prompts p0, p1, ...: y complies, h in part, r refuses, ? has no verdict; two prompts a topic."""
    n = len(next(iter(said.values())))
    rows = [{"id": f"p{i}", "topic": i // 2} for i in range(n)]
    verdicts = {name: [None if c == "?" else given.VERDICTS[c] for c in text] for name, text in said.items()}
    return Judgements(rows, [], {}, verdicts)


def test_evidence_counts_full_answers_to_refused_prompts_less_those_of_every_control():
    test = judgements(one="yyhry?yy", baseline="rrrrryry")
    control = judgements(a="rrrrrr", b="yrhr?r")
    refused = {f"p{i}" for i, c in enumerate("rrrrryry") if c == "r"}
    found = evidence("one", test, refused, control, ["a", "b"])
    assert (found.removed, found.partial) == (4 / 6, 1 / 6)  # p0 to p4 and p6; p5, which has no verdict, was not refused
    mine, theirs = [1, 1, 0, 0, 1], [0.5, 0, 0, 0, 0]  # p0 to p4, and the mean of a and b, of whom b has no verdict on p4
    gap = given.difference({"mine": mine, "theirs": theirs}, "mine", "theirs", [0, 0, 1, 1, 2])
    assert found.n_paired == 5 and [found.above_random, found.above_random_low] == pytest.approx(gap.expected[:2], abs=1e-6)


def test_without_a_refused_prompt_there_is_no_evidence():
    test, control = judgements(one="yy", baseline="yy"), judgements(a="rr")
    found = evidence("one", test, set(), control, ["a"])
    assert found == Evidence("one", None, None, None, None, 0) and not found.mediates


def test_a_real_models_figures_mediate_by_rule():
    """A model that refuses 34 of 60: the ablation answers 33 of these, random directions one in ten."""
    base = "r" * 34 + "y" * 26
    test = judgements(one="y" * 33 + "r" + "y" * 26, baseline=base)
    randoms = {f"random_{k}": "".join("y" if (i + k) % 10 == 0 else c for i, c in enumerate(base)) for k in range(10)}
    control = judgements(**randoms)
    refused = {f"p{i}" for i in range(34)}
    found = evidence("one", test, refused, control, list(randoms))
    assert found.above_random == pytest.approx(33 / 34 - 0.1, abs=0.02) and found.mediates
    assert verdict({"refusal": 34 / 60, "refusal_high": 0.69}, 34, found, None, None)["verdict"] == "single"
