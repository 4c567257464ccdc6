"""An edit of a checkpoint, whatever it lies in, as the folder of an ordinary one: what is run and scored beside its base."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from refusal.io.errors import UserError
from refusal.io.files import write_whole
from refusal.io.progress import progress
from refusal.lm.adapter import CONFIG
from refusal.lm.architecture import Architecture, architecture_of, same_model, untied_config
from refusal.lm.checkpoint import DTYPES, INDEX, SINGLE, data_of, header_bytes, read_json, read_shards
from refusal.lm.load import LM, load_model, weights_hash
from refusal.lm.validate import small_files
from refusal.lm.weights import open_weights


@contextmanager
def as_checkpoint(path: Path, base: Path, scratch: Path) -> Iterator[tuple[Path, str]]:
    """(the folder of a checkpoint, what it was: `checkpoint`, `adapter` or `gguf`).

    A folder of safetensors is itself. An adapter is merged into `base`, and a GGUF file dequantized to float32, in a folder below
    `scratch` that is gone afterwards: equal inputs give equal bytes, so that what is stored by `weights_hash` is found again.
    Raises UserError for what is none of these, or no edit of `base`'s model.
    """
    kind = "gguf" if path.suffix == ".gguf" and path.is_file() else "adapter" if (path / CONFIG).is_file() else "checkpoint"
    if kind == "checkpoint":
        if not path.is_dir():
            raise UserError(f"{path}: no such folder or .gguf file: give that of a checkpoint or of an adapter.")
        look(path, base)
        yield path, kind
        return
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch, prefix=".edited-") as place:
        folder = Path(place)
        try:
            if kind == "adapter":
                _merge(path, base, folder)
            else:
                from refusal.lm.gguf import convert  # transformers' reader is slow to import

                convert(path, folder, "float32", lambda written: look(written, base))
            yield folder, kind
        except UserError as error:  # the folder is no place that a person knows
            raise UserError(str(error).replace(place, str(path))) from None


def look(folder: Path, base: Path) -> None:
    """Refuse a checkpoint of another model than `base`'s, by its configuration; an adapter has none. Raises UserError."""
    if not (folder / CONFIG).is_file():
        same_model(_architecture(folder), folder, _architecture(base), base)


def with_weights(lm: LM, folder: Path, dtype: str, device: str) -> LM:
    """An LM with another checkpoint's weights in place of its own; tokenizer, chat template and what ends an answer stay.

    Raises UserError as `load_model` does.
    """
    return replace(lm, model=load_model(folder, dtype, device), weights=weights_hash(folder))


def _architecture(folder: Path) -> Architecture:
    return architecture_of(read_json(folder, "config.json"), folder)


def _merge(adapter: Path, base: Path, target: Path) -> None:
    """Write the base with an adapter merged, W + scale B A cast once to its dtype, as one file; a tied embedding is untied."""
    shards = read_shards(base)
    entries = [entry for shard in shards for entry in shard.entries]
    with open_weights(adapter, base) as weights, open_weights(base) as ours:
        architecture, names = weights.architecture, set(weights.names)
        embedding, unembedding = architecture.saved_as(architecture.embedding_name, names), architecture.unembedding_name
        untied = architecture.tied and not architecture.holds_unembedding(names)
        if untied and not torch.equal(ours.read(embedding), weights.read(embedding).to(ours.read(embedding).dtype)):
            entries += [replace(entry, name=unembedding) for entry in entries if entry.name == embedding]
        else:
            untied = False
        with (target / SINGLE).open("wb") as out, progress(len(entries), f"merge {adapter.name}", "tensor") as bar:
            out.write(header_bytes(entries, {"format": "pt"}))
            for entry in entries:
                tensor = ours.read(embedding) if untied and entry.name == unembedding else weights.read(entry.name)
                out.write(data_of(tensor.to(DTYPES.get(entry.dtype, tensor.dtype))))
                bar.update()
    for name, path in small_files(base).items():
        if name != INDEX:
            write_whole(target / name, path.read_bytes())
    if untied:
        config = untied_config(read_json(base, "config.json"))
        write_whole(target / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
