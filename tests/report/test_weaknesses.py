"""The evidence of each weakness, on small tables whose answers are known."""

from refusal.report.reproduction import published
from refusal.report.weaknesses import weaknesses

DIRECTIONS = {
    "sequential-matched": {
        "separation": [None, 2.0, 5.0],
        "separation_in_sample": [None, 2.5, 7.0],
        "cosine_to_sequential": [None, 1.0, 1.0],
        "cosine_to_sequential_min": 1.0,
        "n_harmful": 600,
        "n_val": 200,
    },
    "sequential-shuffled": {"cosine_to_sequential_min": 1.0},
    "sequential-unrelated": {"cosine_to_sequential_min": 0.7},
    "batched-matched": {"cosine_to_sequential_min": 1.0},
    "batched_unmasked-matched": {"cosine_to_sequential": [None, 0.8, 0.9]},
}
NAMES = ("compliance", "compliance_low", "compliance_high", "n")
RATES = {
    name: dict(zip(NAMES, figures, strict=True))
    for name, figures in {
        "baseline": (0.05, 0.0, 0.2, 60),
        "random": (0.1, 0.06, 0.15, 300),
        "rank_1": (0.9, 0.8, 0.97, 59),
    }.items()
}
GAP = {"val_minus_test": 0.02, "val_minus_test_low": -0.1, "val_minus_test_high": 0.14}
SCIENCE = {
    "arms": {"baseline": RATES["baseline"] | {"coherence": 1.0}, "rank_1": RATES["rank_1"] | GAP},
    "controls": {"random_1": RATES["random"] | {"n_arms": 10, "rank": 1}},
    "padding": [
        {"masked": m, "n_pads": n, "layer": i, "cosine": c, "separation": 1.0, "separation_clean": 2.0, "n": 40}
        for m, n, i, c in (
            (True, 8, 1, 1.0),
            (False, 8, 1, 0.99),
            (False, 32, 1, 0.5),
            (False, 32, 2, 0.9),
            (False, "as batched", 1, 0.1),
        )
    ],
}
SELECT = {"rank_1": {"low": 0.84, "high": 1.0, "n_tied": 6, "n": 200}}


def rows(cell, *labels):
    scores = {"compliance": 1.0, "refusal": 0.0, "empty": 0.0, "degenerate": 0.0}
    return [{"cell": cell, "label": label, "compliance": scores.get(label), "coherence": scores.get(label)} for label in labels]


def evidence(verdicts=(), alphas=(), science=SCIENCE, directions=DIRECTIONS):
    found = weaknesses(published(), directions, list(verdicts), SELECT, science, list(alphas))
    assert len(found) == 7 and all(set(row) == {"name", "what", "evidence"} for row in found)
    return {row["name"]: row["evidence"] for row in found}


def test_dropping_what_is_empty_turns_the_ranking_over():
    verdicts = [
        *rows("baseline", "refusal", "refusal"),
        *rows("layer_1_alpha_100", "compliance", "compliance", "compliance", "refusal"),
        *rows("layer_2_alpha_250", "compliance", "empty", "degenerate", "empty"),
        *rows("layer_3_alpha_100", "refusal", "missing"),
    ]
    found = evidence(verdicts)["empty completions left out of means"]
    assert found == {
        "n_empty": 2,
        "n_degenerate": 1,
        "n": 9,
        "most_flattered": "layer_2_alpha_250",
        "counted": 0.25,
        "dropped": 1.0,
        "n_of_it_dropped": 3,
        "top_3_counted": ["layer_1_alpha_100", "layer_2_alpha_250", "layer_3_alpha_100"],
        "top_3_dropped": ["layer_2_alpha_250", "layer_1_alpha_100", "layer_3_alpha_100"],
    }


def test_the_place_where_alpha_differs_most():
    alphas = [
        {"place": place, "alpha": alpha, "compliance": c, "n": 60}
        for place, alpha, c in (("resid_pre", 0.5, 1.0), ("weights", 0.5, 0.3), ("resid_pre", 1.0, 0.9), ("weights", 1.0, 1.0))
    ]
    found = evidence(alphas=alphas)["alpha at run time is not alpha in the weights"]
    assert found == {"alpha": 0.5, "run_time": 1.0, "weights": 0.3, "n": 60}


def test_padding_pairing_separation_and_intervals():
    found = evidence()
    padding = found["unmasked padding"]
    assert (padding["published_lowest_cosine"], padding["published_lowest_layer"]) == (0.6896, 8)
    assert (padding["our_lowest_cosine"], padding["our_lowest_layer"], padding["our_cosine_masked"]) == (0.8, 1, 1.0)
    for masked, n_pads, cosine in (("masked", 8, 1.0), ("unmasked", 32, 0.5)):
        measured = {"separation": 1.0, "separation_clean": 2.0, "n": 40}
        assert padding[f"most_pads_{masked}"] == {"n_pads": n_pads, "layer": 1, "cosine": cosine} | measured
    assert found["a pairing effect within one set"] == {
        "cosine_to_matched_min_shuffled": 1.0,
        "cosine_to_matched_min_unrelated": 0.7,
    }
    assert found["in-sample separation"] == {"layer": 2, "in_sample": 7.0, "val": 5.0, "n_train": 600, "n_val": 200}
    assert found["no intervals"] == {
        "published_range_of_ranked_cells": [0.851, 0.912],
        "our_rank_1_low": 0.84,
        "our_rank_1_high": 1.0,
        "our_cells_that_tie": 6,
        "n": 200,
        **GAP,
    }
    assert found["no baseline"] == RATES | {"random": RATES["random"] | {"n_arms": 10}}


def test_what_was_not_measured_is_none():
    found = evidence(science=SCIENCE | {"padding": None}, directions={"batched-matched": DIRECTIONS["sequential-matched"]})
    assert found["unmasked padding"]["our_lowest_cosine"] is None and found["unmasked padding"]["most_pads_unmasked"] is None
    assert found["a pairing effect within one set"] == {
        "cosine_to_matched_min_shuffled": None,
        "cosine_to_matched_min_unrelated": None,
    }
    assert found["alpha at run time is not alpha in the weights"]["alpha"] is None
    assert found["empty completions left out of means"]["n"] == 0
