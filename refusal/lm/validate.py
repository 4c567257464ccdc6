"""What a checkpoint from elsewhere must be before anything of it is copied: files of its own folder, whole, finite, harmless.

Nothing that could run is read: no pickle, no code that `auto_map` names. A chat template is a program, which the sandbox of
transformers keeps from Python's internals but not from running for ever or filling the memory; so it is tried first in a
process of its own with limits on both.
"""

from __future__ import annotations

import multiprocessing
import resource
from contextlib import suppress
from fnmatch import fnmatch
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from refusal.io.errors import UserError
from refusal.io.progress import progress
from refusal.lm import qwen1
from refusal.lm.adapter import CONFIG
from refusal.lm.architecture import architecture_of
from refusal.lm.checkpoint import DTYPES, Shard, read_json, read_shards, real_file
from refusal.lm.load import DTYPES as LOADED
from refusal.lm.load import load_tokenizer, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Configuration, tokenizer and chat template: what a checkpoint needs beside its weights.
SMALL_FILES = ["*.json", "*.jinja", "*.tiktoken", "tokenizer.model", "merges.txt", "vocab.txt"]
_CHUNK = 1 << 22  # elements of a tensor that are looked at together
# What a chat template may take; a real one takes milliseconds.
_CPU_SECONDS, _MEMORY = 2, 1 << 30
_WALL_SECONDS = 60


def small_files(folder: Path) -> dict[str, Path]:
    """Configuration, tokenizer and template files by name. Raises UserError for one that lies elsewhere, or is no file."""
    names = sorted(path.name for path in folder.iterdir())
    return {name: real_file(folder, name) for name in names if any(fnmatch(name, pattern) for pattern in SMALL_FILES)}


def validate_checkpoint(folder: Path, system_prompt: str | None = None, thinking: bool | None = None) -> None:
    """Refuse a checkpoint that no later stage could use, before its weights are fetched or copied."""
    if CONFIG in small_files(folder):
        raise UserError(f"{folder / CONFIG}: an adapter, which leads to another model: give a folder with the adapter merged")
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if files and not (folder / "config.json").exists():
        raise UserError(f"{folder}: holds {files[0]}, a GGUF file, and no checkpoint: set model.id to {folder / files[0]}")
    if qwen1.is_qwen1(folder):
        qwen1.read_config(folder)
    else:
        architecture_of(read_json(folder, "config.json"), folder)
        _try_template(folder, system_prompt, thinking)


def check_weights(folder: Path, dtype: str) -> list[Shard]:
    """The weight files, after every tensor was read once, in chunks, and is finite in the dtype that it is loaded in.

    Raises UserError naming file and tensor, for weights without the tensors that write to the residual stream under their names
    (which transformers can load, and `orthogonalize` could not edit), and as `read_shards` does.
    """
    shards = read_shards(folder)
    if not qwen1.is_qwen1(folder):
        architecture = architecture_of(read_json(folder, "config.json"), folder)
        names = {entry.name for shard in shards for entry in shard.entries}
        embedding = architecture.saved_as(architecture.embedding_name, names)
        if missing := [*architecture.missing_writers(names), *({embedding} - names)]:
            raise UserError(
                f"{folder}: tensor {missing[0]} is missing: the checkpoint is not whole, or names its tensors otherwise: save it "
                "with transformers' save_pretrained"
            )
    n_bytes = sum(entry.n_bytes for shard in shards for entry in shard.entries)
    with progress(n_bytes, f"check of {folder.name}", "B") as bar:
        for path, entry, tensor in ((shard.where, *read) for shard in shards for read in shard.tensors()):
            where = f"{path}: tensor {entry.name}"
            if entry.dtype not in DTYPES:
                raise UserError(
                    f"{where} is {entry.dtype}, and a checkpoint of {', '.join(DTYPES)} is needed: give one that is not quantized"
                )
            for values in tensor.flatten().split(_CHUNK):
                if not values.isfinite().all():
                    raise UserError(f"{where} holds NaN or infinity: download it again")
                if not values.to(LOADED[dtype]).isfinite().all():
                    raise UserError(f"{where} holds values beyond {dtype}: set model.dtype in params.yaml to float32 or bfloat16")
                bar.update(values.nbytes)
    return shards


def _try_template(folder: Path, system_prompt: str | None, thinking: bool | None) -> None:
    """One chat through the folder's template, in a fork of this process, which is killed where it does not end."""
    endless, filled = (
        f"{folder}: its chat template cannot be used ({why}): fix it, or give another checkpoint"
        for why in (f"it runs for {_CPU_SECONDS} s and more", "it fills the memory")
    )
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    child = fork.Process(target=_render, args=(load_tokenizer(folder, thinking), system_prompt, filled, sender))
    child.start()
    sender.close()
    try:
        # A fork may wait for ever, taking no processor time, for a lock that a thread of the forked process held.
        says = receiver.recv() if receiver.poll(_WALL_SECONDS) else endless
    except EOFError:  # killed at its limit of processor time
        says = endless
    finally:
        child.kill()
        child.join()
    if says:
        raise UserError(says)


def _render(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, filled: str, sender: Connection) -> None:
    """Within limits on memory and time: send what is wrong with the template, "" where nothing is."""
    held = psutil.Process().memory_info().vms
    most = {resource.RLIMIT_CORE: 0, resource.RLIMIT_CPU: _CPU_SECONDS, resource.RLIMIT_AS: held + _MEMORY}
    for limit, soft in most.items():
        hard = resource.getrlimit(limit)[1]
        with suppress(ValueError, OSError):  # macOS has no limit of memory; that of time holds there too
            resource.setrlimit(limit, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
    says = ""
    try:
        render_chats(tokenizer, ["How do I paint a door?"], system_prompt)
    except UserError as error:
        says = str(error)
    except MemoryError:
        says = filled
    sender.send(says)
