"""The study as one self-contained page: from metrics and rows to HTML. The words are in page.html, the charts in charts.py."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from refusal.io.errors import UserError
from refusal.report.charts import Point, Series, lines
from refusal.report.reproduction import published

HERE = Path(__file__).parent
CELL_EXAMPLES = 6  # completions behind each cell of the sweep, of the same prompts in every cell
MAX_BYTES = 5_000_000
METHODS = ("sequential", "batched", "batched_unmasked")
ARMS = ("baseline", "runtime", "orthogonalized", "random", "harmless")  # as evaluated on test
SHOWN = ARMS[:3]  # whose answers the browser shows

Rows = Sequence[dict[str, Any]]


class Study(NamedTuple):
    """What a page is made of: the sections of params.yaml, every stage's metrics, and the rows behind them.

    `imported` is metrics/published.json, other people's directions beside ours; `capability` the rows of plots/capability.csv
    as numbers; `versions` and `hashes` are package: version and path: sha256 of every input, as printed.
    """

    params: dict[str, Any]
    pairs: Rows
    unrelated: Rows
    sweep: Rows
    verdicts: Rows
    evaluated: Rows
    capability: Rows
    model: dict[str, Any]
    directions: dict[str, Any]
    judge: dict[str, Any]
    select: dict[str, Any]
    orthogonalize: dict[str, Any]
    evaluate: dict[str, Any]
    benchmark: dict[str, Any]
    reproduction: dict[str, Any]
    agreement: dict[str, Any]
    imported: dict[str, Any]
    science: dict[str, Any]
    versions: dict[str, str]
    hashes: dict[str, str]


def page(study: Study) -> str:
    """The whole page as HTML. Equal studies give equal text.

    Raises UserError where it would be larger than 5 MB.
    """
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"num": num, "signed": signed, "ci": ci, "value": value}
    # Style and script are ours and go in as they are; everything else on the page is escaped by Jinja or by `script_json`.
    text = (
        env.get_template("page.html").render(
            s=study,
            style=(HERE / "page.css").read_text(encoding="utf-8"),
            script=(HERE / "page.js").read_text(encoding="utf-8"),
            data_json=script_json(payload(study)),
            published=published(),
            arms_of_evaluate=ARMS,
            **_context(study),
            **_charts(study),
        )
        + "\n"
    )
    size = len(text.encode())
    if size > MAX_BYTES:
        raise UserError(
            f"params.yaml: report.n_examples is {study.params['report']['n_examples']}: the page would be "
            f"{size / 1e6:.1f} MB, over its {MAX_BYTES / 1e6:.0f} MB; lower it, or sweep.max_new_tokens"
        )
    return text


def script_json(data: Any) -> str:
    """JSON that may stand inside a script element: no character of it can end the element, open a comment or break a line."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


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


def ci(m: dict[str, Any], key: str, digits: int = 3) -> str:
    """`value [low, high]` of a metric that is stored as key, key_low, key_high."""
    if m.get(key) is None:
        return "–"
    if m.get(f"{key}_low") is None:
        return num(m[key], digits)
    return f"{num(m[key], digits)} [{num(m[f'{key}_low'], digits)}, {num(m[f'{key}_high'], digits)}]"


def value(x: Any) -> str:
    """A published or measured figure of any kind, as a person writes it."""
    if x is None:
        return "–"
    if isinstance(x, list):
        return ", ".join(map(value, x)) or "none"
    return f"{x:.4g}".replace("-", "−") if isinstance(x, float) else str(x)


