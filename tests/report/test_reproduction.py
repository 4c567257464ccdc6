import json
import os
from pathlib import Path

import pytest
import torch

from refusal.report.reproduction import comparable, drop_off, low_layers, published, reproduce, summary

ARM = "sequential-matched"


def _directions() -> dict:
    """Three layers; separation on val peaks at one, and in-sample at another."""

    def one(cosine: float, val: tuple[float, float], in_sample: tuple[float, float]) -> dict:
        return {
            "separation": [None, *val],
            "separation_in_sample": [None, *in_sample],
            "layers": [1, 2],
            "peak_layer": 1 + val.index(max(val)),
            "peak_separation": max(val),
            "cosine_to_sequential": [None, cosine, cosine],
            "cosine_to_sequential_min": cosine,
        }

    return {
        ARM: one(1.0, val=(4.0, 3.0), in_sample=(2.5, 9.0)),
        "batched_unmasked-matched": one(0.9, val=(5.0, 6.0), in_sample=(8.0, 7.0)),
    }


def _cell(layer: int | None, alpha: float, compliance: float) -> dict:
    return {"layer": layer, "alpha": alpha, "compliance": compliance, "coherence": compliance + 0.125, "score": compliance / 2}


BEST = ("layer_2_alpha_100", "layer_15_alpha_75", "layer_1_alpha_100")


def _inputs() -> dict:
    judge = {
        "baseline": _cell(None, 0.0, 0.0),
        "layer_1_alpha_100": _cell(1, 1.0, 0.5),
        "layer_2_alpha_100": _cell(2, 1.0, 0.75),
        "layer_2_alpha_250": _cell(2, 2.5, 0.25),
        "layer_15_alpha_75": _cell(15, 0.75, 0.625),
    }
    return {
        "directions": _directions(),
        "judge": judge,
        "select": {f"rank_{i}": judge[name] for i, name in enumerate(BEST, 1)},
        "benchmark": {
            "baseline": {"average": 0.5},
            **{f"rank_{i}": {"average": 0.5 - i / 10, "difference": -i / 10} for i in (1, 2, 3)},
        },
    }


def _reproduce(model_id: str = "organism", arm: str = ARM, **changed) -> dict:
    return reproduce(published(), model_id, arm, {"n_layers": 3, "alphas": [1.0, 2.5]}, **(_inputs() | changed))


def _figures(value) -> list:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _figures(item)]
    if isinstance(value, list):
        return [leaf for item in value for leaf in _figures(item)]
    return [value]


def test_every_published_figure_has_a_row():
    theirs, made = published(), _reproduce()
    shown = [leaf for row in made["rows"] for leaf in _figures(row["published"])]
    for figure in _figures({k: v for k, v in theirs.items() if k not in ("source", "vectors")}) + _figures(
        theirs["vectors"]["in_sample_peak"]
    ):
        assert figure is None or figure in shown, figure
    names = [row["quantity"] for row in made["rows"]]
    assert len(set(names)) == len(names)


def test_ours_stands_beside_theirs_even_where_models_differ():
    rows = {row["quantity"]: row for row in _reproduce()["rows"]}
    assert (rows["cosine_sequential_batched.layer_2"]["published"], rows["cosine_sequential_batched.layer_2"]["ours"]) == (
        0.9656,
        0.9,
    )
    assert (
        rows["cosine_sequential_batched.layer_3"]["ours"] is None
        and "0 to 2" in rows["cosine_sequential_batched.layer_3"]["note"]
    )
    first = "sequential-matched.rank_1"
    assert (rows[f"{first}.layer"]["ours"], rows[f"{first}.compliance"]["ours"]) == (2, 0.75)
    assert rows[f"{first}.benchmark_difference"]["published"] == pytest.approx(0.5149 - 0.5182)
    assert rows[f"{first}.benchmark_difference"]["ours"] == -0.1
    assert rows["batched-matched.rank_1.layer"]["ours"] is None
    assert "batched_unmasked-matched" in rows["batched-matched.rank_1.layer"]["note"]
    assert rows["undefined_layer"]["ours"] == 0 and rows["settings.n_heads"]["ours"] is None
    assert all(row["ours"] is not None or row["note"] for row in rows.values() if row["published"] is not None)


