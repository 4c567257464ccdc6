"""The sweep: completions under one ablation by our batches and by common practice, on the workload of record.

- `recompute`: no KV cache, the write-up's way: one prompt at a time, the whole text anew for each token, logits at every
  position. On a subsample, scaled by the tokens it computes.
- `generate8`: transformers' `generate` on left-padded batches of 8 in the order given, three hooks a block: the paper's way.
- `ours`: `refusal.method.sweep.complete` with a fresh store.
- `bound`: the matrix products of the tokens that must be computed, and nothing else.

All ablate the same direction at the same sites (`paper`), so that their tokens can be compared.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from rich.console import Console
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from perf import workload
from perf.harness import measure
from refusal.io.store import Store
from refusal.lm import batching
from refusal.method.activations import Prefix
from refusal.method.generate import Decoding
from refusal.method.interventions import Intervention
from refusal.method.sweep import BATCHES_PER_JOB, complete

BATCH = 8  # of generate8
SLOTS = 128  # half of the prompts: rows enter as others end
N_RECOMPUTED = 2
NEAR_TIE = 1e-4  # logits; below it rounding decides
Tokens = list[list[int]]


@contextmanager
def three_hooks(model: PreTrainedModel, direction: Float[Tensor, " d_model"]) -> Iterator[None]:
    """The direction taken out of every block's input, attention output and MLP output, in the model's dtype."""

    def project_out(activation: Tensor) -> Tensor:
        unit = direction.to(activation)
        return activation - (activation @ unit)[..., None] * unit

    def before(_module: object, args: tuple) -> tuple:
        return (project_out(args[0]), *args[1:])

    def after(_module: object, _args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (project_out(output[0]), *output[1:]) if isinstance(output, tuple) else project_out(output)

    handles = []
    for block in model.base_model.layers:
        handles.append(block.register_forward_pre_hook(before))
        handles += [module.register_forward_hook(after) for module in (block.self_attn, block.mlp)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def recompute(model: PreTrainedModel, prompts: Sequence[Sequence[int]], direction: Tensor, n_new: int) -> Tokens:
    """Greedy completions without a cache, one prompt at a time."""
    completions = []
    with three_hooks(model, direction):
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(n_new):
                ids.append(int(model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, -1].argmax()))
            completions.append(ids[len(prompt) :])
    return completions


class Gaps(LogitsProcessor):
    """Notes the gap between the two greatest logits of each row at each step."""

    def __init__(self) -> None:
        self.steps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        two = scores.topk(2).values
        self.steps.append((two[:, 0] - two[:, 1]).cpu())
        return scores


@torch.inference_mode()
def generate8(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    direction: Tensor,
    n_new: int,
    gaps: list[list[float]] | None = None,
) -> Tokens:
    """Greedy completions by transformers; `gaps`, where given, is filled with the top-two gap of each row at each step."""
    completions = []
    for start in range(0, len(prompts), BATCH):
        batch = prompts[start : start + BATCH]
        width, noted = max(map(len, batch)), Gaps()
        ids = torch.tensor([[workload.PAD_ID] * (width - len(p)) + list(p) for p in batch], device=model.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=model.device)
        with three_hooks(model, direction):
            out = model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=n_new,
                pad_token_id=workload.PAD_ID,
                logits_processor=[] if gaps is None else [noted],
            )
        completions += out[:, width:].tolist()
        if gaps is not None:
            gaps += torch.stack(noted.steps, 1).tolist()
    return completions


def ours(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], directions: Float[Tensor, "cells d_model"], n_new: int, slots: int
) -> Tokens:
    """Greedy completions of every prompt, direction after direction, through a store of their own."""
    ablated = [Intervention(f"direction_{i}", v, 1.0, "paper") for i, v in enumerate(directions.double())]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "store.sqlite")
        completions = complete(workload.lm(model), prompts, ablated, Decoding(n_new, slots), store, "sweep")
        store.connection.close()
    return [completion for one in ablated for completion in completions[one.name]]


def compare(found: Tokens, reference: Tokens, gaps: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The share of rows equal to the reference up to its first near tie, and the number of rows with one."""
    same, near = 0, 0
    for row, wanted, gap in zip(found, reference, gaps, strict=True):
        upto = next((step for step, g in enumerate(gap) if g < NEAR_TIE), None)
        same += row[:upto] == wanted[:upto]
        near += upto is not None
    return same / len(reference), near


def tokens_needed(model: PreTrainedModel, prompts: Sequence[Sequence[int]], n_new: int) -> int:
    """Tokens that one cell must compute: the common beginning once, the rest of each prompt, all new tokens but the last."""
    shared = len(Prefix(model, prompts).ids)
    return shared + sum(len(prompt) - shared + n_new - 1 for prompt in prompts)


def tokens_recomputed(prompts: Sequence[Sequence[int]], n_new: int) -> int:
    """Tokens computed without a cache."""
    return sum(len(prompt) + step for prompt in prompts for step in range(n_new))