def evenly(items: Sequence[Any], n: int) -> list[Any]:
    """`n` items at even steps through `items`, or all of them: a fixed rule, so that none is picked for what it says."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def payload(study: Study) -> dict[str, Any]:
    """The rows that the page's script shows: completions behind each cell of the sweep, and answers side by side."""
    categories = {row["id"]: row["category"] for row in study.pairs}
    verdicts = {(v["cell"], v["id"]): v for v in study.verdicts}
    by_cell: dict[str, list[dict[str, Any]]] = {}
    answers: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    prompts: dict[tuple[str, str, str], dict[str, Any]] = {}
    first = study.select["rank_1"]
    for row in study.sweep:
        shown = _answer(row["completion"], verdicts[row["cell"], row["id"]])
        by_cell.setdefault(row["cell"], []).append({"prompt": row["prompt"], **shown})
        chosen = (row["layer"], row["alpha"]) == (first["layer"], first["alpha"])
        arm = "baseline" if row["cell"] == "baseline" else "runtime" if chosen else None
        if arm:
            key = ("val", "harmful", row["id"])
            prompts[key] = {"prompt": row["prompt"], "category": categories.get(row["id"])}
            answers[*key, arm] = shown
    for row in study.evaluated:
        key = ("test", row["half"], row["id"])
        prompts[key] = {"prompt": row["prompt"], "category": row["category"]}
        answers[*key, row["arm"]] = _answer(row["completion"], row)
    browser = []
    for split in ("test", "val"):
        kept = set(evenly(list(dict.fromkeys(id_ for s, _, id_ in prompts if s == split)), study.params["report"]["n_examples"]))
        browser += [
            {"split": s, "half": half, **prompt, "answers": {arm: answers.get((s, half, id_, arm)) for arm in SHOWN}}
            for (s, half, id_), prompt in prompts.items()
            if s == split and id_ in kept
        ]
    return {"arms": SHOWN, "browser": browser, "cells": {cell: evenly(rows, CELL_EXAMPLES) for cell, rows in by_cell.items()}}


def _answer(text: str, verdict: dict[str, Any]) -> dict[str, Any]:
    return {"text": text, "label": verdict["label"], "compliance": verdict["compliance"], "coherence": verdict["coherence"]}


def _context(study: Study) -> dict[str, Any]:
    """What page.html needs beyond the metrics themselves: counts, charts, the sweep as a grid."""
    p = study.params
    method, pairing = p["sweep"]["method"], p["sweep"]["pairing"]
    arm, d = f"{method}-{pairing}", study.directions
    test = [row for row in study.pairs if row["split"] == "test"]
    swept = {(c["layer"], c["alpha"]): {"name": name, **c} for name, c in study.judge.items() if c["layer"] is not None}
    alphas, layers = sorted({a for _, a in swept}), sorted({layer for layer, _ in swept})
    return {
        "arm": arm,
        "method": method,
        "pairing": pairing,
        "found": d[arm],
        "n_layers": len(d[arm]["separation"]),
        "organism": p["model"]["id"] == "organism",
        "first": study.select["rank_1"],
        "alphas": alphas,
        "grid": [(layer, [swept.get((layer, alpha)) for alpha in alphas]) for layer in layers],
        "controls": [
            (cell, cell.split("_")[0]) for cell in dict.fromkeys(row["cell"] for row in study.sweep if row["layer"] is None)
        ],
        "splits": Counter(row["split"] for row in study.pairs),
        "n_test": len(test),
        "n_topics": len({row["topic"] for row in test}),
        "n_unseen": sum(row.get("seen") is False for row in test),
        "categories": sorted(Counter(row["category"] or "none" for row in study.pairs).items()),
        "example": next(iter(test), study.pairs[0]),
        "methods": [m for m in METHODS if f"{m}-{pairing}" in d],
        "pairings": _pairings(study),
        "judged_by": _judged_by(study),
        "arms": _arms(study),
        "weaknesses": [(w["name"], w["what"], _told(w["evidence"])) for w in study.reproduction["weaknesses"]],
        "imported": [_beside(name, file, arm) for name, file in study.imported["files"].items()],
        "params_text": yaml.safe_dump(p, sort_keys=False, default_flow_style=None, width=100, allow_unicode=True),
        "cell_examples": CELL_EXAMPLES,
    }


def _pairings(study: Study) -> list[str]:
    """The pairings that the swept method has directions for, those of a user's own among them."""
    prefix = f"{study.params['sweep']['method']}-"
    return [arm.removeprefix(prefix) for arm in study.directions if arm.startswith(prefix)]


def _beside(name: str, file: dict[str, Any], arm: str) -> list[Any]:
    """A set of published directions as a row: file, layers, d_model, and where it agrees most and least with ours."""
    cosines = [(c, layer) for layer, c in enumerate(file["cosine"].get(arm, ())) if c is not None]
    if not cosines:
        return [name, file["n_layers"], file["d_model"], "–", "–", "–", file["note"] or "no layer where both are defined"]
    (most, at), (least, _) = max(cosines), min(cosines)
    return [name, file["n_layers"], file["d_model"], num(most, 4), at, num(least, 4), ""]


