"""Charts as SVG: Vega-Lite templates of `dvc plots`, filled as DVC fills them and rendered by vl_convert, without a network."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

TEMPLATES = Path(__file__).parents[2] / ".dvc" / "plots"
# vl_convert ships the first font and measures text by it, so that a chart has the same layout on every machine; the padding
# leaves room for a browser that has none of them.
_TEXT = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
CONFIG = {
    "font": "Liberation Sans, Arial, Helvetica, sans-serif",
    "padding": {"left": 16, "right": 16, "top": 5, "bottom": 5},
    "aria": False,  # a chart is one image with one description; its numbers are in a table
    "view": {"stroke": None},
    "mark": {"color": "#0b4fa0"},
    "rule": {"color": "#0b4fa0"},
    "axis": _TEXT,
    "header": _TEXT,
    "legend": _TEXT | {"orient": "bottom", "labelLimit": 300, "columnPadding": 25},
    "title": {"anchor": "start", "frame": "group", "fontSize": 14, "subtitleFontSize": 12},
}

Spec = dict[str, Any]


def fill(template: str, rows: Sequence[Mapping[str, Any]], x: str, y: str, **labels: str) -> Spec:
    """The specification of `.dvc/plots/<template>.json` with rows, columns, title, x_label and y_label (by default x and y)."""
    text = (TEMPLATES / f"{template}.json").read_text(encoding="utf-8")
    for anchor, label in ({"x": x, "y": y, "title": "", "x_label": x, "y_label": y} | labels).items():
        text = text.replace(f"<DVC_METRIC_{anchor.upper()}>", json.dumps(label)[1:-1])
    return json.loads(text.replace('"<DVC_METRIC_DATA>"', json.dumps(list(rows), allow_nan=False)))


def without(field: str, spec: Any) -> Any:
    """A specification without the channels, tooltips and facets of a field: of one that has a single value, such as `rev`."""
    if isinstance(spec, list):
        return [without(field, item) for item in spec if not _shows(field, item)]
    if not isinstance(spec, dict):
        return spec
    if "facet" in spec and all(_shows(field, channel) for channel in spec["facet"].values()):
        spec = {key: item for key, item in spec.items() if key not in ("facet", "spec")} | spec["spec"]
    return {key: without(field, item) for key, item in spec.items() if not _shows(field, item)}


def _shows(field: str, channel: Any) -> bool:
    return isinstance(channel, dict) and channel.get("field") == field


def svg(spec: Spec, description: str, background: str | None = "white") -> str:
    """The chart as SVG, with a description for a screen reader. Equal arguments give equal text.

    But for a gradient or a clip, whose ids vl_convert numbers by process: no chart of ours has one.
    """
    from vl_convert import vegalite_to_svg  # starts a JavaScript engine, half a second

    drawn = vegalite_to_svg(spec | {"background": background, "config": CONFIG})
    drawn = re.sub(r' role="graphics-\w+" aria-roledescription="[^"]*"', "", drawn)  # parts of an image have no role of their own
    return drawn.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1) + "\n"


def figure(spec: Spec, description: str) -> Markup:
    """The chart within a page, which gives it its colours (page.css), in a region that scrolls where the screen is narrow."""
    region = f'<div class="scroll" role="region" aria-label="{escape(description)}, chart" tabindex="0">'
    return Markup(f"{region}{svg(spec, description, background=None)}</div>")
