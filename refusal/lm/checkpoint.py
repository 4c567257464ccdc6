"""A checkpoint's folder: which of its files are the weights and what is in them, read through safetensors and never unpickled.

No link is followed out of the folder.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.files import unique_keys, write_whole

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_SYNC = 1 << 26  # bytes written between two calls of fsync
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, its dtype as the format calls it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the folder, where it really lies, its metadata, and its tensors in file order."""

    folder: Path
    name: str
    path: Path
    metadata: dict[str, str]
    entries: tuple[Entry, ...]

    @property
    def where(self) -> Path:
        """The file as a user knows it (`path` may be a hub blob, named by its hash)."""
        return self.folder / self.name

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, mapped into memory: read where it is used."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(name)

    def tensors(self) -> Iterator[tuple[Entry, Tensor]]:
        """All of its tensors in file order, mapped as `tensor`'s."""
        with safe_open(self.path, framework="pt") as file:
            for entry in self.entries:
                yield entry, file.get_tensor(entry.name)


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
    file_of = weight_map(folder)
    shards = [read_shard(folder, name) for name in sorted(set(file_of.values()))]
    for shard in shards:
        names = {entry.name for entry in shard.entries}
        if misplaced := sorted(name for name in names if file_of.get(name) != shard.name):
            raise UserError(f"{shard.where}: tensor {misplaced[0]} is not where the index has it: download both.")
        if missing := sorted(name for name, file in file_of.items() if file == shard.name and name not in names):
            raise UserError(f"{shard.where}: tensor {missing[0]}, in the index, is missing: download both.")
    return shards


def weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index says. Raises UserError where it does not."""
    file_of = read_json(folder, INDEX).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(name, str) for name in file_of.values()):
        raise UserError(f"{folder / INDEX}: weight_map does not name each tensor's file: download it again.")
    return file_of


def make_loadable(folder: Path) -> list[str]:
    """Change, in a copied checkpoint, what keeps transformers from loading it on another machine; what was changed, in words.

    `config.json` may name kernels that it was trained with, or that are to be fetched from the hub: left out, torch's own
    compute the same. An index may lack the `metadata` that transformers reads, or the size in it.
    """
    changed, config = [], read_json(folder, "config.json")
    kernels = {name: config.pop(name) for name in _KERNELS if config.get(name) not in (None, "eager", "sdpa")}
    for name, kernel in kernels.items():
        changed.append(f"config.json: {name} {kernel} is left out: torch's own takes its place")
    if kernels:
        write_whole(folder / "config.json", (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode())
    if not (folder / SINGLE).exists() and (folder / INDEX).exists():
        index = read_json(folder, INDEX)
        stated = index.get("metadata")
        metadata: dict[str, Any] = stated if isinstance(stated, dict) else {}
        if type(metadata.get("total_size")) not in (int, float):
            metadata["total_size"] = sum(entry.n_bytes for shard in read_shards(folder) for entry in shard.entries)
            index["metadata"] = metadata
            write_whole(folder / INDEX, (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode())
            changed.append(f"{INDEX}: the size of all tensors is put in: it was not there")
    return changed


def read_shard(folder: Path, name: str) -> Shard:
    """One file's header, which safetensors checks against its size. Raises UserError naming the file."""
    path = real_file(folder, name)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: (file.get_slice(key), file.get_tensor(key).nbytes) for key in file.offset_keys()}
            entries = tuple(Entry(key, s.get_dtype(), tuple(s.get_shape()), n_bytes) for key, (s, n_bytes) in slices.items())
            return Shard(folder, name, path, file.metadata() or {}, entries)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / name}: no whole safetensors file ({error}): download it again.") from None


def header_bytes(entries: Iterable[Entry], metadata: Mapping[str, str]) -> bytes:
    """What comes before the tensors in a file of `entries`, whose bytes follow in this order without holes: the length of a
    JSON object in 8 bytes, and that, padded to a multiple of 8 (https://huggingface.co/docs/safetensors#format)."""
    fields: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.n_bytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [begin, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def data_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them, without a copy where it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


class Output:
    """A file that goes to disk while more of it is computed: else nearly all of it would wait for the end."""

    def __init__(self, path: Path):
        self._file, self._thread, self._synced = path.open("wb"), ThreadPoolExecutor(1), 0
        self._syncs: list[Future[None]] = []

    def write(self, data: bytes | memoryview) -> None:
        """Append to the file."""
        self._file.write(data)
        if self._file.tell() - self._synced > _SYNC and all(one.done() for one in self._syncs):
            self._synced = self._file.tell()
            self._syncs.append(self._thread.submit(os.fsync, self._file.fileno()))

    def __enter__(self) -> Output:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file, self._thread:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
                for one in self._syncs:
                    one.result()


# Named by its content: no file that anyone keeps for another purpose has such a path.
_DVC_OBJECT = re.compile(r"/files/md5/[0-9a-f]{2}/[0-9a-f]{30}$")


def real_file(folder: Path, name: str) -> Path:
    """The regular file behind `name`. Links may stay in the folder, or lead to an object of a DVC cache (`cache.type symlink`)
    or, in a hub snapshot, to the cache's blobs.

    Raises UserError for a missing file and for a path or link that leaves the folder.
    """
    root = folder.resolve()
    real = (root / name).resolve()
    # The repository's blobs, which may be links to those that all repositories share.
    homes = [root, *(parent / "blobs" for parent in root.parents[1:3] if root.parent.name == "snapshots")]
    inside = any(real.is_relative_to(home) for home in homes) or _DVC_OBJECT.search(real.as_posix())
    if Path(name).name != name or not inside:
        raise UserError(f"{folder / name}: the file lies outside its folder: put the file itself there.")
    if not real.is_file():
        raise UserError(f"{folder / name}: the file is missing: download it again.")
    return real


def read_json(folder: Path, name: str) -> dict:
    """A JSON object in a file of the folder. Raises UserError naming the file."""
    try:
        value = json.loads(real_file(folder, name).read_bytes(), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / name}: not valid JSON ({error}): download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{folder / name}: a JSON object was expected: download it again.")
    return value
