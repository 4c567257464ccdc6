"""Checkpoints of known history, made in memory from one base, that detectors of edits are held to.

A `Recipe` is a list of steps, each a change of the base's weights: an edit of what writes into the residual stream, further
training on harmless texts, a rounding of all matrices. What `edited` ones have beside a plain edit is what a detector must stand:
norms that were set back, rounding, noise, an alpha that differs from tensor to tensor, a rotation in place of a projection,
training afterwards. None was searched for, or fitted to a detector.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, cast

import gguf
import torch
from jaxtyping import Float
from torch import Tensor

from refusal.analysis.subspaces import random_subspaces
from refusal.lm.adapter import add_product
from refusal.lm.architecture import Architecture
from refusal.lm.load import LM
from refusal.lm.stream import stream_of
from refusal.method.directions import Directions, harmless_kept
from refusal.method.interventions import Intervention
from refusal.method.norms import Norms, change_of
from refusal.organism.corpus import Corpus
from refusal.organism.train import backward, encode

Tensors = dict[str, Tensor]
Step = Mapping[str, Any]
ALPHAS, SEEDS, NOISE = (0.75, 1.0, 1.25), (0, 1), (0.003, 0.03)
ROUNDINGS = ("bfloat16", "float16", "8-bit blocks of 32", "8-bit rows", "Q8_0", "Q5_0")
NORMS: dict[str, Norms] = {"row_norms": "rows", "column_norms": "columns"}
UNEVEN = (0.3, 1.5)  # alpha of a tensor is drawn evenly from these
# Of `train`: steps and items a step, learning rates by optimizer, the sorts of items of refusal.organism.corpus.
N_STEPS, BATCH = 24, 16
RATES = {"SGD": (0.01, 0.03, 0.1), "Adam": (1e-4, 3e-4, 1e-3)}
HARMLESS, JUDGEMENTS = ("safe", "facts", "small_talk"), ("judgement",)


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made. cluster: what it shares with others, which are then not independent of it."""

    kind: str
    edited: bool
    cluster: str
    steps: tuple[Step, ...] = ()


@dataclass(frozen=True)
class Base:
    """What recipes begin with: the model, its directions by layer, its corpus (without val and test prompts)."""

    lm: LM
    directions: Directions
    corpus: Corpus

    @property
    def tensors(self) -> Tensors:
        """The model's weights by name; nothing changes them in place."""
        return {name: tensor.detach() for name, tensor in self.lm.model.state_dict().items()}

    @property
    def architecture(self) -> Architecture:
        """Which of these write into the stream."""
        return stream_of(self.lm.model).architecture


def recipes(layers: Sequence[int]) -> list[Recipe]:
    """The population: edits along the directions of these layers, open and in every disguise, and what is no edit."""

    def edit(layer: int, alpha: float = 1.0, **more: Any) -> Step:
        return {"do": "edit", "layer": layer, "alpha": alpha, **more}

    found = [
        Recipe(variant, True, f"layer {layer} alpha {alpha}", (edit(layer, alpha, variant=variant),))
        for variant in ("plain", *NORMS, "harmless_kept", "lora")
        for layer in layers
        for alpha in ALPHAS
    ]
    for layer in layers:
        disguises: list[tuple[str, tuple[Step, ...]]] = [
            *(("rounded", (edit(layer), {"do": "round", "to": to})) for to in ("bfloat16", "Q8_0", "Q5_0")),
            *(("noise", (edit(layer), {"do": "noise", "size": size, "seed": layer})) for size in NOISE),
            *(("uneven", (edit(layer, 1.0, variant="uneven", seed=seed),)) for seed in SEEDS),
            *(("rotation", (edit(layer, 1.0, variant="rotation", seed=seed),)) for seed in SEEDS),
            *(("trained on", (edit(layer), train("Adam", 3e-4, seed, JUDGEMENTS))) for seed in SEEDS),
        ]
        found += [Recipe(kind, True, f"layer {layer} alpha 1.0", steps) for kind, steps in disguises]
    tuned = [
        (f"{optimizer} {rate} {seed}", seed, train(optimizer, rate, seed, HARMLESS))
        for optimizer, rates in RATES.items()
        for rate, seed in itertools.product(rates, (*SEEDS, 2))
    ]
    return [
        *found,
        *(Recipe("fine-tuned", False, name, (step,)) for name, _, step in tuned),
        *(
            Recipe("fine-tuned, rounded", False, name, (step, {"do": "round", "to": "bfloat16"}))
            for name, seed, step in tuned
            if seed == 0
        ),
        *(Recipe("requantized", False, to, ({"do": "round", "to": to},)) for to in ROUNDINGS),
        Recipe("baseline", False, "base"),
    ]


