"""The write-up's figures and ours for the same quantities, and the twelve scalars that tell variants apart."""

import json
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from refusal.report.study import Metrics, Rows, Study

PUBLISHED = Path(__file__).with_name("published.json")
NO_PAIRS = "the prompts are no pairs: unrelated harmless ones are subtracted"
# The write-up's batched code left the padding unmasked: that is this package's method of the other name.
OUR_METHOD = {"sequential": "sequential", "batched": "batched_unmasked"}


def published() -> Metrics:
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
    defined = by_layer(separation)
    run = list(takewhile(lambda layer: defined[layer] < max(defined.values()) / 3, defined))
    return [run[0], run[-1]] if run else None


def by_layer(values: Sequence[float | None]) -> dict[int, float]:
    """The defined values of a list by layer."""
    return {layer: value for layer, value in enumerate(values) if value is not None}


def drop_off(cells: Rows) -> float | None:
    """The least swept alpha at which the best score of any layer is below half the best at smaller alphas; None if none is."""
    best: dict[float, float] = {}
    for cell in cells:
        best[cell["alpha"]] = max(cell["score"], best.get(cell["alpha"], 0.0))
    fallen = (a for a in sorted(best) if best[a] < max((best[b] for b in best if b < a), default=0.0) / 2)
    return next(fallen, None)


def reproduce(study: Study) -> Metrics:
    """What metrics/reproduction.json says of each published figure; its `weaknesses` are `refusal.report.weaknesses`.

    A row has `quantity`, `published`, `ours` (null with a `note` that says why), and `comparable`: true only for the same model.
    """
    theirs, model_id = published(), study.params["model"]["id"]
    same = comparable(model_id)
    return {
        "source": theirs["source"],
        "vectors": theirs["vectors"]["source"],
        "published_model": theirs["settings"]["model"],
        "model": model_id,
        "arm": study.arm,
        "comparable": same,
        "rows": [
            {"quantity": quantity, "published": figure, "ours": ours, "comparable": same, "note": note}
            for part in (_settings, _separation, _cosines, _cells)
            for quantity, figure, ours, note in part(theirs, study)
        ],
    }


Row = tuple[str, Any, Any, str | None]


def _settings(theirs: Metrics, study: Study) -> Iterator[Row]:
    p = study.params
    ours = {
        "model": p["model"]["id"],
        "n_layers": len(study.directions[study.arm]["separation"]),
        "hook": "hook_resid_pre",
        "position": "last prompt token",
        "n_pairs": len(study.pairs) if study.paired else None,
        "pairs_by": p["prompts"].get("harmful") or p["prompts"]["source"],
        "judge": p["judge"]["kind"],
        "judged": ["compliance", "coherence"],
        "alphas": p["sweep"]["alphas"],
        "benchmark_tasks": list(study.benchmark["baseline"]["tasks"]),
        "benchmark_score": "mean over tasks of acc_norm, or of acc where a task has no acc_norm",
        "checkpoint_name": "{method}_layer_{layer}_alpha_{100 alpha}",
    }
    if p["model"]["id"] == "organism":
        shape = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "vocab_size": "vocab_size"}
        ours |= {name: p["organism"][key] for name, key in shape.items()}
    for name, value in theirs["settings"].items():
        missing = NO_PAIRS if name == "n_pairs" and not study.paired else None
        yield f"settings.{name}", value, ours.get(name), missing if name in ours else "not recorded"


def _separation(theirs: Metrics, study: Study) -> Iterator[Row]:
    main = study.of("sequential") or next(iter(study.directions.values()))
    n_layers, peak = len(main["separation"]), main["peak_layer"]
    undefined = [layer for layer in range(n_layers) if layer not in main["layers"]]
    yield "undefined_layer", theirs["undefined_layer"], undefined[0] if len(undefined) == 1 else undefined, None
    yield (
        "separation.little_or_none_layers",
        theirs["separation"]["little_or_none_layers"],
        low_layers(main["separation_in_sample"]),
        "ours: first layers whose in-sample separation stays below a third of its peak",
    )
    yield (
        "separation.peak_region",
        theirs["separation"]["peak_region"],
        None if peak is None else "mid-late" if peak >= n_layers / 2 else "early-mid",
        f"ours: the half of the stack that holds the val peak, layer {peak} of 0 to {n_layers - 1}",
    )
    for method, figure in theirs["vectors"]["in_sample_peak"].items():
        arm = study.of(OUR_METHOD[method])
        ours = by_layer(arm["separation_in_sample"]) if arm else {}
        at = max(ours, key=lambda layer: ours[layer], default=None)
        note = (None if study.paired else NO_PAIRS) if ours else f"{OUR_METHOD[method]}-matched was not collected"
        yield f"in_sample_peak.{method}.layer", figure["layer"], at, note
        yield f"in_sample_peak.{method}.separation", figure["separation"], None if at is None else ours[at], note


