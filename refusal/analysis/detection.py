"""Whether a checkpoint was edited, without knowing its history: signals of it, and how well each tells edited from other ones.

Two are of Hurtado 2026 (arXiv 2607.01854), which combines a refusal gap in activations with the energy of the weight
difference (AUROC .95 over 273 checkpoints: figure as in the abstract; how they are computed is said here, not there). Ours is
what `refusal.analysis.edits.compare` says of the weights. All of them need the base.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from refusal.analysis.edits import compare
from refusal.analysis.low_rank import energy
from refusal.analysis.population import Base, Recipe, Tensors, made
from refusal.io.errors import UserError
from refusal.lm.load import LM
from refusal.lm.weights import Weights
from refusal.method.activations import last_logits, last_token_resid_pre
from refusal.organism.grammar import REFUSALS
from refusal.stats import cluster_indices, expanded_quantiles, identical_values, resampled_counts

EDITS = ("edit", "edit and more", "edit under quantization")  # of what `compare` says
# Each is greater for what was edited. `both`: the mean of the ranks of gap_lost and energy in the population.
SIGNALS = ("gap_lost", "energy", "both", "concentration", "compare")


@dataclass(frozen=True)
class Prompts:
    """Token ids of harmful and safe prompts, on which no direction was fitted."""

    harmful: list[list[int]]
    safe: list[list[int]]


def signals(base: Base, prompts: Prompts, before: Float[Tensor, " n_layers"], recipe: Recipe) -> dict[str, Any]:
    """The signals of one checkpoint, what `compare` says, and the share of harmful prompts that it begins to refuse; `before` is
    the base's `gap`."""
    tensors = made(base, recipe.steps)
    model = deepcopy(base.lm.model)
    model.load_state_dict({name: w.float() for name, w in tensors.items()})
    lm = replace(base.lm, model=model)
    kept = gap(lm, prompts, base.directions.unit)
    defined = base.directions.layers
    found = compare(
        *(
            Weights(Path(name), base.architecture, tuple(ws), ws.__getitem__)
            for name, ws in (
                ("base", base.tensors),
                ("edited", tensors),
            )
        )
    )
    return {
        "gap_lost": 1 - float((kept[defined] / before[defined]).mean()),
        "energy": relative_energy(base.tensors, tensors),
        "concentration": concentration(base, tensors),
        "compare": float(found.kind in EDITS),
        "says": found.kind,
        "refuses": refuses(lm, prompts.harmful),
    }


def gap(lm: LM, prompts: Prompts, unit: Float[Tensor, "n_layers d_model"]) -> Float[Tensor, " n_layers"]:
    """The refusal gap of each layer: mean <r_l, v_l> at the last token of harmful prompts less that of safe ones, in float64."""
    harmful, safe = (last_token_resid_pre(lm, ids, "batched").double() for ids in (prompts.harmful, prompts.safe))
    return torch.einsum("ld,ld->l", harmful.mean(0) - safe.mean(0), unit.double())


def relative_energy(base: Tensors, edited: Tensors) -> float:
    """|W - W'|^2 over |W|^2, each summed over all tensors."""
    left = sum(energy(w.double() - edited[name].double()) for name, w in base.items())
    return left / sum(energy(w.double()) for w in base.values())


def concentration(base: Base, edited: Tensors) -> float:
    """The share of the energy of W - W', over all that writes into the stream, along the one direction of the stream that has
    most of it; 0 where nothing differs. Independent changes of each value have about 1 / d_model and a little more."""
    d_model = base.lm.d_model
    gram = torch.zeros(d_model, d_model, dtype=torch.float64)
    for name, w in base.tensors.items():
        axis = base.architecture.writer_axis(name, include_embedding=True)
        if axis is not None:
            d = (w.double() - edited[name].double()).movedim(axis, 0).reshape(d_model, -1)
            gram += d @ d.mT
    total = float(gram.trace())
    return float(torch.linalg.eigvalsh(gram)[-1]) / total if total else 0.0


