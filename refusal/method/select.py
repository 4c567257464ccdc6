"""Choosing cells of a sweep, on val alone."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from refusal.io.errors import UserError
from refusal.method.subspaces import Span

_LAYERS = r"\d+([-+]\d+)*"
_NAME = rf"[a-z_]+_(layer_\d+|svd_\d+_rank_\d+|(qr|per_layer)_{_LAYERS})_alpha_\d+"


def cell_name(span: str, alpha: float) -> str:
    """`layer_5_alpha_100`: the cell's part of a checkpoint's name; `span` is the name of what it takes out."""
    return f"{span}_alpha_{100 * alpha:.0f}"


def span_of(name: str, method: str, among: Sequence[Span]) -> Span:
    """What the selected cell of this name takes out. Raises UserError where the sweep has no such cell."""
    for span in among:
        if name.removeprefix(f"{method}_").rpartition("_alpha_")[0] == span.name:
            return span
    raise UserError(f"{name} is no cell of the sweep that params.yaml describes: run `dvc repro select`, which selects anew")


def layer_scores(cells: Mapping[str, Mapping[str, Any]], among: Sequence[Span]) -> dict[int, float]:
    """Of each layer the best score of the cells that its direction has a part in."""
    scores: dict[int, float] = {}
    for span in among:
        best = max(cell["score"] for name, cell in cells.items() if name.rpartition("_alpha_")[0] == span.name)
        scores |= {layer: max(best, scores.get(layer, best)) for layer in span.layers}
    return scores


def checked(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cells of a metrics file, whose names become paths. Raises UserError for one that the pipeline would not give."""
    for cell in cells.values():
        if not re.fullmatch(_NAME, cell["name"]):
            raise UserError(
                f"{cell['name']!r} is no name of a cell, and would be a path: run `dvc repro select`, which writes the names"
            )
    return cells


def cell_row(
    cell: Mapping[str, Any], span: Span, layer: int, method: str, n_tied: int, margin_items: float | None
) -> dict[str, Any]:
    """What metrics/select.json says of a chosen cell of metrics/judge.json; layer: that of its layers which stands for them."""
    return {
        "layer": layer,
        "alpha": cell["alpha"],
        "compliance": cell["compliance"],
        "low": cell["compliance_low"],
        "high": cell["compliance_high"],
        "coherence": cell["coherence"],
        "score": cell["score"],
        "n": cell["n"],
        "n_tied": n_tied,
        "margin_items": margin_items,
        "name": f"{method}_{cell_name(span.name, cell['alpha'])}",
    }


def rank(
    cells: Mapping[str, Mapping[str, Any]], among: Sequence[Span], separation: Sequence[float | None], top: int, method: str
) -> list[dict[str, Any]]:
    """The `top` cells by mean compliance x coherence, best first. among: what the sweep takes out.

    Ties go to the alpha nearest 1, where run time and weights both remove the whole component and nothing more, then to
    the layer that separates better on val: of a subspace of several layers that one of them which does, its `layer`. `low` and
    `high` are the interval of compliance; `n_tied` counts the
    cells whose score equals the chosen one's, itself included; `margin_items` is how many prompts' worth of score it is ahead of
    the next one by, None for the last: as many completions that fall the other way may change the choice.
    Raises UserError where the sweep has fewer cells than asked for.
    """
    best = {span.name: min(span.layers, key=lambda i: (-(separation[i] or 0.0), i)) for span in among}
    of = {span.name: span for span in among}
    swept = [(span, cell) for name, cell in cells.items() if (span := name.rpartition("_alpha_")[0]) in of]
    if len(swept) < top:
        raise UserError(f"params.yaml: select.top is {top} but the sweep has {len(swept)} cells; lower it or sweep more")

    def order(one: tuple[str, Mapping[str, Any]]) -> tuple[float, float, float, int, tuple[int, ...]]:
        (span, cell), layer = one, best[one[0]]
        return (-cell["score"], abs(cell["alpha"] - 1), -(separation[layer] or 0.0), layer, of[span].layers)

    ordered = sorted(swept, key=order)
    return [
        cell_row(
            cell,
            of[span],
            best[span],
            method,
            sum(other["score"] == cell["score"] for _, other in swept),
            None if after is None else (cell["score"] - after[1]["score"]) * cell["n"],
        )
        for (span, cell), after in zip(ordered[:top], [*ordered[1:], None], strict=False)
    ]
