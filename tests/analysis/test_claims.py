"""Claims beside figures: the rule of three outcomes, and every measure from metrics that are written out by hand."""

import json
from pathlib import Path

import pytest
import yaml
from synthetic import naive_hybrid

from refusal.analysis.claims import DOES_NOT, MEASURES, NOT_DECIDED, REPLICATES, Measured, beside, outcome
from refusal.io.claims import Claim, read
from refusal.io.errors import UserError

ROOT = Path(__file__).parents[2]
ROW = dict.fromkeys(("claim", "source", "read", "their_n", "their_figure", "quantity", "decides"), "words") | {"measure": "single"}


def claim(**more) -> Claim:
    return Claim(**ROW | more)


@pytest.mark.parametrize(
    ("ours", "control", "predicted", "said"),
    [
        ((0.7, 0.6, 0.8), 0.0, {"at_least": 0.5}, REPLICATES),
        ((0.7, 0.4, 0.8), 0.0, {"at_least": 0.5}, NOT_DECIDED),
        ((0.3, 0.2, 0.4), 0.0, {"at_least": 0.5}, DOES_NOT),
        ((0.3, 0.2, 0.6), 0.0, {"at_least": 0.5}, NOT_DECIDED),
        ((0.3, 0.2, 0.4), 0.0, {"at_most": 0.5}, REPLICATES),
        ((0.7, 0.6, 0.8), 0.0, {"at_most": 0.5}, DOES_NOT),
        ((0.7, 0.5, 0.8), 0.0, {"at_most": 0.5}, NOT_DECIDED),
        ((0.7, 0.6, 0.8), 0.0, {"at_least": 0.5, "at_most": 0.75}, NOT_DECIDED),
        ((0.7, 0.6, 0.72), 0.0, {"at_least": 0.5, "at_most": 0.75}, REPLICATES),
        ((0.7, 0.6, 0.8), 0.6, {"at_least": 0.5, "control_outside": True}, DOES_NOT),
        ((0.7, 0.6, 0.8), 0.6, {"at_least": 0.5}, REPLICATES),
        ((0.7, 0.6, 0.8), 0.4, {"at_least": 0.5, "control_outside": True}, REPLICATES),
        ((0.7, 0.6, 0.8), (0.4, 0.1, 0.75), {"at_least": 0.5, "control_outside": True}, NOT_DECIDED),
        ((0.7, 0.6, 0.8), (0.4, 0.1, 0.69), {"at_least": 0.5, "control_outside": True}, REPLICATES),
        ((0.3, 0.2, 0.4), (0.9, 0.3, 0.95), {"at_most": 0.5, "control_outside": True}, NOT_DECIDED),
    ],
)
def test_the_rule(ours, control, predicted, said):
    theirs = control if isinstance(control, tuple) else (control, None, None)
    assert outcome(claim(**predicted), Measured(ours, 10, "prompts", "random", theirs)) == said


def test_nothing_measured_decides_nothing():
    assert outcome(claim(at_least=0.5), None) == NOT_DECIDED


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (ROW, "mine: .*nothing is predicted"),
        (ROW | {"at_least": 0.5, "measure": "singel"}, "mine.measure: singel is none: choose among single, weights"),
        (ROW | {"at_least": "half"}, "mine.at_least: Input should be a valid number"),
        ({k: v for k, v in ROW.items() if k != "source"} | {"at_least": 0.5}, "mine.source: Field required"),
        (ROW | {"at_least": 0.5, "sauce": "a"}, "mine.sauce: Extra inputs"),
    ],
)
def test_a_row_that_is_no_claim_is_refused(row, said):
    with pytest.raises(UserError, match=f"claims.yaml: {said}"):
        read({"mine": row}, MEASURES, "claims.yaml")


def rate(name: str, value: float, low: float, high: float) -> dict:
    return {name: value, f"{name}_low": low, f"{name}_high": high}


BASELINE = {"refusal": 0.5, "n": 80} | rate("compliance", 0.4, 0.3, 0.5) | rate("substring_refusal", 0.6, 0.5, 0.7)
ABLATED = {"n": 80, "n_paired": 78} | rate("compliance", 0.9, 0.8, 0.95) | rate("difference", 0.5, 0.4, 0.55)
ABLATED |= rate("substring_refusal", 0.05, 0.02, 0.12)
RANDOM = rate("compliance", 0.45, 0.35, 0.55)
ARMS = {"baseline": BASELINE, "runtime": ABLATED, "random": RANDOM, "orthogonalized": ABLATED, "random_weights": RANDOM}
CATEGORIES = {
    "n": {"a": 10, "b": 20, "c": 30, "d": 40},
    **{f"mean_cosine{end}": [None, v] for end, v in (("", 0.4), ("_null_low", 0.7), ("_null", 0.8), ("_null_high", 0.85))},
    **{f"participation_ratio{end}": [None, v] for end, v in (("", 2.0), ("_null_low", 1.1), ("_null", 1.2), ("_null_high", 1.6))},
}
CORRECTED = "cosine_to_sequential_corrected"
METRICS = {
    "evaluate": ARMS | {"harmless": {"n": 80} | rate("compliance", 0.2, 0.1, 0.3)},
    "generalization": {"sets": {"jailbreakbench": {"figures": [ARMS | {"ablated": ABLATED}]}}},
    "long_answers": {
        "arms": {arm: {"n_paired": 70} | rate("refusal_difference", v, v - 0.1, v + 0.1) for arm, v in (("runtime", 0.1), ("baseline", 0.2))}
    },
    "select": {"rank_1": {"layer": 1}},
    "directions": {
        "sequential-matched": {"categories": CATEGORIES},
        "sequential-shuffled": None,
        "batched-matched": {"layers": [1, 2], CORRECTED: [None, 1.0, 0.99], f"{CORRECTED}_low": [None, 0.98, 0.9], f"{CORRECTED}_high": [None, 1.01, 1.1]},
        "batched_unmasked-matched": {
            "layers": [1, 2, 3],
            "n_harmful": 300,
            CORRECTED: [None, 0.6, 0.5, 0.1],
            f"{CORRECTED}_low": [None, 0.5, 0.4, None],
            f"{CORRECTED}_high": [None, 0.7, 0.6, None],
        },
    },
    "science": {
        "verdict": {"best_subspace": "qr_3", "best_single": "rank_1", "reason": None},
        "estimators": {"affine": {"arm": "affine.2"}},
        "arms": {
            "baseline": BASELINE,
            "affine.2": ABLATED,
            "rank_1": ABLATED,
            "qr_3": {"rank": 3, "n": 80} | rate("compliance", 0.95, 0.9, 0.98),
        },
        "controls": {"random_affine": RANDOM, "random_1": RANDOM, "random_3": rate("compliance", 0.5, 0.4, 0.6)},
    },
    "pairing": {"dtype": "bfloat16", "figures": {"matched": vars(Measured((0.5, 0.4, 0.6), 50, "prompts", "random", (0.0, 0.0, 0.1))), "behaviour": None}},
}
NEAR = {"rel": 1e-6}


