"""Difference-in-means directions, and the geometry that says where refusal separates.

The line that computes a direction is in `difference_in_means`. Everything is float64: at layer 0 the last template
token is the same for every prompt, and only an exact enough mean shows that the difference there is rounding noise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refusal.errors import RefusalError

# A difference shorter than this share of the activations' own size is rounding noise: float32 keeps about 1e-7.
UNDEFINED_BELOW = 1e-5


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
    harmful: Float[Tensor, "n_harmful n_layers d_model"], safe: Float[Tensor, "n_safe n_layers d_model"]
) -> Directions:
    """d_l = mean r_l(harmful) - mean r_l(safe) and v_l = d_l / |d_l|, in float64.

    Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3.
    """
    safe_mean = safe.double().mean(0)
    difference = harmful.double().mean(0) - safe_mean
    norm = difference.norm(dim=-1, keepdim=True)
    scale = safe.double().norm(dim=-1).mean(0)
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


def project(
    activations: Float[Tensor, "n n_layers d_model"], unit: Float[Tensor, "n_layers d_model"]
) -> Float[Tensor, "n n_layers"]:
    """<r_l(p), v_l> of every prompt at every layer."""
    return torch.einsum("nld,ld->nl", activations.double(), unit.double())


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
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (n_flips, len(differences)), generator=generator).double() * 2 - 1
    return (signs @ differences.double() / len(differences)).norm(dim=-1)


def bootstrap_unit(
    harmful: Float[Tensor, "n_harmful n_layers d_model"],
    safe: Float[Tensor, "n_safe n_layers d_model"],
    n_resamples: int,
    seed: int,
    paired: bool,
) -> Float[Tensor, "n_resamples n_layers d_model"]:
    """Directions of resampled prompts: whole pairs when `paired`, else the two sets one by one.

    A resample is a vector of weights, so all of them are two matrix products.
    """
    generator = torch.Generator().manual_seed(seed)

    def weights(n: int) -> Float[Tensor, "n_resamples n"]:
        drawn = torch.randint(0, n, (n_resamples, n), generator=generator)
        return torch.zeros(n_resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double()) / n

    def means(set_: Tensor, weight: Tensor) -> Tensor:
        return (weight @ set_.double().flatten(1)).unflatten(1, set_.shape[1:])

    harmful_weights = weights(len(harmful))
    safe_weights = harmful_weights if paired else weights(len(safe))
    difference = means(harmful, harmful_weights) - means(safe, safe_weights)
    return difference / difference.norm(dim=-1, keepdim=True)
