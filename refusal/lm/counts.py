"""What this process has run through a model: the figures that a run's record, a plan and a benchmark are compared by."""

from collections import Counter
from threading import Lock
from typing import Any

from torch import nn

# passes: rows of a batch, once for each forward they were in. tokens: rows times positions, padding included.
COUNTS: Counter[str] = Counter(passes=0, tokens=0)
_LOCK = Lock()
SIZES: dict[str, int] = {}  # rows at once that were found, not given: by parameter, or by work where memory ran out


def watch(model: nn.Module) -> None:
    """Count every forward of a transformers model from here on, whoever calls it."""
    base: Any = model.base_model
    base.register_forward_pre_hook(_count, with_kwargs=True)


def _count(_module: nn.Module, args: tuple, kwargs: dict) -> None:
    ids = kwargs.get("input_ids")
    if ids is None:
        ids = args[0] if args else kwargs["inputs_embeds"]
    with _LOCK:
        COUNTS["passes"] += ids.shape[0]
        COUNTS["tokens"] += ids.shape[0] * ids.shape[1]
