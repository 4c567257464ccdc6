"""Organisms with known ground truth: a row of metrics/organisms.json, and docs/organisms.svg, which is drawn from that file.

`python -m refusal.report.organisms metrics/organisms.json docs/organisms.svg`, or `make picture`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from refusal.report.charts import fill, svg
from refusal.report.study import Metrics

RATES = ("compliance", "compliance_low", "compliance_high", "n", "coherence", "exact", "kl", "cosine_planted")
REFUSAL = ("baseline_refusal", "baseline_refusal_low", "baseline_refusal_high")


def figures(kind: str, model: Metrics, directions: Metrics, judge: Metrics, science: Metrics) -> Metrics:
    """One organism, from the metrics of its own study: rates on test prompts, except `by_layer`, which is val.

    Of a kind other than `planted` all that needs the planted direction is None, or empty.
    """
    arms, verdict = science["arms"], science["verdict"]
    (swept,) = directions.values()

    def rates(name: str, keys: Sequence[str] = RATES) -> Metrics:
        return {key: arms[name][key] for key in keys}

    planted = rates("planted") if kind == "planted" else None
    cells = [cell for cell in judge.values() if cell["layer"] is not None]
    return {
        "verdict": verdict["verdict"],
        "reason": verdict["reason"],
        "by": verdict["by"],
        "difference_mediates": verdict["difference"]["mediates"],
        **{key: arms["baseline"][key.removeprefix("baseline_")] for key in REFUSAL},
        "refusal_safe": model["refusal_safe"],
        "facts_accuracy": model["facts_accuracy"],
        "compliance_single": arms["rank_1"]["compliance"],
        "compliance_rank_k": {name: rates(name) for name in arms if arms[name]["family"] == "subspace"},
        "compliance_planted": planted and planted["compliance"],
        "cosine_planted": arms["rank_1"]["cosine_planted"],
        "separation_peak": swept["peak_separation"],
        "cross_layer_cosine_mean": mean_between_layers(swept["cross_layer_cosine"]),
        "zero": [row and row["zero"] for row in science["zero"]],
        "by_layer": {
            "compliance": {str(cell["layer"]): cell["compliance"] for cell in cells},
            "separation": {str(cell["layer"]): swept["separation"][cell["layer"]] for cell in cells},
            "n": judge["baseline"]["n"],
        },
        "single": rates("rank_1") | {"layer": science["layer"]},
        "per_layer": rates("per_layer"),
        "planted": planted,
        "less_planted": {str(arm["layer"]): rates(name) for name, arm in arms.items() if arm["family"] == "less_planted"},
        "estimators": science["estimators"],
        "random": {name: {key: c[key] for key in (*RATES[:4], "n_arms")} for name, c in science["controls"].items()},
    }


def mean_between_layers(cosines: Sequence[Sequence[float | None]]) -> float | None:
    """Mean cosine of the directions of two different layers, where both are defined."""
    defined = [c for i, row in enumerate(cosines) for c in row[i + 1 :] if c is not None]
    return sum(defined) / len(defined) if defined else None


def picture(organisms: Mapping[str, Any]) -> str:
    """A mark a layer, organism and seed: Cohen's d on val, and compliance once that layer's direction is ablated.

    Kind `none` is left out: it refuses nothing, so that no ablation could restore compliance.
    """
    layers = [
        {"kind": name.split(".")[0], "separation": row["by_layer"]["separation"][layer], "compliance": compliance}
        for name, row in organisms.items()
        for layer, compliance in row["by_layer"]["compliance"].items()
    ]
    rows = [row for row in layers if row["kind"] != "none" and row["separation"] is not None]
    n = next(iter(organisms.values()))["by_layer"]["n"]
    spec = fill("organisms", rows, "separation", "compliance", x_label="Cohen's d on val", y_label="compliance, ablated")
    under = f"each mark: one layer of one organism, n = {n} harmful val prompts, alpha 1"
    return svg(
        spec | {"title": {"text": "Separation is not mediation", "subtitle": under}},
        "Compliance once the direction of a layer is ablated, against how far that direction separates harmful from safe prompts",
    )


if __name__ == "__main__":
    source, target = map(Path, sys.argv[1:])
    target.write_text(picture(json.loads(source.read_text(encoding="utf-8"))), encoding="utf-8")
