"""Subspaces to ablate where one direction may not be enough, and random ones of the same rank as their control."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io.errors import UserError
from refusal.method.activations_file import Activations


def paired_svd(
    harmful: Float[Tensor, "n_pairs d_model"], safe: Float[Tensor, "n_pairs d_model"], k: int
) -> Float[Tensor, "k d_model"]:
    """The first k right singular vectors of the paired differences at one layer, uncentred, largest first, in float64.

    Uncentred, so that a difference all pairs share is the first of them and not taken out beforehand. Raises
    UserError where the differences span fewer than k dimensions.
    """
    vectors = _spanning(harmful, safe)
    if len(vectors) < k:
        raise UserError(
            f"the {len(harmful)} paired differences span fewer than {k} dimensions: raise prompts.n_pairs in params.yaml, or "
            "give a file of more pairs"
        )
    return vectors[:k]


def singular_vectors(
    harmful: Activations, safe: Activations, layers: Sequence[int], k: int
) -> Float[Tensor, "n_layers k d_model"]:
    """The first k vectors of `paired_svd` at each of the layers: zeros elsewhere, and beyond what the differences span."""
    vectors = torch.zeros(harmful.shape[1], k, harmful.shape[2], dtype=torch.float64)
    for layer in layers:
        found = _spanning(harmful[:, layer], safe[:, layer])[:k]
        vectors[layer, : len(found)] = found
    return vectors


def _spanning(harmful: Float[Tensor, "n_pairs d_model"], safe: Float[Tensor, "n_pairs d_model"]) -> Float[Tensor, "rank d_model"]:
    """All right singular vectors of the paired differences but those that rounding gives."""
    _, values, vectors = torch.linalg.svd(harmful.double() - safe.double(), full_matrices=False)
    return vectors[values > 1e-10 * values[0]]


def random_subspaces(d_model: int, k: int, n: int, seed: int) -> Float[Tensor, "n k d_model"]:
    """Orthonormal bases of `n` subspaces of rank k, drawn evenly: the control for ablating any subspace of that rank."""
    drawn = torch.randn(n, d_model, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(drawn)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT.contiguous()


def captured(basis: Float[Tensor, "k d_model"], vector: Float[Tensor, " d_model"]) -> float:
    """Length of the projection of vector / |vector| onto the span of orthonormal rows: |cosine| for k = 1; 1 if it lies inside.

    A random subspace of rank k captures about sqrt(k / d_model).
    """
    unit = vector.double() / vector.double().norm()
    return float((basis.double() @ unit).norm())
