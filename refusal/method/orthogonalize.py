"""Checkpoints whose writers no longer reach a direction, edited on disk: W <- W - alpha v v^T W.

Weight orthogonalization (Arditi et al. 2024, arXiv 2406.11717, section 4.1; alpha = 1 there), for attention and MLP
output matrices and their biases, and E <- E - alpha E v v^T for the embedding. With the embedding the result equals
run-time ablation at `writes` for every alpha, and at `paper` for alpha = 1, except where a norm stands between writer
and stream (see `refusal.lm.architecture.Architecture`: Gemma 2 and 3).

Tensors stream through the safetensors format: one read for all cells, one matrix at a time; no model is built. The same
edit can be written as a rank-1 adapter (`refusal.lm.adapter`), thousands of times smaller.
"""

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from refusal.io.errors import UserError
from refusal.io.files import sync, write_whole
from refusal.io.store import progress
from refusal.lm.adapter import CONFIG, adapter_files
from refusal.lm.architecture import Architecture, architecture_of
from refusal.lm.checkpoint import (
    DTYPES,
    INDEX,
    SINGLE,
    Entry,
    Reader,
    Shard,
    header_bytes,
    read_json,
    read_shards,
    real_file,
    write_all,
)

_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # never pickles; other safetensors hold unedited weights
_FLUSH = 1 << 26  # bytes written between two calls of fsync
_CHUNK = 1 << 22  # bytes: in and out of a cache, not of memory


@dataclass(frozen=True)
class Edit:
    """One checkpoint to write, whole (`safetensors`) or as an adapter to the source (`lora`).

    alpha = 0 copies the source's tensors byte for byte.
    """

    target: Path  # replaced if it exists, only once the new one is whole
    direction: Float[Tensor, " d_model"]  # unit; normalised once more in float64
    alpha: float
    include_embedding: bool = True
    format: Literal["safetensors", "lora"] = "safetensors"


@dataclass
class Report:
    """What an edit did, measured on the tensors as written (of an adapter: as merged), after the cast to the file's dtype.

    residuals: |v^T W'| / |W'| (Frobenius) of each edited tensor: rounding at alpha = 1.
    deviations: |v^T W' - (1 - alpha) v^T W| / |W|, which should be rounding at every alpha.
    """

    target: Path
    residuals: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    n_copied: int = 0  # tensors taken over as bytes; with an adapter, left as they are
    bytes_written: int = 0  # whole folder

    @property
    def n_edited(self) -> int:
        return len(self.residuals)

    @property
    def max_residual(self) -> float:
        return max(self.residuals.values(), default=0.0)

    @property
    def max_deviation(self) -> float:
        return max(self.deviations.values(), default=0.0)


def orthogonalize(source: Path, edits: Sequence[Edit]) -> list[Report]:
    """Write one edited copy of the checkpoint folder `source` for each edit, in one read of it; reports in order.

    Keeps shards, tensor order, index, metadata and every unedited byte; copies config, tokenizer and template files.
    Arithmetic is float32 (float64 for float64 files) with one cast. A tied embedding that is edited is untied:
    `lm_head.weight` keeps the original bytes and config.json says so. Memory holds one matrix and a few megabytes.
    Folders appear whole or not at all, and an existing target is replaced.

    Raises UserError, with nothing written, for a folder that is no complete safetensors checkpoint of a supported
    architecture, a direction that is not a unit vector of its width, NaN or infinity in a tensor to edit, or an
    adapter that could not be exact: of a model whose writers have biases or are experts, or of alpha 0.
    """
    source = Path(source)
    architecture = architecture_of(read_json(source, "config.json"))
    shards = read_shards(source)
    index = None if any(shard.name == SINGLE for shard in shards) else INDEX  # an index of other files is left out
    copies = [
        (path.name, real_file(source, path.name))
        for path in sorted(source.iterdir())
        if path.suffix in _COPIED and not path.is_dir() and (path.name == index or ".index." not in path.name)
    ]
    cells = [_Cell(source, edit, architecture, shards) for edit in edits]
    if len({cell.target for cell in cells}) != len(cells):
        raise UserError("two edits write to the same target: give each cell a folder of its own.")
    try:
        for cell in cells:
            shutil.rmtree(cell.partial, ignore_errors=True)
            cell.partial.mkdir(parents=True)
        with progress(sum(len(shard.entries) for shard in shards), "orthogonalize", "tensor") as bar:
            for shard in shards:
                _write_shard(shard, cells, bar)
        for cell in cells:
            for name, content in cell.small_files(copies):
                write_whole(cell.partial / name, content)
        return [cell.publish() for cell in cells]
    finally:
        for cell in cells:
            shutil.rmtree(cell.partial, ignore_errors=True)


