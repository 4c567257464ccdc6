"""Checkpoints whose writers no longer reach a direction or subspace, edited on disk: W <- W - alpha B^T B W.

Weight orthogonalization (Arditi et al. 2024, arXiv 2406.11717, section 4.1; one direction and alpha = 1 there), for attention
and MLP output matrices and their biases, and for the transposed embedding. With the embedding the result equals run-time
ablation at `writes` for every alpha, and at `paper` for alpha = 1, except where a norm stands between writer and stream (see
`refusal.lm.architecture.Architecture`: Gemma 2 and 3).

No model is built: tensors are mapped from the source's files, edited in blocks of columns (`Intervention.edit`) and written one
by one. The same edit can be written as a LoRA adapter (`refusal.lm.adapter`), thousands of times smaller.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor
from tqdm import tqdm

from refusal.io.errors import UserError
from refusal.io.files import SyncedFile, sync, write_whole
from refusal.io.progress import progress
from refusal.lm.adapter import CONFIG, ROOT, WEIGHTS
from refusal.lm.architecture import Architecture, architecture_of, untied_config
from refusal.lm.checkpoint import DTYPES, INDEX, SINGLE, Entry, Shard, data_of, header_bytes, read_json, read_shards, real_file
from refusal.lm.gguf_writer import FORMATS, check_writable, write_gguf
from refusal.method.interventions import Intervention
from refusal.method.norms import Norms, change_of

_COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken")  # never pickles; other safetensors hold unedited weights
_BLOCK = 1 << 18  # elements computed at once, which a cache holds


@dataclass(frozen=True)
class Edit:
    """One checkpoint to write, whole (`safetensors`), as an adapter to the source (`lora`), or whole with a file
    `<target's name>.gguf` of the same weights in it (`refusal.lm.gguf_writer.FORMATS`).

    intervention: the basis to take out and alpha (0 copies the source's tensors byte for byte); its sites play no role. Of one
        basis a layer each is taken out of its layer's writers, and of the embedding none, as at `writes`.
    norms: what of each matrix keeps its length (`refusal.method.norms`); of biases `columns` alone does.
    """

    target: Path  # replaced if it exists, only once the new one is whole
    intervention: Intervention
    include_embedding: bool = True
    format: Literal["safetensors", "lora", "gguf-f16", "gguf-bf16"] = "safetensors"
    norms: Norms | None = None

    @property
    def embedded(self) -> bool:
        """Whether the embedding's values change; with a basis a layer they do not, as at run time."""
        return self.include_embedding and self.intervention.alpha != 0 and not self.intervention.per_layer

    def axis(self, architecture: Architecture, name: str) -> int | None:
        """The axis of a tensor that is d_model, counted from the end; None for a tensor that stays as it is."""
        axis = architecture.writer_axis(name, self.embedded) if self.intervention.alpha != 0 else None
        basis = None if axis is None else self.at(architecture, name).intervention.basis
        return axis if basis is not None and bool(basis.any()) else None

    def at(self, architecture: Architecture, writer: str) -> Edit:
        """The same with what is taken out of this writer: of one basis a layer its layer's, which may be zero."""
        one, layer = self.intervention, architecture.layer_of(writer)
        if one.basis is None or not one.per_layer or layer is None:
            return self
        basis = one.basis[layer]
        return replace(self, intervention=replace(one, basis=basis, alpha=one.alpha if basis.any() else 0.0))


@dataclass
class Report:
    """What an edit did, measured on the tensors as written (of an adapter: as merged), after the cast to the file's dtype.

    residuals: |B W'| / |W'| (Frobenius) of each edited tensor: rounding at alpha = 1.
    deviations: |B W' - (1 - alpha) B W| / |W|, which should be rounding at every alpha, but where norms of rows are kept.
    """

    residuals: dict[str, float] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    casts: dict[str, float] = field(default_factory=dict)  # |W_gguf - W| / |W| of each tensor, where GGUF was asked for
    n_copied: int = 0  # tensors taken over as bytes; with an adapter, left as they are

    @property
    def n_edited(self) -> int:
        return len(self.residuals)

    @property
    def max_residual(self) -> float:
        return max(self.residuals.values(), default=0.0)

    @property
    def max_deviation(self) -> float:
        return max(self.deviations.values(), default=0.0)


@dataclass(frozen=True)
class _Source:
    """The checkpoint to edit: its folder, its weights, and the files that are copied with them."""

    folder: Path
    architecture: Architecture
    shards: list[Shard]
    small_files: dict[str, Path]
    embedding: str  # its tensor's name in the files

    @property
    def shard_of(self) -> dict[str, tuple[Shard, Entry]]:
        """Each tensor by name, and the file that holds it."""
        return {entry.name: (shard, entry) for shard in self.shards for entry in shard.entries}


def orthogonalize(source: Path, edits: Sequence[Edit]) -> list[Report]:
    """Write an edited copy of the checkpoint folder `source` for each edit; reports in order.

    Keeps shards, tensor order, index, metadata and every unedited byte; copies config, tokenizer and template files.
    Arithmetic is float32 (float64 for float64 files) with one cast. A tied embedding that is edited is untied:
    `lm_head.weight` keeps the original bytes and config.json says so. Memory holds one edited matrix and a few megabytes.
    Folders appear whole or not at all, and an existing target is replaced.

    Raises UserError, with nothing written, for a folder that is no complete safetensors checkpoint of a supported
    architecture, a basis of another width or of other layers, NaN or infinity in a tensor to edit, an adapter that could
    not be exact (of a model whose writers have biases or are experts, or of alpha 0), or what `write_gguf` refuses.
    """
    checkpoint = _read_source(Path(source))
    if any(edit.format in FORMATS for edit in edits):
        check_writable(checkpoint.folder)
    targets = [_check(checkpoint, edit) for edit in edits]
    if len(set(targets)) != len(targets):
        raise UserError("two edits write to the same target: give each a folder of its own.")
    partials = [target.with_name(f".{target.name}.partial") for target in targets]
    reports = []
    try:
        with progress(len(edits) * len(checkpoint.shard_of), "orthogonalize", "tensor") as bar:
            for edit, partial in zip(edits, partials, strict=True):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
                write = _write_adapter if edit.format == "lora" else _write_checkpoint
                reports.append(write(checkpoint, edit, partial, bar))
                if kind := FORMATS.get(edit.format):
                    reports[-1].casts = write_gguf(partial, partial / f"{edit.target.name}.gguf", kind)
        for partial, target in zip(partials, targets, strict=True):
            _publish(partial, target)
    finally:
        for partial in partials:
            shutil.rmtree(partial, ignore_errors=True)
    return reports


def _read_source(folder: Path) -> _Source:
    architecture, shards = architecture_of(read_json(folder, "config.json")), read_shards(folder)
    index = None if any(shard.name == SINGLE for shard in shards) else INDEX  # an index of other files is left out
    small = [
        path.name
        for path in sorted(folder.iterdir())
        if path.suffix in _COPIED and not path.is_dir() and (path.name == index or ".index." not in path.name)
    ]
    names = {entry.name for shard in shards for entry in shard.entries}
    embedding = architecture.saved_as(architecture.embedding_name, names)
    return _Source(folder, architecture, shards, {name: real_file(folder, name) for name in small}, embedding)


def _check(source: _Source, edit: Edit) -> Path:
    """The target's absolute path. Raises UserError for what cannot be done."""
    target = Path(os.path.abspath(edit.target))  # noqa: PTH100 (a link stays a link)
    here, there = source.folder.resolve(), target.resolve()
    if here == there or here.is_relative_to(there) or there.is_relative_to(here):
        raise UserError(f"{target}: the target overlaps the source {source.folder}: write to another folder.")
    if target.is_symlink() or target.is_file():
        raise UserError(f"{target}: the target exists and is not a folder: remove it.")
    known = [target / name for name in ("config.json", CONFIG)]
    if target.is_dir() and any(target.iterdir()) and not any(path.exists() for path in known):
        raise UserError(f"{target}: the target is a folder, but not a checkpoint to replace: remove it.")

    basis, alpha, architecture = edit.intervention.basis, edit.intervention.alpha, source.architecture
    if basis is None:
        raise UserError(f"{target.name}: weights are edited with a basis, and the baseline has none: give one [k, d_model].")
    if basis.shape[-1] != architecture.d_model:
        raise UserError(f"{target.name}: the basis is {list(basis.shape)}, and the model's d_model is {architecture.d_model}.")
    if edit.intervention.per_layer and len(basis) != architecture.n_layers:
        raise UserError(f"{target.name}: the basis is for {len(basis)} layers, and the model has {architecture.n_layers}.")
    if not math.isfinite(alpha):
        raise UserError(f"{target.name}: alpha is {alpha}: give a finite number.")

    missing = architecture.missing_writers(set(source.shard_of))
    if edit.embedded and source.embedding not in source.shard_of:
        missing.append(source.embedding)
    if missing:
        raise UserError(f"{source.folder}: tensor {missing[0]} is missing: is the checkpoint whole, and not quantized?")
    edited = []
    for shard, entry in source.shard_of.values():
        if (axis := edit.axis(architecture, entry.name)) is None:
            continue
        edited.append(entry)
        if entry.dtype not in DTYPES or len(entry.shape) < -axis or entry.shape[axis] != architecture.d_model:
            raise UserError(
                f"{shard.where}: {entry.name} is {entry.dtype} {list(entry.shape)}, not floats of width "
                f"{architecture.d_model} as config.json's hidden_size says: use an unquantized checkpoint."
            )
    if edit.format == "lora":
        _check_adapter(edit, edited, architecture)
    return target


def _check_adapter(edit: Edit, edited: Sequence[Entry], architecture: Architecture) -> None:
    target = edit.target
    if edit.norms:
        raise UserError(f"{target.name}: {edit.norms} that keep their norms are no edit of low rank: write safetensors.")
    if not edited:
        raise UserError(f"{target.name}: alpha is 0, and an adapter of nothing is none: give another alpha.")
    for entry in edited:
        why = "a bias, which an adapter cannot change" if len(entry.shape) == 1 else ""
        if len(entry.shape) == 3 or ".experts." in entry.name:
            why = "an expert, held fused by the model"
        elif architecture.names.in_model(entry.name)[0] != entry.name:
            why = "called otherwise in the model, by whose names adapters go"
        if why:
            raise UserError(f"{target.name}: {entry.name} is {why}: set orthogonalize.format to safetensors in params.yaml.")


def _edit(edit: Edit, axis: int, shard: Shard, entry: Entry, w: Tensor, report: Report) -> Iterator[tuple[Tensor, Tensor]]:
    """(W', B W) of a tensor whose axis `axis` is d_model, in pieces in the order of its file: its matrices [d_model, n], or some
    rows of the embedding, whose columns these are; B W is [k, n]. How far they agree goes into the report at the end.

    Computed in blocks of columns, each of which is edited by itself, so that what is held in a wider dtype stays small.
    """
    intervention, wide = edit.intervention, torch.promote_types(w.dtype, torch.float32)
    step = max(1, _BLOCK // w.shape[axis])
    norms = None if (w.ndim == 1 or entry.name.endswith("bias")) and edit.norms == "rows" else edit.norms
    squares = torch.zeros(4, dtype=torch.float64)  # of W, W', B W' and B W' - (1 - alpha) B W
    experts = w.unbind() if w.ndim == 3 else [w]
    matrices = experts if axis == -2 else [one.reshape(-1, w.shape[-1]).mT for one in experts]
    size = w.shape[-1] if axis == -2 else step
    for change, before in ((change_of(intervention, norms, m, step), part) for m in matrices for part in m.split(size, 1)):
        after = torch.empty_like(before)
        components = torch.empty(intervention.rank, before.shape[-1], dtype=wide)
        blocks = zip(*(t.split(step, -1) for t in (before, after, components)), strict=True)
        for columns, changed, component in blocks:
            for target, value in zip((changed, component), change(columns), strict=True):
                target.copy_(value)
            left = intervention.component(changed)
            # B W is finite only if W is: NaN and infinity survive a product with zero. So W needs no second look.
            if not (component.isfinite().all() and left.isfinite().all()):
                raise UserError(
                    f"{shard.where}: {entry.name} has NaN or infinity in it, or the edit overflows {entry.dtype}: fix it."
                )
            for i, part in enumerate((columns, changed, left, left - (1 - intervention.alpha) * component)):
                squares[i] += torch.linalg.vector_norm(part, dtype=wide).double() ** 2
        yield after if axis == -2 else after.mT, components
    source, written, left_over, deviation = squares.tolist()
    report.residuals[entry.name] = math.sqrt(left_over / (written or 1))
    report.deviations[entry.name] = math.sqrt(deviation / (source or 1))


def _write_checkpoint(source: _Source, edit: Edit, partial: Path, bar: tqdm) -> Report:
    """The source's files with its writers edited."""
    report, architecture = Report(), source.architecture
    # Where config.json says tied but the file holds an unembedding, transformers uses that one: it is kept.
    untied: tuple[Shard, Entry] | None = None
    if edit.embedded and architecture.tied and not architecture.holds_unembedding(source.shard_of):
        untied = source.shard_of[source.embedding]
    for shard in source.shards:
        # The unembedding takes the embedding's place, as it was, behind all others.
        added = [replace(untied[1], name=architecture.unembedding_name)] if untied is not None and untied[0] is shard else []
        with SyncedFile(partial / shard.name) as out:
            out.write(header_bytes([*shard.entries, *added], shard.metadata))
            for entry, tensor in shard.tensors():
                if (axis := edit.axis(architecture, entry.name)) is None:
                    report.n_copied += 1
                    out.write(data_of(tensor))
                else:
                    for piece, _ in _edit(edit.at(architecture, entry.name), axis, shard, entry, tensor, report):
                        out.write(data_of(piece))
                bar.update()
            for _ in added:
                out.write(data_of(shard.tensor(source.embedding)))
    for name, path in source.small_files.items():
        write_whole(partial / name, _small_file(name, path.read_bytes(), edit, architecture, untied))
    return report


def _small_file(name: str, content: bytes, edit: Edit, architecture: Architecture, untied: tuple[Shard, Entry] | None) -> bytes:
    """A small file of the source as the edit has it: config and index say if the embedding was untied."""
    if name == "config.json" and edit.embedded and architecture.tied:
        fields = untied_config(json.loads(content))
    elif name == INDEX and untied is not None:
        shard, entry = untied
        fields = json.loads(content)
        fields["weight_map"][architecture.unembedding_name] = shard.name
        for key, more in (("total_size", entry.n_bytes), ("total_parameters", math.prod(entry.shape))):
            if key in (fields.get("metadata") or {}):
                fields["metadata"][key] += more
    else:
        return content
    return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()


def _write_adapter(source: _Source, edit: Edit, partial: Path, bar: tqdm) -> Report:
    """What the edit adds to the source, in two files; the source's own stay where they are."""
    report, tensors, modules = Report(), {}, set()
    for shard in source.shards:
        for entry, tensor in shard.tensors():
            bar.update()
            if (axis := edit.axis(source.architecture, entry.name)) is None:
                report.n_copied += 1
                continue
            at = edit.at(source.architecture, entry.name)
            a = torch.cat([component for _, component in _edit(at, axis, shard, entry, tensor, report)], -1)
            module = entry.name.removesuffix(".weight")
            modules.add(module if edit.intervention.per_layer else module.rpartition(".")[2])
            for name, matrix in (("A", a), ("B", at.intervention.update(a))):
                kind = f"lora_embedding_{name}" if axis == -1 else f"lora_{name}.weight"
                tensors[f"{ROOT}{module}.{kind}"] = matrix.contiguous()
    config = {
        # From the target: base and adapter can move together, and no machine's path is in the files.
        "base_model_name_or_path": os.path.relpath(source.folder, edit.target),
        "lora_alpha": edit.intervention.rank,  # PEFT scales B A by lora_alpha / r
        "peft_type": "LORA",
        "r": edit.intervention.rank,
        "target_modules": sorted(modules),
        "task_type": "CAUSAL_LM",
    }
    write_whole(partial / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    write_whole(partial / WEIGHTS, save(tensors))
    return report


def _publish(partial: Path, target: Path) -> None:
    """The folder under its own name: from here on it is whole, and on disk."""
    sync(partial)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)
