import json
import os
from pathlib import Path

import pytest
import torch
from small_study import study

from refusal.report.reproduction import comparable, drop_off, low_layers, published, reproduce, summary
from refusal.report.study import Study

ARM = "sequential-matched"


def cell(layer: int | None, alpha: float, compliance: float) -> dict:
    return {"layer": layer, "alpha": alpha, "compliance": compliance, "coherence": compliance + 0.125, "score": compliance / 2}


def arm(cosine: float, val: tuple[float, float] = (4.0, 3.0), in_sample: tuple[float, float] = (2.5, 9.0)) -> dict:
    """Directions of three layers; separation on val peaks at one, and in-sample at another."""
    return {
        "separation": [None, *val],
        "separation_in_sample": [None, *in_sample],
        "layers": [1, 2],
        "peak_layer": 1 + val.index(max(val)),
        "peak_separation": max(val),
        "cosine_to_sequential": [None, cosine, cosine],
        "cosine_to_sequential_min": cosine,
    }


CELLS = [cell(None, 0.0, 0.0), cell(2, 1.0, 0.75), cell(15, 0.75, 0.625), cell(1, 1.0, 0.5), cell(2, 2.5, 0.25)]
DIRECTIONS = {ARM: arm(1.0), "batched_unmasked-matched": arm(0.9, val=(5.0, 6.0), in_sample=(8.0, 7.0))}


def changed(model_id: str = "organism", method: str = "sequential", directions: dict = DIRECTIONS) -> Study:
    """A study of these cells and directions, the best three cells ranked, that swept one of the methods."""
    s = study(model_id)
    scores = {f"rank_{i}": {"average": 0.5 - i / 10, "difference": -i / 10} for i in (1, 2, 3)}
    return s._replace(
        params=s.params | {"sweep": s.params["sweep"] | {"method": method}},
        directions=directions,
        judge={str(i): c for i, c in enumerate(CELLS)},
        select={f"rank_{i}": CELLS[i] | {"name": f"{method}_{i}"} for i in (1, 2, 3)},
        benchmark={"baseline": {"average": 0.5, "tasks": {"facts": {}}}, **scores},
        evaluate={
            name: {"compliance": i, "coherence": 10 + i, "kl": 20 + i}
            for i, name in enumerate(("baseline", "random", "runtime", "orthogonalized"))
        },
    )


def rows(s: Study) -> dict[str, dict]:
    made = reproduce(s)["rows"]
    assert len({row["quantity"] for row in made}) == len(made)
    return {row["quantity"]: row for row in made}


def _figures(value) -> list:
    if isinstance(value, dict):
        return [leaf for item in value.values() for leaf in _figures(item)]
    return [leaf for item in value for leaf in _figures(item)] if isinstance(value, list) else [value]


def test_every_published_figure_has_a_row():
    theirs = published()
    shown = [leaf for row in rows(changed()).values() for leaf in _figures(row["published"])]
    tables = {k: v for k, v in theirs.items() if k not in ("source", "vectors", "across_models", "paper_runs", "weaknesses")}
    for figure in _figures(tables) + _figures(theirs["vectors"]["in_sample_peak"]):
        assert figure is None or figure in shown, figure


