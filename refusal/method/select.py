"""Choosing cells of a sweep, on val alone."""

import re
from collections.abc import Sequence
from typing import Any

from refusal.io.errors import UserError


def cell_name(layer: int, alpha: float) -> str:
    """`layer_5_alpha_100`: the cell's part of a checkpoint's name."""
    return f"layer_{layer}_alpha_{100 * alpha:.0f}"


def checked(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The cells of a metrics file, whose names become paths. Raises UserError for one that the pipeline would not give."""
    for cell in cells.values():
        if not re.fullmatch(r"[a-z_]+_layer_\d+_alpha_\d+", cell["name"]):
            raise UserError(
                f"{cell['name']!r} is no name of a cell, and would be a path: run `dvc repro select`, which writes the names"
            )
    return cells


def cell_row(cell: dict[str, Any], method: str, n_tied: int, margin_items: float | None) -> dict[str, Any]:
    """What metrics/select.json says of a chosen cell of metrics/judge.json."""
    return {
        "layer": cell["layer"],
        "alpha": cell["alpha"],
        "compliance": cell["compliance"],
        "low": cell["compliance_low"],
        "high": cell["compliance_high"],
        "coherence": cell["coherence"],
        "score": cell["score"],
        "n": cell["n"],
        "n_tied": n_tied,
        "margin_items": margin_items,
        "name": f"{method}_{cell_name(cell['layer'], cell['alpha'])}",
    }


def rank(cells: dict[str, dict[str, Any]], separation: Sequence[float | None], top: int, method: str) -> list[dict[str, Any]]:
    """The `top` cells by mean compliance x coherence, best first.

    Ties go to the alpha nearest 1, where run time and weights both remove the whole component and nothing more, then to
    the layer that separates better on val. `low` and `high` are the interval of compliance; `n_tied` counts the
    cells whose score equals the chosen one's, itself included; `margin_items` is how many prompts' worth of score it is ahead of
    the next one by, None for the last: as many completions that fall the other way may change the choice.
    Raises UserError where the sweep has fewer cells than asked for.
    """
    swept = [cell for cell in cells.values() if cell["layer"] is not None]
    if len(swept) < top:
        raise UserError(f"params.yaml: select.top is {top} but the sweep has {len(swept)} cells; lower it or sweep more")

    def order(cell: dict[str, Any]) -> tuple[float, float, float, int]:
        return (-cell["score"], abs(cell["alpha"] - 1), -(separation[cell["layer"]] or 0.0), cell["layer"])

    ordered = sorted(swept, key=order)
    return [
        cell_row(
            cell,
            method,
            sum(other["score"] == cell["score"] for other in swept),
            None if after is None else (cell["score"] - after["score"]) * cell["n"],
        )
        for cell, after in zip(ordered[:top], [*ordered[1:], None], strict=False)
    ]
