"""The write-up's known weaknesses, each with the evidence that this package's own run gives for it.

The evidence is about the model that was run: it tells how large an effect can be, not how large it was in the write-up.
Where a run did not measure something the figure is None.
"""

from collections.abc import Mapping, Sequence
from typing import Any

Metrics = Mapping[str, Any]


def weaknesses(
    theirs: Metrics,
    directions: Metrics,
    verdicts: Sequence[Metrics],
    select: Metrics,
    science: Metrics,
    alphas: Sequence[Metrics],
) -> list[dict[str, Any]]:
    """One row a weakness: `name`, `what`, and `evidence`, whose figures carry their n where they are rates.

    `theirs` is published.json; `verdicts` the rows of every completion of the sweep (cell, label, compliance, coherence);
    `alphas` the rows of the science stage's curve (place, alpha, compliance, n).
    """
    return [
        {"name": name, "what": what, "evidence": evidence}
        for name, what, evidence in (
            (
                "unmasked padding",
                "the batched code let left padding be attended to",
                _padding(theirs, directions, science.get("padding")),
            ),
            (
                "a pairing effect within one set",
                "difference-in-means does not see which safe prompt goes with which harmful one; only another set can move it",
                _pairing(directions),
            ),
            (
                "in-sample separation",
                "Cohen's d was scored on the prompts that the direction was fitted on",
                _in_sample(directions),
            ),
            (
                "empty completions left out of means",
                "a cell that breaks the model keeps the mean of what little it says",
                _empty(verdicts),
            ),
            (
                "no baseline",
                "no unedited model and no random direction stands beside the cells",
                _baseline(science),
            ),
            (
                "alpha at run time is not alpha in the weights",
                "cells were chosen by ablation at resid_pre and written to weights at the same alpha",
                _places(alphas),
            ),
            ("no intervals", "cells are ranked by rates whose differences chance can make", _intervals(theirs, select, science)),
        )
    ]


def _padding(theirs: Metrics, directions: Metrics, rows: Sequence[Metrics] | None) -> dict[str, Any]:
    published = {i: c for i, c in enumerate(theirs["cosine_sequential_batched"]) if c is not None}
    lowest = min(published, key=lambda i: published[i])
    found: dict[str, Any] = {"published_lowest_cosine": published[lowest], "published_lowest_layer": lowest}
    arm = directions.get("batched_unmasked-matched")
    ours = {i: c for i, c in enumerate(arm["cosine_to_sequential"]) if c is not None} if arm else {}
    found |= {"our_lowest_cosine": min(ours.values(), default=None)}
    found |= {"our_lowest_layer": min(ours, key=lambda i: ours[i]) if ours else None}
    found |= {
        "our_cosine_masked": directions["batched-matched"]["cosine_to_sequential_min"]
        if "batched-matched" in directions
        else None
    }
    for masked in (True, False):
        mine = [r for r in rows or () if r["masked"] is masked and r["n_pads"] != "as batched" and r["cosine"] is not None]
        most = max((r["n_pads"] for r in mine), default=None)
        worst = min((r for r in mine if r["n_pads"] == most), key=lambda r: r["cosine"], default=None)
        name = "masked" if masked else "unmasked"
        found[f"most_pads_{name}"] = worst and {
            k: worst[k] for k in ("n_pads", "layer", "cosine", "separation", "separation_clean", "n")
        }
    return found


def _pairing(directions: Metrics) -> dict[str, Any]:
    arms = {name.split("-")[1]: m for name, m in directions.items() if name.startswith("sequential-")}
    return {
        f"cosine_to_matched_min_{name}": arms[name]["cosine_to_sequential_min"] if name in arms else None
        for name in ("shuffled", "unrelated")
    }


def _in_sample(directions: Metrics) -> dict[str, Any]:
    arm = directions.get("sequential-matched") or next(iter(directions.values()))
    both = [
        (i, a, b)
        for i, (a, b) in enumerate(zip(arm["separation_in_sample"], arm["separation"], strict=True))
        if a is not None and b is not None
    ]
    if not both:
        return {"layer": None, "in_sample": None, "val": None, "n_train": arm["n_harmful"], "n_val": arm["n_val"]}
    layer, in_sample, val = max(both, key=lambda row: row[1])
    return {"layer": layer, "in_sample": in_sample, "val": val, "n_train": arm["n_harmful"], "n_val": arm["n_val"]}


def _empty(verdicts: Sequence[Metrics]) -> dict[str, Any]:
    """The cells' order by mean compliance x coherence, over all completions and over those that are not empty or degenerate."""
    cells: dict[str, list[tuple[float, str]]] = {}
    for v in verdicts:
        if v["label"] != "missing" and v["cell"].startswith("layer_"):
            cells.setdefault(v["cell"], []).append((v["compliance"] * v["coherence"], v["label"]))

    def mean(values: list[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    counted = {cell: mean([score for score, _ in rows]) for cell, rows in cells.items()}
    dropped = {
        cell: mean([score for score, label in rows if label not in ("empty", "degenerate")]) for cell, rows in cells.items()
    }
    most = max(cells, key=lambda cell: dropped[cell] - counted[cell]) if cells else None
    return {
        "n_empty": sum(label == "empty" for rows in cells.values() for _, label in rows),
        "n_degenerate": sum(label == "degenerate" for rows in cells.values() for _, label in rows),
        "n": sum(map(len, cells.values())),
        "most_flattered": most,
        "counted": counted[most] if most else None,
        "dropped": dropped[most] if most else None,
        "n_of_it_dropped": sum(label in ("empty", "degenerate") for _, label in cells[most]) if most else None,
        "top_3_counted": sorted(counted, key=lambda cell: -counted[cell])[:3],
        "top_3_dropped": sorted(dropped, key=lambda cell: -dropped[cell])[:3],
    }


def _baseline(science: Metrics) -> dict[str, Any]:
    arms, random = science["arms"], science["controls"]["random_1"]
    names = ("compliance", "compliance_low", "compliance_high", "n")
    return {
        "baseline": {k: arms["baseline"][k] for k in names},
        "random": {k: random[k] for k in (*names, "n_arms")},
        "rank_1": {k: arms["rank_1"][k] for k in names},
    }


def _places(alphas: Sequence[Metrics]) -> dict[str, Any]:
    at = {(r["place"], r["alpha"]): r for r in alphas}
    gaps = {
        alpha: at["resid_pre", alpha]["compliance"] - at["weights", alpha]["compliance"]
        for place, alpha in at
        if place == "weights" and ("resid_pre", alpha) in at
    }
    worst = max(gaps, key=lambda alpha: abs(gaps[alpha])) if gaps else None
    return {
        "alpha": worst,
        "run_time": at["resid_pre", worst]["compliance"] if worst is not None else None,
        "weights": at["weights", worst]["compliance"] if worst is not None else None,
        "n": int(at["weights", worst]["n"]) if worst is not None else None,
    }


def _intervals(theirs: Metrics, select: Metrics, science: Metrics) -> dict[str, Any]:
    published = [cell["compliance"] for top in theirs["arms"].values() for cell in top]
    first, arm = select["rank_1"], science["arms"]["rank_1"]
    return {
        "published_range_of_ranked_cells": [min(published), max(published)],
        "our_rank_1_low": first["low"],
        "our_rank_1_high": first["high"],
        "our_cells_that_tie": first["n_tied"],
        "val_minus_test": arm["val_minus_test"],
        "val_minus_test_low": arm["val_minus_test_low"],
        "val_minus_test_high": arm["val_minus_test_high"],
        "n": first["n"],
    }
