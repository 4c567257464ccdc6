"""The anatomy of an edit as figures: what `edits.compare` found, and its direction beside a study's own, noise and chance."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from jaxtyping import Float
from scipy.special import betaincinv
from torch import Tensor

from refusal.analysis.edits import Difference

AT_LENGTH = ("basis", "by_layer", "only_in", "tensors")  # of `figures`, what `in_short` leaves out


def figures(found: Difference, cosines: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """All that was found, as JSON. Each tensor that differs has an entry; basis, rank and alpha are null without an edit."""
    edited = found.of("edited")
    alphas = [one.alpha for one in edited if one.alpha is not None]
    return {
        "kind": found.kind,
        "how": found.how,
        "rank": found.rank,
        "shared": found.basis is not None if edited else None,
        "alpha": {"mean": mean(alphas), "min": min(alphas), "max": max(alphas)} if alphas else None,
        "estimate": None if found.estimate is None else vars(found.estimate),
        "norms_set_back": sorted({one.norms for one in edited if one.norms}) if edited else None,
        "embedding": {"kind": found.embedding, "untied": found.untied},
        "layers": layers(found),
        "cosines": {name: list(values) for name, values in cosines.items()},
        "cosine_by_chance": found.by_chance,
        "basis": None if found.basis is None else found.basis.tolist(),
        "by_layer": None
        if found.by_layer is None
        else {"embedding" if layer is None else str(layer): basis.tolist() for layer, basis in found.by_layer.items()},
        "only_in": found.alone,
        "n_same": len(found.of("same")),
        "tensors": {one.name: {k: v for k, v in vars(one).items() if k != "name"} for one in found.tensors if one.kind != "same"},
    }


def layers(found: Difference) -> list[dict[str, Any]]:
    """Of each layer with a changed writer: the mean alpha of its attention and MLP (null where unedited), and the greatest
    |W - W'| / |W| of both."""
    rows = []
    for layer in sorted({one.layer for one in found.tensors if one.layer is not None}):
        writers = [one for one in found.tensors if one.layer == layer and one.writer]
        row: dict[str, Any] = {"layer": layer}
        for name, at in (("attention", True), ("mlp", False)):
            alphas = [one.alpha for one in writers if (".self_attn." in one.name) == at and one.alpha is not None]
            row[name] = mean(alphas) if alphas else None
        rows.append(row | {"relative": max((one.relative for one in writers), default=0.0)})
    return [row for row in rows if row["relative"] > 0]


def in_short(found: Mapping[str, Any]) -> dict[str, Any]:
    """`figures` without bases and tensors: of these, how many there are of each kind."""
    kinds = [one["kind"] for one in found["tensors"].values()]
    counts = {"same": found["n_same"]} | {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    left = {key: value for key, value in found.items() if key not in (*AT_LENGTH, "n_same", "cosines", "cosine_by_chance")}
    return left | {"n_tensors": counts}


def beside_directions(
    found: Difference, unit: Float[Tensor, "n_layers d_model"], reliability: Sequence[float | None]
) -> dict[str, Any]:
    """|cosine| of the edit with each layer's direction (of rank k the length of its projection on the edit's span), the noise
    ceiling of that, and what a random direction has: in the root mean square, and in 95 % of draws at most.

    reliability: of each layer's direction. None without an edit, and where a layer has no direction. The ceiling holds for an
    edit that was made of other prompts: one made of this very estimate shares its noise, and may have 1.
    """
    cosines = found.cosines(unit)
    rank, d_model = found.rank, unit.shape[1]
    ranks = [found.rank if found.by_layer is None else len(found.by_layer.get(i, ())) for i in range(len(unit))]
    return {
        "cosine": cosines,
        "ceiling": [
            None if c is None or r is None or not k else span_ceiling(r, k, d_model)
            for c, r, k in zip(cosines, reliability, ranks, strict=True)
        ],
        "by_chance": found.by_chance,
        "by_chance_95": None if rank is None else chance_quantile(rank, d_model, 0.95),
    }


def span_ceiling(reliability: float, rank: int, d_model: int) -> float:
    """What noise leaves of the length of an estimated direction's projection on a span of this rank that holds the true one.

    A share r of the estimate's squared length is the direction, and the rest noise, of which the span's other dimensions hold
    (k - 1) / (d_model - 1): sqrt(r + (1 - r) (k - 1) / (d_model - 1)), which for rank 1 is sqrt(r) (`reliability.ceiling`).
    """
    return math.sqrt(reliability + (1 - reliability) * (rank - 1) / max(1, d_model - 1))


def chance_quantile(rank: int, d_model: int, share: float) -> float:
    """The length that the projection of a random unit vector on a span of this rank has in so large a share of draws at most.

    Its square is Beta(k / 2, (d_model - k) / 2): the share that k of d_model squared normal variables have of their sum.
    """
    return 1.0 if rank >= d_model else math.sqrt(float(betaincinv(rank / 2, (d_model - rank) / 2, share)))
