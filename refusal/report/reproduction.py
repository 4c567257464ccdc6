"""The write-up's figures beside ours for the same quantities, and the twelve scalars that tell variants apart."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PUBLISHED = Path(__file__).with_name("published.json")
# The write-up's batched code left the padding unmasked: that is this package's method of the other name.
OUR_METHOD = {"sequential": "sequential", "batched": "batched_unmasked"}

Metrics = Mapping[str, Any]


def published() -> dict[str, Any]:
    """Every figure of the write-up's tables, with its source, as the package ships it in published.json."""
    return json.loads(PUBLISHED.read_text(encoding="utf-8"))


def comparable(model_id: str) -> bool:
    """Whether a model is the write-up's: Qwen/Qwen-1_8B-Chat itself, or a folder that its conversion was written to."""
    return "Qwen-1_8B-Chat" in model_id


def low_layers(separation: Sequence[float | None]) -> list[int] | None:
    """[first, last] of the run of layers from the first defined one that stay below a third of the peak.

    The write-up says "little or no separation" without a number; a third of the peak is our reading of it. None where
    no layer is defined or the first is not below.
    """
    defined = [(layer, value) for layer, value in enumerate(separation) if value is not None]
    peak = max((value for _, value in defined), default=0.0)
    run: list[int] = []
    for layer, value in defined:
        if value >= peak / 3:
            break
        run.append(layer)
    return [run[0], run[-1]] if run else None


def drop_off(cells: Sequence[Metrics]) -> float | None:
    """The least swept alpha at which the best score of any layer is below half the best at smaller alphas; None if none is."""
    best: dict[float, float] = {}
    for cell in cells:
        best[cell["alpha"]] = max(cell["score"], best.get(cell["alpha"], 0.0))
    alphas = sorted(best)
    for i, alpha in enumerate(alphas[1:], 1):
        if best[alpha] < max(best[smaller] for smaller in alphas[:i]) / 2:
            return alpha
    return None


def reproduce(
    theirs: Metrics,
    model_id: str,
    arm: str,
    settings: Metrics,
    directions: Metrics,
    judge: Metrics,
    select: Metrics,
    benchmark: Metrics,
) -> dict[str, Any]:
    """All that metrics/reproduction.json says: one row for each published figure.

    `arm` is the `<method>-<pairing>` that was swept; `settings` are ours under published.json's names. A row has
    `quantity`, `published`, `ours` (null with a `note` that says why), and `comparable`: true only for the same model.
    """
    same, rows = comparable(model_id), []

    def row(quantity: str, figure: Any, ours: Any, note: str | None = None) -> None:
        rows.append({"quantity": quantity, "published": figure, "ours": ours, "comparable": same, "note": note})

    for name, value in theirs["settings"].items():
        row(f"settings.{name}", value, settings.get(name), None if name in settings else "not recorded")

    main = directions.get("sequential-matched") or next(iter(directions.values()))
    n_layers = len(main["separation"])
    undefined = [layer for layer in range(n_layers) if layer not in main["layers"]]
    row("undefined_layer", theirs["undefined_layer"], undefined[0] if len(undefined) == 1 else undefined)
    peak = main["peak_layer"]
    row(
        "separation.little_or_none_layers",
        theirs["separation"]["little_or_none_layers"],
        low_layers(main["separation_in_sample"]),
        "ours: first layers whose in-sample separation stays below a third of its peak",
    )
    row(
        "separation.peak_region",
        theirs["separation"]["peak_region"],
        None if peak is None else "mid-late" if peak >= n_layers / 2 else "early-mid",
        f"ours: the half of the stack that holds the val peak, layer {peak} of 0 to {n_layers - 1}",
    )
    for method, figure in theirs["vectors"]["in_sample_peak"].items():
        found = directions.get(f"{OUR_METHOD[method]}-matched")
        ours = {layer: value for layer, value in enumerate(found["separation_in_sample"]) if value is not None} if found else {}
        at = max(ours, key=lambda layer: ours[layer]) if ours else None
        missing = None if ours else f"{OUR_METHOD[method]}-matched was not collected"
        row(f"in_sample_peak.{method}.layer", figure["layer"], at, missing)
        row(f"in_sample_peak.{method}.separation", figure["separation"], None if at is None else ours[at], missing)

    unmasked = directions.get("batched_unmasked-matched") if "sequential-matched" in directions else None
    for layer, figure in enumerate(theirs["cosine_sequential_batched"]):
        ours_here = unmasked["cosine_to_sequential"][layer] if unmasked and layer < n_layers else None
        note = (
            "sequential and batched_unmasked were not both collected"
            if unmasked is None
            else f"our model has layers 0 to {n_layers - 1}"
            if layer >= n_layers
            else "no direction where prompts cannot differ"
            if ours_here is None
            else None
        )
        row(f"cosine_sequential_batched.layer_{layer}", figure, ours_here, note)

    cells = [cell for cell in judge.values() if cell["layer"] is not None]
    row(
        "alpha_drop_off",
        theirs["alpha_drop_off"],
        drop_off(cells),
        f"ours: first of the swept alphas ({', '.join(f'{a:g}' for a in sorted({c['alpha'] for c in cells}))}) whose best score "
        "is below half the best at smaller ones",
    )
    row("benchmark.baseline", theirs["benchmark_baseline"], benchmark["baseline"]["average"], _tasks(same))
    for published_arm, top in theirs["arms"].items():
        method, pairing = published_arm.split("-")
        ours_arm = f"{OUR_METHOD[method]}-{pairing}"
        for i, figures in enumerate(top, 1):
            _rank_rows(
                row,
                f"{published_arm}.rank_{i}",
                figures,
                theirs["benchmark_baseline"],
                ours_arm == arm,
                ours_arm,
                cells,
                select.get(f"rank_{i}"),
                benchmark.get(f"rank_{i}"),
                same,
            )
    return {
        "source": theirs["source"],
        "vectors": theirs["vectors"]["source"],
        "published_model": theirs["settings"]["model"],
        "model": model_id,
        "arm": arm,
        "comparable": same,
        "rows": rows,
    }


