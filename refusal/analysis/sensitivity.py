"""How the direction depends on the number of prompts, the position it is taken at, and padding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from refusal.analysis.separation import Contrast, bootstrap_unit
from refusal.analysis.study import Study
from refusal.io.store import key
from refusal.lm.load import LM
from refusal.lm.stream import stream_of
from refusal.method.activations import left_pad
from refusal.method.directions import Directions, as_json, cohens_d, cosine, difference_in_means, project

HarmfulAndSafe = tuple[Float[Tensor, "n n_layers d_model"], Float[Tensor, "n n_layers d_model"]]


def sizes(n: int) -> list[int]:
    """16, 32, 64, ... below n, and n itself: all."""
    return [*(2**i for i in range(4, n.bit_length()) if 2**i < n), n]


def by_size(contrast: Contrast, reference: Directions, n_resamples: int, seed: int) -> list[dict[str, Any]]:
    """Cosine of directions from n resampled prompts a side with this contrast's full-data direction, by n and layer.

    `n` prompts are drawn with replacement: at n = all this is the bootstrap. `to_reference` is the cosine of the
    full-data direction itself with the reference's, the same for every n. Percentile 95 % intervals.
    """
    rows = []
    unit, paired = contrast.directions.unit, contrast.paired
    n_all = min(len(contrast.harmful), len(contrast.safe))
    for layer in contrast.directions.layers:
        harmful, safe = contrast.harmful[:, layer], contrast.safe[:, layer]
        for n in sizes(n_all):
            drawn = (seed, paired) if n == n_all else (seed + n, paired, n)
            c = cosine(bootstrap_unit(harmful, safe, n_resamples, *drawn), unit[layer])
            rows.append(
                {
                    "n": n,
                    "all": n == n_all,
                    "layer": layer,
                    "cosine": float(c.median()),
                    "low": float(c.quantile(0.025)),
                    "high": float(c.quantile(0.975)),
                    "to_reference": as_json(cosine(unit[layer], reference.unit[layer])),
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
    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in stream_of(model).blocks(model)]
    try:
        model.base_model(**{name: value.to(model.device) for name, value in inputs.items()}, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(kept, dim=2)


def collect(
    study: Study,
    ids: Sequence[Sequence[int]],
    label: str,
    n_positions: int = 1,
    pads: tuple[int, bool] | None = None,
    of: Callable[[Float[Tensor, "batch n_positions n_layers d_model"]], Tensor] = lambda resid_pre: resid_pre,
) -> Float[Tensor, "n ..."]:
    """`resid_pre_at_end` of many prompts, in their order, float32 or the model's own dtype, from the store where it is known; or
    what `of` makes of each batch.

    `pads` None: batches of like length with no more padding than they need, masked. Otherwise (how many, masked): every prompt
    gets exactly that many, so batches hold prompts of one length.
    """
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    batches: list[list[list[int]]] = []
    for i in order:
        room = batches and len(batches[-1]) < study.params.activations.batch_size
        if room and (pads is None or len(batches[-1][0]) == len(ids[i])):
            batches[-1].append(list(ids[i]))
        else:
            batches.append([list(ids[i])])
    n_pads, masked = pads or (0, True)
    shared = {**study.lm.identity, "pad": study.lm.pad_id, "n_positions": n_positions, "n_pads": n_pads, "masked": masked}

    def compute(batch: list[list[int]]) -> bytes:
        return save({"resid_pre": resid_pre_at_end(study.lm, batch, n_positions, n_pads, masked)})

    jobs = [(key("resid_pre at the end", (resid_pre_at_end,), **shared, ids=batch), batch) for batch in batches]
    rows = torch.cat([of(load(value)["resid_pre"]) for value in study.store.run(jobs, compute, label)])
    return rows[torch.tensor(order).argsort()]


def positions(
    harmful: Float[Tensor, "n n_positions n_layers d_model"],
    safe: Float[Tensor, "n n_positions n_layers d_model"],
    val_harmful: Float[Tensor, "m n_positions n_layers d_model"],
    val_safe: Float[Tensor, "m n_positions n_layers d_model"],
) -> list[dict[str, Any]]:
    """By position (-1 is the last token) and layer: Cohen's d on val, and the cosine with the last token's direction."""
    last = difference_in_means(harmful[:, -1], safe[:, -1])
    rows = []
    for position in range(-1, -harmful.shape[1] - 1, -1):
        at_position = difference_in_means(harmful[:, position], safe[:, position])
        d = cohens_d(*(project(val[:, position], at_position.unit) for val in (val_harmful, val_safe)))
        to_last = cosine(at_position.unit, last.unit)
        rows += [
            {
                "position": position,
                "layer": layer,
                "separation": as_json(d[layer]),
                "cosine_to_last": as_json(to_last[layer]),
                "n": len(harmful),
            }
            for layer in at_position.layers
        ]
    return rows


def padding(clean: HarmfulAndSafe, padded: Mapping[tuple[bool, int | str], HarmfulAndSafe]) -> list[dict[str, Any]]:
    """What padding does, by (masked, number of pads) and layer, against the same prompts without.

    cosine: of the direction with the clean one. separation and separation_clean: Cohen's d of these very prompts on their
    own direction (in-sample, as the write-up's). moved: median distance a prompt moves, in lengths of the clean difference. A
    number of pads may be a word, for sets that mix numbers.
    """

    def separation(sets: HarmfulAndSafe, directions: Directions) -> Float[Tensor, " n_layers"]:
        return cohens_d(*(project(activations, directions.unit) for activations in sets))

    without = difference_in_means(*clean)
    d_clean = separation(clean, without)
    rows = []
    for (masked, n_pads), sets in padded.items():
        directions = difference_in_means(*sets)
        to_clean, d = cosine(directions.unit, without.unit), separation(sets, directions)
        moves = torch.cat([ours.double() - theirs.double() for ours, theirs in zip(sets, clean, strict=True)])
        distance = moves.norm(dim=-1).median(0).values / without.difference.norm(dim=-1)
        rows += [
            {
                "masked": masked,
                "n_pads": n_pads,
                "layer": layer,
                "cosine": as_json(to_clean[layer]),
                "separation": as_json(d[layer]),
                "separation_clean": as_json(d_clean[layer]),
                "moved": float(distance[layer]),
                "n": len(sets[0]),
            }
            for layer in without.layers
        ]
    return rows
