"""Last-token `resid_pre` of every layer, collected in three ways.

`sequential` runs one prompt a forward. `batched` runs several of similar length, padding masked and positions right,
and equals it to rounding. `batched_unmasked` left-pads a batch in the order given and lets the padding be attended to,
as the write-up's batched code did.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from refusal.anatomy import anatomy_of
from refusal.memory import in_parts


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
    """Which prompts share a batch: by length for `batched`, in the order given for `batched_unmasked`.

    `sequential` is grouped too, but only into units of work to store; each prompt is still a forward of its own.
    """
    order = list(range(len(lengths)))
    if method == "batched":
        order.sort(key=lambda i: lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.inference_mode()
def last_token_resid_pre(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], method: str, pad_id: int
) -> Float[Tensor, "batch n_layers d_model"]:
    """`blocks.{l}.hook_resid_pre` at the last token of each prompt, for every layer l, by `method`, in the model's dtype.

    Only the last position is copied, and neither the final norm's output nor any logit is used.
    """
    if method == "sequential":
        return torch.cat([_forward(model, torch.tensor([tokens]), None) for tokens in ids])
    padded, mask = left_pad(ids, pad_id)
    return _forward(model, padded, mask if method == "batched" else None)


def _forward(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> Float[Tensor, "batch n_layers d_model"]:
    # Said once for the whole batch: a part of it without padding takes the same path as the rest.
    padding = (
        {} if mask is None or bool(mask.all()) else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    )

    def rows(first: int, last: int) -> Tensor:
        return _forward_rows(model, ids[first:last], {name: value[first:last] for name, value in padding.items()})

    return torch.cat(in_parts(rows, len(ids), "activations"))


def _forward_rows(model: PreTrainedModel, ids: Tensor, padding: dict[str, Tensor]) -> Float[Tensor, "batch n_layers d_model"]:
    rows: list[Tensor] = []

    def keep(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        rows.append((args[0] if args else kwargs["hidden_states"])[:, -1].clone())

    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in anatomy_of(model.config).blocks(model)]
    try:
        inputs = {name: value.to(model.device) for name, value in {"input_ids": ids, **padding}.items()}
        model.base_model(**inputs, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack([row.cpu() for row in rows], dim=1)  # layers may lie on several devices