def test_each_separation_is_the_one_that_its_row_names():
    rows = {
        row["quantity"]: row["ours"]
        for row in _reproduce()["rows"]
        if "separation" in row["quantity"] or "peak" in row["quantity"]
    }
    assert rows == {
        "separation.little_or_none_layers": [1, 1],  # in-sample: 2.5 is below a third of 9
        "separation.peak_region": "early-mid",  # on val: layer 1 of 0 to 2
        "in_sample_peak.sequential.layer": 2,
        "in_sample_peak.sequential.separation": 9.0,
        "in_sample_peak.batched.layer": 1,
        "in_sample_peak.batched.separation": 8.0,
    }
    alone = {row["quantity"]: row for row in _reproduce(directions={ARM: _directions()[ARM]})["rows"]}
    assert alone["in_sample_peak.sequential.layer"]["ours"] == 2
    for what in ("layer", "separation"):
        row = alone[f"in_sample_peak.batched.{what}"]
        assert row["ours"] is None and row["note"] == "batched_unmasked-matched was not collected"


def test_every_rank_stands_beside_the_published_one_of_its_place():
    rows = {row["quantity"]: (row["published"], row["ours"]) for row in _reproduce()["rows"]}
    judge, theirs = _inputs()["judge"], published()["arms"][ARM]
    for i, (name, figures) in enumerate(zip(BEST, theirs, strict=True), 1):
        for key in ("layer", "alpha", "compliance", "coherence"):
            assert rows[f"{ARM}.rank_{i}.{key}"] == (figures[key], judge[name][key])
        assert rows[f"{ARM}.rank_{i}.benchmark"] == (figures["benchmark"], pytest.approx(0.5 - i / 10))
        assert rows[f"{ARM}.rank_{i}.benchmark_difference"][1] == -i / 10
        for key, ours in (("compliance", 0.625), ("coherence", 0.75)):  # layer 15, alpha 0.75 alone of theirs was swept here
            assert rows[f"{ARM}.rank_{i}.same_cell.{key}"] == (figures[key], ours if i == 1 else None)
    assert rows["alpha_drop_off"] == (1.5, 2.5)  # scores 0.3125, 0.375, 0.125 at alphas 0.75, 1, 2.5
    assert rows["benchmark.baseline"] == (0.5182, 0.5) and rows["settings.n_layers"] == (24, 3)


def test_the_published_batched_arm_is_our_unmasked_one():
    rows = {row["quantity"]: row["ours"] for row in _reproduce(arm="batched_unmasked-matched")["rows"]}
    assert rows["batched-matched.rank_1.layer"] == 2 and rows["sequential-matched.rank_1.layer"] is None


@pytest.mark.parametrize(
    ("model_id", "same"),
    [
        ("Qwen/Qwen-1_8B-Chat", True),
        ("models/converted/Qwen-1_8B-Chat", True),
        ("organism", False),
        ("Qwen/Qwen2-1.5B-Instruct", False),
        ("Qwen/Qwen-1_8B", False),
    ],
)
def test_comparable_only_with_the_same_model(model_id, same):
    assert comparable(model_id) is same
    made = _reproduce(model_id)
    assert made["comparable"] is same and {row["comparable"] for row in made["rows"]} == {same}


def test_without_unmasked_activations_the_cosines_say_why():
    directions = {ARM: _directions()[ARM]}
    row = next(r for r in _reproduce(directions=directions)["rows"] if r["quantity"] == "cosine_sequential_batched.layer_1")
    assert row["ours"] is None and "not both collected" in row["note"]


def test_low_layers():
    assert low_layers([None, 1.0, 2.0, 9.0, 1.0]) == [1, 2]
    assert low_layers([None, 9.0, 1.0]) is None
    assert low_layers([None, None]) is None


