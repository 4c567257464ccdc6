"""What the report says of the write-up's figures by a second path: from metrics that other tests recompute, and from verdicts."""

import json
from typing import Any

import pandas as pd
from place import ROOT

from pipeline.naive_model import Ran

PUBLISHED = json.loads((ROOT / "refusal/report/published.json").read_text())
RATE = ["compliance", "compliance_low", "compliance_high", "n"]


def layers(values: list[float | None]) -> pd.Series:
    return pd.Series(values, dtype=float)


def settings(ran: Ran) -> dict[str, Any]:
    """Of each setting that the write-up names, this study's."""
    p = ran.params
    return {
        **{"model": "organism", "n_layers": len(ran.unit), "hook": "hook_resid_pre", "position": "last prompt token"},
        **{"d_model": p["organism"]["hidden_size"], "n_heads": p["organism"]["num_attention_heads"]},
        **{"vocab_size": p["organism"]["vocab_size"], "n_pairs": len(ran.rows["pairs"]), "pairs_by": "grammar"},
        **{"judge": "rules", "judged": ["compliance", "coherence"], "alphas": p["sweep"]["alphas"]},
        "benchmark_tasks": p["benchmark"]["suite"],
        "benchmark_score": "mean over tasks of acc_norm, or of acc where a task has no acc_norm",
        "checkpoint_name": "{method}_layer_{layer}_alpha_{100 alpha}",
    }


