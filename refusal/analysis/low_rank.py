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
ROUNDS = 50  # at most, of the alternation that undoes norms: a dozen in tiny models, a few in large ones
# Which norms of W' [d_model, n] were set back to those of W: its columns' (what one input writes), its rows', the rows' where the
# edit was made of rows at length 1, or its own. Axes of the norm, and whether rows came first.
NORMS = {"columns": ((0,), False), "rows": ((1,), False), "rows of length 1": ((1,), True), "whole": ((0, 1), False)}


@dataclass(frozen=True)
class Spectrum:
    """Of D = W - W' [d_model, n], norms undone: singular values above `edge`, with their left vectors; the SHOWN greatest.

    explained: the energy that rounding may leave; left: what these leave, by that. norms: of NORMS, what was set back. W and W'
    by `unit` are what the edit was made of, and W' times `scale` has the norms that it left.
    """

    vectors: Float[Tensor, "d_model r"]
    values: Float[Tensor, " r"]
    shown: list[float]
    edge: float
    explained: float
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
    if max(ratios, default=0.0) < 2 or plain.shown[0] < 4 * plain.edge:  # so near to rounding, norms say nothing
        return plain
    k, undone = ratios.index(max(ratios)) + 1, []
    if not _norms_kept(w, edited, step, (0, 1), k):  # whichever norms are kept, that of the whole is
        return plain
    for norms, (axes, by_row) in NORMS.items():
        unit: Tensor | float = 1.0
        ours, theirs, steps = w, edited, step
        if by_row:
            unit = _norm(w, (1,)).clamp(min=torch.finfo(w.dtype).tiny)
            ours, theirs, steps = w / unit, edited / unit, step / unit
        if _norms_kept(ours, theirs, steps, axes, k):
            scale = _scale(ours, theirs, axes, k)
            found = _against_rounding(ours - theirs * scale, steps * scale)
            undone.append(replace(found, norms=norms, unit=unit, scale=scale))
    return min((one for one in undone if one.low), key=lambda one: one.left, default=plain)


def _sketch(d: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest singular values of a matrix, largest first, with their left singular vectors."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # torch.manual_seed, which seeds all devices, takes longer than the sketch
        u, s, _ = torch.svd_lowrank(d, min(MAX_RANK * 3 // 2, *d.shape), niter=2)
    return u, s


def _against_rounding(d: Float[Tensor, "d_model n"], step: Float[Tensor, "d_model n"]) -> Spectrum:
    """The singular values that rounding by `step` does not explain. Low: there are a few, and what they leave is rounding."""
    u, s = _sketch(d)
    edge = float(_norm(step, (1,)).max()) + float(_norm(step, (0,)).max())  # of the largest row and column
    edge += _of_sums(d) * float(s[0])
    rank = int((s > edge).sum())
    rounding = explained(d, step)
    left = (energy(d) - float((s[:rank].double() ** 2).sum())) / (rounding or 1)
    low = 0 < rank <= min(MAX_RANK, min(d.shape) // 2) and left <= 1
    return Spectrum(u[:, :rank].double(), s[:rank].double(), s[:SHOWN].tolist(), edge, rounding, left, low)


def _of_sums(d: Tensor) -> float:
    """The rounding of sums over a matrix in its dtype, relative: what is left where values are exacter than that (float64)."""
    return torch.finfo(d.dtype).eps * math.sqrt(sum(d.shape))


def explained(d: Tensor, step: Tensor) -> float:
    """The energy that rounding may have left in D."""
    return energy(step) + _of_sums(d) * energy(d)


def energy(matrix: Tensor) -> float:
    """The sum of squares."""
    return float((matrix * matrix).sum())


def _norms_kept(w: Tensor, edited: Tensor, step: Tensor, axes: tuple[int, ...], k: int) -> bool:
    """Whether norms over `axes` differ by no more than rounding of values by `step`, and of sums in float32, in the mean square;
    and by less than from those of an edit of rank k that set nothing back."""
    ours, theirs = _norm(w, axes), _norm(edited, axes)
    of_sums = torch.finfo(torch.float32).eps * math.sqrt(w.numel() / ours.numel())
    variance = (_norm(step * w, axes) / ours) ** 2 + (of_sums * ours) ** 2
    kept = ((ours - theirs) ** 2 / variance).nanmean()  # where there is nothing, 0 / 0
    return bool(kept <= 1) and bool(kept < ((_norm(_projected(w, w - edited, k), axes) - theirs) ** 2 / variance).nanmean())


def _norm(matrix: Tensor, axes: tuple[int, ...]) -> Tensor:
    return (matrix * matrix).sum(axes, keepdim=True).sqrt()


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
        before, scale = scale, (edited * projected).sum(axes, keepdim=True) / _norm(edited, axes) ** 2
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
