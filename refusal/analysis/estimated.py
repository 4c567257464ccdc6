"""Contrasts whose directions are of another estimator than the mean, and what is then not said of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refusal.analysis.ceilings import CORRECTED
from refusal.analysis.separation import Contrast, contrast
from refusal.method.activations_file import Activations
from refusal.method.robust_means import estimate

# Figures of resampled, halved or counted prompts, which all are of means.
OF_MEANS = (
    "bootstrap_cosine_low",
    "bootstrap_cosine_median",
    "split_half_cosine",
    "reliability",
    "n_for_reliability_90",
    *CORRECTED,
)


def contrast_by(estimator: str, activations: Mapping[str, Activations], pairing: str, seed: int) -> Contrast:
    """`contrast`, its directions by `directions.estimator`."""
    of = contrast(activations, pairing, seed)
    if estimator == "mean":
        return of
    return replace(of, directions=estimate(of.harmful, of.safe, estimator, of.paired))


def without_noise_of_means(metrics: Mapping[str, Any], estimator: str) -> dict[str, Any]:
    """What is described of a contrast; null in place of what is known of a mean alone, where the estimator is another."""
    if estimator == "mean":
        return dict(metrics)
    return {name: [None] * len(value) if name in OF_MEANS else value for name, value in metrics.items()}
