"""Difference-in-means directions, and the geometry that says where refusal separates.

The line that computes a direction is in `difference_in_means`. Everything is float64: at layer 0 the last template
token is the same for every prompt, and only an exact enough mean shows that the difference there is rounding noise.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refusal.errors import RefusalError
from refusal.safetensors_file import Stack

# A difference shorter than this share of the activations' own size is rounding noise: float32 keeps about 1e-7.
UNDEFINED_BELOW = 1e-5
DRAWS_AT_ONCE = 2**22  # numbers, 32 MB


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


def difference_in_means(
    harmful: Float[Tensor, "n_harmful n_layers d_model"] | Stack, safe: Float[Tensor, "n_safe n_layers d_model"] | Stack
) -> Directions:
    """d_l = mean r_l(harmful) - mean r_l(safe) and v_l = d_l / |d_l|, in float64.

    Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3.
    """
    means, lengths = [], []
    for layer in range(harmful.shape[1]):  # one at a time: the two sets need not fit in memory
        of_safe = safe[:, layer].double()
        means.append(torch.stack([harmful[:, layer].double().mean(0), of_safe.mean(0)]))
        lengths.append(of_safe.norm(dim=-1).mean())
    harmful_mean, safe_mean = torch.stack(means, dim=1)
    difference = harmful_mean - safe_mean
    norm = difference.norm(dim=-1, keepdim=True)
    scale = torch.stack(lengths)
    defined = norm[:, 0] > UNDEFINED_BELOW * scale
    unit = torch.where(defined[:, None], difference / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)
    return Directions(difference, unit, defined, safe_mean)


def read_directions(path: Path) -> dict[str, Tensor]:
    """The file that holds the directions of every method and pairing. Raises RefusalError naming a file that is none."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise RefusalError(f"{path}: cannot be read ({error}): delete it and run `dvc repro`, which makes it anew") from None


def of_arm(tensors: Mapping[str, Tensor], method: str, pairing: str) -> dict[str, Tensor]:
    """`unit`, `difference`, `defined` and `safe_mean` of one method and pairing, from the file that holds all of them.

    Raises RefusalError where it holds none.
    """
    prefix = f"{method}-{pairing}."
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if lacking := {"unit", "difference", "defined", "safe_mean"} - found.keys():
        raise RefusalError(f"the file of directions has no {prefix}{min(lacking)}: run `dvc repro directions`, which writes it")
    return found


def random_unit(d_model: int, n: int, seed: int) -> Float[Tensor, "n d_model"]:
    """`n` directions drawn evenly from the unit sphere: the control for ablating any direction at all."""
    drawn = torch.randn(n, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def project(
    activations: Float[Tensor, "n n_layers d_model"] | Stack, unit: Float[Tensor, "n_layers d_model"]
) -> Float[Tensor, "n n_layers"]:
    """<r_l(p), v_l> of every prompt at every layer."""
    return torch.stack([activations[:, layer].double() @ v for layer, v in enumerate(unit.double())], dim=1)


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


def spectrum(differences: Float[Tensor, "n_pairs d_model"]) -> Float[Tensor, " rank"]:
    """Share of the uncentred second moment of the paired differences along each singular vector, largest first.

    Unlike the mean difference this sees which safe prompt goes with which harmful one.
    """
    energy = torch.linalg.svdvals(differences.double()).square()
    return energy / energy.sum()


def effective_rank(shares: Float[Tensor, " rank"]) -> float:
    """Participation ratio 1 / sum(share^2): 1 for a line, the dimension for a ball."""
    return float(1 / shares.square().sum())


def sign_flip_null(differences: Float[Tensor, "n_pairs d_model"], n_flips: int, seed: int) -> Float[Tensor, " n_flips"]:
    """Length of the mean difference when each pair's harmful and safe halves are swapped at random.

    Swapping leaves the uncentred spectrum as it is and destroys a common direction: the null of "the pairs agree".
    """
    differences, drawn = differences.double(), _draws(n_flips, len(differences), 2, torch.Generator().manual_seed(seed))
    return torch.cat([((flips.double() * 2 - 1) @ differences / len(differences)).norm(dim=-1) for flips in drawn])


def _draws(n_draws: int, n: int, high: int, generator: torch.Generator) -> Iterator[Int[Tensor, "part n"]]:
    """`n_draws` rows of `n` whole numbers below `high`, a few at a time: more prompts take more turns and not more memory."""
    at_once = max(1, DRAWS_AT_ONCE // n)
    for first in range(0, n_draws, at_once):
        yield torch.randint(0, high, (min(at_once, n_draws - first), n), generator=generator)


def bootstrap_unit(
    harmful: Float[Tensor, "n_harmful d_model"],
    safe: Float[Tensor, "n_safe d_model"],
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

    def means(set_: Tensor) -> Tensor:
        set_, found, n = set_.double(), [], size or len(set_)
        for drawn in _draws(n_resamples, n, len(set_), generator):
            weights = torch.zeros(len(drawn), len(set_), dtype=torch.float64)
            found.append(weights.scatter_add_(1, drawn, torch.ones_like(drawn).double()) @ set_ / n)
        return torch.cat(found)

    of_harmful = means(harmful)
    if paired:
        generator.manual_seed(seed)  # the same draws
    difference = of_harmful - means(safe)
    return difference / difference.norm(dim=-1, keepdim=True)
