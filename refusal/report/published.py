"""Other people's published directions, read from files, and their cosine with ours by layer.

Two layouts are known: the write-up's `{layer: vector [d_model]}`, NaN where undefined, and the paper's
`mean_diffs` [positions, n_layers, d_model] (andyrdt/refusal_direction, pipeline/submodules/generate_directions.py), positions
counted from the end of the prompt. Of this package's own directions.safetensors the unit vectors are read. A file of one
number a layer holds the separation (Cohen's d) of the same run.
"""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy
import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from refusal.io.errors import UserError
from refusal.method.control_vector import read_control_vector
from refusal.method.directions import as_json, cosine

READ = (".safetensors", ".pt", ".npy", ".gguf")
MOST_LAYERS = 256  # a longer vector is no list of one number a layer


def read_vectors(folder: Path) -> tuple[dict[str, Float[Tensor, "n_layers d_model"]], dict[str, Float[Tensor, " n_layers"]]]:
    """(directions, figures) of every .safetensors, .pt, .npy and control vector (.gguf) below `folder`, or of that file, by
    `<file>`, `<file>:<tensor>`, `<file>:position_-1`. Figures are vectors: numbers by layer, or one direction for every layer;
    `compare` tells which.

    A .pt is read with `weights_only=True`, so nothing in it runs. Raises UserError naming a file that cannot be read so, or
    holds something else.
    """
    directions: dict[str, Tensor] = {}
    figures: dict[str, Tensor] = {}
    folder, paths = (folder.parent, [folder]) if folder.is_file() else (folder, sorted(folder.rglob("*")))
    for path in (path for path in paths if path.suffix in READ and path.is_file()):
        for name, tensor in _tensors(path).items():
            for position, array in _by_position(tensor).items():
                if array.ndim not in (1, 2) or not array.is_floating_point():
                    raise UserError(
                        f"{path}: {name or 'its tensor'} has shape {list(tensor.shape)} and dtype {tensor.dtype}, and directions "
                        "are floats [n_layers, d_model] or [positions, n_layers, d_model]; take the file out of the folder"
                    )
                full = ":".join(filter(None, (path.relative_to(folder).as_posix(), name, position)))
                (directions if array.ndim == 2 else figures)[full] = array
    return directions, figures


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, "" where it is just one; a dictionary by layer counts as one, stacked in order."""
    try:
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            # A directions.safetensors of this package holds more than directions.
            return {name: tensor for name, tensor in tensors.items() if name.endswith(".unit")} or tensors
        if path.suffix == ".gguf":
            return {"": read_control_vector(path)}
        if path.suffix == ".npy":
            return {"": torch.from_numpy(numpy.load(path, allow_pickle=False))}
        content = torch.load(path, weights_only=True, map_location="cpu")
        if isinstance(content, Mapping) and content and set(content) == set(range(len(content))):
            content = torch.stack([torch.as_tensor(content[layer], dtype=torch.float64) for layer in range(len(content))])
        if isinstance(content, Tensor):
            return {"": content}
        if isinstance(content, Mapping) and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items()):
            return dict(content)
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, UnpicklingError, SafetensorError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read as tensors alone ({why}); take it out of the folder") from None
    raise UserError(f"{path}: holds neither a tensor, nor tensors by name or by layer; take it out of the folder")


def _by_position(tensor: Tensor) -> dict[str, Tensor]:
    if tensor.ndim != 3:
        return {"": tensor}
    return {f"position_{i - len(tensor)}": by_layer for i, by_layer in enumerate(tensor)}


def compare(
    directions: Mapping[str, Float[Tensor, "n_layers d_model"]],
    figures: Mapping[str, Float[Tensor, " n_layers"]],
    ours: Mapping[str, Float[Tensor, "n_layers d_model"]],
) -> dict[str, Any]:
    """All that metrics/published.json says of published directions compared with `ours`, which are by `<method>-<pairing>`.

    A vector as long as our d_model is one direction (the paper's `direction.pt`), compared with each layer's; its `n_layers` is
    null. `files`: shape, and the cosine by layer with each of ours: null at a layer where either is undefined, and `comparable`
    false with a `note` where the shapes differ, since the cosine of two models' directions has no meaning. `between`: the
    cosine by layer of every two published sets of one shape, which needs no model. `figures`: numbers by layer as they are.
    """
    files: dict[str, dict[str, Any]] = {}
    widths = {unit.shape[1] for unit in ours.values()}
    layers = {unit.shape[0] for unit in ours.values()}
    single = {n: v for n, v in figures.items() if len(v) not in layers and (len(v) in widths or len(v) > MOST_LAYERS)}
    figures = {name: values for name, values in figures.items() if name not in single}
    for published, v in single.items():
        comparable = {name: unit for name, unit in ours.items() if unit.shape[1] == len(v)}
        files[published] = {
            "n_layers": None,
            "d_model": len(v),
            "comparable": bool(comparable),
            "note": "one direction for all layers" if comparable else f"ours have d_model {sorted(widths)}: another model",
            "cosine": {name: as_json(cosine(unit, v.expand_as(unit))) for name, unit in comparable.items()},
        }
    shapes = " and ".join(sorted({str(list(unit.shape)) for unit in ours.values()}))
    for published, theirs in directions.items():
        comparable = {name: unit for name, unit in ours.items() if unit.shape == theirs.shape}
        files[published] = {
            "n_layers": theirs.shape[0],
            "d_model": theirs.shape[1],
            "comparable": bool(comparable),
            "note": None if comparable else f"ours are {shapes}: another model",
            "cosine": {name: as_json(cosine(unit, theirs)) for name, unit in comparable.items()},
        }
    between = {
        f"{a} {b}": as_json(cosine(directions[a], directions[b]))
        for a, b in combinations(directions, 2)
        if directions[a].shape == directions[b].shape
    }
    return {"files": files, "between": between, "figures": {name: as_json(values) for name, values in figures.items()}}