def test_ours_is_given_even_where_models_differ():
    made = rows(changed())
    expected = {
        "settings.n_layers": (24, 3),
        "settings.n_heads": (16, study().params["organism"]["num_attention_heads"]),
        "undefined_layer": (0, 0),
        "separation.little_or_none_layers": ([1, 10], [1, 1]),  # in-sample: 2.5 is below a third of 9
        "separation.peak_region": ("mid-late", "early-mid"),  # on val: layer 1 of 0 to 2
        "in_sample_peak.sequential.layer": (19, 2),
        "in_sample_peak.sequential.separation": (5.33, 9.0),
        "in_sample_peak.batched.layer": (20, 1),
        "in_sample_peak.batched.separation": (3.57, 8.0),
        "cosine_sequential_batched.layer_2": (0.9656, 0.9),
        "cosine_sequential_batched.layer_3": (0.97, None),
        "alpha_drop_off": (1.5, 2.5),  # scores 0.3125, 0.375, 0.125 at alphas 0.75, 1, 2.5
        "benchmark.baseline": (0.5182, 0.5),
        "batched-matched.rank_1.layer": (15, None),
    }
    for i, theirs in enumerate(published()["arms"][ARM], 1):
        name, ours = f"{ARM}.rank_{i}", CELLS[i]
        expected |= {f"{name}.{key}": (theirs[key], ours[key]) for key in ("layer", "alpha", "compliance", "coherence")}
        expected |= {f"{name}.benchmark": (theirs["benchmark"], 0.5 - i / 10)}
        expected |= {f"{name}.benchmark_difference": (pytest.approx(theirs["benchmark"] - 0.5182), -i / 10)}
        for key in ("compliance", "coherence"):  # layer 15, alpha 0.75 alone of theirs was swept here
            expected |= {f"{name}.same_cell.{key}": (theirs[key], CELLS[2][key] if i == 1 else None)}
    assert {quantity: (made[quantity]["published"], made[quantity]["ours"]) for quantity in expected} == expected
    assert all(row["ours"] is not None or row["note"] for row in made.values() if row["published"] is not None)
    assert "0 to 2" in made["cosine_sequential_batched.layer_3"]["note"]
    assert "batched_unmasked-matched" in made["batched-matched.rank_1.layer"]["note"]


def test_the_published_batched_arm_is_our_unmasked_one():
    made = rows(changed(method="batched_unmasked"))
    assert made["batched-matched.rank_1.layer"]["ours"] == 2 and made[f"{ARM}.rank_1.layer"]["ours"] is None
    alone = rows(changed(directions={ARM: arm(1.0)}))
    assert alone["in_sample_peak.sequential.layer"]["ours"] == 2
    for quantity, note in {
        "in_sample_peak.batched.layer": "batched_unmasked-matched was not collected",
        "in_sample_peak.batched.separation": "batched_unmasked-matched was not collected",
        "cosine_sequential_batched.layer_1": "sequential and batched_unmasked were not both collected",
    }.items():
        assert (alone[quantity]["ours"], alone[quantity]["note"]) == (None, note)


SAME = ("Qwen/Qwen-1_8B-Chat", "models/converted/Qwen-1_8B-Chat")


@pytest.mark.parametrize("model_id", [*SAME, "organism", "Qwen/Qwen2-1.5B-Instruct", "Qwen/Qwen-1_8B"])
def test_comparable_only_with_the_same_model(model_id):
    made = reproduce(changed(model_id))
    assert comparable(model_id) is made["comparable"] is (model_id in SAME)
    assert {row["comparable"] for row in made["rows"]} == {made["comparable"]}


def test_low_layers_and_the_drop_off():
    assert low_layers([None, 1.0, 2.0, 9.0, 1.0]) == [1, 2]
    assert low_layers([None, 9.0, 1.0]) is low_layers([None, None]) is None
    cells = [cell(1, 1.0, 0.8), cell(2, 1.0, 0.1), cell(1, 1.5, 0.5), cell(1, 2.0, 0.3), cell(1, 3.0, 0.1)]
    assert drop_off(cells) == drop_off(cells[::-1]) == 2.0
    assert drop_off(cells[:3]) is drop_off([]) is None


def test_summary_is_twelve_numbers_each_from_its_own_place():
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
    for method, layer, separation, cosine in (("sequential", 1, 4.0, 1.0), ("batched_unmasked", 2, 6.0, 0.9)):
        own = {"peak_layer": layer, "peak_separation": separation, "cosine_to_sequential_min": cosine}
        assert summary(changed(method=method)) == own | shared
    subspace = changed()
    subspace.judge["1"] = CELLS[1] | {"layer": "1-2"}
    assert summary(subspace)["rank_1_layer"] == "1-2"  # of several layers all, as the sweep's table has them
    alone = changed(method="batched_unmasked", directions={"batched_unmasked-matched": arm(0.9)})
    assert summary(alone)["cosine_to_sequential_min"] is None


