"""What was done to an edited checkpoint, read from its weights and those of its base: which tensors differ, and by which edit.

Weight orthogonalization (Arditi et al. 2024, arXiv 2406.11717, section 4.1) makes W' = W - alpha V V^T W of every matrix that
writes into the residual stream, V [d_model, k] orthonormal. So D = W - W' = alpha V V^T W has V for its left singular vectors,
the same in every writer, and alpha is the regression of V^T D on V^T W. Only what is of this form up to rounding is called an
edit; whatever else happened (a fine-tune, a requantization) is said as that, and has neither direction nor alpha.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.analysis.low_rank import Spectrum, common, energy, explained, spectrum
from refusal.analysis.rounding import Grid, grid_of, wide
from refusal.analysis.subspaces import captured
from refusal.analysis.under_rounding import Estimate, Fit, shared_basis
from refusal.io.errors import UserError
from refusal.io.progress import progress
from refusal.lm.architecture import same_model
from refusal.lm.weights import Weights

Kind = Literal["same", "rounded", "edited", "low rank", "full rank", "changed"]


@dataclass(frozen=True)
class TensorDifference:
    """What lies between a tensor W of the base and W' of the edited checkpoint.

    kind: `same` (all values), `rounded` (the base's values on a coarser grid, and nothing else), `edited` (W - alpha V V^T W),
    `low rank` (but not of that form), `full rank` (a writer: beyond rounding, and no low rank), `changed` (no writer, or a bias).
    relative: |W - W'| / |W| (Frobenius). largest: max |W - W'|. grid: what W' is rounded to.
    rank, singular_values (the first SHOWN of D, norms undone) and edge (what rounding leaves of them): of matrices that write.
    alpha, residual (|D - alpha V V^T W| / |D|) and norms (of NORMS, those that were set back): of edited ones.
    """

    name: str
    layer: int | None
    writer: bool
    kind: Kind
    relative: float = 0.0
    largest: float = 0.0
    grid: str | None = None
    rank: int | None = None
    singular_values: list[float] = field(default_factory=list)
    edge: float | None = None
    alpha: float | None = None
    residual: float | None = None
    norms: str | None = None


@dataclass(frozen=True)
class Difference:
    """What lies between two checkpoints; basis and by_layer are None where no writer was edited.

    basis: orthonormal rows [k, d_model] that all edited writers share. by_layer: where they share none, each layer's own; the
    embedding's is that of None. alone: the tensors that one of the two has. untied: the unembedding, which is the base's
    embedding, is a tensor of its own now.
    """

    tensors: list[TensorDifference]
    basis: Float[Tensor, "k d_model"] | None
    by_layer: dict[int | None, Float[Tensor, "k d_model"]] | None
    alone: dict[str, list[str]]
    untied: bool
    embedding: Kind
    estimate: Estimate | None = None

    def of(self, *kinds: Kind) -> list[TensorDifference]:
        """The tensors of these kinds."""
        return [one for one in self.tensors if one.kind in kinds]

    @property
    def kind(self) -> str:
        """In a word: `identical`, `requantized`, `edit`, `edit under quantization`, `edit and more`, `full rank`, `low rank`,
        `changed` (no writer is)."""
        more = self.of("full rank", "low rank", "changed")
        if self.of("edited"):
            pooled = self.estimate is not None and self.estimate.pooled
            return "edit and more" if more else "edit under quantization" if pooled else "edit"
        found = next((kind for kind in ("full rank", "low rank", "changed") if any(one.kind == kind for one in more)), None)
        return found or ("requantized" if self.of("rounded") else "identical")

    @property
    def how(self) -> str:
        """How that is known."""
        n = {kind: len(self.of(kind)) for kind in get_args(Kind)}
        more = n["full rank"] + n["low rank"] + n["changed"]
        grids = ", ".join(sorted({str(one.grid) for one in self.of("rounded")}))
        rounded = f", but for {n['rounded']} rounded to {grids}" if grids else ""
        edited = f"W - W' is alpha V V^T W up to rounding in {n['edited']} tensors"
        return {
            "identical": f"all {n['same']} tensors have the base's values",
            "requantized": f"{n['rounded']} tensors are the base's rounded to {grids}, and {n['same']} are equal",
            "edit": f"{edited}, and all others are the base's{rounded}",
            "edit under quantization": f"{edited}, seen in all of them together, and all others are the base's{rounded}",
            "edit and more": f"{edited}, and {more} others differ by more than that",
            "full rank": f"{more} tensors differ by more than rounding, {n['full rank']} writers of them by no low rank: further "
            "training, a merge, or a quantization that is not known here",
            "low rank": f"{more} tensors differ by more than rounding, {n['low rank']} writers of them by a low rank that is not "
            "alpha V V^T W: an adapter that was trained, say",
            "changed": f"{more} tensors differ by more than rounding, and none of them writes into the residual stream",
        }[self.kind]

    @property
    def rank(self) -> int | None:
        """How many dimensions were scaled in the output of every writer, or at most in a layer's; None without an edit."""
        bases = [self.basis] if self.basis is not None else list((self.by_layer or {}).values())
        return max((len(basis) for basis in bases), default=None)

    @property
    def by_chance(self) -> float | None:
        """What `cosines` has of a random direction: sqrt(rank / d_model), in the root mean square."""
        bases = [self.basis] if self.basis is not None else list((self.by_layer or {}).values())
        return max((math.sqrt(len(basis) / basis.shape[1]) for basis in bases), default=None)

    def cosines(self, directions: Float[Tensor, "n_layers d_model"]) -> list[float | None]:
        """How much of each layer's direction lies in the span of the edit (of that layer's, where they share none): |cosine| for
        rank 1. None where either is missing. Raises UserError for another width."""
        found: list[float | None] = []
        for layer, vector in enumerate(directions):
            basis = self.basis if self.by_layer is None else self.by_layer.get(layer)
            if basis is None or not (vector.isfinite().all() and vector.any()):
                found.append(None)
            elif basis.shape[1] != len(vector):
                raise UserError(f"directions have {len(vector)} components, and d_model is {basis.shape[1]}: give this model's.")
            else:
                found.append(captured(basis, vector))
        return found


def compare(base: Weights, edited: Weights) -> Difference:
    """Which edit leads from one checkpoint to the other. Tensors are read twice, one of each checkpoint at a time.

    Deterministic: large matrices are sketched from a fixed seed, with an error far below that of rounding. Raises UserError for
    checkpoints of different models, and for NaN or infinity.
    """
    sources = _paired(base, edited)
    spectra: dict[str, Spectrum] = {}
    estimate: Estimate | None = None
    tensors: list[TensorDifference] = []
    with progress(2 * len(sources), "compare", "tensor") as bar:
        for name, source in sources.items():
            pair = _Pair.read(base, edited, source, name)
            one, found = _first_look(name, pair)
            if not math.isfinite(one.relative):
                raise UserError(
                    f"{edited.where}: {name}, here or in {base.where}, has NaN or infinity in it: download both again."
                )
            tensors.append(one)
            if found is not None and found.low:
                spectra[name] = found
            bar.update()
        bases, shared = _bases(spectra, {one.name: one.layer for one in tensors})
        for i, one in enumerate(tensors):
            v = bases.get(None if shared else one.layer)
            if v is not None and (one.name in spectra or (one.writer and one.kind == "changed")):
                pair = _Pair.read(base, edited, sources[one.name], one.name)
                tensors[i] = _second_look(one, pair, v, spectra.get(one.name))
            bar.update()
    if not any(one.norms for one in tensors):
        estimate, basis = _beneath_blocks(base, edited, sources, tensors)
        if basis is not None:
            bases, shared = {None: basis}, True
    layers = {one.layer for one in tensors if one.kind == "edited"}
    of_edited, names = edited.architecture, set(edited.names)
    embedding, unembedding = (of_edited.saved_as(name, names) for name in (of_edited.embedding_name, of_edited.unembedding_name))
    kind_of = {one.name: one.kind for one in tensors}
    return Difference(
        tensors,
        bases[None] if shared and layers else None,
        {layer: bases[layer] for layer in bases if layer in layers} if layers and not shared else None,
        {"base": [n for n in base.names if n not in sources.values()], "edited": [n for n in edited.names if n not in sources]},
        sources.get(unembedding) == embedding and kind_of[unembedding] == "same",
        kind_of[embedding],
        estimate,
    )


def _paired(base: Weights, edited: Weights) -> dict[str, str]:
    """The base's tensor of each of the edited checkpoint's that it can be compared with."""
    ours, theirs = base.architecture, edited.architecture
    same_model(theirs, edited.where, ours, base.where)
    sources = {name: name for name in edited.names if name in base.names}
    untied = theirs.saved_as(theirs.unembedding_name, set(edited.names))
    embedding = ours.saved_as(ours.embedding_name, set(base.names))
    if ours.tied and untied in edited.names and not ours.holds_unembedding(set(base.names)) and embedding in base.names:
        sources[untied] = embedding
    if embedding not in sources:
        raise UserError(f"{edited.where}: tensor {embedding} is missing here or in {base.where}: is each whole?")
    return sources


@dataclass(frozen=True)
class _Pair:
    """W and W' of one tensor as files have them; `view` makes a matrix [d_model, n] of one that writes."""

    w: Tensor
    edited: Tensor
    axis: int | None

    @classmethod
    def read(cls, base: Weights, edited: Weights, source: str, name: str) -> _Pair:
        w, edited_w = base.read(source), edited.read(name)
        if w.shape != edited_w.shape or not w.is_floating_point() or not edited_w.is_floating_point():
            raise UserError(
                f"{edited.where}: {name} is {edited_w.dtype} {list(edited_w.shape)}, and {w.dtype} {list(w.shape)} in "
                f"{base.where}: give two unquantized checkpoints of one model."
            )
        return cls(w, edited_w, edited.architecture.writer_axis(name, include_embedding=True))

    @property
    def dtype(self) -> torch.dtype:
        return wide(torch.promote_types(self.w.dtype, self.edited.dtype))

    def view(self, tensor: Tensor) -> Tensor:
        return tensor if self.axis is None else tensor.movedim(self.axis, 0).reshape(tensor.shape[self.axis], -1)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """W and W' in a dtype to compute in."""
        return self.view(self.w.to(self.dtype)), self.view(self.edited.to(self.dtype))

    def step(self, grid: Grid) -> Tensor:
        """A step of the grid of W' for each value; of a float's, at W where that is more: where W' is nearly 0, the sum that made
        it was rounded at the size of its terms."""
        if grid.block is None:
            return self.view(grid.step(torch.maximum(self.edited.abs(), self.w.abs()).to(self.dtype)))
        return self.view(torch.maximum(grid.step(self.edited), Grid(self.edited.dtype).step(self.w)).to(self.dtype))


def _first_look(name: str, pair: _Pair) -> tuple[TensorDifference, Spectrum | None]:
    """What can be said of a tensor by itself, and the spectrum of a matrix that writes and differs by more than rounding."""
    match = re.search(r"\.(\d+)\.", name)  # the first number of a name is its layer's
    one = TensorDifference(name, int(match[1]) if match else None, pair.axis is not None, "same")
    if pair.w.dtype == pair.edited.dtype and torch.equal(pair.w, pair.edited):
        return one, None
    w, edited = pair.matrices()
    d = w - edited
    if not d.any():
        return one, None
    grid, relative = grid_of(pair.edited), math.sqrt(energy(d) / (energy(w) or 1))
    one = replace(one, kind="changed", relative=relative, largest=float(d.abs().max()), grid=str(grid))
    if not math.isfinite(relative):
        return one, None
    if not grid.holds(pair.w) and bool((d.abs() <= pair.view(grid.error(pair.edited))).all()):
        return replace(one, kind="rounded"), None
    if not one.writer or d.shape[1] == 1:  # a vector is of rank one whatever was done to it
        return one, None
    found = spectrum(w, edited, pair.step(grid))
    kind: Kind = "low rank" if found.low else "full rank"
    rank = len(found.values) if found.low else None
    return replace(one, kind=kind, rank=rank, singular_values=found.shown, edge=found.edge, norms=found.norms), found


def _bases(spectra: Mapping[str, Spectrum], layer_of: Mapping[str, int | None]) -> tuple[dict[int | None, Tensor], bool]:
    """The basis of all writers, under None, and True; or where they have no common one each layer's, and False."""
    if not spectra:
        return {}, False
    basis = common([*spectra.values()])
    if len(basis) == max(len(one.values) for one in spectra.values()):
        return {None: basis}, True
    of_layer: dict[int | None, list[Spectrum]] = {}
    for name, one in spectra.items():
        of_layer.setdefault(layer_of[name], []).append(one)
    return {layer: common(ones) for layer, ones in of_layer.items()}, False


def _second_look(one: TensorDifference, pair: _Pair, v: Float[Tensor, "k d_model"], found: Spectrum | None) -> TensorDifference:
    """alpha by least squares, V^T D = alpha V^T W, and whether D is alpha V V^T W up to rounding, which makes it an edit."""
    w, edited = pair.matrices()
    if found is not None and found.norms is not None:
        w, edited = w / found.unit, edited / found.unit * found.scale
    d = w - edited
    del edited
    vd, vw = ((v.to(d.dtype) @ matrix).double() for matrix in (d, w))
    of_w, of_both = float((vw**2).sum()), float((vd * vw).sum())
    alpha = of_both / of_w if of_w else 0.0
    of_d = energy(d)
    along = float(((vd - alpha * vw) ** 2).sum())
    if found is not None and along > max(len(v) * found.edge**2, float((vd**2).sum()) / 100):
        return one  # what lies along V is no alpha V^T W, however little it is beside the rounding of all else
    left = max(of_d - 2 * alpha * of_both + alpha**2 * of_w, 0.0)
    if left > (explained(d, pair.step(grid_of(pair.edited))) if found is None else found.explained):
        return one
    return replace(one, kind="edited", alpha=alpha, residual=math.sqrt(left / (of_d or 1)))


def _beneath_blocks(
    base: Weights, edited: Weights, sources: Mapping[str, str], tensors: list[TensorDifference]
) -> tuple[Estimate | None, Float[Tensor, "k d_model"] | None]:
    """How well an edit is known whose matrices are all in blocks, and its basis; None without such an edit. What is seen to be
    edited in all of them together alone is said to be, in place."""
    changed = [i for i, one in enumerate(tensors) if one.writer and one.singular_values]
    if not changed or not all("blocks" in str(tensors[i].grid) for i in changed):
        return None, None

    def read(i: int) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        pair = _Pair.read(base, edited, sources[tensors[i].name], tensors[i].name)
        w, after = pair.matrices()
        of_base = grid_of(pair.w)
        noise = None if of_base.block is None else pair.view(of_base.step(pair.w).to(pair.dtype))
        return w, w - after, pair.view(grid_of(pair.edited).step(pair.edited).to(pair.dtype)), noise

    d_model = edited.architecture.d_model
    basis, p = shared_basis(lambda: (read(i)[1:3] for i in changed), d_model)
    aspect = d_model / sum(math.prod(base.read(sources[tensors[i].name]).shape) // d_model for i in changed)
    # Of two rounded matrices rounding is not quite independent, and may look like a dimension more: that is no alpha V V^T W.
    for k in range(len(basis), 0, -1):
        fit, found = Fit(basis[:k], aspect), {}
        for i in changed:
            w, d, step, noise = read(i)
            one = fit.of_tensor(w, d, step, noise)
            if one is not None:
                fit.add(w, d, step, noise, one[0])
                fit.pooled += tensors[i].kind != "edited"
                left = one[1] / (math.sqrt(energy(d)) or 1.0)
                found[i] = replace(tensors[i], kind="edited", rank=k, alpha=one[0], residual=left)
        if found and all(i in found for i in changed if tensors[i].kind == "edited"):
            break
    else:
        return None, None
    for i, tensor in enumerate(tensors):
        if tensor.writer and tensor.kind == "changed":  # a bias
            found[i] = _second_look(tensor, _Pair.read(base, edited, sources[tensor.name], tensor.name), fit.basis, None)
    tensors[:] = [found.get(i, tensor) for i, tensor in enumerate(tensors)]
    return fit.estimate(p), fit.basis
