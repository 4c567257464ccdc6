"""Whether the difference of two matrices is of low rank, up to what rounding explains; norms that were set back are undone first.

What rounding explains is known from the values: one rounding errs by at most half a step of the grid that W' lies on, and by
step / sqrt(12) on average. A matrix of independent entries of sizes s has a norm of about max_i |s_i.| + max_j |s_.j| (Bandeira
and van Handel 2016, "Sharp nonasymptotic bounds on the norm of random matrices with independent entries"), which is the `edge`
that singular values have to pass; s is taken as one whole step, which leaves room for twelve roundings: tools take a subspace out
one direction after another, and each of these rounds once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

MAX_RANK = 32  # of what is called low; the sketch that finds it has half as many columns again
SHOWN = 8  # singular values that are kept
ROUNDS = 50  # of the alternation that undoes norms; it gains a factor of about d_model in each
# Which norms of W' [d_model, n] were set back to those of W: its columns' (what one input writes), its rows', the rows' where the
# edit was made of rows at length 1, or its own. Axes of the norm, and whether rows came first.
NORMS = {"columns": ((0,), False), "rows": ((1,), False), "rows of length 1": ((1,), True), "whole": ((0, 1), False)}


@dataclass(frozen=True)
class Spectrum:
    """Of D = W - W' [d_model, n], norms undone: singular values above `edge`, with their left vectors; the SHOWN greatest.

    left: the energy that these leave, by the most that rounding explains. norms: of NORMS, what was set back. W and W' by `unit`
    are what the edit was made of, and W' times `scale` has the norms that it left.
    """

    vectors: Float[Tensor, "d_model r"]
    values: Float[Tensor, " r"]
    shown: list[float]
    edge: float
    left: float
    low: bool
    norms: str | None = None
    unit: Tensor | float = 1.0
    scale: Tensor | float = 1.0


def spectrum(w: Float[Tensor, "d_model n"], edited: Float[Tensor, "d_model n"], step: Float[Tensor, "d_model n"]) -> Spectrum:
    """The spectrum of W - W', whose values lie on a grid of these steps; low is False where nothing of low rank explains it.

    Norms shrink by about a d_model-th when a direction is out, so that even set back they leave the edit's singular values far
    above all others: their number is where neighbours are furthest apart, if that is a factor of 2.
    """
    plain = _against_rounding(w - edited, step)
    ratios = [one / other if other else math.inf for one, other in zip(plain.shown, plain.shown[1:], strict=False)]
    if max(ratios, default=0.0) < 2:
        return plain
    k, undone = ratios.index(max(ratios)) + 1, []
    for norms, (axes, by_row) in NORMS.items():
        of_rows = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        unit = torch.where(of_rows > 0, of_rows, 1.0) if by_row else torch.ones_like(of_rows)
        ours, theirs, steps = w / unit, edited / unit, step / unit
        if _norms_kept(ours, theirs, steps, axes, k):
            scale = _scale(ours, theirs, axes, k)
            found = _against_rounding(ours - theirs * scale, steps * scale)
            undone.append(replace(found, norms=norms, unit=unit, scale=scale))
    return min((one for one in undone if one.low), key=lambda one: one.left, default=plain)


def _sketch(d: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest singular values of a matrix, largest first, with their left singular vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(d, min(MAX_RANK * 3 // 2, *d.shape), niter=2)
    return u, s


def _against_rounding(d: Float[Tensor, "d_model n"], step: Float[Tensor, "d_model n"]) -> Spectrum:
    """The singular values that rounding by `step` does not explain. Low: there are a few, and what they leave is rounding."""
    u, s = _sketch(d)
    squares = step**2
    edge = math.sqrt(float(squares.sum(1).max())) + math.sqrt(float(squares.sum(0).max()))
    edge += _of_sums(d) * float(s[0])
    rank = int((s > edge).sum())
    energy = float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2
    left = (energy - float((s[:rank].double() ** 2).sum())) / (explained(d, step) or 1)
    low = 0 < rank <= min(MAX_RANK, min(d.shape) // 2) and left <= 1
    return Spectrum(u[:, :rank].double(), s[:rank].double(), s[:SHOWN].tolist(), edge, left, low)


def _of_sums(d: Tensor) -> float:
    """The rounding of sums over a matrix in its dtype, relative: what is left where values are exacter than that (float64)."""
    return torch.finfo(d.dtype).eps * math.sqrt(sum(d.shape))


def explained(d: Tensor, step: Tensor) -> float:
    """The energy that rounding may have left in D."""
    return float((step**2).sum(dtype=torch.float64)) + _of_sums(d) * float(torch.linalg.vector_norm(d, dtype=torch.float64)) ** 2


def _norms_kept(w: Tensor, edited: Tensor, step: Tensor, axes: tuple[int, ...], k: int) -> bool:
    """Whether norms over `axes` differ by no more than rounding of values by `step`, and of sums in float32, in the mean square;
    and by less than from those of an edit of rank k that set nothing back."""
    size, theirs, plain = (torch.linalg.vector_norm(m, dim=axes) for m in (w, edited, _projected(w, w - edited, k)))
    of_sums = torch.finfo(torch.float32).eps * math.sqrt(w.numel() / size.numel())
    variance = (((step * w) ** 2).sum(axes) / size**2 + (of_sums * size) ** 2).clamp(min=torch.finfo(w.dtype).tiny)
    kept, not_kept = (float(((norm - theirs) ** 2 / variance).nanmean()) for norm in (size, plain))
    return kept <= 1 and kept < not_kept


def _projected(w: Tensor, d: Tensor, k: int) -> Tensor:
    """W - alpha V V^T W, with V the first k left singular vectors of D, and alpha by least squares."""
    v = _sketch(d)[0][:, :k]
    vw, vd = v.mT @ w, v.mT @ d
    return w - v @ vw * ((vd * vw).sum() / (vw * vw).sum())


def _scale(w: Tensor, edited: Tensor, axes: tuple[int, ...], k: int) -> Tensor:
    """The factors, one for each norm over `axes`, by which W' is W - alpha V V^T W for some V of rank k: least squares for the
    factors given V and alpha, and for these given the factors, in turn."""
    scale = torch.ones_like(w.sum(axes, keepdim=True))
    for _ in range(ROUNDS):
        projected = _projected(w, w - edited * scale, k)
        before, scale = scale, (edited * projected).sum(axes, keepdim=True) / (edited**2).sum(axes, keepdim=True)
        scale = scale.nan_to_num(1.0)  # a row or column of zeros
        if bool(((scale - before).abs() <= torch.finfo(w.dtype).eps).all()):
            break
    return scale


def common(spectra: Sequence[Spectrum]) -> Float[Tensor, "k d_model"]:
    """The left singular vectors of several writers, each weighted by its value over the edge, as orthonormal rows.

    So weighted, rounding moves the vectors of each by a matrix of norm below 1, and those of n writers by one below sqrt(n): as
    many dimensions are common as have a singular value above that. Signs make the largest component positive.
    """
    stacked = torch.cat([one.vectors * (one.values / one.edge) for one in spectra], dim=1)
    u, s, _ = torch.linalg.svd(stacked, full_matrices=False)
    basis = u[:, s > math.sqrt(len(spectra))].mT
    return basis * basis.gather(1, basis.abs().argmax(1, keepdim=True)).sign()
