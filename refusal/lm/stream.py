"""The residual stream of a loaded model: the modules that it passes and what is added to it.

Which child of a block comes before which is seen in one forward of two tokens: where a norm takes the very tensor that a part
of the block gave, it is the norm's output that is added (Gemma 2 and 3, OLMo 2 and 3, GLM-4), and else the part's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from refusal.lm.architecture import Architecture, architecture_of, without_weights


@dataclass(frozen=True)
class Stream:
    """What of a model `architecture` leaves to a forward.

    written: of each block, for each of its parts, the child whose output is added to the stream, by name: the part, or a norm.
    recurrent: it carries a state besides keys and values (linear attention, state-space layers, convolutions).

    A norm between writer and stream divides by the size of the projected output and not of the original one, and its
    elementwise scale turns what is left back towards the direction: the identity "`writes` ablation equals the orthogonalized
    checkpoint" fails there at every alpha but 0; it is exact elsewhere. A scalar commutes with the projection, be it within the
    embedding (Gemma's sqrt(d_model)) or behind a part (Granite's residual_multiplier).
    """

    architecture: Architecture
    written: tuple[tuple[str, ...], ...]
    recurrent: bool

    def __deepcopy__(self, memo: dict) -> Stream:
        """Itself: it holds names alone, and a copy of the model has the same."""
        return self

    @property
    def norm_after_writer(self) -> bool:
        """Whether a norm stands between any writer and the stream."""
        return self.written != self.architecture.parts

    def embedding(self, model: nn.Module) -> nn.Module:
        """The module whose output [batch, seq, d_model] starts the stream."""
        return model.get_submodule(self.architecture.embedding_module)

    def blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks; block l takes `resid_pre` of layer l as its first argument, `hidden_states`."""
        return cast(nn.ModuleList, model.get_submodule(self.architecture.blocks_name))

    def writes(self, model: nn.Module, layer: int) -> list[nn.Module]:
        """The modules of a block whose outputs [batch, seq, d_model] (first of a tuple) are added to the stream."""
        block = self.blocks(model)[layer]
        return [block.get_submodule(name) for name in self.written[layer]]


def stream_of(model: nn.Module) -> Stream:
    """The stream of a loaded model, looked for once. Raises UserError as `architecture_of` does."""
    found = model.__dict__.get("_residual_stream")
    if found is None:
        found = _look(cast(Any, model))
        model.__dict__["_residual_stream"] = found  # of names alone: a copy of the model may keep it
    return found


def norm_after_writer(config: Any) -> bool | None:
    """`Stream.norm_after_writer` of a config's model, without weights; None where it only runs with some."""
    try:
        return _look(without_weights(config).eval()).norm_after_writer
    except (RuntimeError, NotImplementedError, ValueError, IndexError):
        return None


@torch.inference_mode()
def _look(model: Any) -> Stream:
    from transformers import DynamicCache  # slow to import
    from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

    architecture = architecture_of(model)
    blocks = model.get_submodule(architecture.blocks_name)
    gave: list[dict[str, Tensor]] = [{} for _ in blocks]
    written = [{part: part for part in parts} for parts in architecture.parts]
    handles = []
    for i, block in enumerate(blocks):
        for name, child in block.named_children():
            if name in written[i]:
                handles.append(child.register_forward_hook(_remember(gave[i], name)))
            elif any(True for _ in child.parameters()):
                handles.append(child.register_forward_pre_hook(_compare(gave[i], written[i], name), with_kwargs=True))
    # The method itself, so that no hook of the whole model counts this forward.
    base = model.base_model
    try:
        base.forward(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device), use_cache=True)
    finally:
        for handle in handles:
            handle.remove()
    layers = DynamicCache(config=model.config).layers
    recurrent = any(not isinstance(one, DynamicLayer) or isinstance(one, LinearAttentionCacheLayerMixin) for one in layers)
    return Stream(architecture, tuple(tuple(one[part] for part in one) for one in written), recurrent)


def _remember(gave: dict[str, Tensor], part: str) -> Callable:
    def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
        gave[part] = output[0] if isinstance(output, tuple) else output

    return hook


def _compare(gave: dict[str, Tensor], written: dict[str, str], norm: str) -> Callable:
    def hook(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        taken = args[0] if args else kwargs.get("hidden_states")
        for part, output in gave.items():
            if output is taken:
                written[part] = norm

    return hook


def change_input(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Hook a change of `hidden_states`, its first argument, to a block."""

    def hook(_, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    return module.register_forward_pre_hook(hook, with_kwargs=True)


def change_output(module: nn.Module, change: Callable[[Tensor], Tensor]) -> RemovableHandle:
    """Hook a change of its output [batch, seq, d_model], the first of a tuple, to a module that writes."""

    def hook(_, args: tuple, kwargs: dict, output):
        if not isinstance(output, tuple):
            return shaped(output, args, kwargs)
        return (shaped(output[0], args, kwargs), *output[1:])

    def shaped(r: Tensor, args: tuple, kwargs: dict) -> Tensor:
        if r.ndim == 3:
            return change(r)
        rows = args[0] if args else kwargs["hidden_states"]  # some experts give all tokens of a batch in one row (Llama 4)
        return change(r.reshape(rows.shape)).reshape(r.shape)

    return module.register_forward_hook(hook, with_kwargs=True)
