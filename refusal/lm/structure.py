"""The parts, writers and norms of decoder blocks, found by what modules hold and by what their forward calls."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn


def norms_of(decoder: nn.Module, d_model: int, name_of: Mapping[int, str]) -> dict[str, float]:
    """The gains of norms beside the blocks and in them, each with what is added to it: fresh ones are 1 together."""
    norms = {}
    for owner in (decoder, *(block for one in decoder.children() if isinstance(one, nn.ModuleList) for block in one)):
        for child in owner.children():
            gain = getattr(child, "weight", None)
            if isinstance(gain, nn.Parameter) and tuple(gain.shape) == (d_model,):
                with torch.device("cpu"):
                    fresh: Any = cast(Any, type(child))(d_model)
                norms[f"{name_of[id(child)]}.weight"] = 1.0 - float(fresh.weight.detach()[0])
    return norms


def has_matrices(module: nn.Module) -> bool:
    """Whether it has a parameter of two axes or more."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def writers_of(module: nn.Module, d_model: int) -> Iterator[tuple[str, int]]:
    """(name, axis of d_model) of what ends a part: the last projection onto d_model that a module has itself; where it has none,
    those of its children, and the last of their 3-D parameters, each of which holds all experts."""
    projections = [(name, child, axis) for name, child in module.named_children() if (axis := _projects(child, d_model))]
    if projections:
        last = _called_last(module, [name for name, _, _ in projections])
        name, child, axis = next(one for one in projections if one[0] == last)
        yield f"{name}.weight", axis
        if child.bias is not None:
            yield f"{name}.bias", -1
        return
    experts = [(name, one) for name, one in module.named_parameters(recurse=False) if one.ndim == 3]
    if experts:
        yield from _fused(experts, [*module.named_parameters(recurse=False)], d_model)
        return
    # Experts may be in two modules of one parameter each, as GraniteMoE's are.
    alone = [
        (f"{name}.weight", child.weight)
        for name, child in module.named_children()
        if not isinstance(child, nn.modules.conv._ConvNd) and [p.ndim for p in child.parameters()] == [3]
    ]
    yield from _fused(alone, [], d_model)
    for name, child in module.named_children():
        if f"{name}.weight" not in dict(alone):
            yield from ((f"{name}.{inner}", axis) for inner, axis in writers_of(child, d_model))


def _called_last(module: nn.Module, names: list[str]) -> str:
    """Which of these children the forward of a module calls last, as its text says; where it calls none, the last of them."""
    if len(names) == 1:
        return names[0]
    try:
        text = textwrap.dedent(inspect.getsource(inspect.unwrap(type(module).forward)))
    except (OSError, TypeError):
        return names[-1]
    called: list[str] = []

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):  # a call's arguments are evaluated before it
            visit(child)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names:
            called.append(node.func.attr)

    visit(ast.parse(text))
    return called[-1] if called else names[-1]


def _projects(module: nn.Module, d_model: int) -> int:
    """The axis of a linear layer's outputs where these are d_model, else 0."""
    if isinstance(module, nn.Linear):
        return -2 if module.weight.shape[0] == d_model else 0
    # GPT-2's linear layer is named after a convolution, and keeps [in, out].
    weight = cast(Any, module.weight) if type(module).__name__ == "Conv1D" else None
    return -1 if weight is not None and weight.shape[1] == d_model else 0


def _fused(experts: list, all_of_it: list, d_model: int) -> Iterator[tuple[str, int]]:
    """The last of the 3-D parameters, with its bias [expert, d_model]: [expert, d_model, in], or [expert, in, d_model]."""
    if not experts or d_model not in experts[-1][1].shape[1:]:
        return
    name, writer = experts[-1]
    n, rows, columns = writer.shape
    reader = tuple(experts[0][1].shape[1:])
    # Where experts are as wide as the stream, the shape of what reads it tells which way round they are kept.
    axis = (-2 if reader[0] != d_model else -1) if rows == columns else -2 if rows == d_model else -1
    yield name, axis
    later = all_of_it[[one for one, _ in all_of_it].index(name) + 1 :] if all_of_it else []
    yield from ((bias, -1) for bias, one in later if tuple(one.shape) == (n, d_model))
