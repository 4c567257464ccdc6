"""Out of memory halves the batch and goes on.

Batches are units of work in the store, with a fixed composition and a fixed padding. So a batch is never cut anew: its rows,
padded together as ever, are computed in parts, and the parts are put together again. A unit of completions stays whole, too:
half as many of its rows are decoded at once.
"""

import gc
import sys
from collections.abc import Callable
from typing import TypeVar

import torch

from refusal.errors import RefusalError

T = TypeVar("T")
_fits: dict[str, int] = {}  # rows to try, by kind of work, once more did not fit


def fitting(compute: Callable[[int], T], n: int, work: str) -> T:
    """compute(rows at once): all `n`, or as many as memory allows.

    `work` names what is computed: a size that did not fit is not tried again for it, and stderr says so once. `compute` is
    called again where it failed. Raises RefusalError where a single row does not fit.
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
            raise RefusalError(
                f"params.yaml: model.dtype and model.device: memory runs out at a single row of {work}: "
                "use bfloat16, or device: auto to spread the model"
            )
        _fits[work] = rows // 2
        print(f"{work}: out of memory with {rows} rows at once, going on with {_fits[work]}", file=sys.stderr)
        free()


def in_parts(compute: Callable[[int, int], T], n: int, work: str) -> list[T]:
    """[compute(first, last), ...] over consecutive rows that make up range(n): one call where memory allows it.

    As `fitting`: what was computed before memory ran out is kept.
    """
    parts: list[T] = []
    first = 0

    def part(rows: int) -> tuple[T, int]:
        return compute(first, first + rows), first + rows

    while first < n:
        done, first = fitting(part, n - first, work)
        parts.append(done)
    return parts


def free() -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out."""
    # CUDA has a class of its own (a RuntimeError too); MPS and the CPU's allocator say it in a RuntimeError.
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
