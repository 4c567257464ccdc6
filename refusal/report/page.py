"""The study as one self-contained page: from metrics and rows to HTML. The words are in page.html, charts in charts.py."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from refusal.io.errors import UserError
from refusal.io.prompts import WITHOUT_PAIRS
from refusal.report.charts import figure, fill, without
from refusal.report.edits import edited_checkpoints
from refusal.report.numbers import ci, num, signed, value
from refusal.report.reproduction import by_layer, published
from refusal.report.study import Metrics, Rows, Study

HERE = Path(__file__).parent
CELL_EXAMPLES = 6  # completions behind each cell of the sweep, of the same prompts in every cell
MAX_BYTES = 5_000_000
METHODS = ("sequential", "batched", "batched_unmasked")
ARMS = ("baseline", "runtime", "orthogonalized", "random", "random_weights", "harmless")  # as evaluated on test
SHOWN = ARMS[:3]  # whose answers the browser shows


def page(study: Study, reproduction: Metrics) -> str:
    """The whole page as HTML. Equal studies give equal text.

    Raises UserError where it would be larger than 5 MB.
    """
    text = render(
        "page.html",
        s=study,
        reproduction=reproduction,
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        data_json=script_json(payload(study)),
        cell_examples=CELL_EXAMPLES,
        **_context(study),
        **_charts(study),
    )
    size = len(text.encode())
    if size > MAX_BYTES:
        raise UserError(
            f"params.yaml: report.n_examples is {study.params['report']['n_examples']}: the page would be "
            f"{size / 1e6:.1f} MB, over its {MAX_BYTES / 1e6:.0f} MB; lower it, or generation.max_new_tokens"
        )
    return text


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values. The style, and what is marked safe in the template, goes in as it is."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"num": num, "signed": signed, "ci": ci, "value": value, "one_line": one_line}
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return env.get_template(template).render(style=style, **values) + "\n"


def script_json(data: Any) -> str:
    """JSON that may stand inside a script element: no character of it can end the element, open a comment or break a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def evenly(items: Sequence[Any], n: int) -> list[Any]:
    """`n` items at even steps through `items`, or all of them: a fixed rule, so that none is picked for what it says."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def payload(study: Study) -> Metrics:
    """The rows that the page's script shows: completions behind each cell of the sweep, and answers side by side."""
    categories = {row["id"]: row["category"] for row in study.pairs}
    verdicts = {(v["cell"], v["id"]): v for v in study.verdicts}
    by_cell: dict[str, list[Metrics]] = {}
    prompts: dict[tuple[str, str, str], Metrics] = {}  # (split, half, id): prompt, category and answers by arm

    def add(split: str, half: str, row: Metrics, category: str | None, arm: str, answer: Metrics) -> None:
        shown = {"split": split, "half": half, "prompt": row["prompt"], "category": category, "answers": dict.fromkeys(SHOWN)}
        prompts.setdefault((split, half, row["id"]), shown)["answers"][arm] = answer

    for row in study.evaluated:
        if row["arm"] in SHOWN:
            add("test", row["half"], row, row["category"], row["arm"], _answer(row["completion"], row))
    for row in study.sweep:
        answer = _answer(row["completion"], verdicts[row["cell"], row["id"]])
        by_cell.setdefault(row["cell"], []).append({"prompt": row["prompt"], **answer})
        chosen = row["cell"] == study.cell
        if chosen or row["cell"] == "baseline":
            add("val", "harmful", row, categories.get(row["id"]), "runtime" if chosen else "baseline", answer)
    browser = []
    for split in ("test", "val"):
        ids = list(dict.fromkeys(id_ for s, _, id_ in prompts if s == split))
        kept = set(evenly(ids, study.params["report"]["n_examples"]))
        browser += [shown for (s, _, id_), shown in prompts.items() if s == split and id_ in kept]
    return {"arms": SHOWN, "browser": browser, "cells": {cell: evenly(rows, CELL_EXAMPLES) for cell, rows in by_cell.items()}}


def _answer(text: str, verdict: Metrics) -> Metrics:
    return {"text": text, **{key: verdict[key] for key in ("label", "compliance", "coherence")}}


def _context(study: Study) -> Metrics:
    """What page.html needs beyond the metrics themselves: counts, tables, the sweep as a grid."""
    d, method, pairing = study.directions, study.params["sweep"]["method"], study.pairing
    swept = {(c["layer"], c["alpha"]): {"name": name, **c} for name, c in study.judge.items() if c["layer"] is not None}
    alphas, layers = sorted({a for _, a in swept}), dict.fromkeys(layer for layer, _ in sorted(swept, key=_depth))
    return {
        "method": method,
        "pairing": pairing,
        "compared": "matched" if study.paired else "unrelated",
        "without_pairs": None if study.paired else WITHOUT_PAIRS,
        "source": ", ".join(study.params["prompts"].get("harmful") or [study.params["prompts"]["source"]]),
        "direction": d[study.arm],
        "alphas": alphas,
        "grid": [(layer, [swept.get((layer, alpha)) for alpha in alphas]) for layer in layers],
        "controls": {row["cell"]: row["cell"].split("_")[0] for row in study.sweep if row["layer"] is None},
        "splits": Counter(row["split"] for row in study.pairs),
        "test": [row for row in study.pairs if row["split"] == "test"],
        "rendered": _rendered(study),
        "categories": sorted(Counter(row["category"] or "none" for row in study.pairs).items()),
        "methods": [m for m in METHODS if f"{m}-{pairing}" in d],
        "pairings": [arm.removeprefix(f"{method}-") for arm in d if arm.startswith(f"{method}-")],
        "evaluated_arms": [arm for arm in ARMS if arm in study.evaluate],
        "of_categories": _of_categories(d[study.arm]),
        "corrected": lambda of: [ci(at, "cosine_to_sequential_corrected", 2) for at in _at_layers(of)],
        "imported": [_comparison_row(name, file, study.arm, d[study.arm]) for name, file in study.imported["files"].items()],
        "edited_checkpoints": edited_checkpoints(study),
        "paper_runs": published()["paper_runs"],
        "params_text": yaml.safe_dump(study.params, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True),
    }