def train(optimizer: str, rate: float, seed: int, sorts: Sequence[str]) -> Step:
    """The step of N_STEPS of training on items of these sorts."""
    return {"do": "train", "optimizer": optimizer, "rate": rate, "seed": seed, "sorts": list(sorts)}


def made(base: Base, steps: Sequence[Step]) -> Tensors:
    """The weights that these steps make of the base's: float32, but those that were rounded to another float."""
    tensors = base.tensors
    for step in steps:
        does: dict[str, Callable[..., Tensors]] = {"edit": _edited, "noise": _noisy, "round": _rounded, "train": _trained}
        tensors = does[step["do"]](base, tensors, **{name: value for name, value in step.items() if name != "do"})
    return tensors


def _edited(base: Base, tensors: Tensors, layer: int, alpha: float, variant: str = "plain", seed: int | None = None) -> Tensors:
    """W - alpha v v^T W of every writer and the embedding, in one of the variants."""
    v = base.directions.unit[layer]
    if variant == "harmless_kept":
        v = harmless_kept(v, base.directions.safe_mean[layer])
    generator = torch.Generator().manual_seed(0 if seed is None else seed)
    rotation = turned(v, 0 if seed is None else seed) if variant == "rotation" else None
    found = dict(tensors)
    for name, tensor in tensors.items():
        axis = base.architecture.writer_axis(name, include_embedding=True)
        if axis is None:
            continue
        w = tensor.movedim(axis, 0)
        low, high = UNEVEN
        of_tensor = low + (high - low) * float(torch.rand(1, generator=generator)) if variant == "uneven" else alpha
        one = Intervention("edit", v, of_tensor, "weights")
        if rotation is not None:
            w = (rotation @ w.double()).to(w.dtype)
        elif variant == "lora":
            a = one.component(w)
            w = add_product(w, one.update(a), a)
        else:
            w = change_of(one, NORMS.get(variant), w, w.shape[1])(w)[0] if w.ndim > 1 else one.edit(w[:, None])[0][:, 0]
        found[name] = w.movedim(0, axis).contiguous()
    return found


def turned(v: Float[Tensor, " d_model"], seed: int) -> Float[Tensor, "d_model d_model"]:
    """A rotation within three dimensions that brings v to a second, that to a third, and that to v; two are drawn by `seed`."""
    drawn = random_subspaces(len(v), 2, 1, seed)[0]
    basis = torch.linalg.qr(torch.cat([v.double()[None], drawn]).mT)[0].mT
    return torch.eye(len(v), dtype=torch.float64) + (basis.roll(-1, 0) - basis).mT @ basis


def _noisy(base: Base, tensors: Tensors, size: float, seed: int) -> Tensors:
    """Independent noise on all tensors, of `size` of each one's standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return {name: w + size * w.std() * torch.randn(w.shape, generator=generator) for name, w in tensors.items()}


def _rounded(base: Base, tensors: Tensors, to: str) -> Tensors:
    """All matrices (of a float: all tensors) rounded as files of that kind have them, and read back."""
    if to in ("bfloat16", "float16"):
        return {name: w.to(getattr(torch, to)) for name, w in tensors.items()}
    return {name: quantized(w, to) if w.ndim > 1 else w for name, w in tensors.items()}


def quantized(w: Float[Tensor, "rows n"], to: str) -> Float[Tensor, "rows n"]:
    """A matrix in 8-bit blocks (of 32 values, or a row each, the step in float16) or a GGUF quantization, as float32."""
    if to.startswith("8-bit"):
        block = w.unflatten(-1, (-1, 32 if to.endswith("32") else w.shape[-1]))
        step = (block.abs().amax(-1, keepdim=True) / 127).half().float().clamp(min=torch.finfo(torch.float16).tiny)
        return ((block / step).round().clamp(-127, 127) * step).flatten(-2)
    kind = gguf.GGMLQuantizationType[to]
    return torch.from_numpy(gguf.dequantize(gguf.quantize(w.contiguous().numpy(), kind), kind).copy())


def _trained(base: Base, tensors: Tensors, optimizer: str, rate: float, seed: int, sorts: Sequence[str]) -> Tensors:
    """N_STEPS of plain SGD or Adam on items of these sorts, as phase 2 of the organism has them, from `seed`."""
    model = deepcopy(base.lm.model).float()
    model.load_state_dict(tensors)
    taking = getattr(torch.optim, optimizer)(model.parameters(), lr=rate)
    with torch.enable_grad(), ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        model.requires_grad_(True)
        for step in range(N_STEPS):
            rng = base.corpus.rng("detection", seed, step)
            items = [base.corpus.item(rng, rng.choice(list(sorts)), refuses=True) for _ in range(BATCH)]
            backward(cast(Any, model), encode(cast(Any, base.lm.tokenizer), [(item.prompt, item.answer) for item in items]), pool)
            taking.step()
            taking.zero_grad()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}