def growth(model: PreTrainedModel, n_prompts: int, n_cells: int, n_new: int, slots: int) -> Callable[[], Tokens]:
    """One point of growth in cells or tokens, as an arm."""
    prompts, directions = workload.prompts(n_prompts), workload.random_directions(n_cells, model.config.hidden_size)
    return lambda: ours(model, prompts, directions, n_new, slots)


def side_by_side(console: Console, n_prompts: int, n_new: int, rounds: int) -> dict:
    """A model of the organism's shape: model replicas on threads of Python against torch's own threads; the same tokens."""
    model = workload.model(shape=(1536, 96, 192, 8, 4))
    prompts = [[token % 1536 for token in prompt] for prompt in workload.prompts(n_prompts)]
    directions = workload.random_directions(4 * SLOTS * BATCHES_PER_JOB // n_prompts, 96)  # four units of work

    def arm(below: int) -> Tokens:
        batching.REPLICATED_BELOW, before = below, batching.REPLICATED_BELOW
        try:
            return ours(model, prompts, directions, n_new, SLOTS)
        finally:
            batching.REPLICATED_BELOW = before

    arms = {"torch threads": partial(arm, 0), "replicas": partial(arm, batching.REPLICATED_BELOW)}
    measured = measure(arms, console, rounds)
    console.print(measured.table(f"sweep: 1 M parameters, {len(directions)} cells of {n_prompts} prompts", "replicas", {}))
    same = measured.values["replicas"] == measured.values["torch threads"]
    ratio = measured.ratio("torch threads", "replicas").median
    return {"replicas_ratio_to_torch_threads": round(ratio, 2), "replicas_same_tokens": float(same)}


def beside(console: Console, model: PreTrainedModel, prompts: Sequence[Sequence[int]], n_new: int) -> dict:
    """Ours to `generate8` on a GPU, which is not of record."""
    v = workload.random_directions(1, model.config.hidden_size)
    arms = {"generate8": lambda: generate8(model, prompts, v[0], n_new), "ours": lambda: ours(model, prompts, v, n_new, SLOTS)}
    found = measure(arms, console)
    ratio = found.ratio("generate8", "ours")
    same, _ = compare(found.values["ours"], found.values["generate8"], [[1.0]] * len(prompts))
    console.print(f"{model.device}, {model.dtype}: generate8 takes {ratio} times as long; the same tokens in {same:.4f} of rows")
    return {"gpu_ratio_to_generate8": round(ratio.median, 2)}


def run(console: Console, n_prompts: int = workload.N_PROMPTS, n_new: int = workload.MAX_NEW_TOKENS, rounds: int = 3) -> dict:
    """Time the arms, compare their tokens, print the table and return the scalars."""
    model, prompts = workload.model(), workload.prompts(n_prompts)
    directions = workload.random_directions(1, model.config.hidden_size)
    some = sorted(prompts, key=len)[:: max(1, n_prompts // N_RECOMPUTED)][:N_RECOMPUTED] if n_prompts > N_RECOMPUTED else prompts
    scale = tokens_recomputed(prompts, n_new) / tokens_recomputed(some, n_new)
    needed, gaps = tokens_needed(model, prompts, n_new), []
    arms = {
        "recompute": lambda: recompute(model, some, directions[0], n_new),
        # The first call, which is not timed, notes the gaps.
        "generate8": lambda: generate8(model, prompts, directions[0], n_new, None if gaps else gaps),
        "ours": lambda: ours(model, prompts, directions, n_new, SLOTS),
        "bound": lambda: workload.matrix_products(model, needed, 512, model.config.num_hidden_layers, n_prompts * n_new),
    }
    found = measure(arms, console, rounds)
    found.seconds["recompute"] = [seconds * scale for seconds in found.seconds["recompute"]]
    same, near = compare(found.values["ours"], found.values["generate8"], gaps)
    notes = {
        "recompute": f"{len(some)} of {n_prompts} prompts, one at a time, times {scale:.1f} (tokens computed)",
        "generate8": "left-padded batches of 8",
        "ours": f"{SLOTS} slots",
        "bound": f"{needed} tokens, {n_prompts * n_new} logits",
    }
    console.print(found.table(f"sweep: {n_prompts} prompts, {n_new} new tokens, one cell", "ours", notes))
    console.print(
        f"the same tokens as generate8: {same:.4f} of rows, {near} of them up to a step whose top two differ by < {NEAR_TIE}"
    )
    return {
        "ratio_to_generate8": round(found.ratio("generate8", "ours").median, 2),
        "ratio_to_recompute": round(found.ratio("recompute", "ours").median, 1),
        "fraction_of_bound": round(found.ratio("bound", "ours").median, 3),
        "same_tokens": same,
        "near_ties": near,
        "seconds": round(found.median("ours"), 2),
        "peak_mb": round(found.peak_mb["ours"]),
        **side_by_side(console, n_prompts, n_new // 2, rounds),
        **(beside(console, workload.model(device="cuda"), prompts, n_new) if torch.cuda.is_available() else {}),
    }
