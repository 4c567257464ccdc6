"""What a model must be for its figures to mean what they say, proved on a few of its own tokens before anything rests on it.

- sums: every block adds its parts to the stream and no more, resid_{l+1} = resid_l + attn_out + mlp_out, the embedding first,
  up to scalars that config.json states (Granite's residual_multiplier, Falcon-H1's). Else the model is refused.
- tokens: eight greedy tokens of a batch of unlike lengths are those of each prompt alone, without batch, padding or cache.
  Else the model is refused: recurrent mixers get padding and slots wrong where the structure passes.
- edits: each part with its writers orthogonalized gives what it gave, less the component along the direction. Where a part does
  not, or a norm stands between it and the stream, run-time ablation is exact and the edited checkpoint another thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from refusal.io.errors import UserError
from refusal.lm.architecture import Architecture
from refusal.lm.load import LM
from refusal.lm.stream import stream_of
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import Intervention, edited_tensor

ROUNDINGS = 4.0  # a block makes two sums
# |difference| / |output| of an edited part: the edit is rounded to the weights' dtype, and the sum of many products with it.
EDITED = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
# How far two logits may lie apart, of the spread of all, for rounding to choose the other one.
NEAR = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
N_TOKENS, N_PROVED = 8, 4  # greedy tokens; prompts of each half that a study proves its model on
Outcome = Literal["ablate and orthogonalize", "ablate only"]


@dataclass(frozen=True)
class Proof:
    """sums: by layer, the greatest gap of a coordinate, in roundings of the dtype. edits: by layer, |difference| / |output|.
    multipliers: the scalars of the embedding, and of the parts of each layer. n_tokens: greedy tokens compared; n_same: equal.
    """

    outcome: Outcome
    sums: list[float]
    edits: list[float]
    norm_after_writer: bool
    multipliers: list[list[float]]
    n_tokens: int
    n_same: int

    @property
    def figures(self) -> dict[str, Any]:
        """What is kept of it, for a metrics file."""
        sums, edits = max(self.sums), max(self.edits)
        return {
            "outcome": self.outcome,
            "norm_after_writer": self.norm_after_writer,
            "sums": {"gap": sums, "layer": self.sums.index(sums), "at_most": ROUNDINGS},
            "edits": {"gap": edits, "layer": self.edits.index(edits)},
            "multipliers": sorted({scalar for some in self.multipliers for scalar in some}),
            "n_tokens": self.n_tokens,
            "n_same": self.n_same,
        }


def prove(lm: LM, ids: Sequence[Sequence[int]], where: str) -> Proof:
    """The proof on these prompts (token ids), of unlike lengths. Raises UserError for a model that is refused, naming `where`,
    the layer and the gap."""
    sums, multipliers = look_at_sums(lm, ids[:2])
    kind = lm.model.config.model_type
    worst = max(range(len(sums)), key=lambda i: sums[i])
    if not sums[worst] <= ROUNDINGS:
        raise UserError(
            f"{where}: {kind}: layer {worst}: the stream is not the sum of what its blocks add: it is off by {sums[worst]:.3g} "
            f"roundings of {str(lm.model.dtype).removeprefix('torch.')}, and {ROUNDINGS:g} are allowed: use another model."
        )
    edits = look_at_edits(lm, ids[:2])
    same = _check_tokens(lm, ids, where)
    norm = stream_of(lm.model).norm_after_writer
    exact = not norm and max(edits) <= EDITED[lm.model.dtype]
    outcome: Outcome = "ablate and orthogonalize" if exact else "ablate only"
    return Proof(outcome, sums, edits, norm, multipliers, *same)


@torch.inference_mode()
def look_at_sums(lm: LM, ids: Sequence[Sequence[int]]) -> tuple[list[float], list[list[float]]]:
    """(by layer the greatest gap, the scalars of the embedding and of each layer's parts).

    The gap is |out - in - s_1 part_1 - s_2 part_2 ...| of a block, coordinate by coordinate over |in| + |s_1 part_1| + ..., in
    steps of the model's dtype (`torch.finfo.eps`): one or two where a block adds these and no more; or that of what comes in
    from what the block before gave, of the first layer from the embedding. Scalars are the best of 1 and config.json's.
    """
    stream, step = stream_of(lm.model), torch.finfo(lm.model.dtype).eps
    stated = _stated(lm.model.config.get_text_config().to_dict())
    n = lm.n_layers
    gaps, scalars = [0.0] * n, [[1.0]] * (n + 1)
    for prompt in ids:
        seen = _forward(lm, prompt)
        before = [seen["embedding"]]
        for i in range(n):
            into, out = seen[i, "in"], seen[i, "out"]
            gap, of = _gap(into, [], before, stated if i == 0 else [1.0])
            scalars = [of, *scalars[1:]] if i == 0 else scalars
            parts = [seen[i, name] for name in stream.written[i]]
            more, scalars[i + 1] = _gap(out, [into], parts, stated)
            gaps[i] = max(gaps[i], gap / step, more / step)
            before = [out]
    return gaps, scalars


def _gap(out: Tensor, whole: list[Tensor], parts: list[Tensor], stated: list[float]) -> tuple[float, list[float]]:
    """(the greatest |out - sum| over the sum of sizes, the scalars of the parts)."""
    rest = out - sum(whole)
    fitted = torch.linalg.lstsq(torch.stack([part.flatten() for part in parts], 1), rest.flatten()[:, None]).solution[:, 0]
    scalars = [stated[int((torch.tensor(stated) - s).abs().argmin())] for s in fitted.tolist()]
    scaled = [s * part for s, part in zip(scalars, parts, strict=True)]
    size = torch.stack([t.abs() for t in [*whole, *scaled]]).sum(0).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((rest - sum(scaled)).abs() / size).nan_to_num(torch.inf, torch.inf).max()), scalars


def _stated(config: dict) -> list[float]:
    """1 and the multipliers that a config states."""
    values = [value for key, value in config.items() if "multiplier" in key]
    flat = [one for value in values for one in (value if isinstance(value, list | tuple) else [value])]
    return [1.0, *(float(one) for one in flat if isinstance(one, int | float))]


def _forward(lm: LM, prompt: Sequence[int]) -> dict:
    """Of one forward: the embedding's output and, by layer, what came in, went out, and each of the parts, in float64."""
    stream, handles = stream_of(lm.model), []
    seen: dict[Any, Tensor] = {}
    handles.append(stream.embedding(lm.model).register_forward_hook(partial(_keep_output, seen, "embedding")))
    for i, block in enumerate(stream.blocks(lm.model)):
        handles.append(block.register_forward_pre_hook(partial(_keep_input, seen, (i, "in")), with_kwargs=True))
        handles.append(block.register_forward_hook(partial(_keep_output, seen, (i, "out"))))
        for name, module in zip(stream.written[i], stream.writes(lm.model, i), strict=True):
            handles.append(module.register_forward_hook(partial(_keep_output, seen, (i, name))))
    try:
        lm.model.base_model(input_ids=torch.tensor([list(prompt)], device=lm.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    width = seen["embedding"].shape
    return {place: kept.reshape(width) for place, kept in seen.items()}


def _keep_output(seen: dict, place: object, _module: nn.Module, _args: tuple, output: Any) -> None:
    seen[place] = (output[0] if isinstance(output, tuple) else output).cpu().double()


def _keep_input(seen: dict, place: object, _module: nn.Module, args: tuple, kwargs: dict) -> None:
    seen[place] = (args[0] if args else kwargs["hidden_states"]).cpu().double()


@torch.inference_mode()
def look_at_edits(lm: LM, ids: Sequence[Sequence[int]]) -> list[float]:
    """By layer the greatest |out' - (out - v v^T out)| / |out| of a part, out' what it gives of the same input once its writers
    are orthogonalized. v is what the part gives the token where that is longest: a writer that was missed keeps all of it."""
    stream = stream_of(lm.model)
    gaps, handles = [0.0] * lm.n_layers, []
    for i, block in enumerate(stream.blocks(lm.model)):
        for name in stream.architecture.parts[i]:
            place = f"{stream.architecture.blocks_name}.{i}.{name}"
            again = partial(_again, partial(_edited, block.get_submodule(name), place, stream.architecture))

            def hook(_module: nn.Module, args: tuple, kwargs: dict, output: Any, again=again, i: int = i) -> None:
                gaps[i] = max(gaps[i], again(args, kwargs, output))

            handles.append(block.get_submodule(name).register_forward_hook(hook, with_kwargs=True))
    try:
        for prompt in ids:
            lm.model.base_model(input_ids=torch.tensor([list(prompt)], device=lm.model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return gaps


def _again(edited: Callable[[Intervention], AbstractContextManager[nn.Module]], args: tuple, kwargs: dict, output: Any) -> float:
    """The gap of one part, which ran with these arguments."""
    out = (output[0] if isinstance(output, tuple) else output).double().flatten(0, -2)
    longest = out[out.norm(dim=-1).argmax()]
    if not longest.any():
        return 0.0
    v = longest / longest.norm()
    with edited(Intervention("intake", v.cpu(), 1.0, "weights")) as module:
        after = module.forward(*args, **kwargs)
    after = (after[0] if isinstance(after, tuple) else after).double().flatten(0, -2)
    gap = float((after - (out - (out @ v)[:, None] * v)).norm() / out.norm())
    return gap if gap == gap else float("inf")


@contextmanager
def _edited(module: nn.Module, place: str, architecture: Architecture, intervention: Intervention) -> Iterator[nn.Module]:
    """The module with its own writers orthogonalized, for the length of a `with`."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, parameter in list(module.named_parameters()):
            if (axis := architecture.writers.get(f"{place}.{name}")) is None:
                continue
            owner, _, own = name.rpartition(".")
            kept.append((module.get_submodule(owner), own, parameter))
            setattr(kept[-1][0], own, nn.Parameter(edited_tensor(intervention, parameter.data, axis), requires_grad=False))
        yield module
    finally:
        for holder, own, parameter in kept:
            setattr(holder, own, parameter)


@torch.inference_mode()
def _check_tokens(lm: LM, ids: Sequence[Sequence[int]], where: str) -> tuple[int, int]:
    """(tokens compared, tokens equal), to where two logits are so near that rounding chooses. Raises UserError for others."""
    together = generate(lm, ids, Decoding(N_TOKENS, max(2, len(ids) - 1)))
    model, compared, same = cast(Any, lm.model), 0, 0
    for i, (prompt, given) in enumerate(zip(ids, together, strict=True)):
        row = [*prompt, *given]
        # One forward of all, without a cache: what each token would have been is read where it was chosen.
        logits = model(input_ids=torch.tensor([row], device=model.device), use_cache=False).logits[0, len(prompt) - 1 :].double()
        for at, (chosen, likely) in enumerate(zip([*given, None][:N_TOKENS], logits, strict=False)):
            ours = sorted(lm.stop) if chosen is None else [chosen]  # a stop token ends an answer and is left out of it
            apart = float((likely.max() - likely[ours].max()) / likely.std())
            compared, same = compared + 1, same + (apart == 0)
            if apart > NEAR[model.dtype]:
                raise UserError(
                    f"{where}: {model.config.model_type}: prompt {i}, token {at}: a batch chooses another token than the prompt "
                    f"alone, whose logit is {apart:.3g} of their spread lower, and {NEAR[model.dtype]:g} is rounding: some layer "
                    "takes padding for text: use another model."
                )
    return compared, same
