"""The plots of dvc.yaml, their templates as SVG without DVC, and the pictures of the README."""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc_render import VegaRenderer

from refusal.io.files import read_csv
from refusal.report.charts import figure, fill, svg, without
from refusal.report.picture import picture

ROOT = Path(__file__).parents[2]
PLOTS = {name: plot for entry in yaml.safe_load((ROOT / "dvc.yaml").read_text())["plots"] for name, plot in entry.items()}


def _fields(spec) -> set[str]:
    if isinstance(spec, dict):
        own = {spec["field"]} if isinstance(spec.get("field"), str) else set()
        return own | {field for item in spec.values() for field in _fields(item)}
    return {field for item in spec for field in _fields(item)} if isinstance(spec, list) else set()


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_reads_columns_that_are_there_and_names_its_axes(name):
    plot = PLOTS[name]
    (path, y), *none = plot["y"].items()
    with (ROOT / path).open(encoding="utf-8", newline="") as file:
        columns = set(next(csv.reader(file)))
    template = json.loads((ROOT / ".dvc" / "plots" / f"{plot['template']}.json").read_text(encoding="utf-8"))
    assert not none and {plot["x"], y} <= columns and plot["title"] and plot["x_label"] and plot["y_label"]
    steps = template.get("transform", [])
    made = {one["as"] for step in steps for one in (step, *step.get("window", ()), *step.get("joinaggregate", ())) if "as" in one}
    assert {field for field in _fields(template) if not field.startswith("<DVC")} <= columns | {"rev"} | made
    # A facet sorts revisions by name unless told otherwise; `dvc plots diff A B` reads A, then B.
    facets = [facet for facet in template.get("facet", {}).values() if facet["field"] == "rev"]
    assert all(facet["sort"] == {"field": "order", "op": "min"} and "order" in made for facet in facets)
    # Values of a CSV arrive as text.
    assert set(template["data"]["format"]["parse"]) <= columns


@pytest.mark.parametrize("name", PLOTS)
def test_a_template_is_filled_as_dvc_fills_it_and_drawn_without_revisions(name):
    plot = PLOTS[name]
    ((path, y),) = plot["y"].items()
    rows = [row | {"rev": "workspace"} for row in read_csv(ROOT / path)]
    labels = {key: plot[key] for key in ("x", "title", "x_label", "y_label")}
    dvc = VegaRenderer(rows, name, template=plot["template"], template_dir=str(ROOT / ".dvc" / "plots"), y=y, **labels)
    spec = fill(plot["template"], rows, y=y, **labels)
    assert spec == dvc.get_filled_template()
    alone = without("rev", spec)
    assert "rev" not in _fields(alone) and {"rev"} <= _fields(spec) - _fields(alone) <= {"rev", "order"}
    drawn = svg(alone, "a & b")
    assert drawn.startswith('<svg role="img" aria-label="a &amp; b" ') and "revision" not in drawn and "NaN" not in drawn
    assert "revision" in svg(spec, "")


def rate(x: float) -> dict[str, float]:
    return {"compliance": x, "compliance_low": max(0.0, x - 0.1), "compliance_high": min(1.0, x + 0.1)}


def test_text_is_measured_by_the_font_that_vl_convert_ships():
    """A digit of Liberation Sans is 1139 of 2048 units wide: the same on a machine that has other fonts, or none."""

    def width(label: str) -> int:
        drawn = svg(fill("arms", [{"arm": label, **rate(0.5)}], "compliance", "arm", y_label=""), "")
        return int(re.search(r' width="(\d+)"', drawn)[1])

    assert width("0" * 12) - width("00") == pytest.approx(10 * 12 * 1139 / 2048, abs=1)


def test_a_chart_escapes_what_it_is_given():
    rows = [{"arm": "<img src=x>", "rev": '"><b>', **rate(0.5)}]
    drawn = figure(fill("arms", rows, "compliance", "arm"), '"><script>')
    assert "<img" not in drawn and "<b>" not in drawn and "<script" not in drawn and "&lt;img" in drawn


def test_the_picture_shows_the_figures_it_is_given():
    row = {"method": "sequential", "low": 0.5, "high": 2.0, "in_sample": 1.5}
    separation = [row | {"pairing": q, "layer": i, "separation": float(i)} for q in ("matched", "unrelated") for i in (1, 2)]
    sweep = [{"layer": i, "alpha": a, "compliance": i / 10 + a / 2 - 0.3, "n": 9} for i in (1, 2) for a in (1.0, 1.5)]
    rates = {"baseline": 0.0, "runtime": 0.75, "orthogonalized": 1.0, "random": 0.25}
    evaluate = {name: rate(x) | {"n": 7} for name, x in rates.items()} | {"layer": 2, "alpha": 1.5}
    drawn = picture(separation, sweep, evaluate)
    said = re.findall(r"<text[^>]*>([^<]*)</text>", drawn)
    assert [f"{row['compliance']:.2f}" for row in sweep] == [text for text in said if re.fullmatch(r"0\.\d\d", text)]
    assert "compliance, n = 9 val prompts a cell" in said and "compliance, n = 7 harmful prompts" in said
    assert "pairing" not in said and "edited weights" in said
    assert 'd="M120,130h120v130h-120Z" stroke="#d1570f" stroke-width="3"' in drawn  # the selected cell, of two by two
    points = re.findall(r'<path transform="translate\(([\d.]+),([\d.]+)\)"[^>]* fill="#0b4fa0"', drawn)
    assert [float(x) / 200 for x, _ in points[-4:]] == pytest.approx(list(rates.values()))
    assert [1 - float(y) / 260 for _, y in points[:2]] == pytest.approx([0.5, 1.0])  # d of 1 and 2, on an axis to 2


def test_plots_are_drawn_without_a_network(tmp_path, opened):
    from refusal.report.plots_page import plots_page

    made = plots_page()
    assert "cdn" not in made.split("<script>")[0] and "{plot_divs}" in made
    assert made.count("<script") == made.count("</script>") == 1
    (tmp_path / "template.html").write_text(made, encoding="utf-8")
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "plots", tmp_path / "plots")
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "-q"], cwd=tmp_path, check=True)
    shutil.copytree(ROOT / ".dvc" / "plots", tmp_path / ".dvc" / "plots", dirs_exist_ok=True)
    template = ["--html-template", str(tmp_path / "template.html")]
    subprocess.run([*dvc, "plots", "show", *template, "-o", "out"], cwd=tmp_path, check=True)
    tab = opened((tmp_path / "out" / "index.html").read_text(encoding="utf-8"), 380)
    tab.locator("canvas.marks, svg.marks").nth(len(PLOTS) - 1).wait_for()
    # Vega-Lite says that DVC's templates name an older schema; nothing else is said, and nothing asked for.
    assert {re.sub(r"v\d[\d.]*", "v", said) for said in tab.said} <= {
        "The input spec uses Vega-Lite v, but the current version of Vega-Lite is v"
    }
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380  # a wide plot scrolls by itself
