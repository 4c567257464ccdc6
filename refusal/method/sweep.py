"""Completions of many prompts under many interventions, through the resume store.

A *cell* is one intervention: a direction (or none, or the span of several) with an alpha. Rows of all cells are put in order of
prompt length and cut into units of at most ROUNDS batches. A unit decodes a batch at a time, new rows entering as others
end, and is stored whole: its composition is fixed, so rows come out the same whatever else is stored, and a run that was
interrupted meets the same units again and ends in the same bytes. What a kill costs is the unit at hand, at most ROUNDS
batches. What a unit gains: its slots run empty once and not once a batch (where completions end anywhere up to the limit, a
batch alone decodes half empty, ROUNDS = 4 of them a quarter), and the prompts' common beginning is computed once a cell and
unit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io import store as stores
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.lm.replicas import crew, shares
from refusal.method.directions import random_unit
from refusal.method.generate import Where, generate
from refusal.method.interventions import Ablation, Addition
from refusal.method.select import cell_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROUNDS = 4  # batches in a unit of work
FEW = 128  # rows: fewer take as long as half of them


@dataclass(frozen=True)
class Cell:
    """One intervention: its name, what is ablated (a unit direction, an orthonormal basis, or None) with its alpha, and a
    direction's affine offset by layer. `fixed`: it is the same whatever directions were found."""

    name: str
    layer: int | None = None
    alpha: float = 0.0
    direction: Float[Tensor, " d_model"] | Float[Tensor, "k d_model"] | None = None
    offset: Float[Tensor, " n_layers"] | None = None
    fixed: bool = False

    def fingerprint(self) -> list:
        """All that determines what the cell does, for a store's key."""
        return [self.alpha, *(None if t is None else _digest(t) for t in (self.direction, self.offset))]


BASELINE = Cell("baseline", fixed=True)


def grid(
    found: dict[str, Tensor],
    harmless: dict[str, Tensor],
    layers: Sequence[int] | None,
    alphas: Sequence[float],
    n_random: int,
    seed: int,
    affine: bool,
) -> list[Cell]:
    """The cells of a sweep: the baseline; as controls at alpha 1, `n_random` random directions and each layer's difference
    of two harmless sets; and every defined layer with every alpha.

    `found` holds `unit`, `defined` and `safe_mean` of one method and pairing, `harmless` those of its pairing `harmless`. Raises
    UserError for a layer that does not exist or whose direction is undefined, and where all are.
    """
    unit, defined, safe_mean = found["unit"], found["defined"], found["safe_mean"]
    usable = [int(layer) for layer in defined.nonzero().flatten()]
    if not usable:
        raise UserError(
            "no layer has a direction, so nothing can be swept: to the model, harmful and safe prompts are the same (it has one "
            "layer, or its tokenizer does not tell them apart); set another model.id or prompts.source in params.yaml"
        )
    layers = usable if layers is None else layers
    for layer in layers:
        if layer not in usable:
            raise UserError(f"params.yaml: sweep.layers: layer {layer} has no direction; choose among {usable}")

    def cell(name: str, layer: int | None, alpha: float, direction: Tensor, fixed: bool = False) -> Cell:
        return Cell(name, layer, alpha, direction, safe_mean.double() @ direction.double() if affine else None, fixed)

    drawn = random_unit(unit.shape[1], n_random, seed)
    randoms = [cell(f"random_{i}", None, 1.0, v, fixed=not affine) for i, v in enumerate(drawn)]
    differences = [cell(f"harmless_{i}", None, 1.0, harmless["unit"][i]) for i in layers if harmless["defined"][i]]
    chosen = [cell(cell_name(layer, alpha), layer, alpha, unit[layer]) for layer in layers for alpha in alphas]
    return [BASELINE, *randoms, *differences, *chosen]


