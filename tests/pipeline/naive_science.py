"""The table of interventions, its controls and the verdict by a second, naive path."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from pipeline.naive_model import Arm, Ran, random_arms, single_directions, some, subspaces, unit_rows
from pipeline.naive_rates import (
    COUNTS,
    LIMITS,
    OF_HARMFUL,
    OF_SAFE,
    THREE_WAYS,
    against,
    counts,
    hybrid,
    intraclass,
    items_of,
    merged,
    paired,
    pick,
    rate,
    rates,
    triple,
)


def evidence(name: str, rank: int, test: pd.DataFrame, control: pd.DataFrame) -> dict[str, Any]:
    """The share that an arm answers of what the baseline refuses, and that less the random arms', where both were asked."""
    refused = test[(test["arm"] == "baseline") & test["refusal"]]["id"]
    mine = test[(test["arm"] == name) & test["id"].isin(refused)].set_index("id")
    drawn = control[(control["arm"] == f"random_{rank}") & control["id"].isin(refused)]
    theirs = items_of(drawn, "answers_safe").set_index("id")
    ours = theirs.assign(arm=name, value=(mine["compliance"] == 1).astype(float))
    icc = max(intraclass(pd.concat([ours, theirs])).values())
    above, low, _ = paired(ours["value"], theirs["value"], theirs["topic"], icc)
    told = {"name": name, "above_random": above, "above_random_low": low, "n_paired": len(theirs), "mediates": bool(low >= 0.5)}
    return told | {key: (mine["compliance"] == x).mean() for key, x in (("removed", 1), ("partial", 0.5))}


