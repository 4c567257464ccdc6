"""Greedy completions, many prompts and many interventions in one batch.

A row of a batch is a prompt with its own direction and alpha, so cells of a sweep, their baseline and their controls
run side by side. A fixed number of slots decode together; a row that has ended leaves its slot and another enters. A row enters
with the keys and values of its prompt but for the last token, which is its first step: so a prefill needs no logits, and rows of
different lengths are padded on the right, where causal attention does not look. What all prompts begin with is
computed once for each intervention. Only the last position's logits are computed. Models that carry a state besides keys and
values are run otherwise (`refusal.method.recurrent`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from refusal.lm.batching import fitting
from refusal.lm.load import LM
from refusal.lm.stream import stream_of
from refusal.method.activations import Prefix, batches, not_finite
from refusal.method.interventions import Ablation, Addition, Intervention, intervene
from refusal.method.kv_cache import SlotCache
from refusal.method.recurrent import complete_in_turn


@dataclass(frozen=True)
class Decoding:
    """How completions are decoded: greedily, at most `max_new_tokens` tokens each, at most `batch_size` prompts at once."""

    max_new_tokens: int
    batch_size: int = 256


@torch.inference_mode()
def generate(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    interventions: Sequence[Intervention] = (),
    rows: Sequence[int] | None = None,
    addition: Addition | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Greedy completion of each prompt (token ids), without its stop token.

    Prompt i is under `interventions[rows[i]]`: by default under the only one, or one each in order. They act on prompt and
    completion alike, at the same sites at run time; for edited weights see `Intervention.on`. `addition`, a vector [d_model],
    acts at its `positions`. `progress` is told after every step how many tokens are decided, of `max_new_tokens` a prompt: all of
    one that has ended. Where memory runs out the prompts decoded at once are halved, and all begins anew.
    """
    if not prompts or decoding.max_new_tokens < 1:
        return [[] for _ in prompts]
    rows = rows or ([0] * len(prompts) if len(interventions) < 2 else range(len(prompts)))
    ablation = Ablation(interventions) if any(one.basis is not None for one in interventions) else None

    def decoded(slots: int) -> list[list[int]]:
        if stream_of(lm.model).recurrent:
            with nullcontext() if ablation is None else intervene(lm.model, ablation):
                return complete_in_turn(lm, prompts, (decoding.max_new_tokens, slots), ablation, rows, addition, progress)
        batch = _Batch(lm, prompts, Decoding(decoding.max_new_tokens, slots), ablation, rows, addition)
        with nullcontext() if ablation is None else intervene(lm.model, ablation):
            return batch.run(progress)

    return fitting(decoded, min(decoding.batch_size, len(prompts)), "generation")


Layers = list[tuple[Tensor, Tensor]]  # keys and values of each layer, [batch, n_kv_heads, seq, head_dim]