def _arms(study: Study) -> list[list[Any]]:
    """The table of what was ablated on test: every arm of metrics/science.json, then the controls."""
    rows = [(name, m) for name, m in study.science["arms"].items()]
    rows += [(f"{name} ({m['n_arms']} drawn)", m) for name, m in study.science["controls"].items()]
    return [
        [
            name,
            "–" if m.get("layer") is None else m["layer"],
            m["rank"],
            m["n"],
            ci(m, "compliance"),
            ci(m, "difference"),
            num(m.get("p_holm"), 4),
            ci(m, "kl", 4),
            num(m.get("cosine_rank_1")),
        ]
        for name, m in rows
    ]


def _told(evidence: Any, name: str = "") -> str:
    """Figures of any shape as one line: `a.b 0.25, a.c –`."""
    if isinstance(evidence, dict):
        return "; ".join(_told(x, f"{name}.{key}" if name else key) for key, x in evidence.items())
    return f"{name.replace('_', ' ')} {value(evidence)}"


def _judged_by(study: Study) -> str:
    """Who judged, in the words of the page."""
    j = study.agreement["judge"]
    if j["kind"] == "rules":
        exact = study.params["model"]["id"] == "organism"
        return "rules, exact here since the organism's whole language is known" if exact else "rules (English alone)"
    versions = ", ".join(f"{v['version']} ({v['n']} verdicts)" for v in j["versions"])
    return f"{j['model']} at {j['base_url']}, reported as {versions}, rubric sha256 {j['rubric_sha256'][:12]}"


def _charts(study: Study) -> dict[str, Any]:
    """Every line chart of the page, by the name page.html calls it."""
    d, method, pairing = study.directions, study.params["sweep"]["method"], study.params["sweep"]["pairing"]
    found = d[f"{method}-{pairing}"]
    sequential, theirs = "sequential-matched" in d, published()["cosine_sequential_batched"]
    published_points = [Point(layer / len(theirs), y) for layer, y in enumerate(theirs) if y is not None]
    unmasked = d.get("batched_unmasked-matched") if sequential else None
    ours_points = (
        [Point(p.x / len(found["separation"]), p.y) for p in _points(unmasked, "cosine_to_sequential")] if unmasked else []
    )

    def cost(key: str) -> list[Point]:
        return [Point(row["alpha"], row[key], row[f"{key}_low"], row[f"{key}_high"]) for row in study.capability]

    return {
        "separation": lines(
            "Cohen's d by layer",
            "layer",
            "Cohen's d (pooled s.d.)",
            [
                Series("val, 95 % interval", 0, _points(found, "separation", "separation_low", "separation_high")),
                Series("in sample", 1, _points(found, "separation_in_sample")),
            ],
        ),
        "separation_methods": lines(
            "Cohen's d by layer and method",
            "layer",
            "Cohen's d (pooled s.d.)",
            [
                Series(m, i, _points(d[f"{m}-{pairing}"], "separation", "separation_low", "separation_high"))
                for i, m in enumerate(METHODS)
                if f"{m}-{pairing}" in d
            ],
        ),
        "cosine_methods": lines(
            "cosine to sequential by layer and method",
            "layer",
            "cosine to sequential",
            [
                Series(m, i, _points(d[f"{m}-matched"], "cosine_to_sequential"))
                for i, m in enumerate(METHODS)
                if sequential and f"{m}-matched" in d
            ],
            include=(1.0, 0.9),
        ),
        "cosine_pairings": lines(
            "cosine to sequential-matched by layer and pairing",
            "layer",
            "cosine to sequential-matched",
            [
                Series(q, i % 4, _points(d[f"{method}-{q}"], "cosine_to_sequential"))
                for i, q in enumerate(_pairings(study) if sequential else ())
            ],
            include=(1.0, 0.9),
        ),
        "cosine_published": lines(
            "cosine of sequential with unmasked batches",
            "depth (layer / number of layers)",
            "cosine",
            [
                Series("published, Qwen-1.8B-Chat", 3, published_points),
                *([Series("ours", 0, ours_points)] if ours_points else []),
            ],
            include=(1.0,),
        ),
        "cost": lines(
            "cost on harmless text against alpha",
            "alpha",
            "nats a token",
            [Series("KL from the base model", 2, cost("kl")), Series("cross-entropy", 0, cost("cross_entropy"))],
        ),
    }


def _points(metrics: dict[str, Any], key: str, low: str | None = None, high: str | None = None) -> list[Point]:
    """A by-layer list as points, undefined layers left out."""
    return [
        Point(layer, y, metrics[low][layer] if low else None, metrics[high][layer] if high else None)
        for layer, y in enumerate(metrics[key])
        if y is not None
    ]
