"""Bases to ablate against eigenvectors, naive Gram-Schmidt and closed forms."""

import math

import pytest
import torch

from refusal.analysis.subspaces import captured, paired_svd, qr_of_layers, random_subspaces
from refusal.io.errors import UserError


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(basis):
    return torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=basis.dtype), atol=1e-10)


def test_paired_svd_is_the_eigenvectors_of_the_uncentred_second_moment():
    harmful, safe = gaussian(50, 12) * torch.arange(1, 13) + 3, gaussian(50, 12, seed=1)
    basis = paired_svd(harmful, safe, 4)
    moment = sum(torch.outer(h - s, h - s) for h, s in zip(harmful, safe, strict=True))
    values, vectors = torch.linalg.eigh(moment)
    for i in range(4):
        assert abs(float(basis[i] @ vectors[:, values.argsort(descending=True)[i]])) == pytest.approx(1, abs=1e-9)
    assert orthonormal(basis)


def test_a_shared_difference_is_the_first_vector_and_not_centred_away():
    shared = gaussian(12, seed=2)
    safe = gaussian(40, 12)
    assert captured(paired_svd(safe + shared + 0.01 * gaussian(40, 12, seed=3), safe, 1), shared) > 0.9999


def test_too_few_pairs_for_a_rank_is_said():
    safe = gaussian(40, 12)
    with pytest.raises(UserError, match="span fewer than 2"):
        paired_svd(safe + gaussian(12, seed=2), safe, 2)
    with pytest.raises(UserError, match="span fewer than 4"):
        paired_svd(gaussian(3, 12), gaussian(3, 12, seed=1), 4)


def test_qr_of_layers_is_gram_schmidt_in_the_order_given():
    unit = torch.nn.functional.normalize(gaussian(5, 9), dim=-1)
    basis, naive = qr_of_layers(unit, [3, 0, 4]), []
    for layer in (3, 0, 4):
        v = unit[layer].clone()
        for b in naive:
            v = v - (v @ b) * b
        naive.append(v / v.norm())
    assert torch.allclose(basis, torch.stack(naive), atol=1e-10)
    assert torch.allclose(basis[0], unit[3])
    unit[1] = torch.nn.functional.normalize(unit[0] + unit[4], dim=-1)
    with pytest.raises(UserError, match=r"\[0, 4, 1\] do not span 3"):
        qr_of_layers(unit, [0, 4, 1])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_random_subspaces_are_drawn_evenly(k):
    drawn = random_subspaces(24, k, 400, 0)
    assert all(orthonormal(basis) for basis in drawn[:20])
    assert torch.equal(drawn, random_subspaces(24, k, 400, 0)) and not torch.equal(drawn, random_subspaces(24, k, 400, 1))
    v = gaussian(24, seed=7)
    squares = torch.tensor([captured(basis, v) ** 2 for basis in drawn])
    assert float(squares.mean()) == pytest.approx(k / 24, abs=4 * float(squares.std()) / 20)
    assert float(drawn.mean(0).norm()) < 4 * math.sqrt(k / 400)  # no sign is preferred


def test_captured():
    basis = torch.eye(6, dtype=torch.float64)[:2]
    assert captured(basis, torch.tensor([3.0, 4.0, 0, 0, 0, 0])) == pytest.approx(1)
    assert captured(basis, torch.tensor([3.0, 0, 4.0, 0, 0, 0])) == pytest.approx(0.6)
    assert captured(basis[:1], torch.tensor([-2.0, 0, 0, 0, 0, 0])) == pytest.approx(1)