def reproduced(ran: Ran, judged: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """Of each quantity the published figure and ours."""
    d, select, bench = ran.json("directions"), ran.json("select"), ran.json("benchmark")
    best = judged[judged["layer"].notna()].groupby(["layer", "alpha"])["score"].mean().groupby("alpha").max()
    fallen = [alpha for alpha in best.index if best[alpha] < best[best.index < alpha].max() / 2]
    in_sample = {method: layers(d[f"{method}-matched"]["separation_in_sample"]) for method in ("sequential", "batched_unmasked")}
    main = in_sample["sequential"].dropna()
    low = [i for i in main.index if (main[:i] < main.max() / 3).all()]
    peak, cosines = layers(d["sequential-matched"]["separation"]).idxmax(), d["batched_unmasked-matched"]["cosine_to_sequential"]
    ours = {f"settings.{key}": x for key, x in settings(ran).items()}
    ours |= {
        "undefined_layer": 0,
        "alpha_drop_off": min(fallen, default=None),
        "benchmark.baseline": bench["baseline"]["average"],
    }
    ours |= {"separation.little_or_none_layers": [low[0], low[-1]] if low else None}
    ours |= {"separation.peak_region": "mid-late" if peak >= len(ran.unit) / 2 else "early-mid"}
    ours |= {f"cosine_sequential_batched.layer_{i}": x for i, x in enumerate(cosines)}
    for name, of in zip(("sequential", "batched"), in_sample.values(), strict=True):
        ours |= {f"in_sample_peak.{name}.layer": int(of.idxmax()), f"in_sample_peak.{name}.separation": of.max()}
    for rank in (1, 2, 3):  # of the arm that was swept; no layer of this model is one of the write-up's: same_cell is empty
        score = bench[f"rank_{rank}"]["average"]
        mine = select[f"rank_{rank}"] | {"benchmark": score, "benchmark_difference": score - bench["baseline"]["average"]}
        ours |= {f"sequential-matched.rank_{rank}.{key}": x for key, x in mine.items()}
    return {quantity: {"published": x, "ours": ours.get(quantity)} for quantity, x in published().items()}


def published() -> dict[str, Any]:
    """The write-up's figures by the quantity's name."""
    figures = {key: PUBLISHED[key] for key in ("undefined_layer", "alpha_drop_off")}
    for section in ("settings", "separation"):
        figures |= {f"{section}.{key}": x for key, x in PUBLISHED[section].items()}
    figures |= {f"cosine_sequential_batched.layer_{i}": x for i, x in enumerate(PUBLISHED["cosine_sequential_batched"])}
    for name, of in PUBLISHED["vectors"]["in_sample_peak"].items():
        figures |= {f"in_sample_peak.{name}.{key}": x for key, x in of.items()}
    figures["benchmark.baseline"] = PUBLISHED["benchmark_baseline"]
    for arm, top in PUBLISHED["arms"].items():
        for rank, cell in enumerate(top, 1):
            told = cell | {f"same_cell.{key}": cell[key] for key in ("compliance", "coherence")}
            if told["benchmark"] is None:
                del told["benchmark"]
            else:
                told["benchmark_difference"] = told["benchmark"] - PUBLISHED["benchmark_baseline"]
            figures |= {f"{arm}.rank_{rank}.{key}": x for key, x in told.items()}
    return figures


def weaknesses(ran: Ran, judged: pd.DataFrame) -> list[dict[str, Any]]:
    """The evidence that this study gives for each weakness of the write-up."""
    d, science, first = ran.json("directions"), ran.json("science"), ran.json("select")["rank_1"]
    main, arms = d["sequential-matched"], science["arms"]
    theirs, ours = (
        layers(x) for x in (PUBLISHED["cosine_sequential_batched"], d["batched_unmasked-matched"]["cosine_to_sequential"])
    )
    padding = dict.fromkeys(["our_cosine_masked", "most_pads_masked", "most_pads_unmasked"])  # not asked for
    padding |= {"published_lowest_cosine": theirs.min(), "published_lowest_layer": int(theirs.idxmin())}
    padding |= {"our_lowest_cosine": ours.min(), "our_lowest_layer": int(ours.idxmin())}
    layer = int(layers(main["separation_in_sample"]).idxmax())
    split = {"layer": layer, "in_sample": main["separation_in_sample"][layer], "val": main["separation"][layer]}
    split |= {"n_train": len(ran.activations()["train.harmful"]), "n_val": len(ran.sample("val"))}
    curve = pd.read_csv(ran.folder / "plots/science/alphas.csv").pivot(index="alpha", columns="place", values="compliance")
    alpha = (curve["resid_pre"] - curve["weights"]).abs().idxmax()
    cells = [cell["compliance"] for top in PUBLISHED["arms"].values() for cell in top]
    biased = {key: arms["rank_1"][key] for key in ("val_minus_test", "val_minus_test_low", "val_minus_test_high")}
    evidence: dict[str, dict[str, Any]] = {
        "unmasked padding": padding,
        "a pairing effect within one set": {
            "cosine_to_matched_min_shuffled": None,
            "cosine_to_matched_min_unrelated": d["sequential-unrelated"]["cosine_to_sequential_min"],
        },
        "in-sample separation": split,
        "empty completions left out of means": left_out(judged),
        "no baseline": {
            **{name: {key: arms[name][key] for key in RATE} for name in ("baseline", "rank_1")},
            "random": {key: science["controls"]["random_1"][key] for key in (*RATE, "n_arms")},
        },
        "alpha at run time is not alpha in the weights": {
            **{"alpha": alpha, "run_time": curve["resid_pre"][alpha], "weights": curve["weights"][alpha]},
            "n": ran.params["science"]["strength"]["n"],
        },
        "no intervals": {
            **{"published_range_of_ranked_cells": [min(cells), max(cells)], "our_cells_that_tie": first["n_tied"]},
            **{"our_rank_1_low": first["low"], "our_rank_1_high": first["high"], "n": first["n"], **biased},
        },
    }
    return [{"name": name, "evidence": evidence[name]} for name in PUBLISHED["weaknesses"]]


def left_out(judged: pd.DataFrame) -> dict[str, Any]:
    """What leaving empty and degenerate completions out of a cell's mean would do to the order of cells."""
    cells = judged[judged["layer"].notna()]
    lost = cells["label"].isin(["empty", "degenerate"])
    counted = cells.groupby("arm", sort=False)["score"].mean()
    dropped = cells[~lost].groupby("arm")["score"].mean().reindex(counted.index, fill_value=0.0)
    most = (dropped - counted).idxmax()
    by_label = {f"n_{label}": int((cells["label"] == label).sum()) for label in ("empty", "degenerate")}
    of = {
        "most_flattered": most,
        "counted": counted[most],
        "dropped": dropped[most],
        "n_of_it_dropped": int(lost[cells["arm"] == most].sum()),
    }
    tops = {"counted": counted, "dropped": dropped}
    return {
        **by_label,
        **of,
        "n": len(cells),
        **{f"top_3_{name}": [*means.sort_values(ascending=False, kind="stable").index[:3]] for name, means in tops.items()},
    }