@torch.inference_mode()
def refuses(lm: LM, ids: Sequence[Sequence[int]]) -> float:
    """The share of prompts after which the likeliest token is the first of one of the organism's refusals."""
    first = torch.tensor([lm.tokenizer.encode(text, add_special_tokens=False)[0] for text in REFUSALS])
    likeliest = last_logits(lm, ids, [], 1)(0, len(ids))[:, -1].argmax(-1)
    return float(torch.isin(likeliest, first).double().mean())


def auroc(
    edited: Sequence[float],
    others: Sequence[float],
    clusters: tuple[Sequence[Hashable], Sequence[Hashable]],
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """How often an edited checkpoint's signal is above another's, ties counted half, with a 95 % interval and the numbers.

    Whole clusters (of edited, and of others) are drawn again within each class: an expanded percentile bootstrap. Where no
    resample differs, as at 1, the limits are `stats.identical_values` of the fewer clusters. Raises UserError where a class is
    empty.
    """
    if not len(edited) or not len(others):
        raise UserError("detection: there are no checkpoints of one of the two classes: name recipes of both")
    ours, theirs = (np.asarray(values, dtype=np.float64) for values in (edited, others))
    above = (ours[:, None] > theirs) + (ours[:, None] == theirs) / 2
    rng = np.random.default_rng(seed)
    weights = [_drawn(of, n_resamples, rng) for of in clusters]
    areas = np.einsum("rn,nm,rm->r", weights[0], above, weights[1]) / (weights[0].sum(1) * weights[1].sum(1))
    value, fewest = float(above.mean()), min(len(set(of)) for of in clusters)
    if np.allclose(areas, value, atol=1e-12):
        low, high = identical_values(value, fewest, (0.0, 1.0))
    else:
        low, high = np.quantile(areas, expanded_quantiles(fewest))
    return {"auroc": value, "low": float(low), "high": float(high), "n_edited": len(ours), "n_others": len(theirs)}


def _drawn(clusters: Sequence[Hashable], n_resamples: int, rng: np.random.Generator) -> Float[ndarray, "resample item"]:
    """How often each item is drawn in each resample of whole clusters."""
    of = cluster_indices(clusters)
    return np.concatenate([counts[:, of] for counts in resampled_counts(of, n_resamples, rng)]).astype(np.float64)


def table(population: Sequence[Recipe], found: Sequence[Mapping[str, Any]], n_resamples: int, seed: int) -> dict[str, Any]:
    """AUROC of each signal: of all edited checkpoints against all others, of each kind of edited ones against all others, and of
    all edited ones against each kind of others; and of each kind the numbers, mean signals and what `compare` says."""
    from scipy.stats import rankdata

    ranks = sum(rankdata([row[name] for row in found]) for name in ("gap_lost", "energy")) / (2 * len(found))
    rows = [{**row, "both": float(rank), "recipe": recipe} for recipe, row, rank in zip(population, found, ranks, strict=True)]
    kinds = list(dict.fromkeys(recipe.kind for recipe in population))

    def of(signal: str, edited: str | None, other: str | None) -> dict[str, Any]:
        sides = [
            [row for row in rows if row["recipe"].edited == which and kind in (None, row["recipe"].kind)]
            for which, kind in ((True, edited), (False, other))
        ]
        ours, theirs = ([row[signal] for row in side] for side in sides)
        first, second = ([row["recipe"].cluster for row in side] for side in sides)
        return auroc(ours, theirs, (first, second), n_resamples, seed)

    is_edited = {recipe.kind: recipe.edited for recipe in population}
    return {
        "n_edited": sum(recipe.edited for recipe in population),
        "n_others": sum(not recipe.edited for recipe in population),
        "signals": {
            signal: {
                "all": of(signal, None, None),
                "by_kind": {kind: of(signal, *((kind, None) if is_edited[kind] else (None, kind))) for kind in kinds},
            }
            for signal in SIGNALS
        },
        "kinds": {kind: _of_kind([row for row in rows if row["recipe"].kind == kind]) for kind in kinds},
    }


def _of_kind(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of one kind: how many, mean signals, and how often `compare` says what."""
    says = [row["says"] for row in rows]
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("refuses", "gap_lost", "energy", "concentration")}
    return {
        "n": len(rows),
        "edited": rows[0]["recipe"].edited,
        **means,
        "says": {name: says.count(name) for name in sorted(set(says))},
    }
