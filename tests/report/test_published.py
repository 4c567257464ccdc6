"""The published vectors of the real Qwen-1.8B-Chat through the package's own functions: no model at hand, real numbers.

The files are not ours to ship: they are found through REFUSAL_REFERENCE, and read as `dvc import` into data/published/ would have it.
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
SEQUENTIAL, BATCHED = (f"write-up-qwen-1_8b/{method}_rv_dict.pt" for method in ("sequential", "batched"))
PAPER = "paper-qwen-1_8b/mean_diffs.pt:position_-1"


@pytest.fixture(scope="module")
def published():
    return read_vectors(REFERENCE / "published")


def test_shapes_and_lengths(published):
    directions, _ = published
    assert all(directions[name].shape == (24, 2048) for name in (SEQUENTIAL, BATCHED, PAPER))
    lengths = directions[SEQUENTIAL].double().norm(dim=-1)
    assert torch.allclose(lengths[1:], torch.ones(23, dtype=torch.float64), atol=1e-6) and lengths[0].isnan()


def test_the_comparison_gives_the_write_ups_table(published):
    table = json.loads((REFERENCE / "qwen-1_8b-chat.json").read_text(encoding="utf-8"))["cosine_sequential_vs_batched"]
    comparison = compare(*published, {"sequential-matched": torch.ones(8, 96)})
    assert not any(row["comparable"] for row in comparison["files"].values())
    between = comparison["between"][f"{BATCHED} {SEQUENTIAL}"]
    assert between[0] is None  # layer 0 is undefined there
    assert {str(layer): f"{x:.4f}" for layer, x in enumerate(between) if layer} == {
        layer: f"{x:.4f}" for layer, x in table.items()
    }


@pytest.mark.parametrize(("method", "layer", "d"), [("sequential", 19, 5.33), ("batched", 20, 3.57)])
def test_published_separation(published, method, layer, d):
    values = published[1][f"write-up-qwen-1_8b/{method}_cohens_d.pt"].nan_to_num(0)
    assert int(values.argmax()) == layer and round(float(values[layer]), 2) == d
    if method == "batched":
        assert [round(float(f(values[7:11])), 2) for f in (torch.min, torch.max)] == [0.18, 0.31]


@pytest.mark.parametrize(("layer", "value"), [(15, 0.889), (14, 0.822)])
def test_the_write_up_agrees_with_the_paper(published, layer, value):
    assert round(float(cosine(published[0][SEQUENTIAL][layer], published[0][PAPER][layer])), 3) == value


@pytest.mark.parametrize(("first", "last", "value"), [(0, 7, 0.28), (8, 15, 0.44), (12, 23, 0.60), (16, 23, 0.80)])
def test_mean_cosine_between_layers_of_the_paper(published, first, last, value):
    block = cross_layer_cosine(published[0][PAPER])[first : last + 1, first : last + 1]
    n = len(block)
    assert torch.allclose(block.diagonal(), torch.ones(n, dtype=torch.float64))
    # To the second decimal as published; layers 12 to 23 come out at 0.5946, given as 0.60.
    assert float((block.sum() - block.trace()) / (n * (n - 1))) == pytest.approx(value, abs=0.006)