def test_drop_off():
    cells = [_cell(1, 1.0, 0.8), _cell(2, 1.0, 0.1), _cell(1, 1.5, 0.5), _cell(1, 2.0, 0.3), _cell(1, 3.0, 0.1)]
    assert drop_off(cells) == 2.0
    assert drop_off(cells[:3]) is None
    assert drop_off([]) is None


def test_summary_is_twelve_numbers_each_from_its_own_place():
    inputs = _inputs()
    evaluate = {
        name: {"compliance": i, "coherence": 10 + i, "kl": 20 + i}
        for i, name in enumerate(("baseline", "random", "runtime", "orthogonalized"))
    }
    shared = {
        "rank_1_layer": 2,
        "rank_1_alpha": 1.0,
        "baseline_compliance": 0,
        "random_compliance": 1,
        "runtime_compliance": 2,
        "runtime_coherence": 12,
        "orthogonalized_compliance": 3,
        "runtime_kl": 22,
        "benchmark_difference": -0.1,
    }
    for name, own in ((ARM, (1, 4.0, 1.0)), ("batched_unmasked-matched", (2, 6.0, 0.9))):
        figures = summary(name, inputs["directions"], inputs["select"], evaluate, inputs["benchmark"])
        found = dict(zip(("peak_layer", "peak_separation", "cosine_to_sequential_min"), own, strict=True))
        assert figures == found | shared and len(figures) == 12
    alone = {"batched_unmasked-matched": inputs["directions"]["batched_unmasked-matched"]}
    assert (
        summary("batched_unmasked-matched", alone, inputs["select"], evaluate, inputs["benchmark"])["cosine_to_sequential_min"]
        is None
    )


@pytest.fixture
def reference() -> Path:
    if "REFUSAL_REFERENCE" not in os.environ:
        pytest.skip("REFUSAL_REFERENCE is not set: the write-up's tables are not at hand")
    return Path(os.environ["REFUSAL_REFERENCE"])


def test_in_sample_peaks_are_those_of_the_published_files(reference):
    for method, figure in published()["vectors"]["in_sample_peak"].items():
        found = torch.load(reference / "published" / "write-up-qwen-1_8b" / f"{method}_cohens_d.pt", weights_only=True)
        peak = max((layer for layer in found if layer), key=lambda layer: found[layer])
        assert {"layer": peak, "separation": round(float(found[peak]), 2)} == figure


def test_published_figures_are_the_reference_ones(reference):
    theirs, ours = json.loads((reference / "qwen-1_8b-chat.json").read_text(encoding="utf-8")), published()
    settings = ours["settings"]
    assert settings["model"] == theirs["model"] and ours["source"]["title"] in theirs["source"]
    assert {name: settings[name] for name in theirs["model_shape"]} == theirs["model_shape"]
    assert settings["hook"] == theirs["activation"]["hook"] and settings["n_pairs"] == theirs["n_pairs"]
    assert settings["pairs_by"] == theirs["pairs_by"] and settings["judge"] == theirs["judge"]["by"]
    assert settings["judged"] == theirs["judge"]["axes"] and settings["alphas"] == theirs["alphas"]
    assert settings["benchmark_tasks"] == theirs["benchmark"]["tasks"]
    assert ours["separation"] == theirs["separation"] and ours["alpha_drop_off"] == theirs["alpha_drop_off"]
    cosines = {str(layer): value for layer, value in enumerate(ours["cosine_sequential_batched"]) if value is not None}
    assert cosines == theirs["cosine_sequential_vs_batched"]
    cells = [
        {**dict(zip(("method", "pairing"), arm.split("-"), strict=True)), **{k: v for k, v in cell.items() if k != "benchmark"}}
        for arm, top in ours["arms"].items()
        for cell in top
    ]
    assert cells == theirs["sweep_top"]
    averages = {
        f"{arm.split('-')[0]}_layer_{cell['layer']}_alpha_{100 * cell['alpha']:.0f}": cell["benchmark"]
        for arm, top in ours["arms"].items()
        for cell in top
        if cell["benchmark"] is not None
    }
    assert averages | {"baseline": ours["benchmark_baseline"]} == theirs["benchmark"]["average"]
