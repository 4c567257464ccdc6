"""What a sweep takes out, against names written by hand, projections by least squares and closed forms."""

from pathlib import Path

import pytest
import torch
from tiny import tiny_direction

from refusal.io.errors import UserError
from refusal.io.params_file import load_params
from refusal.method.subspaces import Span, basis_of, random_of, spans

SWEEP = load_params(Path(__file__).parents[2] / "params.yaml").sweep
DEFINED = [1, 2, 3, 4, 5]
MEANS = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
UNIT = tiny_direction(rows=6, seed=2).double()
UNIT[0] = 0
SINGULAR = torch.linalg.qr(torch.randn(6, 32, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0].mT
GIVEN = {"unit": UNIT, "safe_mean": MEANS, "defined": UNIT.any(-1), "singular": SINGULAR.contiguous()}


def swept(**values):
    return spans(SWEEP.model_copy(update=values), DEFINED)


def projector(vectors):
    """P onto the span of rows, by least squares: what each unit vector of the space has as its best fit."""
    eye = torch.eye(vectors.shape[1], dtype=torch.float64)
    return vectors.T @ torch.linalg.lstsq(vectors.T, eye).solution


def same_span(basis, vectors):
    gram = basis @ basis.T
    return bool((gram - torch.eye(len(basis))).abs().max() < 1e-9) and bool((basis.T @ basis - projector(vectors)).abs().max() < 1e-9)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        ({}, ["layer_1", "layer_2", "layer_3", "layer_4", "layer_5"]),
        ({"layers": [4, 2]}, ["layer_4", "layer_2"]),
        ({"basis": "qr"}, ["qr_1-5"]),
        ({"basis": "qr", "rank": 4}, ["qr_1-4", "qr_2-5"]),
        ({"basis": "qr", "layers": [2, 3, 4, 5]}, ["qr_2-5"]),
        ({"basis": "qr", "layers": [5, 1, 2], "rank": 2}, ["qr_1-2", "qr_2+5"]),
        ({"basis": "qr", "layers": [1, 2, 4, 5]}, ["qr_1-2+4-5"]),
        ({"basis": "svd", "layers": [3], "rank": 2}, ["svd_3_rank_2"]),
        ({"basis": "per_layer"}, ["per_layer_1-5"]),
        ({"basis": "per_layer", "layers": [4]}, ["per_layer_4"]),
    ],
)
def test_names(values, names):
    found = swept(**values)
    assert [one.name for one in found] == names
    # One rank a sweep, of which its random controls are.
    assert len({one.rank for one in found}) == 1 and all(one.shown == one.layers[0] for one in found if len(one.layers) == 1)


def test_a_basis_spans_its_layers_directions():
    (window,) = swept(basis="qr", layers=[2, 3, 5])
    assert window.shown == "2-3+5" and same_span(basis_of(window, GIVEN), UNIT[[2, 3, 5]])
    (svd,) = swept(basis="svd", layers=[3], rank=4)
    assert same_span(basis_of(svd, GIVEN), SINGULAR[3, :4])
    assert torch.equal(basis_of(Span("single", (3,)), GIVEN), UNIT[3:4])
    (own,) = swept(basis="per_layer", layers=[2, 3])
    assert basis_of(own, GIVEN)[[2, 3], 0].equal(UNIT[[2, 3]]) and not basis_of(own, GIVEN)[[0, 1, 4, 5]].any()


def test_what_is_kept_of_the_safe_mean_is_kept_of_every_vector():
    """Each layer's direction less its share of that layer's safe mean, and the span of these."""
    for layers in ([2], [2, 3, 5]):
        of = Span("qr" if len(layers) > 1 else "single", tuple(layers), len(layers))
        left = torch.stack([UNIT[i] - (UNIT[i] @ MEANS[i]) / (MEANS[i] @ MEANS[i]) * MEANS[i] for i in layers])
        assert same_span(basis_of(of, GIVEN, keep_harmless=True), left)
    svd = basis_of(Span("svd", (4,), 3), GIVEN, keep_harmless=True)
    assert (svd @ MEANS[4]).abs().max() < 1e-9 and len(svd) == 3
    assert (random_of(Span("svd", (4,), 3), GIVEN, 1, 0, keep_harmless=True)[0] @ MEANS[4]).abs().max() < 1e-9


@pytest.mark.parametrize("span", [Span("qr", (2, 3, 5), 3), Span("svd", (4,), 3), Span("single", (4,))], ids=lambda one: one.name)
def test_random_ones_have_its_rank_and_are_even(span):
    drawn = random_of(span, GIVEN, 400, 0)
    assert all(same_span(basis, basis) and len(basis) == span.rank for basis in drawn)
    captured = torch.stack([(basis @ UNIT[1]).square().sum() for basis in drawn])
    assert float(captured.mean()) == pytest.approx(span.rank / 32, abs=4 * float(captured.std()) / 20)
    assert torch.equal(drawn[0], random_of(span, GIVEN, 400, 0)[0]) and not torch.equal(drawn[0], random_of(span, GIVEN, 400, 1)[0])


def test_random_ones_a_layer_act_at_its_layers_alone():
    drawn = random_of(Span("per_layer", (2, 4)), GIVEN, 3, 0)
    assert [basis.shape for basis in drawn] == [(6, 1, 32)] * 3
    assert all(basis[[2, 4]].norm(dim=-1).sub(1).abs().max() < 1e-9 and not basis[[0, 1, 3, 5]].any() for basis in drawn)
    vectors = torch.cat([basis[[2, 4], 0] for basis in drawn])
    assert (vectors @ vectors.T - torch.eye(6)).abs().max() < 0.9  # no two alike


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"basis": "qr", "rank": 6}, r"^params\.yaml: sweep\.rank: basis qr of rank 6 is made of 6 layers' .* there are 5: name more"),
        ({"basis": "qr", "layers": [0, 2]}, r"^params\.yaml: sweep\.layers: layer 0 has no direction"),
    ],
)
def test_layers_that_are_not_there(values, said):
    with pytest.raises(UserError, match=said):
        swept(**values)


def test_vectors_that_are_not_there():
    svd, said = Span("svd", (3,), 4), r"^params\.yaml: sweep\.basis: svd of rank 4 .* layer 3 has not so many: take .*sweep.pairing matched"
    few = SINGULAR.clone()
    few[3, 3] = 0
    for given in (GIVEN | {"singular": few}, {name: t for name, t in GIVEN.items() if name != "singular"}):
        with pytest.raises(UserError, match=said):
            basis_of(svd, given)
    alike = UNIT.clone()
    alike[3] = alike[2]
    with pytest.raises(UserError, match=r"layers \[2, 3\] do not span 2 dimensions: choose others in sweep.layers"):
        basis_of(Span("qr", (2, 3), 2), GIVEN | {"unit": alike})
