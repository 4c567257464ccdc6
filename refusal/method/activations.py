"""Last-token `resid_pre` of every layer, collected in three ways.

`sequential` runs one prompt a forward. `batched` runs several of similar length, padded on the right, where causal attention
never looks back from, after the keys and values of what all of them begin with; it equals `sequential` to rounding.
`batched_unmasked` left-pads a batch in the order given and lets the padding be attended to, as the write-up's batched code did.

No method computes more than it must: the last block's input is all that is asked of it, so it does not run, and nor do
the final norm and the unembedding. Batches are composed before anything is computed, and rows go to their places in the file
as they come: an interrupted run ends in the same bytes, and memory holds one batch, however many prompts there are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor
from transformers import DynamicCache

from refusal.io.errors import UserError
from refusal.io.files import sync
from refusal.io.store import Store, key
from refusal.lm.batching import in_parts
from refusal.lm.checkpoint import DTYPES, Entry, data_of, header_bytes
from refusal.lm.engine import hand_out
from refusal.lm.load import LM
from refusal.lm.stream import stream_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What a forward costs beside its tokens, in tokens: below it, padding is cheaper than one more forward.
_FORWARD = 32


def left_pad(ids: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Left-padded ids [batch, seq] and their mask [batch, seq]; the last token of every row is at -1."""
    width = max(map(len, ids))
    padded = torch.full((len(ids), width), pad_id)
    mask = torch.zeros(len(ids), width, dtype=torch.long)
    for row, tokens in enumerate(ids):
        padded[row, width - len(tokens) :] = torch.tensor(tokens)
        mask[row, width - len(tokens) :] = 1
    return padded, mask


def batches(lengths: Sequence[int], method: str, batch_size: int) -> list[list[int]]:
    """Which prompts share a batch of at most `batch_size`: the unit of work to store.

    For `batched`, prompts in order of length are cut where the least is computed, padding and the cost of one more forward
    weighed; `lengths` are then those of the tokens to compute. Other methods take them in the order given, and each prompt
    of a `sequential` batch is a forward of its own.
    """
    order = list(range(len(lengths)))
    if method != "batched":
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    order.sort(key=lambda i: lengths[i])
    least, cut = [0], [0]  # of the first n prompts: tokens computed, and where their last batch begins
    for end in range(1, len(order) + 1):
        costs = {
            start: least[start] + (end - start) * lengths[order[end - 1]] + _FORWARD
            for start in range(max(0, end - batch_size), end)
        }
        cut.append(min(costs, key=lambda start: costs[start]))
        least.append(costs[cut[-1]])
    plan, end = [], len(order)
    while end:
        plan.append(order[cut[end] : end])
        end = cut[end]
    return plan[::-1]


def not_finite(model: PreTrainedModel) -> UserError:
    """What is said where a forward pass gives NaN or infinity."""
    dtype = str(model.dtype).removeprefix("torch.")
    return UserError(f"params.yaml: model.dtype: the model computes NaN or infinity in {dtype}: set bfloat16 or float32")


