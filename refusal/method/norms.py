"""Edits that give back the norms which a projection takes: every column or every row of a matrix stays as long as it was.

`columns`: what one input writes into the stream keeps its length. At alpha = 1 nothing is written into the span of B, as after
the plain edit; but more of everything else is, so that it no longer equals ablation at run time.
Source: J. Lai, "Norm-Preserving Biprojected Abliteration", 2025, whose code has inputs in rows.

`rows` (one for each coordinate of the stream): W is projected with its rows at length one, the rows are brought back to length
one, and to the lengths they had. That turns what is left towards the span of B again, so that B W' = (1 - alpha) B W does
not hold.
Source: heretic, `row_normalization = "full"` (https://github.com/p-e-w/heretic, pull request 52).
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.method.interventions import Intervention

Norms = Literal["rows", "columns"]


def change_of(
    intervention: Intervention, norms: Norms | None, w: Float[Tensor, "d_model n"], step: int
) -> Callable[[Float[Tensor, "d_model c"]], tuple[Float[Tensor, "d_model c"], Float[Tensor, "k c"]]]:
    """What edits some of the columns of W; those that `rows` keeps are measured first, `step` columns at a time."""
    if norms is None:
        return intervention.edit
    wide = torch.promote_types(w.dtype, torch.float32)

    def columns_kept(columns: Tensor) -> tuple[Tensor, Tensor]:
        edited, component = intervention.edit(columns.to(wide))
        return edited * _ratio(columns.to(wide).norm(dim=0), edited.norm(dim=0)), component

    if norms == "columns":
        return columns_kept

    def row_norms(change: Callable[[Tensor], Tensor]) -> Float[Tensor, "d_model 1"]:
        squares = torch.stack([change(part.to(wide)).double().square().sum(1) for part in w.split(step, 1)])
        return squares.sum(0).sqrt()[:, None]

    before = row_norms(lambda part: part)
    at_one = _ratio(torch.ones_like(before), before).to(wide)
    after = row_norms(lambda part: intervention.edit(part * at_one)[0])
    back = _ratio(before, after).to(wide)

    def rows_kept(columns: Tensor) -> tuple[Tensor, Tensor]:
        return intervention.edit(columns.to(wide) * at_one)[0] * back, intervention.component(columns)

    return rows_kept


def _ratio(wanted: Tensor, norm: Tensor) -> Tensor:
    """What brings a norm to what is wanted; what is zero stays zero."""
    return torch.where(norm > 0, wanted / norm, 0.0)