def rise(one, other):
    return [x / 0.5 for x in naive_hybrid(one, other)]


EXPECTED = {
    **dict.fromkeys(
        ("single", "weights", "other_set", "affine"), ([1.0, 0.8, 1.1], 78, rise((0.45, 0.35, 0.55), (0.4, 0.3, 0.5)))
    ),
    "subspace": (naive_hybrid((0.95, 0.9, 0.98), (0.9, 0.8, 0.95)), 80, naive_hybrid((0.5, 0.4, 0.6), (0.45, 0.35, 0.55))),
    "harmless": (naive_hybrid((0.2, 0.1, 0.3), (0.4, 0.3, 0.5)), 80, naive_hybrid((0.45, 0.35, 0.55), (0.4, 0.3, 0.5))),
    "padding": ([0.5, 0.4, 0.6], 300, [0.99, 0.9, 1.1]),
    "categories": ([0.4, 0.3, 0.45], 100, [0.8, 0.7, 0.85]),
    "dimensions": ([0.5, 0.475, 0.6], 100, [0.3, 0.275, 0.4]),
    "substrings": (naive_hybrid((0.95, 0.88, 0.98), (0.9, 0.8, 0.95)), 80, naive_hybrid((0.4, 0.3, 0.5), (0.4, 0.3, 0.5))),
    "late_refusals": ([0.1, 0.0, 0.2], 70, [0.2, 0.1, 0.3]),
    "pairing.matched": ([0.5, 0.4, 0.6], 50, [0.0, 0.0, 0.1]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_every_measure_is_what_it_says(name):
    found, (ours, n, theirs) = MEASURES[name](METRICS), EXPECTED[name]
    assert found.ours == pytest.approx(tuple(ours), **NEAR) and found.theirs == pytest.approx(tuple(theirs), **NEAR) and found.n == n


def test_what_a_study_lacks_is_not_measured():
    science = METRICS["science"]
    without = METRICS | {
        "evaluate": {"baseline": BASELINE | {"refusal": 0}, "runtime": ABLATED, "orthogonalized": ABLATED},
        "generalization": {"sets": {}},
        "long_answers": None,
        "directions": {"sequential-unrelated": {"categories": None}},
        "science": science | {"verdict": science["verdict"] | {"reason": "no_refusal"}, "estimators": {}},
        "pairing": None,
    }
    wanted = {name for name in MEASURES if name not in ("substrings",)}
    assert {name for name in wanted if MEASURES[name](without) is not None} == set()
    assert MEASURES["categories"](METRICS | {"select": {"rank_1": {"layer": "1-2"}}}) is None
    assert MEASURES["pairing.behaviour"](METRICS) is None and MEASURES["pairing.matched_less_unrelated"](METRICS) is None


def test_the_list_is_whole_and_every_measure_is_used():
    claims = read(yaml.safe_load((ROOT / "data/claims.yaml").read_text()), MEASURES, "data/claims.yaml")
    assert {one.measure for one in claims.values()} == set(MEASURES)
    found = beside(claims, METRICS)
    assert found["one_direction"]["outcome"] == REPLICATES and found["one_direction"]["n"] == 78
    assert found["no_direction_from_pairs"]["of"] == "prompts, bfloat16"
    assert found["behaviour_is_why"] == {"outcome": NOT_DECIDED}


def test_every_row_of_the_committed_table_has_its_n_control_and_interval():
    found = json.loads((ROOT / "metrics/claims.json").read_text())
    claims = read(yaml.safe_load((ROOT / "data/claims.yaml").read_text()), MEASURES, "data/claims.yaml")
    measured = 0
    for study, rows in found.items():
        assert set(rows) == set(claims), study
        for name, row in rows.items():
            assert row["outcome"] in (REPLICATES, DOES_NOT, NOT_DECIDED)
            if "ours" in row:
                measured += 1
                value, low, high = row["ours"]
                assert low <= value <= high and row["n"] > 0 and row["control"] and row["theirs"][0] is not None, (study, name)
            else:
                assert row["outcome"] == NOT_DECIDED, (study, name)
    assert measured > len(claims)
