"""The section `sweep` of params.yaml: what is ablated, at which strengths."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from refusal.io.section import AtMost10000, Count, Method, NonEmpty, Seeded

SINGULAR_VECTORS = 10  # of the paired differences at a layer, kept beside its direction


class Sweep(Seeded):
    """`basis`, `layers` and `rank` are what `refusal.method.subspaces.spans` makes of them."""

    method: Method
    pairing: Literal["auto", "matched", "unrelated"]
    basis: Literal["single", "qr", "svd", "per_layer"] = "single"
    layers: list[Annotated[int, Field(ge=0)]] | None
    rank: Count | None = None
    alphas: NonEmpty[Annotated[float, Field(gt=0, le=10)]]
    n_random: AtMost10000

    def contradictions(self) -> Iterator[str]:
        names = [f"{100 * alpha:.0f}" for alpha in self.alphas]  # as a checkpoint's name has them
        if len(set(names)) < len(names) or len(set(self.layers or [])) < len(self.layers or []):
            yield "two alphas (to two decimals) or two layers are the same; delete one"
        if self.basis in ("single", "per_layer") and self.rank is not None:
            yield f"rank {self.rank} is of basis qr or svd, and basis is {self.basis}: set basis to one of these, or rank to null"
        if self.basis == "svd" and not 1 <= (self.rank or 0) <= SINGULAR_VECTORS:
            yield f"basis svd takes the first of {SINGULAR_VECTORS} singular vectors: set rank to how many"
        if self.basis == "qr" and self.rank == 1:
            yield "basis qr of rank 1 is one layer's direction: set basis to single, or rank to 2 or more"
        elif self.basis == "qr" and self.layers is not None and len(self.layers) < (self.rank or 2):
            least = self.rank or 2
            yield f"basis qr needs the directions of {least} layers or more, and layers names {len(self.layers)}: name more"
