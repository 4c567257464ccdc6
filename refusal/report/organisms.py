"""docs/organisms.svg: separation against mediation on organisms whose truth is known, drawn from metrics/organisms.json.

python -m refusal.report.organisms metrics/organisms.json docs/organisms.svg
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from refusal.report.charts import marker, ticks

WIDTH, HEIGHT = 640, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 20, 74, 48
INKS = {"single": "#0b4fa0", "planted": "#1b7f4b", "distributed": "#d1570f", "natural": "#7a4fa3"}
STYLE = """
svg { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
text { fill: #3d444d; } .head { font-weight: 600; font-size: 14px; fill: #16191d; }
.grid { stroke: #c9ced5; stroke-width: .6; } .axis { stroke: #545b64; }
"""


def picture(organisms: Mapping[str, Any]) -> str:
    """A mark a layer, organism and seed: Cohen's d on val, and compliance once that layer's direction is ablated.

    Kind `none` is left out: it refuses nothing, so that no ablation could restore compliance.
    """
    points = [
        (name.split(".")[0], name, layer, row["by_layer"]["separation"][layer], compliance)
        for name, row in organisms.items()
        for layer, compliance in row["by_layer"]["compliance"].items()
        if name.split(".")[0] in INKS and row["by_layer"]["separation"][layer] is not None
    ]
    x_ticks, n = ticks(0.0, max(d for *_, d, _ in points)), next(iter(organisms.values()))["by_layer"]["n"]

    def px(d: float) -> float:
        return LEFT + d / x_ticks[-1] * (WIDTH - LEFT - RIGHT)

    def py(compliance: float) -> float:
        return HEIGHT - BOTTOM - compliance * (HEIGHT - TOP - BOTTOM)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>Compliance once the direction of a layer is ablated, against how far that direction separates harmful from safe "
        f"prompts</title><style>{STYLE}</style>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        '<text class="head" x="14" y="24">Separation is not mediation</text>',
        f'<text x="14" y="43">each mark: one layer of one organism, n = {n} harmful val prompts, alpha 1</text>',
    ]
    for y in (0.0, 0.25, 0.5, 0.75, 1.0):
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(y):.1f}" y2="{py(y):.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        out.append(f'<text x="{px(x):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{x:g}</text>')
    out.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    out.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">Cohen\'s d on val</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    out.append(f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">compliance, ablated</text>')
    for i, (kind, ink) in enumerate(INKS.items()):
        out.append(f'<g fill="{ink}" fill-opacity=".75">{marker(i, LEFT + 12 + 118 * i, 62)}')
        out.append(f'<text x="{LEFT + 22 + 118 * i}" y="66">{kind}</text>')
        for of, name, layer, d, compliance in points:
            if of == kind:
                said = f"{name}, layer {layer}: d {d:.1f}, compliance {compliance:.2f}"
                out.append(marker(i, px(d), py(compliance), said))
        out.append("</g>")
    return "\n".join([*out, "</svg>"]) + "\n"


if __name__ == "__main__":
    source, target = sys.argv[1:]
    Path(target).write_text(picture(json.loads(Path(source).read_text(encoding="utf-8"))), encoding="utf-8")
