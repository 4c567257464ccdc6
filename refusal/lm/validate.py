"""What a checkpoint from elsewhere must be before anything of it is copied: files of its own folder, whole, finite, harmless.

Nothing that could run is read: no pickle, no code that `auto_map` names. A chat template is a program, which the sandbox of
transformers keeps from Python's internals but not from running for ever or filling the memory; so it is tried first in a
process of its own that may do neither.
"""

from __future__ import annotations

import os
import resource
import select
import signal
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from refusal.io.errors import UserError
from refusal.io.store import progress
from refusal.lm import qwen1
from refusal.lm.adapter import CONFIG
from refusal.lm.architecture import architecture_of
from refusal.lm.checkpoint import DTYPES, Shard, read_json, read_shards, real_file
from refusal.lm.load import DTYPES as LOADED
from refusal.lm.load import load_tokenizer, render_chats

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SUFFIXES = {".json", ".jinja", ".model", ".txt"}
_PIECE = 1 << 22  # elements looked at at once
_MEMORY = 3  # the exit status of a trial that ran out of it
_SECONDS, _BYTES = 2, 1 << 30  # of processor time and memory, that a chat template may take; a real one takes milliseconds
_PATIENCE = 60  # seconds on the clock


def small_files(folder: Path) -> dict[str, Path]:
    """Configuration, tokenizer and template files by name. Raises UserError for one that lies elsewhere, or is no file."""
    return {path.name: real_file(folder, path.name) for path in sorted(folder.iterdir()) if path.suffix in SUFFIXES}


def validate_checkpoint(folder: Path, system_prompt: str | None = None) -> None:
    """Refuse a checkpoint that no later stage could use, before its weights are fetched or copied."""
    if CONFIG in small_files(folder):
        raise UserError(f"{folder / CONFIG}: an adapter, which leads to another model: give a folder with the adapter merged")
    if qwen1.is_qwen1(folder):
        qwen1.read_config(folder)
    else:
        architecture_of(read_json(folder, "config.json"), folder)
        _try_template(folder, system_prompt)


def check_weights(folder: Path, dtype: str) -> list[Shard]:
    """The weight files, each tensor of floats read once, in pieces, and found finite in the dtype that it is loaded in.

    Raises UserError naming file and tensor, and as `read_shards` does.
    """
    shards = read_shards(folder)
    with progress(sum(entry.n_bytes for shard in shards for entry in shard.entries), f"look at {folder.name}", "B") as bar:
        for shard in shards:
            with shard.open() as file:
                for entry in shard.entries:
                    if entry.dtype not in DTYPES:
                        raise UserError(
                            f"{shard.where}: tensor {entry.name} is {entry.dtype}, and a checkpoint of {', '.join(DTYPES)} is "
                            "needed: give one that is not quantized"
                        )
                    for values in file.get_tensor(entry.name).reshape(-1).split(_PIECE):
                        if not values.isfinite().all():
                            raise UserError(f"{shard.where}: tensor {entry.name} holds NaN or infinity: download it again")
                        if not values.to(LOADED[dtype]).isfinite().all():
                            raise UserError(
                                f"{shard.where}: tensor {entry.name} holds values beyond {dtype}: set model.dtype in params.yaml "
                                "to float32 or bfloat16"
                            )
                        bar.update(values.nbytes)
    return shards


def _try_template(folder: Path, system_prompt: str | None) -> None:
    """One chat through the folder's template, in a fork of this process that is killed where it runs away."""
    tokenizer = load_tokenizer(folder)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _trial(tokenizer, system_prompt, writing)
    os.close(writing)
    with open(reading, "rb") as pipe:
        # A fork has no threads but one: it may wait for ever, taking no time of the processor, for a lock that another had.
        if not select.select([pipe], [], [], _PATIENCE)[0]:
            os.kill(child, signal.SIGXCPU)
        said = pipe.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said:
        raise UserError(said)
    if code:
        why = {_MEMORY: "it fills the memory", -signal.SIGXCPU: f"it runs for {_SECONDS} s and more"}.get(
            code, f"it ends with {code}"
        )
        raise UserError(f"{folder}: its chat template cannot be used ({why}): mend it, or give another checkpoint")


def _trial(tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, out: int) -> NoReturn:
    """Nothing but Python runs here: threads of the process that was forked are not in the fork."""
    code = _MEMORY
    try:
        held = psutil.Process().memory_info().vms
        for what, most in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_CPU, _SECONDS), (resource.RLIMIT_AS, held + _BYTES)):
            resource.setrlimit(what, (most, resource.getrlimit(what)[1]))
        render_chats(tokenizer, ["How do I paint a door?"], system_prompt)
        code = 0
    except UserError as error:
        os.write(out, str(error).encode())
    except MemoryError:
        pass
    finally:
        os._exit(code)