def _depth(cell: tuple[int | str, float]) -> tuple[int, ...]:
    """The layers of a cell (its `layer` and alpha), by which rows are in order: 5, or those of `7-10`."""
    return tuple(map(int, re.findall(r"\d+", str(cell[0]))))


def _rendered(study: Study) -> tuple[str, str, str] | None:
    """The first val prompt in the model's template, as what is before the prompt, the prompt, and what is after it; all of it is
    the prompt where the template changed that. None for a study whose metrics are older than this."""
    if (text := study.model.get("rendered_prompt")) is None:
        return None
    prompt = next(row["harmful"] for row in study.pairs if row["split"] == "val")
    before, found, after = text.partition(prompt)
    return (before, found, after) if found else ("", text, "")


def _at_layers(of: Metrics) -> list[Metrics]:
    """Figures that are lists by layer, layer by layer."""
    columns = {key: values for key, values in of.items() if isinstance(values, list) and key != "layers"}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _of_categories(direction: Metrics) -> list[list[Any]]:
    """A row a layer: mean cosine of the categories' directions and their participation ratio, each beside random groups'."""
    rows = _at_layers(direction.get("categories") or {})
    keys = ("mean_cosine", "participation_ratio")
    return [
        [layer, *(cell for key in keys for cell in (num(at[key], 3), ci(at, f"{key}_null")))]
        for layer, at in enumerate(rows)
        if layer in direction["layers"]
    ]


def _comparison_row(name: str, file: Metrics, arm: str, direction: Metrics) -> list[Any]:
    """A set of published directions as a row: file, layers, d_model, and where it agrees most and least with ours.

    Beside the most is what noise of our prompts leaves of a cosine with a direction without noise: the root of the reliability.
    """
    cosines = [(c, layer) for layer, c in by_layer(file["cosine"].get(arm, ())).items()]
    if not cosines:
        return [name, file["n_layers"], file["d_model"], "–", "–", "–", "–", file["note"] or "no layer where both are defined"]
    (most, at), (least, _) = max(cosines), min(cosines)
    r = direction.get("reliability", {at: None})[at]  # metrics of an older version have none
    return [name, file["n_layers"], file["d_model"], num(most, 4), at, num(r and r**0.5, 4), num(least, 4), ""]


def one_line(evidence: Any, name: str = "") -> str:
    """Figures of any shape as one line: `a.b 0.25; a.c –`."""
    if isinstance(evidence, dict):
        return "; ".join(one_line(x, f"{name}.{key}" if name else key) for key, x in evidence.items())
    return f"{name.replace('_', ' ')} {value(evidence)}"


def _charts(study: Study) -> Metrics:
    """The charts by the names that page.html gives them: plots of `dvc plots show`, and the write-up's cosines with ours."""
    plots, compared = study.plots, "matched" if study.paired else "unrelated"
    unmasked = study.of("batched_unmasked") if study.of("sequential") else None
    cosines = {
        "published, Qwen-1.8B-Chat": published()["cosine_sequential_batched"],
        "ours": unmasked["cosine_to_sequential"] if unmasked else [],
    }
    depths = [
        {"source": source, "depth": layer / len(values), "cosine": cosine}
        for source, values in cosines.items()
        for layer, cosine in by_layer(values).items()
    ]

    def drawn(description: str, template: str, rows: Rows, x: str, y: str, **labels: str) -> Markup:
        spec = without("rev", fill(template, rows, x, y, **labels))
        return figure(spec, description) if rows else Markup('<p class="none">Nothing to draw in this run.</p>')

    return {
        "separation": drawn(
            "Cohen's d by layer", "separation", plots["separation"], "layer", "separation", y_label="Cohen's d (pooled s.d.)"
        ),
        "cosine_to_sequential": drawn(
            f"Cosine to sequential-{compared} by layer", "cosine", plots["cosine_to_sequential"], "layer", "cosine"
        ),
        "cosine_published": drawn(
            "Cosine of sequential with unmasked batches", "cosine_published", depths, "depth", "cosine", x_label="layer / layers"
        ),
        "cost": drawn("KL and cross-entropy on harmless text by alpha", "capability", plots["capability"], "alpha", "kl"),
        "compliance_by_arm": drawn("Compliance on test by arm", "arms", plots["science/arms"], "compliance", "arm", y_label=""),
    }
