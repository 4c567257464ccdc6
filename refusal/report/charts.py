"""Line charts as SVG, drawn by hand: no library, no script, colours from the page's style sheet."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 420, 270
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40


class Point(NamedTuple):
    """One measured point; low and high are its 95 % interval, None where there is none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


class Series(NamedTuple):
    """A named line; `style` 0 to 3 picks colour, dash and marker, so that colour is never the only difference."""

    name: str
    style: int
    points: Sequence[Point]


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that span low to high, some `about` of them and never fewer than two."""
    span = (high - low) or 1.0
    raw = span / about
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]


def lines(title: str, x_label: str, y_label: str, series: Sequence[Series], include: Sequence[float] = (0.0,)) -> Markup:
    """An SVG of the series with their intervals as bands; `include` are y values that the axis must hold."""
    points = [p for s in series for p in s.points]
    if not points:
        return Markup('<p class="none">Nothing to draw in this run.</p>')
    ys = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    y_ticks = ticks(min(*ys, *include), max(*ys, *include))
    xs = [p.x for p in points]
    x_ticks = (
        [float(x) for x in range(int(min(xs)), int(max(xs)) + 1)]
        if all(float(x).is_integer() for x in xs)
        else ticks(min(xs), max(xs))
    )
    x_ticks = x_ticks[:: max(1, math.ceil(len(x_ticks) / 12))]
    left, right = min(*xs, x_ticks[0]), max(*xs, x_ticks[-1])

    def px(x: float) -> str:
        return f"{LEFT + (x - left) / ((right - left) or 1) * (WIDTH - LEFT - RIGHT):.1f}"

    def py(y: float) -> str:
        return f"{HEIGHT - BOTTOM - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (HEIGHT - TOP - BOTTOM):.1f}"

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        out.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y)}" y2="{py(y)}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{py(y)}" dy=".32em" text-anchor="end">{y:g}</text>'
        )
    for x in x_ticks:
        out.append(f'<text class="tick" x="{px(x)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:g}</text>')
    out.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="label" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="label" transform="translate(11 {(HEIGHT - BOTTOM + TOP) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for s in series:
        band = [(p.x, p.low, p.high) for p in s.points if p.low is not None and p.high is not None]
        if len(band) > 1:
            edge = [f"{px(x)},{py(high)}" for x, _, high in band] + [f"{px(x)},{py(low)}" for x, low, _ in reversed(band)]
            out.append(f'<polygon class="band s{s.style}" points="{" ".join(edge)}"/>')
    for s in series:
        out.append(f'<polyline class="line s{s.style}" points="{" ".join(f"{px(p.x)},{py(p.y)}" for p in s.points)}"/>')
        out += [marker(s.style, float(px(p.x)), float(py(p.y)), f"{s.name}, {x_label} {p.x:g}: {p.y:.4g}") for p in s.points]
    out.append("</svg>")
    key = "".join(
        f'<li><svg viewBox="0 0 34 12" aria-hidden="true"><line class="line s{s.style}" x1="1" x2="33" y1="6" y2="6"/>'
        f"{marker(s.style, 17, 6)}</svg>{escape(s.name)}</li>"
        for s in series
    )
    return Markup("".join(out) + (f'<ul class="key">{key}</ul>' if len(series) > 1 else ""))


def marker(style: int, x: float, y: float, title: str = "") -> str:
    """A mark of style 0 to 3, with a title to hover over."""
    name = f"<title>{escape(title)}</title>" if title else ""
    if style == 0:
        return f'<circle class="mark s0" cx="{x:.1f}" cy="{y:.1f}" r="3.6">{name}</circle>'
    if style == 1:
        return f'<rect class="mark s1" x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2">{name}</rect>'
    corners = ((0, -4), (3.8, 3), (-3.8, 3)) if style == 2 else ((0, -4.2), (4.2, 0), (0, 4.2), (-4.2, 0))
    return f'<polygon class="mark s{style}" points="{" ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)}">{name}</polygon>'
