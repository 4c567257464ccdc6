"""The weights of a checkpoint by name, one at a time, whatever they lie in: safetensors, an adapter, a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from refusal.io.errors import UserError
from refusal.lm.adapter import CONFIG, read_products
from refusal.lm.architecture import Architecture, architecture_of
from refusal.lm.checkpoint import read_json, read_shards


@dataclass(frozen=True)
class Weights:
    """A checkpoint's tensors: `read` maps or computes one of `names`, which are in the order of the files."""

    where: Path
    architecture: Architecture
    names: tuple[str, ...]
    read: Callable[[str], Tensor]


@contextmanager
def open_weights(path: Path, base: Path | None = None) -> Iterator[Weights]:
    """The weights of a checkpoint's folder, of a LoRA adapter's folder merged into `base`, or of a GGUF file.

    A GGUF file is dequantized into a temporary folder, in float32: it takes the memory and the disk of that. Raises UserError
    for what is none of these.
    """
    if path.suffix == ".gguf" and path.is_file():
        from refusal.lm.gguf import convert  # transformers' reader is slow to import

        with TemporaryDirectory() as folder:
            convert(path, Path(folder), "float32", lambda _: None)
            yield _of_folder(Path(folder))
    elif (path / CONFIG).is_file():
        if base is None:
            raise UserError(f"{path}: is an adapter, which is no base: give the checkpoint that it was made for first.")
        yield _of_adapter(path, _of_folder(base))
    else:
        yield _of_folder(path)


def _of_folder(folder: Path) -> Weights:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder: give that of a checkpoint, of an adapter, or a .gguf file.")
    architecture = architecture_of(read_json(folder, "config.json"), folder)
    shard_of = {entry.name: shard for shard in read_shards(folder) for entry in shard.entries}
    return Weights(folder, architecture, tuple(shard_of), lambda name: shard_of[name].tensor(name))


def _of_adapter(folder: Path, base: Weights) -> Weights:
    """W + scale B A, in float32 at least. Source: PEFT's documentation of LoraConfig, on lora_alpha, r and use_rslora."""
    config = read_json(folder, CONFIG)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    unread = [key for key in ("use_dora", "alpha_pattern", "rank_pattern") if config.get(key)]
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or unread:
        why = f"{unread[0]} is set" if unread else f"r is {rank!r} and lora_alpha {alpha!r}"
        raise UserError(f"{folder / CONFIG}: {why}, and plain LoRA is read: merge the adapter into its base and give that.")
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    products = read_products(folder, base.where, base.names)

    def read(name: str) -> Tensor:
        w = base.read(name)
        return products[name].added_to(w, scale) if name in products else w

    return Weights(folder, base.architecture, base.names, read)
