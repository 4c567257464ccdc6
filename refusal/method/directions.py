"""Difference-in-means directions, and the geometry that says where refusal separates.

The line that computes a direction is in `difference_in_means`. Everything is float64: at layer 0 the last template
token is the same for every prompt, and only an exact enough mean shows that the difference there is rounding noise.

A layer's activations are read in blocks of rows, so that memory does not grow with the prompts. What fits into one block is
computed in one piece.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refusal.io.errors import UserError
from refusal.lm.checkpoint import Layer, Stack
from refusal.stats import chunk_sizes

# A difference shorter than this share of the activations' own size is rounding noise: float32 keeps about 1e-7.
UNDEFINED_BELOW = 1e-5
BLOCK = 2**23  # numbers, 64 MB


@dataclass(frozen=True)
class Directions:
    """One direction a layer: `difference` d_l, its unit vector `unit` v_l (0 where undefined), and the safe mean."""

    difference: Float[Tensor, "n_layers d_model"]
    unit: Float[Tensor, "n_layers d_model"]
    defined: Bool[Tensor, " n_layers"]
    safe_mean: Float[Tensor, "n_layers d_model"]

    @property
    def layers(self) -> list[int]:
        """The layers whose direction is defined."""
        return [int(layer) for layer in self.defined.nonzero().flatten()]


def blocks(rows: Float[Tensor, "n d_model"] | Layer) -> Iterator[Float[Tensor, "part d_model"]]:
    """One layer's rows in float64, in turns of BLOCK numbers, or of d_model rows where that is more."""
    n, d_model = rows.shape
    at_once = max(d_model, BLOCK // d_model)
    for first in range(0, n, at_once):
        yield rows[first : first + at_once].double()


def paired_blocks(
    harmful: Float[Tensor, "n_pairs d_model"] | Layer, safe: Float[Tensor, "n_pairs d_model"] | Layer
) -> Iterator[Float[Tensor, "part d_model"]]:
    """The paired differences of one layer, harmful less safe, in turns as `blocks`."""
    return (ours - theirs for ours, theirs in zip(blocks(harmful), blocks(safe), strict=True))


def mean_row(parts: Iterable[Float[Tensor, "part d_model"]], n: int) -> Float[Tensor, " d_model"]:
    """The mean of all `n` rows of the parts."""
    return sum((part.sum(0) for part in parts), start=torch.zeros((), dtype=torch.float64)) / n


def difference_in_means(
    harmful: Float[Tensor, "n_harmful n_layers d_model"] | Stack, safe: Float[Tensor, "n_safe n_layers d_model"] | Stack
) -> Directions:
    """d_l = mean r_l(harmful) - mean r_l(safe) and v_l = d_l / |d_l|, in float64.

    Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3.
    """
    means, lengths = [], []
    for layer in range(harmful.shape[1]):
        means.append(torch.stack([mean_row(blocks(set_[:, layer]), len(set_)) for set_ in (harmful, safe)]))
        lengths.append(sum(block.norm(dim=-1).sum() for block in blocks(safe[:, layer])) / len(safe))
    harmful_mean, safe_mean = torch.stack(means, dim=1)
    difference = harmful_mean - safe_mean
    norm = difference.norm(dim=-1, keepdim=True)
    scale = torch.stack(lengths)
    defined = norm[:, 0] > UNDEFINED_BELOW * scale
    unit = torch.where(defined[:, None], difference / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    return Directions(difference, unit, defined, safe_mean)


def read_directions(path: Path) -> dict[str, Tensor]:
    """The file that holds the directions of every method and pairing. Raises UserError naming a file that is none."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error}): delete it and run `dvc repro`, which makes it anew") from None


def select_directions(tensors: Mapping[str, Tensor], method: str, pairing: str) -> dict[str, Tensor]:
    """`unit`, `difference`, `defined` and `safe_mean` of one method and pairing, from the file that holds all of them.

    Raises UserError where it holds none.
    """
    prefix = f"{method}-{pairing}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if lacking := {"unit", "difference", "defined", "safe_mean"} - found.keys():
        raise UserError(f"the file of directions has no {prefix}{min(lacking)}: run `dvc repro directions`, which writes it")
    return found


def random_unit(d_model: int, n: int, seed: int) -> Float[Tensor, "n d_model"]:
    """`n` directions drawn evenly from the unit sphere: the control for ablating any direction at all."""
    drawn = torch.randn(n, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def project(
    activations: Float[Tensor, "n n_layers d_model"] | Stack, unit: Float[Tensor, "n_layers d_model"]
) -> Float[Tensor, "n n_layers"]:
    """<r_l(p), v_l> of every prompt at every layer."""
    of_layer = [torch.cat([block @ v for block in blocks(activations[:, i])]) for i, v in enumerate(unit.double())]
    return torch.stack(of_layer, dim=1)


def cohens_d(harmful: Float[Tensor, "n_harmful ..."], safe: Float[Tensor, "n_safe ..."]) -> Float[Tensor, "..."]:
    """Cohen's d: difference of means over the pooled standard deviation (n - 1 in each variance).

    Source: Cohen 1988, "Statistical Power Analysis for the Behavioral Sciences", section 2.2. NaN where both spreads are 0.
    """
    n, m = len(harmful), len(safe)
    pooled = ((n - 1) * harmful.double().var(0) + (m - 1) * safe.double().var(0)) / (n + m - 2)
    return (harmful.double().mean(0) - safe.double().mean(0)) / pooled.sqrt()


def cosine(a: Float[Tensor, "... d_model"], b: Float[Tensor, "... d_model"]) -> Float[Tensor, "..."]:
    """Cosine of two directions in float64; NaN where either is zero or not finite."""
    a, b = a.double(), b.double()
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def cross_layer_cosine(unit: Float[Tensor, "n_layers d_model"]) -> Float[Tensor, "n_layers n_layers"]:
    """Cosine of every layer's direction with every other's."""
    return cosine(unit[:, None], unit[None])


def tsqr_r(parts: Iterable[Float[Tensor, "part d_model"]]) -> Float[Tensor, "m d_model"]:
    """A matrix of at most one block's rows with the singular values and right singular vectors of all parts stacked.

    The R of one QR after another, each of the R so far and the next part: exact, unlike the Gram matrix, which squares the
    condition. Source: Demmel, Grigori, Hoemmen and Langou 2012, "Communication-optimal Parallel and Sequential QR and LU
    Factorizations", sequential TSQR.
    """
    rows = iter(parts)
    found = next(rows)
    for part in rows:
        found = torch.linalg.qr(torch.cat([found, part]), mode="r").R
    return found


def spectrum(
    harmful: Float[Tensor, "n_pairs d_model"] | Layer, safe: Float[Tensor, "n_pairs d_model"] | Layer
) -> Float[Tensor, " rank"]:
    """Share of the uncentred second moment of the paired differences along each singular vector, largest first.

    Unlike the mean difference this sees which safe prompt goes with which harmful one.
    """
    energy = torch.linalg.svdvals(tsqr_r(paired_blocks(harmful, safe))).square()
    return energy / energy.sum()


def effective_rank(shares: Float[Tensor, " rank"]) -> float:
    """Participation ratio 1 / sum(share^2): 1 for a line, the dimension for a ball."""
    return float(1 / shares.square().sum())


def sign_flip_null(
    harmful: Float[Tensor, "n_pairs d_model"] | Layer, safe: Float[Tensor, "n_pairs d_model"] | Layer, n_flips: int, seed: int
) -> Float[Tensor, " n_flips"]:
    """Length of the mean difference when each pair's harmful and safe halves are swapped at random.

    Swapping leaves the uncentred spectrum as it is and destroys a common direction: the null of "the pairs agree".
    """
    n, drawn = len(harmful), _draws(n_flips, len(harmful), 2, torch.Generator().manual_seed(seed))
    return torch.cat([(_weighted(flips.double() * 2 - 1, paired_blocks(harmful, safe)) / n).norm(dim=-1) for flips in drawn])


def _draws(n_draws: int, n: int, high: int, generator: torch.Generator) -> Iterator[Int[Tensor, "part n"]]:
    """`n_draws` rows of `n` whole numbers below `high`, in turns that leave room for a weight each of `high` items."""
    for size in chunk_sizes(n_draws, max(n, high)):
        yield torch.randint(0, high, (size, n), generator=generator)


def _weighted(weights: Float[Tensor, "m n"], parts: Iterable[Float[Tensor, "part d_model"]]) -> Float[Tensor, "m d_model"]:
    """weights @ all parts stacked."""
    rows = iter(parts)
    part = next(rows)
    first, found = len(part), weights[:, : len(part)] @ part
    for part in rows:
        found += weights[:, first : first + len(part)] @ part
        first += len(part)
    return found


def bootstrap_unit(
    harmful: Float[Tensor, "n_harmful d_model"] | Layer,
    safe: Float[Tensor, "n_safe d_model"] | Layer,
    n_resamples: int,
    seed: int,
    paired: bool,
    size: int | None = None,
) -> Float[Tensor, "n_resamples d_model"]:
    """One layer's directions of resampled prompts: whole pairs when `paired`, else the two sets one by one.

    `size` prompts a side are drawn with replacement, by default as many as there are. A resample is a vector of weights, so all
    of them are two matrix products.
    """
    generator = torch.Generator().manual_seed(seed)

    def means(set_: Tensor | Layer) -> Tensor:
        found, n = [], size or len(set_)
        for drawn in _draws(n_resamples, n, len(set_), generator):
            weights = torch.zeros(len(drawn), len(set_), dtype=torch.float64)
            found.append(_weighted(weights.scatter_add_(1, drawn, torch.ones_like(drawn).double()), blocks(set_)) / n)
        return torch.cat(found)

    of_harmful = means(harmful)
    if paired:
        generator.manual_seed(seed)  # the same draws
    difference = of_harmful - means(safe)
    return difference / difference.norm(dim=-1, keepdim=True)
