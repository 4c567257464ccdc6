"""A checkpoint's name becomes a path: no other than those that the pipeline gives does."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from refusal.io.errors import UserError
from refusal.method.select import cell_name, checked, layer_scores, rank, span_of
from refusal.method.subspaces import Span

ROOT = Path(__file__).parents[2]
FOLDER = Path("models/ablated")


LAYER = st.integers(0, 200)
SOME = st.lists(LAYER, min_size=1, max_size=6, unique=True).map(lambda layers: tuple(sorted(layers)))
ONE = LAYER.map(lambda layer: (layer,))
SPANS = (
    st.builds(Span, st.sampled_from(["qr", "per_layer"]), SOME)
    | st.builds(Span, st.just("svd"), ONE, st.integers(1, 10))
    | st.builds(Span, st.just("single"), ONE)
)


@given(st.sampled_from(["sequential", "batched", "batched_unmasked", "random"]), SPANS, st.floats(0, 3))
def test_names_that_the_pipeline_gives_pass(method, span, alpha):
    name = f"{method}_{cell_name(span.name, alpha)}"
    assert checked({"rank_1": {"name": name}})["rank_1"]["name"] == name and (FOLDER / name).name == name
    assert span_of(name, method, [Span("single", (201,)), span]) is span
    with pytest.raises(UserError, match=r"no cell of the sweep .*run `dvc repro select`"):
        span_of(name, method, [Span("single", (201,))])


@given(st.text(st.sampled_from("a_/.\\\0\n0layer_alpha")) | st.from_regex(r"[a-z./]+_layer_[0-9/.]+_alpha_[0-9]+[/.\n]?"))
@example("a_layer_1_alpha_1\n")
@example("../../x")
@example("..")
@example("")
def test_a_name_is_one_folder_in_its_place_or_refused(name):
    try:
        found = checked({"rank_1": {"name": name}})["rank_1"]["name"]
    except UserError:
        return
    assert (FOLDER / found).parent == FOLDER and (FOLDER / found).name == found and found.isprintable()


@pytest.mark.parametrize("stage", ["orthogonalize", "evaluate", "benchmark"])
def test_a_stage_that_meets_another_name_stops(stage, tmp_path):
    """With a folder there that it would have written to or read from."""
    for name in ("params.yaml", "requirements.lock"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    outside = tmp_path / "x"
    outside.mkdir()
    source = "metrics/orthogonalize.json" if stage == "benchmark" else "metrics/select.json"
    (tmp_path / "metrics").mkdir()
    (tmp_path / source).write_text(json.dumps({"rank_1": {"layer": 1, "alpha": 1.0, "name": "../../x"}}))
    done = subprocess.run(
        [sys.executable, "-m", f"stages.{stage}"], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    said = f"{stage}: '../../x' is no name of a cell, and would be a path: run `dvc repro select`, which writes the names"
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == said
    assert not any(outside.iterdir()) and not (tmp_path / "models").exists()


def judged(layer, alpha, score, compliance=0.9):
    return {
        "layer": layer,
        "alpha": alpha,
        "score": score,
        "compliance": compliance,
        "compliance_low": compliance - 0.1,
        "compliance_high": compliance + 0.05,
        "coherence": 0.8,
        "n": 200,
    }


GRID = {
    "baseline": judged(None, None, 0.99),
    "random_0": judged(None, 1.0, 0.98),
    "layer_1_alpha_100": judged(1, 1.0, 0.80),
    "layer_2_alpha_75": judged(2, 0.75, 0.95),
    "layer_2_alpha_100": judged(2, 1.0, 0.90),
    "layer_3_alpha_100": judged(3, 1.0, 0.90),
    "layer_3_alpha_125": judged(3, 1.25, 0.90),
    "layer_4_alpha_100": judged(4, 1.0, 0.90),
    "layer_3_alpha_50": judged(3, 0.5, 0.90),
}
SEPARATION = [None, 1.0, 5.0, 7.0, None]
LAYERS = [Span("single", (layer,)) for layer in (1, 2, 3, 4)]


def test_rank_takes_the_best_and_breaks_ties_as_said():
    chosen = rank(GRID, LAYERS, SEPARATION, 7, "batched")
    assert [(cell["layer"], cell["alpha"]) for cell in chosen] == [
        (2, 0.75),  # the score comes first; baseline and random are no candidates
        (3, 1.0),
        (2, 1.0),
        (4, 1.0),  # of equals the alpha nearest 1, then the layer that separates better
        (3, 1.25),
        (3, 0.5),
        (1, 1.0),
    ]
    assert [cell["n_tied"] for cell in chosen] == [1, 5, 5, 5, 5, 5, 1]
    assert [cell["margin_items"] for cell in chosen] == [pytest.approx(10), 0, 0, 0, 0, pytest.approx(20), None]  # of 200
    assert [cell["name"] for cell in chosen[:2]] == ["batched_layer_2_alpha_75", "batched_layer_3_alpha_100"]
    assert {k: chosen[0][k] for k in ("compliance", "low", "high", "coherence", "score", "n")} == {
        "compliance": 0.9,
        "low": 0.8,
        "high": 0.9500000000000001,
        "coherence": 0.8,
        "score": 0.95,
        "n": 200,
    }
    assert rank(dict(reversed(GRID.items())), LAYERS, SEPARATION, 7, "batched") == chosen  # the order of the file says nothing


def test_a_layer_without_a_separation_ranks_as_one_that_separates_nothing():
    grid = {f"layer_{layer}_alpha_100": judged(layer, 1.0, 0.9) for layer in (1, 2, 3, 4)}
    chosen = rank(grid, LAYERS, [None, -0.5, None, 0.5, 0.0], 4, "batched")
    assert [cell["layer"] for cell in chosen] == [3, 2, 4, 1]


def test_a_subspace_is_named_by_its_layers_and_stands_at_the_one_that_separates_best():
    windows = [Span("qr", (1, 2), 2), Span("qr", (2, 3), 2), Span("qr", (3, 4), 2)]
    cells = {cell_name(one.name, alpha): judged(one.shown, alpha, 0.9) for one in windows for alpha in (0.5, 1.0)}
    cells["baseline"], cells["qr_1-2_alpha_100"]["score"] = judged(None, 0.0, 0.99), 0.95
    chosen = rank(cells, windows, SEPARATION, 6, "sequential")
    assert [(cell["name"], cell["layer"]) for cell in chosen] == [
        ("sequential_qr_1-2_alpha_100", 2),
        ("sequential_qr_2-3_alpha_100", 3),  # these two share their best layer: the one of the first layers comes first
        ("sequential_qr_3-4_alpha_100", 3),
        ("sequential_qr_2-3_alpha_50", 3),
        ("sequential_qr_3-4_alpha_50", 3),
        ("sequential_qr_1-2_alpha_50", 2),
    ]
    assert layer_scores(cells, windows) == {1: 0.95, 2: 0.95, 3: 0.9, 4: 0.9}
    assert layer_scores(GRID, LAYERS) == {1: 0.80, 2: 0.95, 3: 0.90, 4: 0.90}


def test_rank_of_too_few_cells():
    assert len(rank(GRID, LAYERS, SEPARATION, 7, "batched")) == 7
    with pytest.raises(UserError, match=r"^params\.yaml: select\.top is 8 but the sweep has 7 cells"):
        rank(GRID, LAYERS, SEPARATION, 8, "batched")


@pytest.mark.parametrize(
    ("alpha", "name"), [(1.0, "100"), (0.75, "75"), (1.1, "110"), (0.29, "29"), (0.57, "57"), (1.15, "115"), (2, "200")]
)
def test_cell_names_are_the_write_ups(alpha, name):
    assert cell_name(Span("single", (15,)).name, alpha) == f"layer_15_alpha_{name}"
