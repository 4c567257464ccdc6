"""What a cell of the sweep takes out of the stream: the direction of one layer, or a subspace that several directions span.

`sweep.basis` is `single` (each layer's direction), `qr` (the span of the directions of `sweep.rank` layers that follow each other
in `sweep.layers`, a cell for each such window; rank null: one of all of them), `svd` (the first `sweep.rank` singular vectors of
the paired differences at each layer) or `per_layer` (each layer's own direction, taken out at that layer alone).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.sweep import Sweep
from refusal.method.directions import harmless_kept, random_unit

Basis = Float[Tensor, "k d_model"] | Float[Tensor, "n_layers 1 d_model"]


@dataclass(frozen=True)
class Span:
    """What is taken out, before an alpha: `basis` as `sweep.basis` has it, the layers it is made of, and its rank (of
    `per_layer` that of each layer)."""

    basis: str
    layers: tuple[int, ...]
    rank: int = 1

    @property
    def shown(self) -> int | str:
        """Its layer, or its layers as tables and names have them: 5, `7-10`, `3+7-10`."""
        if len(self.layers) == 1:
            return self.layers[0]
        runs: list[list[int]] = []
        for layer in self.layers:
            if runs and layer == runs[-1][-1] + 1:
                runs[-1].append(layer)
            else:
                runs.append([layer])
        return "+".join("-".join(map(str, dict.fromkeys((run[0], run[-1])))) for run in runs)

    @property
    def name(self) -> str:
        """`layer_5`, `qr_7-10`, `svd_5_rank_3` or `per_layer_1-7`: its part of a cell's name."""
        kind = "layer" if self.basis == "single" else self.basis
        return f"{kind}_{self.shown}" + f"_rank_{self.rank}" * (self.basis == "svd")

    @property
    def n_vectors(self) -> int:
        """How many vectors it is made of."""
        return self.rank if self.basis == "svd" else len(self.layers)


def spans(sweep: Sweep, defined: Sequence[int]) -> list[Span]:
    """What a sweep takes out, in turn. defined: the layers that have a direction.

    Raises UserError for a layer that has none, and for fewer layers than a rank asks for.
    """
    layers = list(defined) if sweep.layers is None else sweep.layers
    for layer in layers:
        if layer not in defined:
            raise UserError(f"params.yaml: sweep.layers: layer {layer} has no direction; choose among {list(defined)}")
    ordered = tuple(sorted(layers))
    if sweep.basis == "per_layer":
        return [Span("per_layer", ordered)]
    if sweep.basis == "qr":
        k = sweep.rank or len(layers)
        if not 2 <= k <= len(layers):
            raise UserError(
                f"params.yaml: sweep.rank: basis qr of rank {k} is made of {k} layers' directions, and there are {len(layers)}: "
                "name more in sweep.layers, lower rank, or set basis to single"
            )
        return [Span("qr", ordered[i : i + k], k) for i in range(len(layers) - k + 1)]
    return [Span(sweep.basis, (layer,), sweep.rank or 1) for layer in layers]


def basis_of(span: Span, directions: Mapping[str, Tensor], keep_harmless: bool = False) -> Basis:
    """The basis of what is taken out, orthonormal; of `per_layer` one a layer, zero at layers that it leaves alone.

    directions: `unit`, `safe_mean` and for svd `singular`, by layer. keep_harmless: each vector without its share of its layer's
    safe mean (`harmless_kept`). Raises UserError where there are too few vectors, or they span fewer dimensions.
    """
    if span.basis != "svd":
        return _made(span, directions["unit"][list(span.layers)], directions, keep_harmless)
    found = directions["singular"][span.layers[0], : span.rank] if "singular" in directions else torch.zeros(1, 1)
    if len(found) < span.rank or not found.any(-1).all():
        raise UserError(
            f"params.yaml: sweep.basis: svd of rank {span.rank} is of paired differences, of which layer {span.layers[0]} has "
            "not so many: take prompts that are pairs with sweep.pairing matched, more of them, or basis qr"
        )
    return _made(span, found, directions, keep_harmless)


def random_of(span: Span, directions: Mapping[str, Tensor], n: int, seed: int, keep_harmless: bool = False) -> list[Basis]:
    """`n` random bases of the span's shape and rank, each made of random directions as the span is of its own: the control."""
    drawn = random_unit(directions["unit"].shape[1], n * span.n_vectors, seed)
    return [_made(span, vectors, directions, keep_harmless) for vectors in drawn.split(span.n_vectors)]


def _made(span: Span, vectors: Float[Tensor, "n d_model"], directions: Mapping[str, Tensor], keep_harmless: bool) -> Basis:
    """The basis that vectors at the span's layers give."""
    rows = list(span.layers)
    if keep_harmless:
        vectors = harmless_kept(vectors, directions["safe_mean"][rows])
    if span.basis == "per_layer":
        own = torch.zeros(len(directions["unit"]), 1, vectors.shape[1], dtype=vectors.dtype)
        own[rows, 0] = vectors
        return own
    return vectors if len(vectors) == 1 else qr_of_layers(vectors, range(len(vectors)), rows)


def qr_of_layers(
    unit: Float[Tensor, "n_layers d_model"], layers: Sequence[int], named: Sequence[int] | None = None
) -> Float[Tensor, "k d_model"]:
    """An orthonormal basis of the span of these layers' directions, the first layer's direction first (QR), in float64.

    Source: the write-up's section on LLaMA, which ablates the span of its best layers' directions. Raises UserError
    where a layer's direction is undefined or lies in the span of those before it; `named` are the layers that it then names.
    """
    q, r = torch.linalg.qr(unit[list(layers)].double().T)
    diagonal = r.diagonal()
    if float(diagonal.abs().min()) < 1e-6:
        said = list(layers if named is None else named)
        raise UserError(f"the directions of layers {said} do not span {len(layers)} dimensions: choose others in sweep.layers")
    return (q * diagonal.sign()).T
