"""How the direction depends on the number of prompts, the position it is taken at, and padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.analysis.separation import Arm
from refusal.lm.architecture import architecture_of
from refusal.lm.load import LM
from refusal.method.activations import left_pad
from refusal.method.directions import BLOCK, Directions, bootstrap_unit, cohens_d, cosine, difference_in_means, project


def sizes(n: int) -> list[int]:
    """16, 32, 64, ... below n, and n itself: all."""
    found, size = [], 16
    while size < n:
        found.append(size)
        size *= 2
    return [*found, n]


def by_size(a: Arm, reference: Directions, paired: bool, n_resamples: int, seed: int) -> list[dict[str, Any]]:
    """Cosine of directions from n resampled prompts a side with this arm's full-data direction, by n and layer.

    `n` prompts are drawn with replacement: at n = all this is the bootstrap. `to_reference` is the cosine of the
    full-data direction itself with the reference arm's, the same for every n. Percentile 95 % intervals.
    """
    rows = []
    n_all = min(len(a.harmful), len(a.safe))
    for layer in a.directions.layers:
        sets = (a.harmful[:, layer], a.safe[:, layer])
        # What is one block anyway is read once, not once a size.
        harmful, safe = (rows[:] if rows.shape[0] * rows.shape[1] <= BLOCK else rows for rows in sets)
        unit = a.directions.unit[layer]
        both = bool(reference.defined[layer])
        for n in sizes(n_all):
            drawn = (seed, paired) if n == n_all else (seed + n, paired, n)
            c = cosine(bootstrap_unit(harmful, safe, n_resamples, *drawn), unit)
            rows.append(
                {
                    "n": n,
                    "all": n == n_all,
                    "layer": layer,
                    "cosine": float(c.median()),
                    "low": float(c.quantile(0.025)),
                    "high": float(c.quantile(0.975)),
                    "to_reference": float(cosine(unit, reference.unit[layer])) if both else None,
                }
            )
    return rows


def common_suffix(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts end in: the template's, after the user's text."""
    n = 0
    while n < min(map(len, prompts)) and len({ids[-1 - n] for ids in prompts}) == 1:
        n += 1
    return n


@torch.inference_mode()
def resid_pre_at_end(
    lm: LM, ids: Sequence[Sequence[int]], n_positions: int, n_pads: int = 0, masked: bool = True
) -> Float[Tensor, "batch n_positions n_layers d_model"]:
    """`resid_pre` of every layer at the last `n_positions` tokens, after `n_pads` more padding tokens than are needed.

    `masked`: padding is hidden and positions begin after it; else both are attended to and counted, as the write-up did.
    """
    model = lm.model
    padded, mask = left_pad(ids, lm.pad_id)
    padded = torch.cat([torch.full((len(ids), n_pads), lm.pad_id), padded], dim=1)
    mask = torch.cat([torch.zeros(len(ids), n_pads, dtype=mask.dtype), mask], dim=1)
    kept: list[Tensor] = []

    def keep(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"])[:, -n_positions:].cpu())

    inputs = {"input_ids": padded}
    if masked and not bool(mask.all()):
        inputs |= {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in architecture_of(model.config).blocks(model)]
    try:
        model.base_model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept, dim=2)


def collect(
    lm: LM,
    ids: Sequence[Sequence[int]],
    n_positions: int,
    batch_size: int,
    n_pads: int | None = None,
    masked: bool = True,
    of: Callable[[Float[Tensor, "batch n_positions n_layers d_model"]], Tensor] = lambda found: found,
) -> Float[Tensor, "n ..."]:
    """`resid_pre_at_end` of many prompts, in their order, float32 or the model's own dtype; or what `of` makes of each batch.

    `n_pads` None: batches of like length with no more padding than they need, masked. A number: every prompt gets exactly
    that many, so batches hold prompts of one length.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches: list[list[int]] = []
    for i in order:
        fits = batches and len(batches[-1]) < batch_size and (n_pads is None or len(ids[batches[-1][0]]) == len(ids[i]))
        if fits:
            batches[-1].append(i)
        else:
            batches.append([i])
    rows: list[Tensor | None] = [None] * len(ids)
    for batch in batches:
        found = of(resid_pre_at_end(lm, [ids[i] for i in batch], n_positions, n_pads or 0, masked))
        for i, row in zip(batch, found, strict=True):
            rows[i] = row
    return torch.stack([row for row in rows if row is not None])


def positions(
    harmful: Float[Tensor, "n n_positions n_layers d_model"],
    safe: Float[Tensor, "n n_positions n_layers d_model"],
    val_harmful: Float[Tensor, "m n_positions n_layers d_model"],
    val_safe: Float[Tensor, "m n_positions n_layers d_model"],
) -> list[dict[str, Any]]:
    """By position (-1 is the last token) and layer: Cohen's d on val, and the cosine with the last token's direction."""
    last = difference_in_means(harmful[:, -1], safe[:, -1])
    rows = []
    for p in range(-1, -harmful.shape[1] - 1, -1):
        found = difference_in_means(harmful[:, p], safe[:, p])
        d = cohens_d(project(val_harmful[:, p], found.unit), project(val_safe[:, p], found.unit))
        to_last = cosine(found.unit, last.unit)
        rows += [
            {
                "position": p,
                "layer": layer,
                "separation": float(d[layer]) if bool(d[layer].isfinite()) else None,
                "cosine_to_last": float(to_last[layer]) if bool(last.defined[layer]) else None,
                "n": len(harmful),
            }
            for layer in found.layers
        ]
    return rows


def padding(
    clean: tuple[Float[Tensor, "n n_layers d_model"], Float[Tensor, "n n_layers d_model"]],
    padded: dict[tuple[bool, int | str], tuple[Float[Tensor, "n n_layers d_model"], Float[Tensor, "n n_layers d_model"]]],
) -> list[dict[str, Any]]:
    """What padding does, by mask, number of pads and layer, against the same prompts without: (harmful, safe) each.

    cosine: of the direction with the clean one. separation and separation_clean: Cohen's d of these very prompts on their
    own direction (in-sample, as the write-up's). moved: median distance a prompt moves, in lengths of the clean difference. A
    number of pads may be a word, for sets that mix numbers.
    """
    truth = difference_in_means(*clean)
    rows = []
    for (masked, n_pads), (harmful, safe) in padded.items():
        found = difference_in_means(harmful, safe)
        to_clean = cosine(found.unit, truth.unit)
        d, d_clean = (cohens_d(project(h, v.unit), project(s, v.unit)) for h, s, v in ((harmful, safe, found), (*clean, truth)))
        distance = (
            torch.cat([harmful.double() - clean[0].double(), safe.double() - clean[1].double()]).norm(dim=-1).median(0).values
        )
        rows += [
            {
                "masked": masked,
                "n_pads": n_pads,
                "layer": layer,
                "cosine": float(to_clean[layer]) if bool(found.defined[layer]) else None,
                "separation": float(d[layer]) if bool(found.defined[layer]) else None,
                "separation_clean": float(d_clean[layer]),
                "moved": float(distance[layer] / truth.difference[layer].norm()),
                "n": len(harmful),
            }
            for layer in truth.layers
        ]
    return rows
