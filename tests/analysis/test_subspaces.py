"""Bases to ablate against eigenvectors, naive Gram-Schmidt and closed forms."""

import math

import pytest
import torch
from synthetic import gaussian
from torch.nn.functional import normalize

from refusal.analysis.subspaces import captured, paired_svd, random_subspaces
from refusal.io.errors import UserError
from refusal.method.subspaces import qr_of_layers

F64 = torch.float64


def orthonormal(basis):
    return torch.allclose(basis @ basis.T, torch.eye(len(basis), dtype=basis.dtype), atol=1e-10)


def test_paired_svd_is_the_eigenvectors_of_the_uncentred_second_moment():
    harmful, safe = gaussian(50, 12, dtype=F64) * torch.arange(1, 13) + 3, gaussian(50, 12, seed=1, dtype=F64)
    basis = paired_svd(harmful, safe, 4)
    moment = sum(torch.outer(h - s, h - s) for h, s in zip(harmful, safe, strict=True))
    values, vectors = torch.linalg.eigh(moment)
    cosines = [abs(float(basis[i] @ vectors[:, column])) for i, column in enumerate(values.argsort(descending=True)[:4])]
    assert cosines == pytest.approx([1] * 4, abs=1e-9) and orthonormal(basis)


def test_a_shared_difference_is_the_first_vector_and_not_centred_away():
    shared, safe = gaussian(12, seed=2), gaussian(40, 12)
    assert captured(paired_svd(safe + shared + 0.01 * gaussian(40, 12, seed=3), safe, 1), shared) > 0.9999


def test_too_few_pairs_for_a_rank_is_said():
    safe = gaussian(40, 12, dtype=F64)
    with pytest.raises(UserError, match="span fewer than 2"):
        paired_svd(safe + gaussian(12, seed=2), safe, 2)
    with pytest.raises(UserError, match="span fewer than 4"):
        paired_svd(gaussian(3, 12), gaussian(3, 12, seed=1), 4)


def test_qr_of_layers_is_gram_schmidt_in_the_order_given():
    unit, naive = normalize(gaussian(5, 9, dtype=F64), dim=-1), []
    for layer in (3, 0, 4):
        v = unit[layer] - sum((unit[layer] @ b) * b for b in naive)
        naive.append(v / v.norm())
    assert torch.allclose(qr_of_layers(unit, [3, 0, 4]), torch.stack(naive), atol=1e-10)
    unit[1] = normalize(unit[0] + unit[4], dim=-1)
    with pytest.raises(UserError, match=r"\[0, 4, 1\] do not span 3"):
        qr_of_layers(unit, [0, 4, 1])


@pytest.mark.parametrize("k", [1, 3, 5])
def test_random_subspaces_are_drawn_evenly(k):
    drawn = random_subspaces(24, k, 400, 0)
    assert all(orthonormal(basis) for basis in drawn[:20])
    assert torch.equal(drawn, random_subspaces(24, k, 400, 0)) and not torch.equal(drawn, random_subspaces(24, k, 400, 1))
    squares = torch.tensor([captured(basis, gaussian(24, seed=7)) ** 2 for basis in drawn])
    assert float(squares.mean()) == pytest.approx(k / 24, abs=4 * float(squares.std()) / 20)
    assert float(drawn.mean(0).norm()) < 4 * math.sqrt(k / 400)  # no sign is preferred


@pytest.mark.parametrize(("k", "vector", "length"), [(2, [3, 4, 0], 1), (2, [3, 0, 4], 0.6), (1, [-2, 0, 0], 1)])
def test_captured(k, vector, length):
    assert captured(torch.eye(3, dtype=F64)[:k], torch.tensor(vector, dtype=torch.float32)) == pytest.approx(length)
