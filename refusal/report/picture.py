"""The study's result as one picture: separation by layer, compliance of every cell of the sweep, and compliance on test prompts.

`python -m refusal.report.picture SEPARATION.csv SWEEP.csv EVALUATE.json OUT.svg`, or `make picture`.
"""

import json
import sys
from pathlib import Path

from refusal.io.files import read_csv
from refusal.report.charts import fill, svg, without
from refusal.report.study import Metrics, Rows

DESCRIPTION = (
    "Separation of harmful and safe prompts by layer; compliance when the direction of a layer is ablated; compliance on test "
    "prompts. Bands and bars are 95 % intervals"
)
ARMS = {
    "baseline": "baseline",
    "runtime": "ablated at run time",
    "orthogonalized": "edited weights",
    "random": "random directions",
}
SELECTED = {"type": "rect", "filled": False, "stroke": "#d1570f", "strokeWidth": 3}


def picture(separation: Rows, sweep: Rows, evaluate: Metrics) -> str:
    """The picture from the rows of plots/separation.csv and plots/sweep.csv, and from metrics/evaluate.json."""
    pairing = "matched" if any(row["pairing"] == "matched" for row in separation) else "unrelated"
    shown = [row for row in separation if row["pairing"] == pairing]
    layers = without("pairing", fill("separation", shown, "layer", "separation", y_label="Cohen's d"))
    cells = without("rev", fill("sweep", sweep, "alpha", "compliance", y_label="layer"))
    selected = f"datum.layer == {evaluate['layer']} && datum.alpha == {evaluate['alpha']}"
    cells["layer"].append({"transform": [{"filter": selected}], "mark": SELECTED})
    tested = [{"arm": words} | evaluate[arm] for arm, words in ARMS.items()]
    panels = (
        (layers, "Where refusal is", "Cohen's d on val; dotted: in sample"),
        (cells, "What ablating it does", f"compliance, n = {sweep[0]['n']} val prompts a cell"),
        (
            fill("arms", tested, "compliance", "arm", y_label="") | {"width": 200},
            "What that comes to on test",
            f"compliance, n = {evaluate['baseline']['n']} harmful prompts",
        ),
    )
    columns = [spec | {"title": {"text": text, "subtitle": under}, "height": 260} for spec, text, under in panels]
    return svg(without("rev", {"hconcat": columns, "spacing": 30}), DESCRIPTION)


if __name__ == "__main__":
    separation, sweep, evaluate, out = map(Path, sys.argv[1:])
    figures = json.loads(evaluate.read_text(encoding="utf-8"))
    out.write_text(picture(read_csv(separation), read_csv(sweep), figures), encoding="utf-8")
