"""Subspaces to ablate where one direction may not be enough, and random ones of the same rank as their control."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io.errors import UserError


def paired_svd(
    harmful: Float[Tensor, "n_pairs d_model"], safe: Float[Tensor, "n_pairs d_model"], k: int
) -> Float[Tensor, "k d_model"]:
    """The first k right singular vectors of the paired differences at one layer, uncentred, largest first, in float64.

    Uncentred, so that a difference all pairs share is the first of them and not taken out beforehand. Raises
    UserError where the differences span fewer than k dimensions.
    """
    _, values, vectors = torch.linalg.svd(harmful.double() - safe.double(), full_matrices=False)
    if k > len(values) or float(values[k - 1]) <= 1e-10 * float(values[0]):
        raise UserError(
            f"the {len(harmful)} paired differences span fewer than {k} dimensions: raise prompts.n_pairs in params.yaml, or "
            "give a file of more pairs"
        )
    return vectors[:k]


def qr_of_layers(unit: Float[Tensor, "n_layers d_model"], layers: Sequence[int]) -> Float[Tensor, "k d_model"]:
    """An orthonormal basis of the span of these layers' directions, the first layer's direction first (QR), in float64.

    Source: the write-up's section on LLaMA, which ablates the span of its best layers' directions. Raises UserError
    where a layer's direction is undefined or lies in the span of those before it.
    """
    q, r = torch.linalg.qr(unit[list(layers)].double().T)
    diagonal = r.diagonal()
    if float(diagonal.abs().min()) < 1e-6:
        raise UserError(f"the directions of layers {list(layers)} do not span {len(layers)} dimensions: choose others")
    return (q * diagonal.sign()).T


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