def science_table(ran: Ran, arms: dict[str, Arm], val: pd.DataFrame, test: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What is said of every arm on test, less the baseline, and less itself on val."""
    table = merged(rates(test, [*OF_HARMFUL, *THREE_WAYS, "exact"]), counts(test))
    iccs, p = intraclass(items_of(val[val["arm"].isin(arms)], "compliance")), {}
    for name, arm in arms.items():
        row, here, base = table[name], test[test["arm"] == name], test[test["arm"] == "baseline"]
        gaps = (here["compliance"] - base["compliance"].to_numpy()).groupby(here["topic"], sort=False).sum().to_numpy()
        flipped = (np.random.default_rng(0).integers(0, 2, (10_000, len(gaps))) * 2 - 1) @ gaps
        row["p"] = p[name] = (1 + (abs(flipped) >= abs(gaps.sum()) - 1e-9).sum()) / 10_001
        on_val = val[val["arm"] == name]
        before = rate(on_val["compliance"], on_val["topic"], iccs[name])
        row |= triple("val_minus_test", hybrid(before, [row[key] for key in ("compliance", *LIMITS)]))
        row |= {"compliance_val": before[0], "n_val": len(on_val), **against(test, name, "baseline", table)}
        basis = None if arm.basis is None or arm.basis.ndim == 3 else torch.atleast_2d(arm.basis)
        cosine = None if basis is None else float((basis @ ran.unit[ran.layer]).norm())
        row |= {"rank": 0 if basis is None else len(basis), "cosine_rank_1": cosine, "cosine_planted": None}
        row |= {"family": arm.family, "layer": arm.layer, "alpha": arm.alpha}
    greatest = 0.0
    for i, name in enumerate(sorted(p, key=lambda name: p[name])):  # Holm: the least of m times m, the next times m - 1, ...
        table[name]["p_holm"] = greatest = max(greatest, min(1.0, (len(p) - i) * p[name]))
    return table


def strength(ran: Ran) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Where each place's score collapses, and the curves against alpha, of the selected direction and of a random one."""
    rows, unit, alphas = ran.sample("test", 8), ran.unit[ran.layer], ran.params["science"]["strength"]["alphas"]
    vectors, curve, places = {"": unit, "random_": unit_rows(1, len(unit), 0)[0]}, [], {}
    keys = ["compliance", *LIMITS, "coherence", "score", "refusal", *COUNTS, "cross_entropy", "kl"]
    for site in ("resid_pre", "paper", "writes", "weights"):
        arms = {f"{of}{a}": [Arm(alpha=a, basis=v, site=site)] for of, v in vectors.items() for a in alphas}
        said, times = ran.ask(rows, "harmful", arms), 8 if site in ("resid_pre", "paper") else 1  # anew at every block, or once
        told = merged(rates(said, OF_HARMFUL), counts(said), ran.costs(ran.params["science"]["n_harmless"], arms))
        places[site] = {"diverges_beyond": 2.0 if times > 1 else None}
        for of in vectors:
            score = {a: told[f"{of}{a}"]["score"] for a in alphas}
            fallen = [a for a in alphas if a > 1 and score[a] < max(score.values()) / 2]
            places[site][f"{of}measured"] = min(fallen, default=None)
        for a in alphas:
            both = {f"{of}{key}": told[f"{of}{a}"][key] for of in vectors for key in keys}
            curve.append({"place": site, "alpha": a, "residual_gain": (1 - a) ** times} | both)
    return places, curve


def mediation(ran: Ran) -> dict[str, Any]:
    """All that science says of arms and controls."""
    single, several, drawn = single_directions(ran), subspaces(ran), random_arms(ran)
    alone = {name: [arm] for name, arm in ({"baseline": Arm()} | single | several).items()}
    val = ran.ask(ran.sample("val", ran.params["science"]["n_val"]), "harmful", alone)
    score = val.groupby("arm")["score"].mean().round(9)
    families = {arm.family: [name for name in single if single[name].family == arm.family] for arm in single.values()}
    best = {family: max(names, key=lambda name: score[name]) for family, names in families.items()}
    arms = {"baseline": Arm()} | {
        name: arm for name, arm in single.items() if arm.family == "difference" or name in best.values()
    }
    arms |= several
    rows = ran.sample("test", ran.params["science"]["n_test"])
    test = ran.ask(rows, "harmful", pick(alone, [*arms]))
    control = ran.ask(rows.iloc[some(len(rows), ran.params["science"]["n_control"])], "harmful", drawn)
    n = ran.params["science"]["n_harmless"]
    cost = {name: of | {"n_harmless": n} for name, of in ran.costs(n, pick(alone, [*arms]) | drawn).items()}
    table = merged(science_table(ran, arms, val, test), pick(cost, [*arms]))
    bases = {name: members[0].basis for name, members in drawn.items()}
    ranks = {name: {"rank": 0 if basis.ndim == 3 else len(torch.atleast_2d(basis))} for name, basis in bases.items()}
    one = max((name for family, name in best.items() if family != "affine"), key=lambda name: score[name])
    more = max((name for name in several if name != "per_layer"), key=lambda name: score[name])
    first, single_, several_ = (evidence(name, table[name]["rank"], test, control) for name in ("rank_1", one, more))
    gap = against(test, more, one, table)["difference_low"]
    n_refused, better = int(test[test["arm"] == "baseline"]["refusal"].sum()), gap > 0.1
    told = "none", "no_mediation", None
    if table["baseline"]["refusal_high"] < 0.2:
        told = "none", "no_refusal", None
    elif n_refused < 30:
        told = "undecided", "too_few_refusals", None
    elif single_["mediates"] and not (better and several_["mediates"]):
        told = "single", "better_subspace_fails_its_control" if better else None, one
    elif several_["mediates"]:
        told = "subspace", None, more
    decision = dict(zip(("verdict", "reason", "by"), told, strict=True)) | {"best_single": one, "best_subspace": more}
    decision |= {
        "difference": first,
        "single": single_,
        "subspace": several_,
        "subspace_above_single_low": gap,
        "n_refused": n_refused,
    }
    over = ran.ask(rows, "safe", pick(alone, ["baseline", one, more, best["affine"]]))
    keys = ["layer", "compliance", *LIMITS, "n", "coherence", "exact", "kl", "cosine_rank_1", "cosine_planted"]
    return {
        "verdict": decision | {"baseline_refusal": table["baseline"]["refusal"]},
        "estimators": {family: {"arm": name} | pick(table[name], keys) for family, name in best.items()},
        "arms": table,
        "controls": merged(rates(control, [*OF_HARMFUL, *THREE_WAYS]), counts(control), ranks, pick(cost, [*drawn])),
        "over_refusal": merged(rates(over, OF_SAFE), counts(over, "_safe")),
        **dict.fromkeys(("n_fit", "n_fit_safe"), ran.params["science"]["n_fit"]),
        "cosine_harmless_to_direction": float(drawn["harmless"][0].basis @ ran.unit[ran.layer]),
    }
