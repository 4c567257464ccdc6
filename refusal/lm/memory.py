"""How many rows at once: found from the memory there is where `batch_size` is auto; out of memory halves them and goes on.

Batches are units of work in the store, with a fixed composition and a fixed padding. So a batch is never cut anew: its rows,
padded together as ever, are computed in parts, and the parts are put together again. A unit of completions stays whole, too:
half as many of its rows are decoded at once.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, TypeVar

import psutil
import torch

from refusal.io.errors import UserError
from refusal.lm.counts import SIZES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

T = TypeVar("T")
_fits: dict[str, int] = {}  # rows to try, by kind of work, once more did not fit

ROW = 512  # tokens that a row is given room for: a one-line request in its template, and the answer
MOST = 512  # rows; more of them make no forward faster


def rows_at_once(asked: int | Literal["auto"], model: PreTrainedModel, n_logits: int, work: str) -> int:
    """`asked`, or for auto the power of two whose rows fill half of the memory that the weights leave free.

    A row is ROW tokens of keys and values, one layer's hidden states, and logits at `n_logits` positions. From the memory that
    the device has, not from what is free just now: units of work must be the same in the next run. What is found is
    said on stderr and noted for the run's record under `work`. Raises UserError where the weights leave nothing.
    """
    if asked != "auto":
        return asked
    c, size = model.config, next(model.parameters()).element_size()
    heads = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    head_size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    cached = 2 * c.num_hidden_layers * heads * head_size * size
    hidden = (4 * c.hidden_size + 3 * c.intermediate_size) * max(size, 4)
    row = ROW * (cached + hidden) + 2 * 4 * n_logits * c.vocab_size
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = (device_memory(model.device) - weights) // 2
    if room < row:
        raise UserError(
            f"params.yaml: {work}.batch_size: auto finds no room for a single row beside the weights on {model.device}: "
            "use bfloat16, or device: auto to spread the model"
        )
    SIZES[f"{work}.batch_size"] = rows = min(MOST, 1 << (room // row).bit_length() - 1)
    print(f"{work}: batch_size auto is {rows} rows here", file=sys.stderr)
    return rows


def device_memory(device: torch.device) -> int:
    """Bytes of memory that a device has, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total  # an MPS device's memory is the machine's


def fitting(compute: Callable[[int], T], n: int, work: str) -> T:
    """compute(rows at once): all `n`, or as many as memory allows.

    `work` names what is computed: a size that did not fit is not tried again for it, and stderr says so once. `compute` is
    called again where it failed. Raises UserError where a single row does not fit.
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
        SIZES[work] = _fits[work] = rows // 2
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