class _Batch:
    """One call of `generate`: the slots, the prompts that live in them and those that wait."""

    def __init__(
        self,
        lm: LM,
        prompts: Sequence[Sequence[int]],
        decoding: Decoding,
        ablation: Ablation | None,
        rows: Sequence[int],
        addition: Addition | None,
    ):
        # The model is typed loosely: what transformers' stubs say of a causal model lacks the arguments used here.
        self.model, self.prompts, self.stop, self.pad_id = cast(Any, lm.model), prompts, lm.stop, lm.pad_id
        self.max_new_tokens, self.slots = decoding.max_new_tokens, decoding.batch_size
        self.ablation, self.addition, self.rows = ablation, addition, rows
        self.waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        self.completions: list[list[int]] = [[] for _ in prompts]
        self.live: list[int] = []  # the prompt of each slot ...
        self.tokens: list[int] = []  # ... the token it computes next ...
        self.lengths: list[int] = []  # ... and how many are in the cache before it: its position
        self.assigned: list[int] = []  # the intervention of each row of the last forward
        self.start = len(prompts[self.waiting[-1]]) - 1  # the column from which there is room for every prompt to enter
        # Without rows that enter late the window never moves; else it moves every quarter of a completion, or less often.
        spare = max(16, self.max_new_tokens // 4) if self.slots < len(prompts) else 0
        self.cache = SlotCache(lm.n_layers, self.slots, self.start + self.max_new_tokens + spare)

    def run(self, progress: Callable[[int], None]) -> list[list[int]]:
        self._compute_prefix()
        while self.live or self.waiting:
            free = self.slots - len(self.live)
            # A few at a time: one prompt is a forward of few tokens.
            if self.waiting and (not self.live or free * 8 >= self.slots):
                n_before = len(self.live)
                self._enter(self.waiting[:free])
                self.waiting = self.waiting[free:]
                self._step(n_before)
            else:
                self._step(len(self.live))
            left = sum(self.max_new_tokens - len(self.completions[i]) for i in chain(self.live, self.waiting))
            progress(self.max_new_tokens * len(self.prompts) - left)
        return self.completions

    def _compute_prefix(self) -> None:
        """Keys and values of what all prompts begin with, once for each row of the interventions that is in use."""
        used = sorted(set(self.rows))
        shared = Prefix(self.model, self.prompts).ids if len(used) < len(self.prompts) else []
        self.prefix: Layers = []
        self.n_shared, self.place = len(shared), {row: i for i, row in enumerate(used)}
        if shared:
            self.prefix = self._prefill([shared] * len(used), used, [])

    def _enter(self, entering: Sequence[int]) -> None:
        """Prompts, in order of length, take the slots behind the live ones."""
        if not self.live:
            self.cache.window.end = self.start
        rests = [len(self.prompts[i]) - 1 - self.n_shared for i in entering]
        for batch in batches(rests, "batched", len(rests)):
            group = [entering[i] for i in batch]
            rows = [self.rows[i] for i in group]
            inputs = [self.prompts[i][self.n_shared : -1] for i in group]
            places = [self.place[row] for row in rows]
            past = [(keys[places], values[places]) for keys, values in self.prefix]
            if rests[batch[-1]] > 0:
                past = self._prefill(inputs, rows, past)
            self.cache.clear(len(self.live), len(group))
            if past:
                self.cache.enter(len(self.live), past, [len(self.prompts[i]) - 1 for i in group])
            self.live.extend(group)
            self.lengths.extend(len(self.prompts[i]) - 1 for i in group)
            self.tokens.extend(self.prompts[i][-1] for i in group)

    def _prefill(self, inputs: Sequence[Sequence[int]], rows: Sequence[int], past: Layers) -> Layers:
        """Keys and values of `inputs`, padded on the right, behind those of `past`."""
        cache = DynamicCache(past or None)  # no config: sliding layers keep all columns, too
        width = max(map(len, inputs))
        ids = torch.tensor([[*tokens, *[self.pad_id] * (width - len(tokens))] for tokens in inputs], device=self.model.device)
        self._assign(rows)
        with self._adding(len(rows), len(rows) if self._positions == "last_prompt_token" else 0):
            self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        return [(cast(Tensor, layer.keys), cast(Tensor, layer.values)) for layer in cast(list[DynamicLayer], cache.layers)]

    def _step(self, n_before: int) -> None:
        """The next token of every live row; those that have ended leave. Rows from `n_before` on are still in their prompt."""
        device, width = self.model.device, max(self.lengths)
        if self.cache.end == self.cache.columns:
            self.cache.move_window(max(width, self.start), len(self.live), width)
        self.cache.set_view(len(self.live), width)
        lengths = torch.tensor(self.lengths, device=device)
        mask = None
        if min(self.lengths) < width:
            mask = torch.arange(width + 1, device=device) >= width - lengths[:, None]
        rows = [self.rows[i] for i in self.live]
        self._assign(rows)
        with self._adding(len(rows), 0 if self._positions == "all" else n_before):
            logits = self.model(
                input_ids=torch.tensor(self.tokens, device=device)[:, None],
                position_ids=lengths[:, None],
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
        self.cache.advance()
        best = logits.argmax(-1)
        if logits.gather(-1, best[:, None]).isnan().any():  # NaN is the largest of all to argmax
            raise not_finite(self.model)
        self.tokens = best.tolist()
        self.lengths = [n + 1 for n in self.lengths]
        ended = set()
        for slot, (i, token) in enumerate(zip(self.live, self.tokens, strict=True)):
            if token not in self.stop:
                self.completions[i].append(token)
            if token in self.stop or len(self.completions[i]) == self.max_new_tokens:
                ended.add(slot)
        if ended:
            self._leave(ended)

    def _leave(self, ended: set[int]) -> None:
        """The last rows take the places of those that ended."""
        left = len(self.live) - len(ended)
        into = sorted(slot for slot in ended if slot < left)
        source = [slot for slot in range(left, len(self.live)) if slot not in ended]
        if into:
            self.cache.move_rows(into, source)
        for kept in (self.live, self.tokens, self.lengths):
            for i, s in zip(into, source, strict=True):
                kept[i] = kept[s]
            del kept[left:]

    @property
    def _positions(self) -> str:
        return "prompt" if self.addition is None else self.addition.positions

    def _assign(self, rows: Sequence[int]) -> None:
        if self.ablation is not None and len(self.ablation) > 1 and rows != self.assigned:
            self.ablation.assign(torch.tensor(rows))
            self.assigned = list(rows)

    def _adding(self, n_rows: int, first: int) -> AbstractContextManager:
        """The addition to the rows from `first` on of a batch, as a context."""
        if self.addition is None or first == n_rows:
            return nullcontext()
        vector = self.addition.vector.expand(n_rows, -1)
        if first:
            vector = torch.cat([torch.zeros_like(vector[:first]), vector[first:]])
        return intervene(self.model, Addition(vector, self.addition.layer))
