"""Difference-in-means directions: the file to read first.

Everything is float64: at layer 0 the last template token is the same for every prompt, and only an exact enough mean shows
that the difference there is rounding noise. One layer is in memory at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.prompts import resolve_pairing
from refusal.method.activations_file import Activations

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


def difference_in_means(harmful: Activations, safe: Activations) -> Directions:
    """d_l = mean r_l(harmful) - mean r_l(safe) and v_l = d_l / |d_l|, in float64.

    Source: Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", section 2.3.
    """
    differences, safe_means, sizes = [], [], []
    for layer in range(harmful.shape[1]):
        r_harmful, r_safe = harmful[:, layer].double(), safe[:, layer].double()
        differences.append(r_harmful.mean(0) - r_safe.mean(0))
        safe_means.append(r_safe.mean(0))
        sizes.append(r_safe.norm(dim=-1).mean())
    d = torch.stack(differences)
    norm = d.norm(dim=-1, keepdim=True)
    defined = norm[:, 0] > UNDEFINED_BELOW * torch.stack(sizes)
    return Directions(d, torch.where(defined[:, None], d / norm, 0.0), defined, torch.stack(safe_means))


def read_directions(path: Path) -> dict[str, Tensor]:
    """The file that holds the directions of every method and pairing. Raises UserError naming a file that does not."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}): delete it and run `dvc repro`, which makes it anew") from None


def select_directions(tensors: Mapping[str, Tensor], method: str, pairing: str) -> dict[str, Tensor]:
    """`unit`, `difference`, `defined` and `safe_mean` of one method and pairing, from the file that holds all of them.

    pairing: as `sweep.pairing` may be, or `harmless`, the control. Raises UserError where it holds none.
    """
    prefix = f"{method}-{resolve_pairing(pairing, method, tensors)}."
    selected = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    if missing := {"unit", "difference", "defined", "safe_mean"} - selected.keys():
        raise UserError(f"the file of directions has no {prefix}{min(missing)}: run `dvc repro directions`, which writes it")
    return selected


def defined_layers(directions: Mapping[str, Tensor]) -> list[int]:
    """The layers whose direction is defined, of what `select_directions` gives."""
    return [int(layer) for layer in directions["defined"].nonzero().flatten()]


def harmless_kept(unit: Float[Tensor, "*n d_model"], safe_mean: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
    """Directions without their component along the mean of the safe prompts, at length one: an ablation then leaves it in.

    Source: J. Lai, "Projected Abliteration", 2025 (https://huggingface.co/blog/grimjim/projected-abliteration).
    """
    v, m = unit.double(), safe_mean.double()
    left = v - (v * m).sum(-1, keepdim=True) / m.square().sum(-1, keepdim=True) * m
    return left / left.norm(dim=-1, keepdim=True)


def random_unit(d_model: int, n: int, seed: int) -> Float[Tensor, "n d_model"]:
    """`n` directions drawn evenly from the unit sphere: the control for ablating any direction at all."""
    drawn = torch.randn(n, d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def project(activations: Activations, unit: Float[Tensor, "n_layers d_model"]) -> Float[Tensor, "n n_layers"]:
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


def as_json(values: Tensor) -> Any:
    """A number, or nested lists of numbers; None where one is not finite, as JSON has no NaN."""
    if values.ndim:
        return [as_json(value) for value in values]
    return float(values) if bool(values.isfinite()) else None
