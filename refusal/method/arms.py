"""Arms of a behavioural comparison: what is done to the model, by name, and its completions through the resume store.

Arms that ablate one direction or subspace everywhere are cells of the sweep, and share its batches. An arm may also ablate a
direction of its own at each layer; its batches are then its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refusal.io.store import Store
from refusal.method.interventions import Ablation, intervene
from refusal.method.sweep import BASELINE, Cell, ablation_of, complete

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Arm:
    """One arm: a cell, or else the ablations that `build` makes, and the hash of all that determines these.

    family: which question it belongs to. layer: where its direction or basis was estimated. basis: what is ablated,
    [k, d_model], None where there is no such one thing.
    """

    name: str
    family: str
    layer: int | None = None
    alpha: float = 1.0
    basis: Float[Tensor, "k d_model"] | None = None
    cell: Cell | None = None
    build: Callable[[], list[Ablation]] | None = field(default=None, compare=False)
    digest: str = ""

    @property
    def rank(self) -> int:
        """How many dimensions it takes out; 0 for the baseline."""
        return 0 if self.basis is None else len(self.basis)


BASELINE_ARM = Arm("baseline", "baseline", alpha=0.0, cell=BASELINE)


def direction_arm(
    name: str,
    family: str,
    direction: Float[Tensor, " d_model"],
    alpha: float = 1.0,
    layer: int | None = None,
    offset: Float[Tensor, " n_layers"] | None = None,
    fixed: bool = False,
) -> Arm:
    """The ablation of one unit direction, at the sites that the whole comparison ablates at; `offset`, `fixed` as in Cell."""
    cell = Cell(name, layer, alpha, direction, offset, fixed)
    return Arm(name, family, layer, alpha, direction[None], cell)


def subspace_arm(
    name: str,
    family: str,
    basis: Float[Tensor, "k d_model"],
    alpha: float = 1.0,
    layer: int | None = None,
    fixed: bool = False,
) -> Arm:
    """The ablation of the span of orthonormal rows, at the sites that the whole comparison ablates at; `fixed` as in Cell."""
    cell = Cell(name, layer, alpha, basis if len(basis) > 1 else basis[0], fixed=fixed)
    return Arm(name, family, layer, alpha, basis, cell)


def per_layer_arm(
    name: str, family: str, unit: Float[Tensor, "n_layers d_model"], layers: Sequence[int], sites: str, alpha: float = 1.0
) -> Arm:
    """Each of `layers` ablates its own direction; the others, and the embedding's output, are left alone."""

    def build() -> list[Ablation]:
        return [Ablation(unit[layer].reshape(1, 1, -1), torch.tensor([alpha]), sites, layers=[layer]) for layer in layers]

    return Arm(name, family, None, alpha, None, build=build, digest=_digest("per layer", sites, alpha, list(layers), unit))


def complete_arms(
    model: PreTrainedModel,
    weights: str,
    prompts: Sequence[Sequence[int]],
    arms: Sequence[Arm],
    sites: str,
    stop: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    store: Store,
    label: str,
) -> dict[str, list[list[int]]]:
    """Greedy completions {arm name: [token ids of each prompt]}, as `sweep.complete` gives them for cells."""
    cells = [arm.cell for arm in arms if arm.cell]
    edits = {arm.name: (edit(arm, sites), fingerprint(arm, sites)) for arm in arms if arm.cell is None}
    rest = (sites, stop, pad_id, max_new_tokens, batch_size, store, label)
    found = complete(model, weights, prompts, cells, *rest, edits=edits)
    return {arm.name: found[arm.name] for arm in arms}


def edit(arm: Arm, sites: str) -> Callable[[nn.Module], AbstractContextManager]:
    """The arm's interventions on a model, for forwards of one's own (`damage.Edited`); none for the baseline."""

    def on(model: nn.Module) -> AbstractContextManager:
        if arm.build is not None:
            return intervene(model, *arm.build())
        assert arm.cell is not None
        return intervene(model, *([] if arm.cell.direction is None else [ablation_of([arm.cell], sites)]))

    return on


def fingerprint(arm: Arm, sites: str) -> list:
    """All that determines what the arm does, for a store's key."""
    return [sites, arm.digest] if arm.cell is None else [sites, *arm.cell.fingerprint()]


def _digest(*parts: object) -> str:
    plain = [p.detach().double().cpu().numpy().tobytes().hex() if isinstance(p, Tensor) else p for p in parts]
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()
