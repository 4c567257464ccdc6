"""What the directions stage says of each method x pairing: separation, agreement, spectrum, with intervals."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.analysis.zero import resampled_weights
from refusal.lm.checkpoint import Stack
from refusal.method.directions import (
    Directions,
    bootstrap_unit,
    cohens_d,
    cosine,
    cross_layer_cosine,
    difference_in_means,
    effective_rank,
    project,
    sign_flip_null,
    spectrum,
)

N_SINGULAR_VALUES = 10


@dataclass(frozen=True)
class Arm:
    """One method x pairing: the train activations that went in, and the directions that came out."""

    harmful: Float[Tensor, "n_harmful n_layers d_model"] | Stack
    safe: Float[Tensor, "n_safe n_layers d_model"] | Stack
    directions: Directions


def arm(activations: Mapping[str, Tensor | Stack], pairing: str, seed: int) -> Arm:
    """Directions of one method's train activations under a pairing; `shuffled` permutes the safe prompts and is computed anew."""
    harmful, safe = activations["train.harmful"], activations["train.unrelated" if pairing == "unrelated" else "train.safe"]
    if pairing == "shuffled":
        safe = safe[torch.randperm(len(safe), generator=torch.Generator().manual_seed(seed))]
    return Arm(harmful, safe, difference_in_means(harmful, safe))


def describe(
    a: Arm,
    activations: Mapping[str, Tensor | Stack],
    pairing: str,
    reference: Directions,
    val_topics: Sequence[Hashable],
    n_resamples: int,
    n_sign_flips: int,
    seed: int,
) -> dict[str, Any]:
    """All that metrics/directions.json says of one arm; lists are by layer, null where the direction is undefined.

    separation: Cohen's d of the matched val pairs on the direction fitted on train; separation_in_sample: on the prompts
    it was fitted on, as the write-up scored it. Intervals are percentile bootstraps: of topic phrases for separation,
    of prompts for the cosine of a resampled direction with the full-data one.
    """
    found = a.directions
    layers, n_layers = found.layers, len(found.defined)
    harmful, safe = (project(activations[f"val.{side}"], found.unit) for side in ("harmful", "safe"))
    separation, in_sample = cohens_d(harmful, safe), cohens_d(project(a.harmful, found.unit), project(a.safe, found.unit))
    limits = _separation_interval(harmful, safe, val_topics, n_resamples, seed)
    low, high = (limit.where(separation.isfinite(), torch.nan) for limit in limits)
    to_reference = cosine(found.unit, reference.unit)
    paired = pairing != "unrelated"
    resampled = torch.full((n_resamples, n_layers), torch.nan, dtype=torch.float64)
    shares: dict[int, Tensor] = {}
    null: dict[int, float] = {}
    for i in layers:
        ours, theirs = a.harmful[:, i], a.safe[:, i]
        resampled[:, i] = cosine(bootstrap_unit(ours, theirs, n_resamples, seed, paired), found.unit[i])
        if paired:
            shares[i] = spectrum(ours, theirs)
            null[i] = float(sign_flip_null(ours, theirs, n_sign_flips, seed).quantile(0.95))
    both = [layer for layer in layers if bool(reference.defined[layer])]

    def by_layer(values: Tensor) -> list[float | None]:
        return [float(values[layer]) if layer in layers and bool(values[layer].isfinite()) else None for layer in range(n_layers)]

    scored = [layer for layer in layers if by_layer(separation)[layer] is not None]
    metrics: dict[str, Any] = {
        "n_harmful": len(a.harmful),
        "n_safe": len(a.safe),
        "n_val": len(harmful),
        "layers": layers,
        "peak_layer": max(scored, key=lambda layer: float(separation[layer])) if scored else None,
        "peak_separation": max(float(separation[layer]) for layer in scored) if scored else None,
        "separation_first": by_layer(separation)[layers[0]] if layers else None,
        "separation_last_half_min": min((float(separation[i]) for i in scored if i >= n_layers / 2), default=None),
        "cosine_to_sequential_min": min((float(to_reference[layer]) for layer in both), default=None),
        "separation": by_layer(separation),
        "separation_low": by_layer(low),
        "separation_high": by_layer(high),
        "separation_in_sample": by_layer(in_sample),
        "cosine_to_sequential": [float(to_reference[i]) if i in both else None for i in range(n_layers)],
        "bootstrap_cosine_low": by_layer(resampled.quantile(0.025, dim=0)),
        "bootstrap_cosine_median": by_layer(resampled.quantile(0.5, dim=0)),
        "norm": by_layer(found.difference.norm(dim=-1)),
        "cross_layer_cosine": [
            [float(value) if i in layers and j in layers else None for j, value in enumerate(row)]
            for i, row in enumerate(cross_layer_cosine(found.unit))
        ],
    }
    if paired:
        metrics["spectrum"] = [shares[i][:N_SINGULAR_VALUES].tolist() if i in shares else None for i in range(n_layers)]
        metrics["effective_rank"] = [effective_rank(shares[i]) if i in shares else None for i in range(n_layers)]
        metrics["sign_flip_null_95"] = [null.get(i) for i in range(n_layers)]
    return metrics


