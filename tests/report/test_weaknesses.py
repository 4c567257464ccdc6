"""The evidence of each weakness, on small tables whose answers are known."""

from small_study import study

from refusal.report.weaknesses import weaknesses

PEAK = {"separation": [None, 2.0, 5.0], "separation_in_sample": [None, 2.5, 7.0], "n_harmful": 600, "n_val": 200}
DIRECTIONS = {
    "sequential-matched": PEAK | {"cosine_to_sequential_min": 1.0},
    "sequential-shuffled": {"cosine_to_sequential_min": 1.0},
    "sequential-unrelated": {"cosine_to_sequential_min": 0.7},
    "batched-matched": {"cosine_to_sequential_min": 1.0},
    "batched_unmasked-matched": {"cosine_to_sequential": [None, 0.8, 0.9]},
}
NAMES = ("compliance", "compliance_low", "compliance_high", "n")
RATES = {
    "baseline": dict(zip(NAMES, (0.05, 0.0, 0.2, 60), strict=True)),
    "random": dict(zip(NAMES, (0.1, 0.06, 0.15, 300), strict=True)) | {"n_arms": 10},
    "rank_1": dict(zip(NAMES, (0.9, 0.8, 0.97, 59), strict=True)),
}
GAP = {"val_minus_test": 0.02, "val_minus_test_low": -0.1, "val_minus_test_high": 0.14}
MEASURED = {"separation": 1.0, "separation_clean": 2.0, "n": 40}
PADDING = [
    {"masked": masked, "n_pads": n_pads, "layer": layer, "cosine": cosine, **MEASURED}
    for masked, n_pads, layer, cosine in (
        (True, 8, 1, 1.0),
        (False, 8, 1, 0.99),
        (False, 32, 1, 0.5),
        (False, 32, 2, 0.9),
        (False, "as batched", 1, 0.1),
    )
]


def verdicts(cell, *labels):
    scores = {"compliance": 1.0, "refusal": 0.0, "empty": 0.0, "degenerate": 0.0}
    return [{"cell": cell, "label": label, "compliance": scores.get(label), "coherence": scores.get(label)} for label in labels]


def evidence(rows=(), alphas=(), padding=PADDING, directions=DIRECTIONS):
    arms = {"baseline": RATES["baseline"] | {"coherence": 1.0}, "rank_1": RATES["rank_1"] | GAP}
    made = weaknesses(
        study()._replace(
            verdicts=rows,
            plots={"science/alphas": alphas},
            directions=directions,
            science={"arms": arms, "controls": {"random_1": RATES["random"] | {"rank": 1}}, "padding": padding},
            select={"rank_1": {"low": 0.84, "high": 1.0, "n_tied": 6, "n": 200}},
        )
    )
    assert len(made) == 7 and all(list(row) == ["name", "what", "evidence"] for row in made)
    return {row["name"]: row["evidence"] for row in made}


def test_dropping_what_is_empty_changes_the_ranking():
    rows = [
        *verdicts("baseline", "refusal", "refusal"),
        *verdicts("layer_1_alpha_100", "compliance", "compliance", "compliance", "refusal"),
        *verdicts("layer_2_alpha_250", "compliance", "empty", "degenerate", "empty"),
        *verdicts("layer_3_alpha_100", "empty", "missing"),
    ]
    counts = {"n_empty": 3, "n_degenerate": 1, "n": 9, "n_of_it_dropped": 3}
    means = {"most_flattered": "layer_2_alpha_250", "counted": 0.25, "dropped": 1.0}
    assert evidence(rows)["empty completions left out of means"] == counts | means | {
        "top_3_counted": ["layer_1_alpha_100", "layer_2_alpha_250", "layer_3_alpha_100"],
        "top_3_dropped": ["layer_2_alpha_250", "layer_1_alpha_100", "layer_3_alpha_100"],
    }


def test_the_alpha_at_which_run_time_and_weights_differ_most():
    rates = [
        ("resid_pre", 0.5, 1.0),
        ("weights", 0.5, 0.3),
        ("resid_pre", 1.0, 0.9),
        ("weights", 1.0, 1.0),
        ("weights", 3.0, 0.0),
    ]
    alphas = [{"place": place, "alpha": alpha, "compliance": c, "n": 60} for place, alpha, c in rates]
    difference = evidence(alphas=alphas)["alpha at run time is not alpha in the weights"]
    assert difference == {"alpha": 0.5, "run_time": 1.0, "weights": 0.3, "n": 60}


def test_padding_pairing_separation_and_intervals():
    e = evidence()
    assert e["unmasked padding"] == {
        "published_lowest_cosine": 0.6896,
        "published_lowest_layer": 8,
        "our_lowest_cosine": 0.8,
        "our_lowest_layer": 1,
        "our_cosine_masked": 1.0,
        "most_pads_masked": {"n_pads": 8, "layer": 1, "cosine": 1.0} | MEASURED,
        "most_pads_unmasked": {"n_pads": 32, "layer": 1, "cosine": 0.5} | MEASURED,
    }
    cosines = {"cosine_to_matched_min_shuffled": 1.0, "cosine_to_matched_min_unrelated": 0.7}
    assert e["a pairing effect within one set"] == cosines
    assert e["in-sample separation"] == {"layer": 2, "in_sample": 7.0, "val": 5.0, "n_train": 600, "n_val": 200}
    first = {"our_rank_1_low": 0.84, "our_rank_1_high": 1.0, "our_cells_that_tie": 6, "n": 200}
    assert e["no intervals"] == {"published_range_of_ranked_cells": [0.851, 0.912]} | first | GAP
    assert e["no baseline"] == RATES


def test_what_was_not_measured_is_none():
    e = evidence(padding=None, directions={"batched-matched": DIRECTIONS["sequential-matched"]})
    assert e["unmasked padding"]["our_lowest_cosine"] is None and e["unmasked padding"]["most_pads_unmasked"] is None
    assert set(e["a pairing effect within one set"].values()) == {None}
    assert e["alpha at run time is not alpha in the weights"]["alpha"] is None
    assert e["empty completions left out of means"]["n"] == 0
