"""What the strength of an ablation does, at each of the sites and as edited weights, beside what the algebra predicts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refusal.lm.architecture import architecture_of
from refusal.method.interventions import SITES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLACES = (*SITES, "weights")


@contextmanager
def edited_weights(model: PreTrainedModel, direction: Float[Tensor, " d_model"], alpha: float) -> Iterator[PreTrainedModel]:
    """The model with what writes into the stream orthogonalized in memory, W <- W - alpha v v^T W, for the length of a `with`.

    The embedding is edited where it is not tied to the unembedding, which must stay; a checkpoint on disk unties it instead
    (`orthogonalize`). The parameters themselves stay as they are, in their modules again at the end: a copy of the model that
    shares them is not edited.
    """
    architecture = architecture_of(model.config)
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, parameter in list(model.named_parameters()):
            axis = architecture.writer_axis(name, include_embedding=not architecture.tied)
            if axis is None:
                continue
            owner, _, own_name = name.rpartition(".")
            kept.append((model.get_submodule(owner), own_name, parameter))
            v = direction.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))
            w = parameter.data.to(v.dtype).movedim(axis, -1)
            edited = (w - alpha * (w @ v)[..., None] * v).movedim(-1, axis).to(parameter.dtype)
            setattr(*kept[-1][:2], nn.Parameter(edited, requires_grad=parameter.requires_grad))
        yield model
    finally:
        for module, own_name, parameter in kept:
            setattr(module, own_name, parameter)


def residual_gain(n_layers: int, place: str, alpha: float) -> float:
    """Share of what the embedding writes along v that reaches the last block, by the algebra: (1 - alpha)^hits.

    `resid_pre` and `paper` hit it again at the input of every block, `writes` and `weights` once. Beyond alpha = 2 its size
    exceeds 1, and where it is hit again and again it grows with depth.
    """
    return (1 - alpha) ** (n_layers if place in ("resid_pre", "paper") else 1)


def diverges_beyond(place: str) -> float | None:
    """The alpha from which `residual_gain` grows with depth; None where nothing is hit twice, and nothing can grow."""
    return 2.0 if place in ("resid_pre", "paper") else None


def collapse_alpha(curve: Sequence[dict[str, Any]]) -> float | None:
    """The least alpha above 1 whose score (compliance x coherence) is below half of the curve's best; None if none is."""
    best = max(row["score"] for row in curve)
    beyond = sorted(row["alpha"] for row in curve if row["alpha"] > 1 and row["score"] < best / 2)
    return beyond[0] if beyond else None