def _separation_interval(
    harmful: Float[Tensor, "n n_layers"],
    safe: Float[Tensor, "n n_layers"],
    topics: Sequence[Hashable],
    n_resamples: int,
    seed: int,
) -> tuple[Float[Tensor, " n_layers"], Float[Tensor, " n_layers"]]:
    """Percentile bootstrap of Cohen's d over topic phrases, from the weighted moments of each resample."""

    def moments(values: Tensor, weight: Tensor, n: Tensor) -> tuple[Tensor, Tensor]:
        mean = weight @ values / n
        # Centred on the whole sample first: a difference of large squares would lose the digits that matter.
        centre = values.mean(0)
        squares = weight @ (values - centre).square() - n * (mean - centre).square()
        return mean, squares

    found = []
    for weight in resampled_weights(topics, n_resamples, seed):
        n = weight.sum(1, keepdim=True)
        (mean_h, squares_h), (mean_s, squares_s) = moments(harmful, weight, n), moments(safe, weight, n)
        found.append((mean_h - mean_s) / ((squares_h + squares_s) / (2 * n - 2)).sqrt())
    resampled = torch.cat(found)
    resampled[~resampled.isfinite()] = torch.nan  # a resample without spread has no effect size
    return resampled.nanquantile(0.025, dim=0), resampled.nanquantile(0.975, dim=0)


def rows_of(metrics: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Plot data by file: separation and cosine_to_sequential by layer, cross_layer of each arm, spectrum."""
    separation, cosines, cross, spectra = [], [], [], []
    for name, m in metrics.items():
        method, pairing = name.split("-")
        who = {"arm": name, "method": method, "pairing": pairing}
        for layer in m["layers"]:
            separation.append(
                {
                    **who,
                    "layer": layer,
                    "separation": m["separation"][layer],
                    "low": m["separation_low"][layer],
                    "high": m["separation_high"][layer],
                    "in_sample": m["separation_in_sample"][layer],
                }
            )
            if m["cosine_to_sequential"][layer] is not None:
                cosines.append(
                    {
                        **who,
                        "layer": layer,
                        "cosine": m["cosine_to_sequential"][layer],
                        "bootstrap_low": m["bootstrap_cosine_low"][layer],
                    }
                )
            cross += [
                {**who, "layer": layer, "other_layer": other, "cosine": m["cross_layer_cosine"][layer][other]}
                for other in m["layers"]
            ]
            if "spectrum" in m:
                spectra += [
                    {**who, "layer": layer, "component": i + 1, "share": share} for i, share in enumerate(m["spectrum"][layer])
                ]
    return {"separation": separation, "cosine_to_sequential": cosines, "cross_layer_cosine": cross, "spectrum": spectra}