class Prefix:
    """What all prompts begin with (the head of a chat template), and its keys and values, computed once.

    At least `left` tokens of each prompt are left over. A single prompt has no prefix, nor has a model that carries a state
    besides keys and values.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[Sequence[int]], left: int = 1):
        self.ids: list[int] = []
        if len(ids) > 1 and not stream_of(model).recurrent:
            prompts = sorted(list(tokens) for tokens in ids)
            first, final = prompts[0], prompts[-1]  # all others lie between them, and begin alike as they do
            shared = next((n for n, (a, b) in enumerate(zip(first, final, strict=False)) if a != b), len(first))
            self.ids = first[: min(shared, min(map(len, ids)) - left)]
        self._model = model

    @cached_property
    def _keys_and_values(self) -> list[tuple[Tensor, Tensor]]:
        cache = DynamicCache()
        _resid_pre(self._model, torch.tensor([self.ids]), torch.tensor([-1]), cache)
        return [(keys, values) for keys, values, _ in cache]

    def cache(self, rows: int) -> DynamicCache | None:
        """A cache of `rows` rows that holds the prefix; None where there is none."""
        if not self.ids:
            return None
        # Without a config no layer drops what lies outside its window; the mask sees to windows.
        return DynamicCache([(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self._keys_and_values])


def last_logits(
    lm: LM, ids: Sequence[Sequence[int]], prefix: Sequence[int], keep: int
) -> Callable[[int, int], Float[Tensor, "rows keep vocab"]]:
    """A function of (first, last) that gives the logits of these rows of a left-padded batch at their last `keep` tokens.

    All rows begin with `prefix`, whose keys and values are computed once, here.
    """
    model, shared, cache = lm.model, len(prefix), DynamicCache()
    if prefix:
        model.base_model(input_ids=torch.tensor([prefix], device=model.device), past_key_values=cache, use_cache=True)
    layers = [(keys, values) for keys, values, _ in cache]
    padded, own = left_pad([tokens[shared:] for tokens in ids], lm.pad_id)
    mask = torch.cat([own.new_ones(len(own), shared), own], -1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, shared:]

    def logits(first: int, last: int) -> Tensor:
        # Without a config no layer drops what lies outside its window; the mask sees to windows.
        past = DynamicCache([(k.expand(last - first, -1, -1, -1), v.expand(last - first, -1, -1, -1)) for k, v in layers])
        return model(
            input_ids=padded[first:last].to(model.device),
            attention_mask=mask[first:last].to(model.device),
            position_ids=positions[first:last].to(model.device),
            past_key_values=past if layers else None,
            use_cache=bool(layers),
            logits_to_keep=keep,
        ).logits

    return logits


@torch.inference_mode()
def last_token_resid_pre(
    lm: LM, ids: Sequence[Sequence[int]], method: str, prefix: Prefix | None = None, n_positions: int = 1
) -> Float[Tensor, "batch n_layers d_model"]:
    """`blocks.{l}.hook_resid_pre` at the last token of each prompt, for every layer l, by `method`, in the model's dtype; or its
    mean over the last `n_positions` tokens, of which each prompt has as many.

    `prefix` is for `batched`: that of a larger set that these prompts are of; by default, their own.
    """
    model, pad_id = lm.model, lm.pad_id
    if method == "sequential":
        return torch.cat([_in_parts(model, torch.tensor([tokens]), torch.tensor([-1]), None, n_positions) for tokens in ids])
    if method == "batched_unmasked":
        return _in_parts(model, left_pad(ids, pad_id)[0], torch.full((len(ids),), -1), None, n_positions)
    prefix = prefix or Prefix(model, ids, n_positions)
    skip = len(prefix.ids)
    if any(list(tokens[:skip]) != prefix.ids or len(tokens) < skip + n_positions for tokens in ids):
        raise ValueError("a prompt does not begin with the prefix, or has too little after it")
    lengths = [len(tokens) - skip for tokens in ids]
    row_of: dict[int, Tensor] = {}
    for batch in batches(lengths, method, len(ids)):
        padded = torch.full((len(batch), max(lengths[i] for i in batch)), pad_id)
        for row, i in enumerate(batch):
            padded[row, : lengths[i]] = torch.tensor(ids[i][skip:])
        rows = _in_parts(model, padded, torch.tensor([lengths[i] - 1 for i in batch]), prefix, n_positions)
        row_of.update(zip(batch, rows, strict=True))
    return torch.stack([row_of[i] for i in range(len(ids))])


def _in_parts(
    model: PreTrainedModel, ids: Int[Tensor, "batch seq"], last: Int[Tensor, " batch"], prefix: Prefix | None, n_positions: int
) -> Float[Tensor, "batch n_layers d_model"]:
    def rows(first: int, end: int) -> Tensor:
        return _resid_pre(
            model, ids[first:end], last[first:end], None if prefix is None else prefix.cache(end - first), n_positions
        )

    return torch.cat(in_parts(rows, len(ids), "activations"))


class _Enough(Exception):
    """The last block's input is there: the rest of the forward is not needed."""


