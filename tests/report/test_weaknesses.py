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
PADDING = [
    {"masked": masked, "n_pads": n, "layer": i, "cosine": c, "separation": 1.0, "separation_clean": 2.0, "n": 40}
    for masked, n, i, c in [(True, 8, 1, 1.0), *((False, *row) for row in [(8, 1, 0.99), (32, 1, 0.5), (32, 2, 0.9), ("as batched", 1, 0.1)])]
]  # fmt: skip


def verdicts(cell, *labels):
    scores = {"compliance": 1.0, "refusal": 0.0, "empty": 0.0, "degenerate": 0.0}
    return [{"cell": cell, "label": label, "compliance": scores.get(label), "coherence": scores.get(label)} for label in labels]


def evidence(rows=(), alphas=(), padding=PADDING, directions=DIRECTIONS):
    s = study()
    s = s._replace(
        verdicts=rows, plots={"science/alphas": alphas}, directions=directions, science=s.science | {"padding": padding}
    )
    made = weaknesses(s)
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
    e, s = evidence(), study()
    padding = e["unmasked padding"]
    assert (padding["published_lowest_cosine"], padding["published_lowest_layer"]) == (0.6896, 8)
    assert (padding["our_lowest_cosine"], padding["our_lowest_layer"], padding["our_cosine_masked"]) == (0.8, 1, 1.0)
    assert (padding["most_pads_unmasked"]["n_pads"], padding["most_pads_unmasked"]["cosine"]) == (32, 0.5)
    assert padding["most_pads_masked"]["cosine"] == 1.0
    cosines = {"cosine_to_matched_min_shuffled": 1.0, "cosine_to_matched_min_unrelated": 0.7}
    assert e["a pairing effect within one set"] == cosines
    assert e["in-sample separation"] == {"layer": 2, "in_sample": 7.0, "val": 5.0, "n_train": 600, "n_val": 200}
    intervals, first = e["no intervals"], s.select["rank_1"]
    assert (intervals["our_cells_that_tie"], intervals["our_rank_1_low"]) == (first["n_tied"], first["low"])
    assert intervals["published_range_of_ranked_cells"] == [0.851, 0.912]
    rates = {key: e["no baseline"][key]["compliance"] for key in ("baseline", "random", "rank_1")}
    arms = s.science["arms"] | {"random": s.science["controls"]["random_1"]}
    assert rates == {key: arms[key]["compliance"] for key in rates}
    names = ("compliance", "compliance_low", "compliance_high", "n", "n_arms")
    assert e["no baseline"]["random"] == {name: arms["random"][name] for name in names}


def test_what_was_not_measured_is_none():
    e = evidence(padding=None, directions={"batched-matched": DIRECTIONS["sequential-matched"]})
    assert e["unmasked padding"]["our_lowest_cosine"] is None and e["unmasked padding"]["most_pads_unmasked"] is None
    assert set(e["a pairing effect within one set"].values()) == {None}
    assert e["alpha at run time is not alpha in the weights"]["alpha"] is None
    assert e["empty completions left out of means"]["n"] == 0
