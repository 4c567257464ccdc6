"""The ceiling of a cosine and what chance has, by simulation; anatomy in short."""

import math

import pytest
import torch
from scipy.stats import beta
from tiny import tiny_direction, tiny_model

from refusal.analysis.anatomy import beside_directions, chance_quantile, figures, in_short, span_ceiling
from refusal.analysis.edits import compare
from refusal.analysis.reliability import ceiling
from refusal.lm.weights import open_weights
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, orthogonalize


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_the_ceiling_is_what_noise_leaves_of_a_direction_that_the_span_holds(rank):
    """Estimates of the first axis, of reliability .6, projected on the first `rank` axes of 40."""
    d, r = 40, 0.6
    noise = torch.randn(20_000, d, dtype=torch.float64, generator=torch.Generator().manual_seed(rank)) * math.sqrt((1 - r) / r / d)
    estimates = torch.eye(d, dtype=torch.float64)[0] + noise
    lengths = estimates[:, :rank].norm(dim=1) / estimates.norm(dim=1)
    # The noise along the axis itself counts as direction here: a d-th of it.
    assert math.sqrt(float((lengths**2).mean())) == pytest.approx(span_ceiling(r, rank, d), abs=0.01)
    assert rank > 1 or span_ceiling(r, 1, d) == ceiling(r, 1.0)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_what_a_random_direction_has(rank):
    drawn = torch.randn(40_000, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    lengths = drawn[:, :rank].norm(dim=1) / drawn.norm(dim=1)
    assert chance_quantile(rank, 16, 0.95) == pytest.approx(float(lengths.quantile(0.95)), abs=0.01)
    assert chance_quantile(rank, 16, 0.95) == pytest.approx(math.sqrt(beta.ppf(0.95, rank / 2, (16 - rank) / 2)))
    assert chance_quantile(16, 16, 0.95) == 1.0


def test_an_edit_beside_directions_and_in_short(tmp_path):
    v = torch.linalg.qr(tiny_direction(rows=2).double().T)[0].T
    tiny_model("llama").save_pretrained(tmp_path / "base")
    edits = {"one": Intervention("one", v[:1], 1.0), "two": Intervention("two", v, 0.5)}
    orthogonalize(tmp_path / "base", [Edit(tmp_path / name, one) for name, one in edits.items()])
    unit = torch.stack([torch.zeros(32, dtype=torch.float64), v[1], (v[0] + v[1]) / math.sqrt(2)])
    for name, cosines in (("one", [None, 0.0, math.sqrt(0.5)]), ("two", [None, 1.0, 1.0])):
        with open_weights(tmp_path / "base") as base, open_weights(tmp_path / name) as edited:
            found = compare(base, edited)
        beside, k = beside_directions(found, unit, [None, 0.81, None]), len(edits[name].basis)
        assert beside["cosine"] == [c if c is None else pytest.approx(c, abs=1e-3) for c in cosines]
        assert beside["ceiling"] == [None, pytest.approx(math.sqrt(0.81 + 0.19 * (k - 1) / 31)), None]
        assert beside["by_chance"] == pytest.approx(math.sqrt(k / 32)) and beside["by_chance_95"] == chance_quantile(k, 32, 0.95)
        short = in_short(figures(found, {}))
        assert short["n_tensors"] == {"same": 23, "edited": 7} and short["rank"] == k and len(short["layers"]) == 3
        assert not {"basis", "by_layer", "tensors", "only_in", "cosines"} & short.keys()
    with open_weights(tmp_path / "base") as base:
        same = compare(base, base)
    assert beside_directions(same, unit, [0.5] * 3) == {"cosine": [None] * 3, "ceiling": [None] * 3, "by_chance": None, "by_chance_95": None}
