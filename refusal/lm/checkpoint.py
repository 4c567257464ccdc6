"""The safetensors format read from its bytes, and which of a checkpoint folder's files are its weights.

Layout: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without holes
(https://huggingface.co/docs/safetensors#format). Nothing here is unpickled, and no link is followed out of the folder.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.files import sync, unique_keys

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the reference implementation's own limit
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; offsets in bytes from the start of the file's data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the folder, where it really lies, its header and tensors in file order."""

    folder: Path
    name: str
    path: Path
    header: bytes  # with its length in front: everything before the data
    fields: dict  # the header as JSON, metadata included
    entries: tuple[Entry, ...]

    @property
    def data_start(self) -> int:
        return len(self.header)

    @property
    def where(self) -> Path:
        """The file as a user knows it (`path` may be a hub blob, named by its hash)."""
        return self.folder / self.name


def read_shards(folder: Path) -> list[Shard]:
    """The weight files of a checkpoint folder, all headers checked.

    As transformers does, takes `model.safetensors` before `model.safetensors.index.json`.
    Raises UserError for a folder without either, a missing shard, one outside the folder, a tensor that is not
    where the index says, or a malformed file.
    """
    if (folder / SINGLE).exists():
        return [read_shard(folder, SINGLE)]
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no model.safetensors and no index of one: give a folder of safetensors weights.")
    named = weight_map(folder)
    shards = [read_shard(folder, name) for name in sorted(set(named.values()))]
    found: dict[str, str] = {}
    for shard in shards:
        for entry in shard.entries:
            if named.get(entry.name) != shard.name or entry.name in found:
                raise UserError(f"{shard.where}: tensor {entry.name} is not where the index has it: download both.")
            found[entry.name] = shard.name
    for name in named:
        if name not in found:
            raise UserError(f"{folder / named[name]}: tensor {name}, in the index, is missing: download both.")
    return shards


def weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index says. Raises UserError where it does not."""
    named = read_json(folder, INDEX).get("weight_map")
    if not isinstance(named, dict) or not all(isinstance(name, str) for name in named.values()):
        raise UserError(f"{folder / INDEX}: weight_map does not name each tensor's file: download it again.")
    return named


def read_shard(folder: Path, name: str) -> Shard:
    """One file's header, checked against its size. Raises UserError naming the file and the tensor."""
    path = real_file(folder, name)
    where = folder / name
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(size - 8, _MAX_HEADER):
            raise UserError(f"{where}: no safetensors file, or cut short in its header: download it again.")
        header = head + file.read(length)
    fields = _object(where, header[8:])
    entries = [_entry(where, key, value) for key, value in fields.items() if key != "__metadata__"]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    at = 0
    for entry in entries:
        if entry.begin != at:
            raise UserError(f"{where}: tensor {entry.name} overlaps another or leaves a hole: download it again.")
        at = entry.end
        if at > size - len(header):
            raise UserError(f"{where}: tensor {entry.name} lies beyond the end of the file: download it again.")
    if at != size - len(header):
        raise UserError(f"{where}: {size - len(header) - at} bytes belong to no tensor: download it again.")
    return Shard(folder, name, path, header, fields, tuple(entries))


class Reader:
    """The data of a shard in file order, through one buffer: a piece is valid until the next is taken."""

    def __init__(self, shard: Shard, file: FileIO):
        self.shard, self.file, self.buffer = shard, file, torch.empty(0, dtype=torch.uint8)
        self.seek(0)

    def seek(self, begin: int) -> None:
        self.file.seek(self.shard.data_start + begin)

    def take(self, n: int) -> Tensor:
        if len(self.buffer) < n:
            self.buffer = torch.empty(n, dtype=torch.uint8)
        view, at = memoryview(self.buffer.numpy()), 0  # type: ignore[arg-type]
        while at < n:
            got = self.file.readinto(view[at:n])
            if not got:
                raise UserError(f"{self.shard.where}: the file became shorter while it was read: run again.")
            at += got
        return self.buffer[:n]


class Writer:
    """A safetensors file written row by row, in any order, so that memory holds no more than the rows at hand.

    tensors: {name: (dtype, shape)}, the rows along the first axis. The header is written first and each row at its place;
    bytes are those that safetensors.torch.save_file would write. The file appears under its name when a `with` ends well,
    whole and on disk. Raises UserError if a row was not written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]):
        self.path, self.partial = path, path.with_name(f".{path.name}.partial")
        self.tensors, self._begin, fields, at = tensors, {}, {}, 0
        names = {dtype: name for name, dtype in DTYPES.items()}
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            end = at + math.prod(shape) * dtype.itemsize
            fields[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [at, end]}
            self._begin[name], at = at, end
        self._header, self._missing = header_bytes(fields), {name: set(range(shape[0])) for name, (_, shape) in tensors.items()}
        self._size = len(self._header) + at

    def __enter__(self) -> "Writer":
        self._file = self.partial.open("wb", buffering=0)
        write_all(self._file, self._header)
        self._file.truncate(self._size)
        return self

    def put(self, name: str, rows: Sequence[int], values: Tensor) -> None:
        """Write values [len(rows), ...], of the tensor's dtype, as these rows of `name`."""
        dtype, shape = self.tensors[name]
        if values.dtype != dtype or values.shape != (len(rows), *shape[1:]) or not all(0 <= row < shape[0] for row in rows):
            given = f"{values.dtype} {list(values.shape)} for rows {list(rows)[:3]}..."
            raise ValueError(f"{name}: rows of {dtype} {list(shape)} were expected, not {given}")
        for row, value in zip(rows, values.detach().cpu().contiguous(), strict=True):
            data = value.reshape(-1).view(torch.uint8).numpy()
            self._file.seek(len(self._header) + self._begin[name] + row * len(data))
            write_all(self._file, data)
        self._missing[name] -= set(rows)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                if lacking := [name for name, rows in self._missing.items() if rows]:
                    raise UserError(f"{self.path}: {len(self._missing[lacking[0]])} rows of {lacking[0]} were not written")
                os.fsync(self._file.fileno())
                self.partial.rename(self.path)
                sync(self.path.parent)
        finally:
            self._file.close()
            self.partial.unlink(missing_ok=True)


