"""The subspace that the differences of all writers share, where rounding hides it in each: in blocks of 4 to 8 bits.

D_t = alpha V V^T W_t + E_t of writer t, E_t rounding: its values are independent, and at most half a step (of two rounded
matrices, a step). What all writers share adds up over them, and rounding does not.

Whether there is more than rounding is tested on the values in steps, all writers side by side: a matrix [d_model, N] of nearly
independent values of one variance, whose greatest singular value follows Tracy and Widom's law. Source: Johnstone 2001, "On the
Distribution of the Largest Eigenvalue in Principal Components Analysis"; its rank, one dimension after another: Kritchman and
Nadler 2009, "Non-Parametric Detection of the Number of Signals"; the law as a shifted gamma: Chiani 2014, "Distribution of the
Largest Eigenvalue for Real Wishart and Gaussian Random Matrices and a Simple Approximation for the Tracy-Widom Distribution".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from scipy.special import gammaincc, gammaincinv
from torch import Tensor

from refusal.stats import Z

LEVEL = 1e-3  # of the test of each dimension
MOST = 8  # dimensions: each is a pass over the tensors
ROUNDING = 1 / 12  # the mean square of rounding, in squared steps


@dataclass(frozen=True)
class Estimate:
    """Beneath rounding by blocks, of the edited tensors together.

    p: of the last dimension that is more than rounding. cosine: of the basis with the true one (for rank k the root mean square
    over the true dimensions), as far as rounding explains it. alpha: by least squares. Each with 95 % limits. pooled: of
    how many tensors it was seen in all together alone.
    """

    rank: int
    p: float
    cosine: float
    cosine_low: float
    cosine_high: float
    alpha: float
    alpha_low: float
    alpha_high: float
    n_tensors: int
    pooled: int


def tracy_widom_p(largest: float, n: int, d: int) -> float:
    """How probable an eigenvalue as large is for the Gram matrix [d, d] of n columns of independent values of variance 1."""
    root = math.sqrt(n - 1) + math.sqrt(d)
    scale = root * (1 / math.sqrt(n - 1) + 1 / math.sqrt(d)) ** (1 / 3)
    x = (largest - root**2) / scale
    return float(gammaincc(46.446, max(x + 9.84801, 0.0) / 0.186054))


def shared_basis(
    differences: Callable[[], Iterable[tuple[Tensor, Tensor]]], d_model: int
) -> tuple[Float[Tensor, "k d_model"], float]:
    """As many left singular vectors of all differences (each by its rounding) as are more than rounding, as rows, with the p of
    the last of them; none, and the p of the first that is not.

    differences: gives D and its steps [d_model, n] of every writer, anew for each dimension and once more: one is in memory at a
    time. Without the dimensions that were found, D is tested in steps, which would make more dimensions of those.
    """
    gram, basis, p = torch.zeros(d_model, d_model, dtype=torch.float64), torch.zeros(0, d_model, dtype=torch.float64), 1.0
    vectors: Tensor | None = None
    for k in range(min(MOST, d_model // 2) + 1):
        in_steps, n = torch.zeros(d_model, d_model, dtype=torch.float64), 0
        for d, step in differences():
            if vectors is None:
                gram += (d @ d.mT).double() / variance(step)
            v = basis.to(d.dtype)
            z = _even(torch.where(step > 0, (d - v.mT @ (v @ d)) / step, 0.0))  # of a block of zeros all steps are 0
            in_steps += (z @ z.mT).double()
            n += d.shape[1]
        values = torch.linalg.eigvalsh(in_steps)
        of_one = float(values.sum()) / ((d_model - k) * n)
        next_p = tracy_widom_p(float(values[-1]) / of_one, n, d_model - k) if of_one > 0 else 1.0
        if next_p >= LEVEL:
            return basis, p if k else next_p
        p = next_p
        if vectors is None:
            vectors = torch.linalg.eigh(gram)[1].flip(1).mT
        basis = vectors[: k + 1]
    return basis[:MOST], p


def _even(z: Float[Tensor, "d_model n"]) -> Float[Tensor, "d_model n"]:
    """Its rows and columns at the same mean square: of two rounded matrices, values that an edit moves by less than a step
    differ the more often the more it moves them, and that is a product of what it is in a row and in a column."""
    squares = z**2
    scale = (squares.mean(1, keepdim=True) * squares.mean(0, keepdim=True)).sqrt()
    return torch.where(scale > 0, z * squares.mean().sqrt() / scale, 0.0)


def variance(step: Tensor) -> float:
    """The mean square of rounding by these steps."""
    return float((step.double() ** 2).mean()) * ROUNDING or 1.0


@dataclass
class Fit:
    """What is summed over tensors, given the basis, to say how far it is off and what alpha is. aspect: d_model by the columns of
    all tensors that the basis was found from."""

    basis: Float[Tensor, "k d_model"]
    aspect: float
    n: int = 0
    n_tensors: int = 0
    pooled: int = 0
    xx: float = 0.0
    xy: float = 0.0
    moments: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0])
    left: float = 0.0
    signal: Tensor = field(init=False)
    off: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.signal = torch.zeros(len(self.basis), dtype=torch.float64)
        self.off = torch.zeros(self.basis.shape[1], len(self.basis), dtype=torch.float64)

    def of_tensor(self, w: Tensor, d: Tensor, step: Tensor, of_base: Tensor | None) -> tuple[float, float] | None:
        """alpha and what it leaves, |D - alpha V V^T W|, of one tensor; None where rounding (of W' by `step`, and of W by
        `of_base` where that is rounded so too) does not explain what it leaves, in all or along V."""
        v = self.basis.to(d.dtype)
        rounded = step**2 * ROUNDING + (0.0 if of_base is None else of_base**2 * ROUNDING)
        # W is known but for its own rounding, which is in D too.
        known = 0.0 if of_base is None else float((v**2 @ (of_base**2 * ROUNDING)).sum())
        x, y = v @ w, v @ d
        xx, xy = float((x * x).sum()) - known, float((x * y).sum()) - known
        alpha = xy / xx if xx > 0 else 0.0
        along = float(((y - alpha * x) ** 2).sum())
        rest = d - alpha * v.mT @ x
        left = float((rest**2).sum())
        # V is off by rounding, and was chosen for having the most of it.
        most = _most(float((v**2 @ rounded).sum()), x.numel()) * (1 + math.sqrt(self.aspect)) ** 2
        if left > _most(float(rounded.sum()), d.numel()) or along > most:
            return None
        return alpha, math.sqrt(left)

    def add(self, w: Tensor, d: Tensor, step: Tensor, of_base: Tensor | None, alpha: float) -> None:
        """Take in an edited tensor, whose alpha is known."""
        v, s = self.basis.to(d.dtype), variance(step)
        known = 0.0 if of_base is None else float((v**2 @ (of_base**2 * ROUNDING)).sum())
        x, y = v @ w, v @ d
        rest = ((d - alpha * v.mT @ x) ** 2).double()
        x, y = x.double(), y.double()
        self.xx += (float((x * x).sum()) - known) / s
        self.xy += (float((x * y).sum()) - known) / s
        for i, moment in enumerate((x**2 * y**2, x**3 * y, x**4)):
            self.moments[i] += float(moment.sum()) / s**2
        self.off += alpha**2 * rest @ (x**2).mT / s**2
        self.signal += alpha**2 * (x**2).sum(1) / s
        self.left += float(rest.sum()) / s
        self.n += d.shape[1]
        self.n_tensors += 1

    def estimate(self, p: float) -> Estimate:
        """Intervals: of alpha by its robust standard error, as in a regression through 0; of the cosine by first-order
        perturbation of singular vectors, sin^2 = sum_i var((E u)_i) / signal^2, a sum of squares whose spread is that of a chi
        square (Satterthwaite 1946). Source: Benaych-Georges and Nadakuditi 2012, "The Singular Values and Vectors of Low Rank
        Perturbations of Large Rectangular Random Matrices", example 3.1, on the factor of strong noise."""
        k, d_model = self.basis.shape
        alpha = self.xy / self.xx
        squares = self.moments[0] - 2 * alpha * self.moments[1] + alpha**2 * self.moments[2]
        se = math.sqrt(max(squares, 0.0)) / self.xx
        theta = self.signal / (self.n * self.left / (d_model * self.n))  # squared signal by noise, a value
        parts = self.off / self.signal**2 * ((1 + theta) / (theta + d_model / self.n))
        sine = float(parts.sum()) / k
        freedom = float(parts.sum() ** 2 / (parts**2).sum())
        low, high = (2 * float(gammaincinv(freedom / 2, q)) / freedom * sine for q in (0.025, 0.975))
        cosine, best, least = (math.sqrt(max(0.0, 1 - one)) for one in (sine, low, high))
        limits = (alpha - Z * se, alpha + Z * se)
        return Estimate(k, p, cosine, least, best, alpha, *limits, self.n_tensors, self.pooled)


def _most(expected: float, n: int) -> float:
    """What n squared rounding errors may sum up to: their expectation and a fifth, and five standard deviations."""
    return expected * (1.2 + 5 * math.sqrt(2 / n))