@pytest.fixture
def reference() -> Path:
    if "REFUSAL_REFERENCE" not in os.environ:
        pytest.skip("REFUSAL_REFERENCE is not set: the write-up's tables are not at hand")
    return Path(os.environ["REFUSAL_REFERENCE"])


def test_the_papers_runs_are_those_of_its_files(reference):
    """Models, choices and scores of its five runs, and the rates of both judges."""
    folder, runs = reference / "published", published()["paper_runs"]
    rates = json.loads((folder / "paper-rates.json").read_text())
    assert {row["model"] for row in runs["rows"]} == set(rates) and len(rates) == 5
    arms = {"baseline": "jailbreakbench_baseline", "ablated": "jailbreakbench_ablation", "subtracted": "jailbreakbench_actadd"}
    for row in runs["rows"]:
        run = folder / f"paper-{row['model'].removesuffix('-chat') if row['model'].startswith('qwen') else row['model']}"
        scored = json.loads((run / "direction_evaluations.json").read_text())
        assert json.loads((run / "direction_metadata.json").read_text()) == {"pos": row["position"], "layer": row["layer"]}
        assert row["n_layers"] == 1 + max(one["layer"] for one in scored)
        theirs = next(one for one in scored if (one["position"], one["layer"]) == (row["position"], row["layer"]))
        for ours, name in (("bypass", "refusal_score"), ("induce", "steering_score"), ("kl", "kl_div_score")):
            assert row[ours] == pytest.approx(theirs[name], abs=5.1e-5)
        of = rates[row["model"]]
        for arm, name in arms.items():
            assert row["substrings"][arm] == of[name]["substring_matching_success_rate"]
            assert row["llama_guard_2"][arm] == of[name]["llamaguard2_success_rate"]
        for arm, name in (("baseline", "harmless_baseline"), ("added", "harmless_actadd")):
            assert row["harmless_substrings"][arm] == of[name]["substring_matching_success_rate"]
        assert {each["n"] for each in of.values()} == {runs["n"]}


def test_in_sample_peaks_are_those_of_the_published_files(reference):
    for method, figure in published()["vectors"]["in_sample_peak"].items():
        d = torch.load(reference / "published" / "write-up-qwen-1_8b" / f"{method}_cohens_d.pt", weights_only=True)
        peak = max((layer for layer in d if layer), key=lambda layer: d[layer])
        assert {"layer": peak, "separation": round(float(d[peak]), 2)} == figure


def test_published_figures_are_the_reference_ones(reference):
    theirs, ours = json.loads((reference / "qwen-1_8b-chat.json").read_text(encoding="utf-8")), published()
    settings = {"model": theirs["model"], **theirs["model_shape"], "hook": theirs["activation"]["hook"]}
    settings |= {"n_pairs": theirs["n_pairs"], "pairs_by": theirs["pairs_by"], "alphas": theirs["alphas"]}
    settings |= {
        "judge": theirs["judge"]["by"],
        "judged": theirs["judge"]["axes"],
        "benchmark_tasks": theirs["benchmark"]["tasks"],
    }
    assert ours["settings"] | settings == ours["settings"] and ours["source"]["title"] in theirs["source"]
    assert ours["separation"] == theirs["separation"] and ours["alpha_drop_off"] == theirs["alpha_drop_off"]
    cosines = {str(layer): value for layer, value in enumerate(ours["cosine_sequential_batched"]) if value is not None}
    assert cosines == theirs["cosine_sequential_vs_batched"]
    averages, listed = {"baseline": ours["benchmark_baseline"]}, []
    for method, pairing, figures in [(*name.split("-"), dict(figures)) for name, top in ours["arms"].items() for figures in top]:
        if (average := figures.pop("benchmark")) is not None:
            averages[f"{method}_layer_{figures['layer']}_alpha_{100 * figures['alpha']:.0f}"] = average
        listed.append({"method": method, "pairing": pairing, **figures})
    assert listed == theirs["sweep_top"] and averages == theirs["benchmark"]["average"]
