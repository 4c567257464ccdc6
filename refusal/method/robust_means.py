"""Other centres than the mean, for activations with one loud coordinate or a few prompts far from all others.

`directions.estimator` names one. `difference_in_means` of `refusal.method.directions` is what `mean` gives; here are

- `geometric_median`: the point of least summed distance to a set's activations, of harmful and of safe prompts.
- `winsorized`: the mean of activations whose values are cut, each prompt's at the QUANTILE of its own magnitudes.
- `normalised`: the mean of what has length 1: of pairs, each pair's difference; of prompts that are no pairs, each activation.

Winsorizing is heretic's (`winsorization_quantile`, off by default there; .95 is the value that it gives as an example): over the
coordinates of one prompt and layer, which cuts a coordinate that is loud in every prompt in every prompt.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from refusal.method.activations_file import Activations
from refusal.method.directions import UNDEFINED_BELOW, Directions, difference_in_means

QUANTILE = 0.95  # of a prompt's magnitudes, at which winsorizing cuts them
TOLERANCE, MOST_STEPS = 1e-10, 100_000  # of a step, over the mean distance to the points


def estimate(harmful: Activations, safe: Activations, estimator: str, paired: bool) -> Directions:
    """One direction a layer, by `mean`, `geometric_median`, `winsorized` or `normalised`, in float64.

    A layer whose difference in means is rounding has no direction by any of them. `normalised` has no length of its own: its
    `difference` has that of the difference in means, and its `safe_mean` is the mean. paired: rows belong together.
    """
    plain = difference_in_means(harmful, safe)
    if estimator == "mean":
        return plain
    differences, safe_means = [], []
    for layer in range(harmful.shape[1]):
        r_harmful, r_safe = harmful[:, layer].double(), safe[:, layer].double()
        if not plain.defined[layer]:
            differences.append(plain.difference[layer])
            safe_means.append(plain.safe_mean[layer])
        elif estimator == "normalised":
            v = _normalised(r_harmful, r_safe, paired)
            differences.append(v / v.norm() * plain.difference[layer].norm())
            safe_means.append(plain.safe_mean[layer])
        else:
            centre = CENTRES[estimator]
            safe_means.append(centre(r_safe))
            differences.append(centre(r_harmful) - safe_means[-1])
    d, centres = torch.stack(differences), torch.stack(safe_means)
    norm = d.norm(dim=-1, keepdim=True)
    defined = plain.defined & (norm[:, 0] > UNDEFINED_BELOW * centres.norm(dim=-1))
    return Directions(d, torch.where(defined[:, None], d / norm, 0.0), defined, centres)


def _normalised(harmful: Float[Tensor, "n d_model"], safe: Float[Tensor, "m d_model"], paired: bool) -> Float[Tensor, " d_model"]:
    """Mean of the pairs' differences at length 1, or that of harmful less that of safe activations at length 1."""
    if not paired:
        return _unit(harmful).mean(0) - _unit(safe).mean(0)
    difference, size = harmful - safe, safe.norm(dim=-1, keepdim=True)
    # A pair that differs by rounding alone would count as much as any other.
    return torch.where(difference.norm(dim=-1, keepdim=True) > UNDEFINED_BELOW * size, _unit(difference), 0.0).mean(0)


def _unit(x: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    return torch.nn.functional.normalize(x, dim=-1)


def geometric_median(points: Float[Tensor, "n d_model"]) -> Float[Tensor, " d_model"]:
    """The point y of least sum |x_i - y|, in float64; of points on one line any of their medians. Raises ArithmeticError where
    steps do not come to an end.

    Weiszfeld's iteration from the mean, as Vardi and Zhang 2000 ("The multivariate L1-median and associated data depth", PNAS 97)
    have it, which gets away from a point that it lands on.
    """
    x = points.double()
    y = x.mean(0)
    for _ in range(MOST_STEPS):
        distance = (x - y).norm(dim=-1)
        size = distance.mean()
        away = distance > 1e-12 * size
        if not bool(away.any()):
            return y
        weights = 1 / distance[away]
        target = (weights[:, None] * x[away]).sum(0) / weights.sum()
        n_here = len(x) - int(away.sum())
        pull = (weights[:, None] * (x[away] - y)).sum(0).norm()
        share = min(1.0, n_here / float(pull)) if n_here and float(pull) > 0 else float(bool(n_here))
        step = (1 - share) * (target - y)
        y = y + step
        if float(step.norm()) <= TOLERANCE * float(size):
            return y
    raise ArithmeticError(f"the geometric median of {len(x)} points is not found in {MOST_STEPS:,} steps")


def winsorized_mean(points: Float[Tensor, "n d_model"]) -> Float[Tensor, " d_model"]:
    """The mean of points whose values lie within plus and minus the QUANTILE of the point's own |values|, in float64."""
    x = points.double()
    most = torch.from_numpy(np.quantile(x.abs().numpy(), QUANTILE, axis=-1, keepdims=True))  # torch's takes 16 million values
    return x.clamp(-most, most).mean(0)


CENTRES: dict[str, Callable[[Tensor], Tensor]] = {"geometric_median": geometric_median, "winsorized": winsorized_mean}
