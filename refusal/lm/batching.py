"""How many rows a forward takes and on how many threads, and the count of what ran.

Batches and jobs are units of work in the store, composed and padded alike in every run, whatever memory is free and however many
threads there are. Where memory runs out, the rows of a batch, padded together as ever, are computed in parts.
"""

from __future__ import annotations

import copy
import gc
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import psutil
import torch
from torch import nn

from refusal.io.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

J = TypeVar("J")
M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")

ROW_TOKENS = 512  # that a row is given room for: a one-line request in its template, and the answer
MAX_ROWS = 512  # more of them make no forward faster
REPLICATED_BELOW = 10_000_000  # parameters; below it two threads with a core each are 1.5 times as fast as one on two, measured

# passes: rows of a batch, once for each forward they were in. tokens: rows times positions, padding included.
COUNTS: Counter[str] = Counter(passes=0, tokens=0)
BATCH_SIZES: dict[str, int] = {}  # rows at once that auto gave, by parameter, or running out of memory, by kind of work
_lock = Lock()
_fits: dict[str, int] = {}  # rows to try, by kind of work, once more did not fit


def count_forwards(model: nn.Module) -> None:
    """Add every forward of a transformers model from here on to COUNTS, whoever calls it."""

    def count(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = next(t for t in (*args, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if t is not None)
        with _lock:
            COUNTS["passes"] += ids.shape[0]
            COUNTS["tokens"] += ids.shape[0] * ids.shape[1]

    base: Any = model.base_model
    base.register_forward_pre_hook(count, with_kwargs=True)


def rows_at_once(asked: int | Literal["auto"], model: PreTrainedModel, n_logits: int, work: str) -> int:
    """`asked`, or for auto the power of two whose rows fill half of the memory that the weights leave of the device's.

    A row is ROW_TOKENS of keys and values, one layer's hidden states, and logits at `n_logits` positions. The result is printed
    on stderr and noted under `work`. Raises UserError where the weights leave nothing.
    """
    if asked != "auto":
        return asked
    c, size = model.config.get_text_config(), next(model.parameters()).element_size()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cached = 2 * c.num_hidden_layers * heads * head_size * size
    hidden = (4 * c.hidden_size + 3 * c.intermediate_size) * max(size, 4)
    row = ROW_TOKENS * (cached + hidden) + 2 * 4 * n_logits * c.vocab_size
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = (device_memory(model.device) - weights) // 2
    if room < row:
        raise UserError(
            f"params.yaml: {work}.batch_size: auto finds no room for a single row beside the weights on {model.device}: "
            "use bfloat16, or device: auto to spread the model"
        )
    BATCH_SIZES[f"{work}.batch_size"] = rows = min(MAX_ROWS, 1 << (room // row).bit_length() - 1)
    print(f"{work}: batch_size auto is {rows} rows here", file=sys.stderr)
    return rows


def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total  # an MPS device's memory is the machine's


def fitting(compute: Callable[[int], R], n: int, work: str) -> R:
    """compute(rows at once): all `n`, or as many as memory allows, halved each time that it runs out.

    `work` names what is computed: a size that did not fit is not tried again for it, and is printed on stderr once. Raises
    UserError where a single row does not fit.
    """
    while True:
        rows = min(n, _fits.get(work, n))
        try:
            return compute(rows)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        # Outside the except: the error's traceback held the tensors of the failed forward.
        if rows == 1:
            raise UserError(
                f"params.yaml: model.dtype and model.device: memory runs out at a single row of {work}: "
                "use bfloat16, or device: auto to spread the model"
            )
        BATCH_SIZES[work] = _fits[work] = rows // 2
        print(f"{work}: out of memory with {rows} rows at once, going on with {_fits[work]}", file=sys.stderr)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def in_parts(compute: Callable[[int, int], R], n: int, work: str) -> list[R]:
    """[compute(first, last), ...] over consecutive rows that make up range(n): one call where memory allows it (`fitting`)."""

    def part(first: int, rows: int) -> tuple[R, int]:
        return compute(first, first + rows), first + rows

    results, first = [], 0
    while first < n:
        result, first = fitting(partial(part, first), n - first, work)
        results.append(result)
    return results


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    # CUDA has a class of its own (a RuntimeError too); MPS and the CPU's allocator say it in a RuntimeError.
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text


def job_slices(n: int, max_size: int, few: int) -> list[slice]:
    """`n` items as jobs of at most `max_size`, of nearly equal size: as few as that takes, but an even number beyond `few` items.

    So that two threads end together; the same jobs however many threads there are.
    """
    count = -(-n // max_size)
    count += count % 2 if n > few else 0
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


def is_replicated(model: nn.Module) -> bool:
    """Whether a model is so small, and on the CPU, that a job of it takes one thread, however many there are."""
    parameters = list(model.parameters())
    return {p.device.type for p in parameters} == {"cpu"} and sum(p.numel() for p in parameters) <= REPLICATED_BELOW


@contextmanager
def model_replicas(model: M, compute: Callable[[M, J], R], n_jobs: int) -> Iterator[tuple[Callable[[J], R], Executor | None]]:
    """(`compute` with a replica of its own for each job, the threads to run jobs on; None where there is but this one).

    As many threads as torch has, for a small model on the CPU, whose matrices are too small for torch's own threads to share;
    each works on one core, with hooks and buffers of its own and the model's own weights. The hooks that the model has when this
    begins are on all replicas. Several models go as one `nn.ModuleList`. What a job gives does not depend on the threads.
    """
    n, parameters = torch.get_num_threads(), list(model.parameters())
    if n == 1 or not is_replicated(model):
        yield lambda job: compute(model, job), None
        return
    idle: SimpleQueue[M] = SimpleQueue()
    idle.put(model)
    for _ in range(min(n, n_jobs) - 1):
        idle.put(copy.deepcopy(model, {id(p): p for p in parameters}))

    def run(job: J) -> R:
        replica = idle.get()
        try:
            return compute(replica, job)
        finally:
            idle.put(replica)

    pool = ThreadPoolExecutor(min(n, max(1, n_jobs)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield run, pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n)  # what the threads set is what later ones of this process begin with
