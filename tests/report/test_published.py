"""The published vectors of the real Qwen-1.8B-Chat through the package's own functions: no model at hand, real numbers.

The files are not ours to ship: they are found through REFUSAL_REFERENCE.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from refusal.method.directions import cosine, cross_layer_cosine
from refusal.report.published import compare, read_vectors

REFERENCE = Path(os.environ.get("REFUSAL_REFERENCE", "none"))
pytestmark = pytest.mark.skipif(
    not REFERENCE.is_dir(), reason="REFUSAL_REFERENCE names no folder with the published vectors, which the package does not ship"
)


def load(path):
    return torch.load(REFERENCE / "published" / path, weights_only=True, map_location="cpu")


def stacked(method):
    vectors = load(f"write-up-qwen-1_8b/{method}_rv_dict.pt")
    return torch.stack([vectors[layer] for layer in range(24)])


@pytest.fixture(scope="module")
def sequential():
    return stacked("sequential")


@pytest.fixture(scope="module")
def paper():
    """Difference-in-means at the last position, [24, 2048]."""
    return load("paper-qwen-1_8b/mean_diffs.pt")[-1]


@pytest.fixture(scope="module")
def table():
    return json.loads((REFERENCE / "qwen-1_8b-chat.json").read_text(encoding="utf-8"))


def test_cosine_of_sequential_to_batched_is_the_write_ups_table(sequential, table):
    found = cosine(sequential, stacked("batched"))
    published = table["cosine_sequential_vs_batched"]
    assert {int(layer) for layer in published} == set(range(1, 24))
    assert {layer: f"{found[int(layer)]:.4f}" for layer in published} == {layer: f"{x:.4f}" for layer, x in published.items()}
    assert found[0].isnan()  # layer 0 is undefined there


def test_published_directions_are_unit_vectors(sequential):
    assert torch.allclose(sequential[1:].double().norm(dim=-1), torch.ones(23, dtype=torch.float64), atol=1e-6)


def test_published_separation():
    by_method = {method: load(f"write-up-qwen-1_8b/{method}_cohens_d.pt") for method in ("sequential", "batched")}
    for method, layer, d in (("sequential", 19, 5.33), ("batched", 20, 3.57)):
        values = {int(k): float(v) for k, v in by_method[method].items() if float(v) == float(v)}
        assert max(values, key=values.get) == layer
        assert round(values[layer], 2) == d
    dip = [round(float(by_method["batched"][layer]), 2) for layer in (7, 8, 9, 10)]
    assert (min(dip), max(dip)) == (0.18, 0.31)


@pytest.mark.parametrize(("layer", "value"), [(15, 0.889), (14, 0.822)])
def test_the_write_up_agrees_with_the_paper(sequential, paper, layer, value):
    assert round(float(cosine(sequential[layer], paper[layer])), 3) == value


@pytest.mark.parametrize(("first", "last", "value"), [(0, 7, 0.28), (8, 15, 0.44), (12, 23, 0.60), (16, 23, 0.80)])
def test_mean_cosine_between_layers_of_the_paper(paper, first, last, value):
    block = cross_layer_cosine(paper)[first : last + 1, first : last + 1]
    n = len(block)
    assert torch.allclose(block.diagonal(), torch.ones(n, dtype=torch.float64))
    # To the second decimal as published; layers 12 to 23 come out at 0.5946, given as 0.60.
    assert float((block.sum() - block.trace()) / (n * (n - 1))) == pytest.approx(value, abs=0.006)


def test_the_papers_selected_cell():
    assert json.loads((REFERENCE / "published/paper-qwen-1_8b/direction_metadata.json").read_text()) == {"pos": -2, "layer": 15}


def test_an_import_of_all_of_it_says_the_same(table):
    """What `dvc import` of these folders into data/published/ would give, with no model at hand."""
    directions, figures = read_vectors(REFERENCE / "published")
    assert {name: list(t.shape) for name, t in directions.items() if "position_-1" in name or "rv_dict" in name} == {
        "paper-qwen-1_8b/mean_diffs.pt:position_-1": [24, 2048],
        "write-up-qwen-1_8b/batched_rv_dict.pt": [24, 2048],
        "write-up-qwen-1_8b/sequential_rv_dict.pt": [24, 2048],
    }
    found = compare(directions, figures, {"sequential-matched": torch.ones(8, 96)})
    assert not any(row["comparable"] for row in found["files"].values())
    between = found["between"]["write-up-qwen-1_8b/batched_rv_dict.pt write-up-qwen-1_8b/sequential_rv_dict.pt"]
    assert between[0] is None
    assert {str(i): f"{x:.4f}" for i, x in enumerate(between) if i} == {
        layer: f"{x:.4f}" for layer, x in table["cosine_sequential_vs_batched"].items()
    }
    assert round(max(d for d in found["figures"]["write-up-qwen-1_8b/sequential_cohens_d.pt"] if d is not None), 2) == 5.33
