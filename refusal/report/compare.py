"""What was done to a checkpoint, or how two models' scores differ, in a few lines: what `refusal compare` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def text(found: Mapping[str, Any]) -> str:
    """`anatomy.figures` in a few lines, and a table by layer."""
    alpha, n = found["alpha"], len(found["tensors"])
    lines = [f"{found['kind']}: {found['how']}"]
    if alpha is not None:
        space = "the same in all of them" if found["shared"] else "another in each layer"
        least, greatest = _number(alpha["min"]), _number(alpha["max"])
        lines.append(f"rank {found['rank']}, {space}; alpha {_number(alpha['mean'])}, in single tensors {least} to {greatest}")
        if (known := found["estimate"]) is not None:
            lines.append(
                f"as far as rounding to blocks allows (95 %): {_limits(known, 'alpha')}; |cosine| with the true direction"
                f" {_limits(known, 'cosine')}; p that it is rounding {_number(known['p'])}"
            )
        lines.append(f"norms set back after the edit: {', '.join(found['norms_set_back']) or 'none'}")
    untied = ", and the unembedding is a tensor of its own now" if found["embedding"]["untied"] else ""
    lines.append(f"embedding: {found['embedding']['kind']}{untied}; {n} tensors differ, {found['n_same']} do not")
    lines += [f"only in {which}: {len(names)} tensors, {names[0]} first" for which, names in found["only_in"].items() if names]
    names = ["attention", "mlp", "relative"]
    if found["layers"]:
        lines.append("layer" + "".join(f"{name:>11}" for name in names))
    for row in found["layers"]:
        lines.append(f"{row['layer']:5}" + "".join(f"{_number(row[name]):>11}" for name in names))
    for name, values in found["cosines"].items():
        known = {layer: value for layer, value in enumerate(values) if value is not None}
        best = max(known, key=lambda layer: known[layer], default=None)
        says = "none to compare" if best is None else f"{_number(known[best])} at layer {best}, the greatest of {len(known)}"
        lines.append(f"|cosine| with {name}: {says}; by chance {_number(found['cosine_by_chance'])}")
    return "\n".join(lines) + "\n"


def scores_text(table: Mapping[str, Mapping[str, Any]], title: str, notes: Sequence[str] = ()) -> str:
    """Rows of `samples.paired_row` by name as a table under `title`, and the notes below it."""
    width = max(map(len, (*table, title)))
    lines = [f"{title:{width}}     n    base  edited  difference (95 %)          gained  lost  p (McNemar)  p (Holm)"]
    for name, row in table.items():
        difference = f"{row['difference']:+.4f} [{row['difference_low']:+.4f}, {row['difference_high']:+.4f}]"
        ends = f"{row['n_gained']:6} {row['n_lost']:5}  {_number(row['p']):>11}  {_number(row['p_holm']):>8}"
        lines.append(f"{name:{width}} {row['n']:5}  {row['base']:.4f}  {row['edited']:.4f}  {difference:26} {ends}")
    return "\n".join([*lines, *notes]) + "\n"


def _limits(known: Mapping[str, Any], name: str) -> str:
    label = f"{name} " if name == "alpha" else ""
    return label + f"{known[name]:.5f} [{known[f'{name}_low']:.5f}, {known[f'{name}_high']:.5f}]"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) >= 1e-3 or value == 0 else f"{value:.1e}"