def ablation_of(cells: Sequence[Cell], sites: str) -> Ablation:
    """One ablation whose row i is `cells[i]`; a cell without a direction gets alpha 0 and is left as it is."""
    bases = [None if cell.direction is None else torch.atleast_2d(cell.direction) for cell in cells]
    k, d_model = (max(b.shape[axis] for b in bases if b is not None) for axis in (0, 1))
    depth = next((len(cell.offset) for cell in cells if cell.offset is not None), 0)
    basis, offset = (torch.zeros(len(cells), *shape, dtype=torch.float64) for shape in ((k, d_model), (depth, 1)))
    for i, (cell, given) in enumerate(zip(cells, bases, strict=True)):
        if given is not None:
            basis[i, : len(given)] = given
        if cell.offset is not None:
            offset[i, :, 0] = cell.offset
    alpha = torch.tensor([cell.alpha for cell in cells], dtype=torch.float64)
    return Ablation(basis, alpha, sites, offset if depth else None)


def complete(
    model: PreTrainedModel,
    weights: str,
    prompts: Sequence[Sequence[int]],
    cells: Sequence[Cell],
    sites: str,
    stop: Collection[int],
    pad_id: int,
    max_new_tokens: int,
    batch_size: int,
    store: Store,
    label: str,
    addition: tuple[Float[Tensor, " d_model"], int] | None = None,
    where: Where = "prefill",
    edits: Mapping[str, tuple[Callable[[Any], AbstractContextManager], Sequence[object]]] = MappingProxyType({}),
) -> dict[str, list[list[int]]]:
    """Greedy completions {cell name: [token ids of each prompt]}, in the order of `prompts`.

    `weights` is the checkpoint's hash; `batch_size` the rows decoded at once; `addition` a raw difference and its layer, added
    to every row, `where` as in `generate`. `edits` names what is no cell: an edit of the model and all that determines it.

    An edit's batches are its own. So are those of cells that ablate several dimensions, and of `fixed` cells, which another
    study of the model finds in the store.
    """
    shared = {
        "dtype": str(model.dtype),
        "device": model.device.type,
        "sites": sites,
        "stop": sorted(stop),
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "addition": None if addition is None else [_digest(addition[0]), addition[1], where],
    }
    jobs: list[tuple[str, _Unit]] = []

    def cut(weights: str, cells: Sequence[Cell], edit: str | None = None) -> None:
        rows = sorted((len(prompts[p]), p, c) for p in range(len(prompts)) for c in range(len(cells)))
        marks = [cell.fingerprint() for cell in cells]
        for share in shares(len(rows), ROUNDS * batch_size, FEW):
            unit = [(p, c) for _, p, c in rows[share]]
            what = [[list(prompts[p]), marks[c]] for p, c in unit]
            jobs.append((stores.key("completions", (complete,), weights=weights, **shared, rows=what), _Unit(cells, unit, edit)))

    alike: dict[tuple[bool, bool], list[Cell]] = {}
    for cell in cells:
        alike.setdefault((cell.fixed, cell.direction is not None and cell.direction.ndim > 1), []).append(cell)
    for group in alike.values():
        cut(weights, group)
    for name, (_, what) in edits.items():
        cut(f"{weights}+{what}", [BASELINE], name)

    def compute(model: PreTrainedModel, unit: _Unit) -> bytes:
        used = sorted({c for _, c in unit.rows})
        chosen = [unit.cells[c] for c in used]
        edit = ablation_of(chosen, sites) if any(cell.direction is not None for cell in chosen) else None
        add = None if addition is None else Addition(*addition)
        ids, row = [prompts[p] for p, _ in unit.rows], [used.index(c) for _, c in unit.rows]
        with edits[unit.edit][0](model) if unit.edit else nullcontext():
            return json.dumps(generate(model, ids, stop, max_new_tokens, pad_id, edit, add, row, batch_size, where)).encode()

    found: dict[str, list[list[int]]] = {name: [[] for _ in prompts] for name in (*(cell.name for cell in cells), *edits)}
    with crew(model, compute, len(jobs)) as (run, pool):
        for (_, unit), value in zip(jobs, store.run(jobs, run, label, "unit", pool), strict=True):
            for (p, c), tokens in zip(unit.rows, json.loads(value), strict=True):
                found[unit.edit or unit.cells[c].name][p] = tokens
    return found


class _Unit(NamedTuple):
    """What is decoded and stored together: rows (prompt, cell), under one of `edits` where it is named."""

    cells: Sequence[Cell]
    rows: list[tuple[int, int]]
    edit: str | None


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().double().cpu().numpy().tobytes()).hexdigest()
