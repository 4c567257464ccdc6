"""A small model on several threads of Python at once, where the matrices are too small for torch's own threads to share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

J = TypeVar("J")
M = TypeVar("M", bound=nn.Module)
R = TypeVar("R")
SMALL = 10_000_000  # parameters up to which two threads of Python on one core each beat one on two, measured 1.5 times


def shares(n: int, most: int, few: int) -> list[slice]:
    """`n` items as jobs of at most `most` items, of like size: as few as that takes, but an even number beyond `few` items.

    So that two threads end together; the same jobs however many threads there are.
    """
    count = -(-n // most)
    count += count % 2 if n > few else 0
    return [slice(n * i // count, n * (i + 1) // count) for i in range(count)]


@contextmanager
def crew(model: M, compute: Callable[[M, J], R], n_jobs: int) -> Iterator[tuple[Callable[[J], R], Executor | None]]:
    """(`compute` with a model of its own for each job, the threads to run jobs on, None where there is but this one).

    As many threads as torch has, for a small model on the CPU; each works on one core, with hooks and buffers of its own and the
    model's own weights. The hooks that the model has when this begins are on all of them. Several models go as one
    `nn.ModuleList`. What a job gives does not depend on how many threads there are.
    """
    n = torch.get_num_threads()
    if n == 1 or {p.device.type for p in model.parameters()} != {"cpu"} or sum(p.numel() for p in model.parameters()) > SMALL:
        yield lambda job: compute(model, job), None
        return
    free: SimpleQueue[M] = SimpleQueue()
    free.put(model)
    for _ in range(min(n, n_jobs) - 1):
        free.put(copy.deepcopy(model, {id(p): p for p in model.parameters()}))

    def run(job: J) -> R:
        one = free.get()
        try:
            return compute(one, job)
        finally:
            free.put(one)

    pool = ThreadPoolExecutor(min(n, max(1, n_jobs)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield run, pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(n)  # what the threads set is what later ones of this process begin with