def _tasks(same: bool) -> str | None:
    return None if same else "ours: the tasks in settings.benchmark_tasks"


def _rank_rows(
    row: Any,
    name: str,
    figures: Metrics,
    baseline: float,
    swept: bool,
    ours_arm: str,
    cells: Sequence[Metrics],
    selected: Metrics | None,
    scored: Metrics | None,
    same: bool,
) -> None:
    """One published cell: ours of the same rank, ours at the same layer and alpha, and its checkpoint's benchmark."""
    why = None if swept else f"this run swept another arm; sweep {ours_arm} to fill it"
    ranked = selected if swept else None
    at = next((c for c in cells if swept and c["layer"] == figures["layer"] and c["alpha"] == figures["alpha"]), None)
    for key in ("layer", "alpha", "compliance", "coherence"):
        row(f"{name}.{key}", figures[key], ranked and ranked[key], why)
    for key in ("compliance", "coherence"):
        row(
            f"{name}.same_cell.{key}",
            figures[key],
            at and at[key],
            why or (None if at else f"no cell at layer {figures['layer']}, alpha {figures['alpha']:g}"),
        )
    if figures["benchmark"] is not None:
        ours = scored if swept else None
        row(f"{name}.benchmark", figures["benchmark"], ours and ours["average"], why or _tasks(same))
        row(
            f"{name}.benchmark_difference",
            round(figures["benchmark"] - baseline, 4),
            ours and ours["difference"],
            why or _tasks(same),
        )


def summary(arm: str, directions: Metrics, select: Metrics, evaluate: Metrics, benchmark: Metrics) -> dict[str, float | None]:
    """All that metrics/summary.json says, the same twelve keys for every variant, so that `dvc exp show` stays readable.

    The rates are rank_1's on test prompts: compliance and coherence 0 to 1, runtime_kl nats a token on harmless text,
    benchmark_difference rank_1's checkpoint less the base. cosine_to_sequential_min is null where sequential was not collected.
    """
    found, first = directions[arm], select["rank_1"]
    return {
        "peak_layer": found["peak_layer"],
        "peak_separation": found["peak_separation"],
        "cosine_to_sequential_min": found["cosine_to_sequential_min"] if "sequential-matched" in directions else None,
        "rank_1_layer": first["layer"],
        "rank_1_alpha": first["alpha"],
        "baseline_compliance": evaluate["baseline"]["compliance"],
        "random_compliance": evaluate["random"]["compliance"],
        "runtime_compliance": evaluate["runtime"]["compliance"],
        "runtime_coherence": evaluate["runtime"]["coherence"],
        "orthogonalized_compliance": evaluate["orthogonalized"]["compliance"],
        "runtime_kl": evaluate["runtime"]["kl"],
        "benchmark_difference": benchmark["rank_1"]["difference"],
    }