def _cosines(theirs: Metrics, study: Study) -> Iterator[Row]:
    unmasked = study.of("batched_unmasked") if study.of("sequential") else None
    ours = unmasked["cosine_to_sequential"] if unmasked else []
    for layer, figure in enumerate(theirs["cosine_sequential_batched"]):
        here = ours[layer] if layer < len(ours) else None
        note = None if study.paired else NO_PAIRS
        if not unmasked:
            note = "sequential and batched_unmasked were not both collected"
        elif layer >= len(ours):
            note = f"our model has layers 0 to {len(ours) - 1}"
        elif here is None:
            note = "no direction where prompts cannot differ"
        yield f"cosine_sequential_batched.layer_{layer}", figure, here, note


def _cells(theirs: Metrics, study: Study) -> Iterator[Row]:
    """The sweep and the benchmark: each published cell, ours of the same rank, ours at the same layer and alpha."""
    cells = {(cell["layer"], cell["alpha"]): cell for cell in study.judge.values() if cell["layer"] is not None}
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({alpha for _, alpha in cells}))
    note = f"ours: first of the swept alphas ({alphas}) whose best score is below half the best at smaller ones"
    yield "alpha_drop_off", theirs["alpha_drop_off"], drop_off([*cells.values()]), note
    tasks = None if comparable(study.params["model"]["id"]) else "ours: the tasks in settings.benchmark_tasks"
    baseline = theirs["benchmark_baseline"]
    yield "benchmark.baseline", baseline, study.benchmark["baseline"]["average"], tasks
    for published_arm, top in theirs["arms"].items():
        method, pairing = published_arm.split("-")
        our_arm = f"{OUR_METHOD[method]}-{pairing}"
        swept = our_arm == study.arm
        why = None if swept else f"this run swept another arm; sweep {our_arm} to fill it"
        for rank, figures in enumerate(top, 1):
            name, layer, alpha = f"{published_arm}.rank_{rank}", figures["layer"], figures["alpha"]
            selected, scored = (m.get(f"rank_{rank}", {}) if swept else {} for m in (study.select, study.benchmark))
            same_cell = cells.get((layer, alpha), {}) if swept else {}
            for key in ("layer", "alpha", "compliance", "coherence"):
                yield f"{name}.{key}", figures[key], selected.get(key), why
            missing = why or (None if same_cell else f"no cell at layer {layer}, alpha {alpha:g}")
            for key in ("compliance", "coherence"):
                yield f"{name}.same_cell.{key}", figures[key], same_cell.get(key), missing
            if figures["benchmark"] is not None:
                yield f"{name}.benchmark", figures["benchmark"], scored.get("average"), why or tasks
                difference = round(figures["benchmark"] - baseline, 4)
                yield f"{name}.benchmark_difference", difference, scored.get("difference"), why or tasks


def summary(study: Study) -> dict[str, float | None]:
    """All that metrics/summary.json says, the same twelve keys for every variant, so that `dvc exp show` stays readable.

    The rates are rank_1's on test prompts: compliance and coherence 0 to 1, runtime_kl nats a token on harmless text,
    benchmark_difference rank_1's checkpoint less the base. rank_1_layer is `7-10` of a subspace of these layers.
    cosine_to_sequential_min is null where sequential was not collected.
    """
    swept, first, e = study.directions[study.arm], study.select["rank_1"], study.evaluate
    return {
        "peak_layer": swept["peak_layer"],
        "peak_separation": swept["peak_separation"],
        "cosine_to_sequential_min": swept["cosine_to_sequential_min"] if study.of("sequential") else None,
        "rank_1_layer": study.judge[study.cell]["layer"],
        "rank_1_alpha": first["alpha"],
        "baseline_compliance": e["baseline"]["compliance"],
        "random_compliance": e["random"]["compliance"],
        "runtime_compliance": e["runtime"]["compliance"],
        "runtime_coherence": e["runtime"]["coherence"],
        "orthogonalized_compliance": e["orthogonalized"]["compliance"],
        "runtime_kl": e["runtime"]["kl"],
        "benchmark_difference": study.benchmark["rank_1"]["difference"],
    }
