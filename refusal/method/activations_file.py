"""Activations in a safetensors file, of which a layer at a time is read: memory holds no more, however many prompts there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from refusal.io.errors import UserError


@dataclass(frozen=True, eq=False)
class ActivationsOnDisk:
    """One set of activations, `name` in the file: [n, n_layers, d_model], indexed as a tensor of that shape is.

    `acts[:, layer]` reads one layer, [n, d_model] in float64. `acts[rows]` is the same of some rows, or of all in another order,
    and reads nothing.
    """

    path: Path
    name: str
    rows: Int[Tensor, " n"]
    n_layers: int
    d_model: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(n, n_layers, d_model)."""
        return len(self.rows), self.n_layers, self.d_model

    def __getitem__(self, index):
        if not isinstance(index, tuple):
            return replace(self, rows=self.rows[index])
        rows, layer = index
        # The file is mapped, not read whole: from it come the pages of this layer alone.
        with safe_open(self.path, "pt") as file:
            return file.get_slice(self.name)[:, layer][self.rows[rows]].double()


# Wherever a set of activations is taken: in memory, or in a file.
Activations = Float[Tensor, "n n_layers d_model"] | ActivationsOnDisk


def read_activations(path: Path, kept: Mapping[str, Sequence[int]] | None = None) -> dict[str, ActivationsOnDisk]:
    """The sets of prompts in a file of activations, of those named in `kept` these rows. Raises UserError for a missing or
    malformed file."""
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read as activations ({error}): delete it and run `dvc repro activations`") from None
    if odd := [name for name, shape in shapes.items() if len(shape) != 3]:
        raise UserError(
            f"{path}: {odd[0]} has shape {shapes[odd[0]]}, and activations are [n, n_layers, d_model]: delete the file and run "
            "`dvc repro activations`"
        )
    return {
        name: ActivationsOnDisk(path, name, torch.tensor((kept or {}).get(name, range(n))), *rest)
        for name, (n, *rest) in shapes.items()
    }
