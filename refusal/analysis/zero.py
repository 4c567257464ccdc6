"""Where zero lies along a direction, between the safe prompts and the harmful ones, and how well projections tell them apart.

Linear ablation sends every prompt to zero. Where zero lies among the safe prompts, ablated harmful prompts look safe;
where it lies among the harmful ones, ablation makes the model take everything for harmful.
"""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.stats import chunk_sizes, numbered

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def resampled_weights(clusters: Sequence[Hashable], n_resamples: int, seed: int) -> Iterator[Float[Tensor, "part n"]]:
    """How often each item occurs in each bootstrap resample of whole clusters, in turns."""
    of, n_clusters = numbered(clusters)
    generator = torch.Generator().manual_seed(seed)
    for size in chunk_sizes(n_resamples, len(of)):
        drawn = torch.randint(0, n_clusters, (size, n_clusters), generator=generator)
        counts = torch.zeros(size, n_clusters, dtype=torch.float64)
        yield counts.scatter_add_(1, drawn, torch.ones_like(drawn).double())[:, torch.from_numpy(of)]


def origin_between_means(
    harmful: Float[Tensor, " n"], safe: Float[Tensor, " n"], clusters: Sequence[Hashable], n_resamples: int, seed: int
) -> dict[str, Any]:
    """Of projections on one direction: quantiles of both sets, and `zero`, 0 at the safe mean and 1 at the harmful mean.

    `zero` carries a percentile bootstrap 95 % interval over topic phrases.
    """
    harmful, safe = harmful.double(), safe.double()
    found = []
    for weight in resampled_weights(clusters, n_resamples, seed):
        total = weight.sum(1)
        means = (weight @ harmful / total, weight @ safe / total)
        found.append(-means[1] / (means[0] - means[1]))
    resampled = torch.cat(found)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    return {
        "zero": float(-safe.mean() / (harmful.mean() - safe.mean())),
        "zero_low": float(resampled.quantile(0.025)),
        "zero_high": float(resampled.quantile(0.975)),
        **{f"harmful_q{100 * q:02.0f}": float(v) for q, v in zip(QUANTILES, harmful.quantile(levels), strict=True)},
        **{f"safe_q{100 * q:02.0f}": float(v) for q, v in zip(QUANTILES, safe.quantile(levels), strict=True)},
        "harmful_mean": float(harmful.mean()),
        "safe_mean": float(safe.mean()),
        "n": len(harmful),
    }


def auroc(
    harmful: Float[Tensor, " n"], safe: Float[Tensor, " m"], clusters: Sequence[Hashable], n_resamples: int, seed: int
) -> dict[str, Any]:
    """Area under the ROC curve of the projection as a detector of harmful prompts, ties counted half (Mann and Whitney).

    With a percentile bootstrap 95 % interval over topic phrases; pairs come whole, so n = m and clusters are theirs. At
    the edge, where the two sets do not overlap, the interval has no width: `separable` says so.
    """
    # Safe prompts in order of projection: how many lie below a harmful one is a difference of running sums, so that no table of
    # all pairs is held. Sums are of whole numbers and halves, exact in any order.
    ordered, order = safe.double().sort()
    below, upto = (torch.searchsorted(ordered, harmful.double().contiguous(), right=right) for right in (False, True))
    found = []
    for weight in resampled_weights(clusters, n_resamples, seed):
        running = torch.nn.functional.pad(weight[:, order].cumsum(1), (1, 0))
        found.append(((running[:, below] + running[:, upto]) / 2 * weight).sum(1) / weight.sum(1).square())
    resampled = torch.cat(found)
    return {
        "auroc": int((below + upto).sum()) / 2 / (len(harmful) * len(safe)),
        "auroc_low": float(resampled.quantile(0.025)),
        "auroc_high": float(resampled.quantile(0.975)),
        "separable": bool(harmful.min() > safe.max()),
        "n": len(harmful),
    }
