"""The study's result as one picture, a plain SVG: where refusal is, what ablating it does, and what that comes to on test.

`python -m refusal.report.picture SEPARATION.csv SWEEP.csv EVALUATE.json OUT.svg`, or `make picture`. Nothing of it depends on a
font or a machine: equal figures give an equal picture.
"""

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import escape

from refusal.report.charts import Point, Series, lines

WIDTH, HEIGHT, TOP, SIDE = 940, 330, 58, 250
ARMS = (
    ("baseline", "untouched"),
    ("runtime", "ablated at run time"),
    ("orthogonalized", "edited weights"),
    ("random", "random directions"),
)
STYLE = """
svg { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
text { fill: #3d444d; } .head { font-weight: 600; font-size: 14px; fill: #16191d; }
.tick, .label { font-size: 13px; } svg svg text { font-size: 15px; }
.grid { stroke: #c9ced5; stroke-width: .6; } .axis { stroke: #545b64; }
.line.s0, .bar { stroke: #0b4fa0; stroke-width: 3; fill: none; }
.band { fill: #0b4fa0; opacity: .16; } .mark { fill: #0b4fa0; }
"""


def shade(value: float) -> str:
    """A colour between near-white (0) and blue (1)."""
    return "#" + "".join(f"{round(a + (b - a) * value):02x}" for a, b in zip((0xF2, 0xF5, 0xF9), (0x0B, 0x4F, 0xA0), strict=True))


def picture(separation: Sequence[dict[str, str]], sweep: Sequence[dict[str, str]], evaluate: dict[str, Any]) -> str:
    """The picture from the rows of plots/separation.csv and plots/sweep.csv, and from metrics/evaluate.json."""
    arm = separation[0]["arm"]
    points = [
        Point(*(float(row[key]) for key in ("layer", "separation", "low", "high"))) for row in separation if row["arm"] == arm
    ]
    n_val, n_test = sweep[0]["n"], evaluate["baseline"]["n"]
    chart = lines("Separation by layer", "layer", "Cohen's d", [Series(arm, 0, points)])
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Separation of harmful and safe prompts by layer; compliance when the direction of a layer is ablated; "
        "compliance on test prompts. Bands and bars are 95 % intervals</title>",
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _head(14, "Where refusal is", f"Cohen's d on val, {arm}"),
        str(chart).replace("<svg ", f'<svg x="4" y="{TOP + 23}" width="330" height="{SIDE - 38}" ', 1),
        _head(346, "What ablating it does", f"compliance, n = {n_val} val prompts a cell"),
        *_grid(sweep, 346, evaluate["layer"], evaluate["alpha"]),
        _head(640, "What that comes to on test", f"compliance, n = {n_test} harmful prompts"),
        *_rates(evaluate, 640),
        "</svg>",
    ]
    return "\n".join(out) + "\n"


def _head(x: int, title: str, under: str) -> str:
    return f'<text class="head" x="{x}" y="24">{escape(title)}</text><text x="{x}" y="43">{escape(under)}</text>'


def _grid(sweep: Sequence[dict[str, str]], left: int, layer: int, alpha: float) -> list[str]:
    alphas, layers = sorted({float(row["alpha"]) for row in sweep}), sorted({int(row["layer"]) for row in sweep})
    x0, wide, high = left + 46, 210 / len(alphas), (SIDE - 62) / len(layers)
    out = [
        f'<text class="label" transform="translate({left + 10} {TOP + (SIDE - 46) / 2:.1f}) rotate(-90)" text-anchor="middle">'
        f'layer</text><text class="label" x="{x0 + 105}" y="{TOP + SIDE - 6}" text-anchor="middle">alpha</text>'
    ]
    for row in sweep:
        value, i, j = float(row["compliance"]), alphas.index(float(row["alpha"])), layers.index(int(row["layer"]))
        x, y = x0 + i * wide, TOP + 10 + j * high
        chosen = (int(row["layer"]), float(row["alpha"])) == (layer, alpha)
        ink = "#fff" if value > 0.5 else "#16191d"
        outline = ' stroke="#d1570f" stroke-width="3"' if chosen else ""
        out.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide - 2:.1f}" height="{high - 2:.1f}" fill="{shade(value)}"'
            f"{outline}/>"
            f'<text x="{x + wide / 2 - 1:.1f}" y="{y + high / 2 + 3.5:.1f}" text-anchor="middle" '
            f'style="fill:{ink}">{value:.2f}</text>'
        )
    for j, number in enumerate(layers):
        out.append(f'<text class="tick" x="{x0 - 8}" y="{TOP + 13.5 + (j + 0.5) * high:.1f}" text-anchor="end">{number}</text>')
    for i, at in enumerate(alphas):
        x = x0 + (i + 0.5) * wide - 1
        out.append(f'<text class="tick" x="{x:.1f}" y="{TOP + SIDE - 30}" text-anchor="middle">{at:g}</text>')
    return out


def _rates(evaluate: dict[str, Any], left: int) -> list[str]:
    x0, wide = left + 8, 200
    out = []
    for tick in (0.0, 0.5, 1.0):
        x = x0 + tick * wide
        out.append(
            f'<line class="grid" x1="{x:g}" x2="{x:g}" y1="{TOP + 6}" y2="{TOP + SIDE - 46}"/>'
            f'<text class="tick" x="{x:g}" y="{TOP + SIDE - 30}" text-anchor="middle">{tick:g}</text>'
        )
    for i, (name, words) in enumerate(ARMS):
        m, y = evaluate[name], TOP + 40 + i * 48
        value, low, high = (x0 + m[f"compliance{end}"] * wide for end in ("", "_low", "_high"))
        rate = f"{m['compliance']:.2f}"
        out.append(
            f'<text x="{x0}" y="{y - 10}">{words}</text><line class="bar" x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
            f'<circle class="mark" cx="{value:.1f}" cy="{y}" r="5"/><text x="{x0 + wide + 14}" y="{y + 4}">{rate}</text>'
        )
    return out


def rows(path: str) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    separation, sweep, evaluate, out = sys.argv[1:]
    figures = json.loads(Path(evaluate).read_text(encoding="utf-8"))
    Path(out).write_text(picture(rows(separation), rows(sweep), figures), encoding="utf-8")