def _resid_pre(
    model: PreTrainedModel,
    ids: Int[Tensor, "batch seq"],
    last: Int[Tensor, " batch"],
    cache: DynamicCache | None,
    n_positions: int = 1,
) -> Float[Tensor, "batch n_layers d_model"]:
    """Every block's input at position `last` of each row, or its mean over so many positions that end there. Keys and values go
    to `cache`, where there is one."""
    rows: list[Tensor] = []
    row, positions = torch.arange(len(last))[:, None], last[:, None] - torch.arange(n_positions)
    blocks = stream_of(model).blocks(model)

    def keep(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        rows.append(hidden[row, positions].mean(1))
        if len(rows) == len(blocks):
            raise _Enough

    handles = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        model.base_model(input_ids=ids.to(model.device), past_key_values=cache, use_cache=cache is not None)
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([row.cpu() for row in rows], dim=1)  # layers may lie on several devices


def collect(
    lm: LM,
    sets: Mapping[str, Sequence[Sequence[int]]],
    method: str,
    batch_size: int,
    store: Store,
    path: Path,
    n_positions: int = 1,
) -> None:
    """Write last-token `resid_pre` of each set of prompts (token ids), or its mean over the last `n_positions` tokens, to `path`:
    {set: [prompt, n_layers, d_model]}.

    Batches hold prompts of one set; what all prompts of all sets begin with is computed once (`batched`). Raises UserError where
    an activation is not finite, or a prompt has fewer tokens.
    """
    everyone = [tokens for prompts in sets.values() for tokens in prompts]
    if (shortest := min(map(len, everyone), default=n_positions)) < n_positions:
        raise UserError(f"params.yaml: activations.n_positions: a prompt has {shortest} tokens: set {shortest} or less")
    prefix = Prefix(lm.model, everyone, n_positions) if method == "batched" else None
    shapes = {name: (len(prompts), lm.n_layers, lm.d_model) for name, prompts in sets.items()}
    with activations_file(path, shapes, lm.model.dtype) as put:
        for name, prompts in sets.items():
            skip = len(prefix.ids) if prefix else 0
            plan = batches([len(tokens) - skip for tokens in prompts], method, batch_size)
            chosen = [[list(prompts[i]) for i in batch] for batch in plan]
            rows = stored_resid_pre(lm, chosen, method, store, f"{method} {name}", prefix, n_positions)
            for batch, resid_pre in zip(plan, rows, strict=True):
                put(name, batch, resid_pre)


def stored_resid_pre(
    lm: LM,
    batches: Sequence[list[list[int]]],
    method: str,
    store: Store,
    label: str,
    prefix: Prefix | None = None,
    n_positions: int = 1,
) -> Iterator[Float[Tensor, "batch n_layers d_model"]]:
    """`last_token_resid_pre` of each batch of prompts (token ids), from the store where it is known. Raises UserError where an
    activation is not finite."""
    shared = {**lm.identity, "method": method, "pad": lm.pad_id, "prefix": prefix and prefix.ids, "n_positions": n_positions}
    jobs = [(key("activations", (last_token_resid_pre,), **shared, ids=batch), batch) for batch in batches]
    compute, code = _Reading(method, n_positions, prefix), (last_token_resid_pre,)
    with hand_out(lm, compute, code, batches, store.done, replicas=False) as (run, pool):
        for value in store.run(jobs, run, label, pool=pool):
            yield load(value)["resid_pre"]


@dataclass
class _Reading:
    """The bytes of a batch's activations. It goes to a worker without the model of its prefix, and takes the one there."""

    method: str
    n_positions: int
    prefix: Prefix | list[int] | None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"prefix": self.prefix.ids if isinstance(self.prefix, Prefix) else self.prefix}

    def __call__(self, lm: LM, batch: list[list[int]], progress: Callable[[int], None]) -> bytes:
        if isinstance(self.prefix, list):
            self.prefix = Prefix(lm.model, [[*self.prefix, 0], [*self.prefix, 1]])
        resid_pre = last_token_resid_pre(lm, batch, self.method, self.prefix, self.n_positions)
        if not resid_pre.isfinite().all():
            raise not_finite(lm.model)
        return save({"resid_pre": resid_pre})


@contextmanager
def activations_file(
    path: Path, shapes: Mapping[str, tuple[int, int, int]], dtype: torch.dtype
) -> Iterator[Callable[[str, Sequence[int], Float[Tensor, "rows n_layers d_model"]], None]]:
    """A safetensors file of {name: [n, n_layers, d_model]}, filled row by row by the function given: `put(name, rows, values)`.

    Its bytes are those that safetensors would write. It appears under its name when the `with` ends well, whole and on disk.
    """
    dtype_name = next(name for name, of_file in DTYPES.items() if of_file == dtype)
    entries = [Entry(name, dtype_name, shapes[name], math.prod(shapes[name]) * dtype.itemsize) for name in sorted(shapes)]
    header = header_bytes(entries, {})
    *begins, end = accumulate((entry.n_bytes for entry in entries), initial=len(header))
    begin_of = {entry.name: begin for entry, begin in zip(entries, begins, strict=True)}
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            file.truncate(end)

            def put(name: str, rows: Sequence[int], values: Tensor) -> None:
                width = math.prod(shapes[name][1:]) * dtype.itemsize
                for row, value in zip(rows, values.reshape(len(rows), -1), strict=True):
                    file.seek(begin_of[name] + row * width)
                    file.write(data_of(value))

            yield put
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)
