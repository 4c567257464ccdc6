"""Numbers as a page writes them."""

from typing import Any

from refusal.report.study import Metrics


def num(x: float | None, digits: int = 2) -> str:
    """A number with so many decimals, a dash for a missing one; what rounds to nothing has no sign."""
    if x is None:
        return "–"
    text = f"{x:.{digits}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{digits}f}"


def signed(x: float | None, digits: int = 3) -> str:
    """`num` with its sign."""
    text = num(x, digits)
    return text if x is None or x <= 0 or not float(text) else f"+{text}"


def ci(m: Metrics, key: str, digits: int = 3) -> str:
    """`value [low, high]` of a metric that is stored as key, key_low, key_high."""
    if m.get(key) is None or m.get(f"{key}_low") is None:
        return num(m.get(key), digits)
    return f"{num(m[key], digits)} [{num(m[f'{key}_low'], digits)}, {num(m[f'{key}_high'], digits)}]"


def value(x: Any) -> str:
    """A published or measured figure of any kind, as a person writes it."""
    if x is None:
        return "–"
    if isinstance(x, list):
        return ", ".join(map(value, x)) or "none"
    return f"{x:.4g}".replace("-", "−") if isinstance(x, float) else str(x)
