"""The write-up's known weaknesses (published.json), each with the evidence that this package's own run gives for it.

The evidence is about the model that was run: it tells how large an effect can be, not how large it was in the write-up.
Where a run did not measure something the figure is None.
"""

from collections.abc import Mapping
from typing import Any

from refusal.report.reproduction import by_layer, published
from refusal.report.study import Metrics, Study

RATE = ("compliance", "compliance_low", "compliance_high", "n")


def weaknesses(study: Study) -> list[Metrics]:
    """One row a weakness: `name`, `what`, and `evidence`, whose figures carry their n where they are rates."""
    evidence = {
        "unmasked padding": _padding,
        "a pairing effect within one set": _pairing,
        "in-sample separation": _in_sample,
        "empty completions left out of means": _empty,
        "no baseline": _baseline,
        "alpha at run time is not alpha in the weights": _strength,
        "no intervals": _intervals,
    }
    return [{"name": name, "what": what, "evidence": evidence[name](study)} for name, what in published()["weaknesses"].items()]


def _pick(row: Mapping[str, Any], *keys: str) -> Metrics:
    return {key: row[key] for key in keys}


def _padding(study: Study) -> Metrics:
    ours = study.of("batched_unmasked") or {"cosine_to_sequential": []}
    evidence: Metrics = {}
    for whose, cosines in (("published", published()["cosine_sequential_batched"]), ("our", ours["cosine_to_sequential"])):
        least = min(((cosine, layer) for layer, cosine in by_layer(cosines).items()), default=(None, None))
        evidence[f"{whose}_lowest_cosine"], evidence[f"{whose}_lowest_layer"] = least
    evidence["our_cosine_masked"] = (study.of("batched") or {}).get("cosine_to_sequential_min")
    counted = [row for row in study.science.get("padding") or () if row["n_pads"] != "as batched" and row["cosine"] is not None]
    for name, masked in (("masked", True), ("unmasked", False)):
        rows = [row for row in counted if row["masked"] is masked]
        worst = min(rows, key=lambda row: (-row["n_pads"], row["cosine"]), default=None)
        keys = ("n_pads", "layer", "cosine", "separation", "separation_clean", "n")
        evidence[f"most_pads_{name}"] = worst and _pick(worst, *keys)
    return evidence


def _pairing(study: Study) -> Metrics:
    return {
        f"cosine_to_matched_min_{pairing}": study.directions.get(f"sequential-{pairing}", {}).get("cosine_to_sequential_min")
        if study.paired
        else None
        for pairing in ("shuffled", "unrelated")
    }


def _in_sample(study: Study) -> Metrics:
    arm = study.of("sequential") or next(iter(study.directions.values()))
    in_sample, val = by_layer(arm["separation_in_sample"]), by_layer(arm["separation"])
    layer: Any = max(in_sample.keys() & val.keys(), key=lambda layer: (in_sample[layer], -layer), default=None)
    separations = {"in_sample": in_sample.get(layer), "val": val.get(layer)}
    return {"layer": layer, **separations, "n_train": arm["n_harmful"], "n_val": arm["n_val"]}


def _empty(study: Study) -> Metrics:
    """The cells' order by mean compliance x coherence, over all completions and over those that are not empty or degenerate."""
    import pandas  # half a second

    rows = [v for v in study.verdicts if v["label"] != "missing" and "_alpha_" in v["cell"]]
    table = pandas.DataFrame(rows, columns=["cell", "label", "compliance", "coherence"])
    table["score"] = table["compliance"].astype(float) * table["coherence"].astype(float)
    lost = table["label"].isin(["empty", "degenerate"])
    counted = table.groupby("cell", sort=False)["score"].mean()
    dropped = table[~lost].groupby("cell")["score"].mean().reindex(counted.index, fill_value=0.0)
    most: Any = (dropped - counted).idxmax() if rows else None
    return {
        "n_empty": int((table["label"] == "empty").sum()),
        "n_degenerate": int((table["label"] == "degenerate").sum()),
        "n": len(table),
        "most_flattered": most,
        "counted": counted.get(most),
        "dropped": dropped.get(most),
        "n_of_it_dropped": int(lost[table["cell"] == most].sum()) if rows else None,
        "top_3_counted": list(counted.sort_values(ascending=False, kind="stable").index[:3]),
        "top_3_dropped": list(dropped.sort_values(ascending=False, kind="stable").index[:3]),
    }


def _baseline(study: Study) -> Metrics:
    arms, random = study.science["arms"], study.science["controls"]["random_1"]
    return {
        "baseline": _pick(arms["baseline"], *RATE),
        "random": _pick(random, *RATE, "n_arms"),
        "rank_1": _pick(arms["rank_1"], *RATE),
    }


def _strength(study: Study) -> Metrics:
    """The alpha at which compliance differs most between ablation at run time and in the weights."""
    curve = study.plots["science/alphas"]
    run_time, weights = ({row["alpha"]: row for row in curve if row["place"] == at} for at in ("resid_pre", "weights"))
    gaps = {alpha: abs(run_time[alpha]["compliance"] - weights[alpha]["compliance"]) for alpha in weights if alpha in run_time}
    if not gaps:
        return dict.fromkeys(("alpha", "run_time", "weights", "n"))
    at = max(gaps, key=lambda alpha: gaps[alpha])
    rates = {"run_time": run_time[at]["compliance"], "weights": weights[at]["compliance"]}
    return {"alpha": at, **rates, "n": weights[at]["n"]}


def _intervals(study: Study) -> Metrics:
    theirs = [cell["compliance"] for top in published()["arms"].values() for cell in top]
    first, arm = study.select["rank_1"], study.science["arms"]["rank_1"]
    return {
        "published_range_of_ranked_cells": [min(theirs), max(theirs)],
        "our_rank_1_low": first["low"],
        "our_rank_1_high": first["high"],
        "our_cells_that_tie": first["n_tied"],
        **_pick(arm, "val_minus_test", "val_minus_test_low", "val_minus_test_high"),
        "n": first["n"],
    }