class Stack:
    """A tensor [n, n_layers, d_model] in a file, of which memory holds what is asked for: `stack[:, layer][first:last]`.

    `stack[rows]` is the same of some of its rows, or of all in another order.
    """

    def __init__(self, shard: Shard, entry: Entry, rows: Sequence[int] | None = None):
        self.shard, self.entry, self.rows = shard, entry, range(entry.shape[0]) if rows is None else rows
        self.shape = (len(self.rows), *entry.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: tuple[slice, int]) -> "Layer": ...

    @overload
    def __getitem__(self, index: Tensor | slice) -> "Stack": ...

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Stack(self.shard, self.entry, self.rows[index])
        if isinstance(index, Tensor):
            return Stack(self.shard, self.entry, [self.rows[i] for i in index.tolist()])
        return Layer(self, index[1])


class Layer:
    """One layer of a stack, [n, d_model], of which rows are read when they are sliced: `layer[first:last]`, `layer[:]`."""

    def __init__(self, stack: Stack, index: int):
        self.stack, self.index = stack, index
        self.shape = (stack.shape[0], stack.shape[2])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, which: slice) -> Tensor:
        shard, entry, rows = self.stack.shard, self.stack.entry, self.stack.rows[which]
        (_, n_layers, d_model), dtype = self.stack.shape, DTYPES[entry.dtype]
        found = torch.empty(len(rows), d_model, dtype=dtype)
        width, data = d_model * dtype.itemsize, found.view(torch.uint8).numpy()
        first, step = shard.data_start + entry.begin + self.index * width, n_layers * width
        with shard.path.open("rb", buffering=0) as file:
            at = file.fileno()
            for to, row in zip(data, rows, strict=True):
                if os.preadv(at, [to], first + row * step) != width:
                    raise UserError(f"{shard.where}: the file became shorter while it was read: run again.")
        return found


def read_stacks(path: Path) -> dict[str, Stack]:
    """The tensors of a file of activations. Raises UserError for a malformed one."""
    shard = read_shard(path.parent, path.name)
    return {entry.name: Stack(shard, entry) for entry in shard.entries}


def header_bytes(fields: dict) -> bytes:
    """A header with its length, padded to 8 bytes so that the data stay aligned."""
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def real_file(folder: Path, name: str) -> Path:
    """The regular file behind `name`. Links may stay inside the folder or, in a hub snapshot, lead to the cache's blobs.

    Raises UserError for a missing file and for a path or link that leaves the folder.
    """
    root = folder.resolve()
    real = (root / name).resolve()
    # The repository's blobs, which may be links to those that all repositories share.
    homes = [root, *(parent / "blobs" for parent in root.parents[1:3] if root.parent.name == "snapshots")]
    if Path(name).name != name or not any(real.is_relative_to(home) for home in homes):
        raise UserError(f"{folder / name}: the file lies outside its folder: put the file itself there.")
    if not real.is_file():
        raise UserError(f"{folder / name}: the file is missing: download it again.")
    return real


def read_json(folder: Path, name: str) -> dict:
    """A JSON object in a file of the folder. Raises UserError naming the file."""
    return _object(folder / name, real_file(folder, name).read_bytes())


def write_all(out: FileIO, data) -> None:
    """All of a buffer to an unbuffered file, which may take it in several bites."""
    view = memoryview(data).cast("B")
    while view:
        view = view[out.write(view) :]


def _object(where: Path, text: bytes) -> dict:
    try:
        value = json.loads(text, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{where}: a JSON object was expected: download it again.")
    return value


def _entry(where: Path, name: str, value: dict) -> Entry:
    try:
        begin, end = value["data_offsets"]
        dtype, shape = value["dtype"], tuple(value["shape"])
        whole = all(type(n) is int and n >= 0 for n in (begin, end, *shape))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or begin > end or not isinstance(dtype, str):
        raise UserError(f"{where}: tensor {name} has no proper dtype, shape and data_offsets: download it again.")
    if dtype in _BITS and (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
        raise UserError(f"{where}: tensor {name} has {end - begin} bytes, not those of {dtype} {list(shape)}.")
    return Entry(name, dtype, shape, begin, end)