class _Cell:
    """One edit under way: its direction ready for use, its folder in the making, its report."""

    def __init__(self, source: Path, edit: Edit, architecture: Architecture, shards: list[Shard]):
        target = Path(os.path.abspath(edit.target))  # noqa: PTH100 (a link stays a link)
        here, there = source.resolve(), target.resolve()
        if here == there or here.is_relative_to(there) or there.is_relative_to(here):
            raise UserError(f"{target}: the target overlaps the source {source}: write to another folder.")
        if target.is_symlink() or target.is_file():
            raise UserError(f"{target}: the target exists and is not a folder: remove it.")
        known = [target / name for name in ("config.json", CONFIG)]
        if target.is_dir() and any(target.iterdir()) and not any(path.exists() for path in known):
            raise UserError(f"{target}: the target is a folder, but not a checkpoint to replace: remove it.")
        v = edit.direction.detach().to("cpu", torch.float64)
        if v.shape != (architecture.d_model,):
            raise UserError(f"{target.name}: direction has shape {list(v.shape)}, the model {[architecture.d_model]}.")
        if not abs(v.norm().item() - 1) < 1e-3:
            raise UserError(f"{target.name}: direction has norm {v.norm().item():.6g}, not 1: normalise it.")
        if not math.isfinite(edit.alpha):
            raise UserError(f"{target.name}: alpha is {edit.alpha}: give a finite number.")
        self.source, self.target, self.alpha = source, target, float(edit.alpha)
        self.v = v / v.norm()
        self.update = -self.alpha * self.v
        # v^T W of each edited tensor, where that is all that is written.
        self.components: dict[str, list[Tensor]] | None = {} if edit.format == "lora" else None
        self.partial = target.with_name(f".{target.name}.partial")
        self.report = Report(target)
        self.architecture, self.embedded = architecture, edit.include_embedding and self.alpha != 0

        holder = {e.name: (shard, e) for shard in shards for e in shard.entries}
        missing = architecture.missing_writers(set(holder))
        if self.embedded and architecture.embedding_name not in holder:
            missing.append(architecture.embedding_name)
        if missing:
            raise UserError(f"{source}: tensor {missing[0]} is missing: is the checkpoint whole, and not quantized?")
        # Where config.json says tied but the file holds an unembedding, transformers uses that one: it is kept.
        self.untied: tuple[Shard, Entry] | None = None
        tied = architecture.tied and architecture.unembedding_name not in holder
        if self.embedded and tied and self.components is None:  # an adapter leaves the shared tensor alone
            self.untied = holder[architecture.embedding_name]
        for shard, entry in holder.values():
            axis, n = self.axis(entry), len(entry.shape)
            if axis is not None and (entry.dtype not in DTYPES or n < -axis or entry.shape[axis] != architecture.d_model):
                raise UserError(
                    f"{shard.where}: {entry.name} is {entry.dtype} {list(entry.shape)}, not floats of width "
                    f"{architecture.d_model} as config.json's hidden_size says: use an unquantized checkpoint."
                )

        if self.components is not None:
            self._refuse_what_no_adapter_can_say([entry for _, entry in holder.values() if self.axis(entry) is not None])

    def _refuse_what_no_adapter_can_say(self, edited: list[Entry]) -> None:
        biases = [entry.name for entry in edited if len(entry.shape) == 1]
        experts = [entry.name for entry in edited if ".experts." in entry.name]
        for why, names in (
            ("a bias, which a rank-1 adapter cannot change", biases),
            ("an expert, held fused by the model", experts),
        ):
            if names:
                raise UserError(f"{self.source}: {names[0]} is {why}: set orthogonalize.format to safetensors in params.yaml.")
        if not edited:
            raise UserError(f"{self.target.name}: alpha is 0, and an adapter of nothing is none: give another alpha.")

    def axis(self, entry: Entry) -> int | None:
        return self.architecture.writer_axis(entry.name, self.embedded) if self.alpha != 0 else None

    def header(self, shard: Shard) -> bytes:
        if self.untied is None or self.untied[0] is not shard:
            return shard.header
        entry, end = self.untied[1], shard.entries[-1].end
        added = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [end, end + entry.n_bytes]}
        return header_bytes(shard.fields | {self.architecture.unembedding_name: added})

    def small_files(self, copies: list[tuple[str, Path]]) -> Iterator[tuple[str, bytes]]:
        """All but the shards: the source's configuration and tokenizer, or the adapter."""
        if self.components is None:
            yield from ((name, self._copy(name, path.read_bytes())) for name, path in copies)
        else:
            whole = {name: torch.cat(parts) for name, parts in self.components.items()}
            source = Path(os.path.abspath(self.source))  # noqa: PTH100
            yield from adapter_files(self.target, source, whole, self.update, self.architecture.embedding_name).items()

    def _copy(self, name: str, content: bytes) -> bytes:
        """A small file of the source as this cell has it: config and index say if the embedding was untied."""
        if name == "config.json" and self.embedded and self.architecture.tied:
            fields = json.loads(content) | {"tie_word_embeddings": False}
        elif name == INDEX and self.untied is not None:
            shard, entry = self.untied
            fields = json.loads(content)
            fields["weight_map"][self.architecture.unembedding_name] = shard.name
            for key, more in (("total_size", entry.n_bytes), ("total_parameters", math.prod(entry.shape))):
                if key in (fields.get("metadata") or {}):
                    fields["metadata"][key] += more
        else:
            return content
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    def keep(self, entry: Entry, component: Tensor) -> None:
        if self.components is not None:
            self.components.setdefault(entry.name, []).append(component)

    def publish(self) -> Report:
        """The folder under its own name: from here on it is whole, and on disk."""
        self.report.bytes_written = sum(path.stat().st_size for path in self.partial.iterdir())
        sync(self.partial)
        old = self.target.with_name(f".{self.target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            self.target.rename(old)
        self.partial.rename(self.target)
        sync(self.target.parent)
        shutil.rmtree(old, ignore_errors=True)
        return self.report


class _Tally:
    """Squared norms of one edited tensor, gathered piece by piece."""

    def __init__(self) -> None:
        self.source = self.edited = self.left = self.deviation = 0.0

    def norms(self, before: Tensor, after: Tensor) -> None:
        # A product with itself runs on all threads and in one pass.
        self.source += torch.dot(before.reshape(-1), before.reshape(-1)).item()
        self.edited += torch.dot(after.reshape(-1), after.reshape(-1)).item()

    def components(self, before: Tensor, after: Tensor, alpha: float) -> None:
        self.left += after.norm().item() ** 2
        self.deviation += (after - (1 - alpha) * before).norm().item() ** 2


def _write_shard(shard: Shard, cells: list[_Cell], bar: tqdm) -> None:
    with ExitStack() as stack:
        reader = Reader(shard, stack.enter_context(shard.path.open("rb", buffering=0)))
        outs: list[FileIO | None] = []
        for cell in cells:
            whole = cell.components is None
            outs.append(stack.enter_context((cell.partial / shard.name).open("wb", buffering=0)) if whole else None)
            _write(outs[-1], cell.header(shard))
        flusher, unflushed = stack.enter_context(ThreadPoolExecutor(1)), 0
        flushing: Future[None] | None = None
        for entry in shard.entries:
            editing, copying, axis = [], [], None
            for cell, out in zip(cells, outs, strict=True):
                if cell.axis(entry) is None:
                    copying += [] if out is None else [out]
                    cell.report.n_copied += 1
                else:
                    axis = cell.axis(entry)
                    editing.append((cell, out, _Tally()))
            if not editing and not copying:
                continue  # unread: adapters alone are written
            # Pages go to disk while more are computed: else nearly all of them wait for the end.
            unflushed += entry.n_bytes
            if unflushed > _FLUSH and (flushing is None or flushing.done()):
                if flushing is not None:
                    flushing.result()
                unflushed, flushing = 0, flusher.submit(_sync, outs)
            reader.seek(entry.begin)
            (_edit_columns if axis == -2 else _edit_rows)(reader, entry, editing, copying)
            for cell, _, tally in editing:
                cell.report.residuals[entry.name] = math.sqrt(tally.left / (tally.edited or 1))
                cell.report.deviations[entry.name] = math.sqrt(tally.deviation / (tally.source or 1))
            bar.update()
        # As the unembedding of the cells that untie it, the embedding is read once more, for all of them.
        untying = [
            (cell.untied[1], out) for cell, out in zip(cells, outs, strict=True) if cell.untied and cell.untied[0] is shard
        ]
        if untying:
            embedding = untying[0][0]
            reader.seek(embedding.begin)
            _edit_rows(reader, embedding, [], [out for _, out in untying if out is not None])
        if flushing is not None:
            flushing.result()
        _sync(outs)


def _sync(outs: list[FileIO | None]) -> None:
    for out in outs:
        if out is not None:
            os.fsync(out.fileno())


def _edit_columns(reader: Reader, entry: Entry, editing: list, copying: list[FileIO]) -> None:
    """W - alpha v v^T W for [..., d_model, in], one matrix in memory at a time."""
    dtype = DTYPES[entry.dtype]
    *lead, d_model, width = entry.shape
    step = max(1, _CHUNK // max(1, width * dtype.itemsize))
    for _ in range(math.prod(lead)):
        raw = reader.take(d_model * width * dtype.itemsize)
        for out in copying:
            write_all(out, raw.numpy())
        matrix = raw.view(dtype).view(d_model, width)
        for cell, out, tally in editing:
            # Blocks of rows keep the float32 copies small. Cells are computed one by one, though a matrix product could
            # take them all: a checkpoint's bytes must not depend on which other cells were made beside it.
            v, update = (t.to(torch.promote_types(dtype, torch.float32)).split(step) for t in (cell.v, cell.update))
            blocks = matrix.split(step)
            before = sum(block.to(part.dtype).mT @ part for block, part in zip(blocks, v, strict=True))
            _check_finite(before, reader, entry)
            cell.keep(entry, before)
            after = torch.zeros_like(before)
            for block, part, change in zip(blocks, v, update, strict=True):
                block = block.to(part.dtype)
                edited = torch.addr(block, change, before).to(dtype)
                _write(out, edited.view(torch.uint8).numpy())
                edited = edited.to(part.dtype)
                after += edited.mT @ part
                tally.norms(block, edited)
            _check_finite(after, reader, entry)
            tally.components(before, after, cell.alpha)


def _edit_rows(reader: Reader, entry: Entry, editing: list, copying: list[FileIO]) -> None:
    """E - alpha E v v^T for [..., d_model], some rows in memory at a time; and the plain copy of any tensor."""
    dtype = DTYPES[entry.dtype] if editing else torch.uint8
    row = entry.shape[-1] * dtype.itemsize if editing else 1
    step = max(1, _CHUNK // row) * row
    for begin in range(0, entry.n_bytes, step):
        raw = reader.take(min(step, entry.n_bytes - begin))
        for out in copying:
            write_all(out, raw.numpy())
        for cell, out, tally in editing:
            v, update = (t.to(torch.promote_types(dtype, torch.float32)) for t in (cell.v, cell.update))
            block = raw.view(dtype).view(-1, len(v)).to(v.dtype)
            before = block @ v
            _check_finite(before, reader, entry)
            cell.keep(entry, before)
            edited = torch.addr(block, before, update).to(dtype)
            _write(out, edited.view(torch.uint8).numpy())
            edited = edited.to(v.dtype)
            after = edited @ v
            _check_finite(after, reader, entry)
            tally.norms(block, edited)
            tally.components(before, after, cell.alpha)


def _write(out: FileIO | None, data) -> None:
    if out is not None:
        write_all(out, data)


def _check_finite(component: Tensor, reader: Reader, entry: Entry) -> None:
    # v^T W is finite only if W is: NaN and infinity survive a product with zero. So W needs no second look.
    if not component.isfinite().all():
        raise UserError(f"{reader.shard.where}: {entry.name} has NaN or infinity in it, or would have: mend it.")
