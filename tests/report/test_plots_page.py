import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

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
    made = {column["as"] for step in template.get("transform", []) for column in step.get("window", [])}
    assert {field for field in _fields(template) if not field.startswith("<DVC")} <= columns | {"rev"} | made
    # A facet sorts revisions by name unless told otherwise; `dvc plots diff A B` reads A, then B.
    facets = [facet for facet in template.get("facet", {}).values() if facet["field"] == "rev"]
    assert all(facet["sort"] == {"field": "order", "op": "min"} and "order" in made for facet in facets)
    # Values of a CSV arrive as text.
    assert set(template["data"]["format"]["parse"]) <= columns


def test_plots_are_drawn_without_a_network(tmp_path, opened):
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
    from refusal.report.plots_page import plots_page

    made = plots_page()
    assert (
        "cdn" not in made.split("<script>")[0] and "{plot_divs}" in made and made.count("<script") == made.count("</script>") == 1
    )
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
    tab.wait_for_function(f"document.querySelectorAll('canvas.marks, svg.marks').length === {len(PLOTS)}")
    # Vega-Lite says that DVC's templates name an older schema; nothing else is said, and nothing asked for.
    assert {re.sub(r"v\d[\d.]*", "v", said) for said in tab.said} <= {
        "The input spec uses Vega-Lite v, but the current version of Vega-Lite is v"
    }
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380  # a wide plot scrolls by itself
