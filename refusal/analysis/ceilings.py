"""Beside each cosine of metrics/directions.json what noise leaves of it, by layer, and the geometry of categories of prompts."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from refusal.analysis.reliability import (
    N_SPLITS,
    ceiling,
    corrected_cosine,
    group_geometry,
    n_for_reliability,
    split_half_cosine,
    step_up,
    subset_cosine,
)
from refusal.analysis.separation import Contrast

LEAST = 5  # prompts of the smallest category, for directions of categories
CORRECTED = tuple(f"cosine_to_sequential_corrected{of}" for of in ("", "_low", "_high"))
ByLayer = list[float | None]


def describe_noise(of: Contrast, reference: Contrast, seed: int) -> dict[str, ByLayer]:
    """By layer how far halves of the prompts agree, the reliability of all, and the cosine to the reference without noise.

    Null where a direction is undefined; the reliability also where halves do not agree at all (a cosine of 0 or less).
    """
    names = ("split_half_cosine", "reliability", "n_for_reliability_90", *CORRECTED)
    columns: dict[str, ByLayer] = {name: [None] * len(of.directions.unit) for name in names}
    for i in of.directions.layers:
        rows = of.rows(i)
        half = split_half_cosine(rows, N_SPLITS, seed)
        values = [half, step_up(half, 2) if half > 0 else math.nan, n_for_reliability(rows)]
        if i in reference.directions.layers:
            values += corrected_cosine(rows, reference.rows(i))
        for name, value in zip(names, values, strict=False):  # no cosine to a reference that has no direction
            columns[name][i] = value if math.isfinite(value) else None
    return columns


def ceilings(one: ByLayer, other: ByLayer) -> ByLayer:
    """By layer the noise ceiling of a cosine of two sets of directions, from their reliabilities."""
    return [ceiling(r, s) for r, s in zip(one, other, strict=True)]


def ceiling_to_all(of: Contrast, everything: Contrast) -> ByLayer | None:
    """By layer the cosine with the direction of all train prompts that as many, drawn at random, would have. None of all."""
    if (len(of.harmful), len(of.safe)) == (len(everything.harmful), len(everything.safe)):
        return None
    sizes = {"harmful": len(everything.harmful), "unrelated": len(everything.safe)}
    rows = [of.rows(i) if i in of.directions.layers else None for i in range(len(of.directions.unit))]
    return [subset_cosine(x, sizes) if x and min(map(len, x.values())) > 1 else None for x in rows]


def categories(of: Contrast, names: Sequence[str | None], n_resamples: int, seed: int) -> dict[str, Any] | None:
    """By layer `group_geometry` of categories of harmful prompts (with their pairs), and `n`, the prompts of each category.

    names: of the harmful train prompts. None where the pairing takes some of these, any has none, or there are fewer than two, or
    one has fewer than LEAST prompts.
    """
    n = Counter(names)
    if len(names) != len(of.harmful) or None in n or len(n) < 2 or min(n.values()) < LEAST:
        return None
    layers = of.directions.layers
    figures = {i: group_geometry(of.rows(i), names, n_resamples, seed) for i in layers}
    columns = {
        key: [figures[i][key] if i in figures else None for i in range(len(of.directions.unit))]
        for key in (figures[layers[0]] if layers else ())
    }
    return {"n": dict(n), **columns}
