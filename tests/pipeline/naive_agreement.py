"""Corrected rates by a second, naive path, written anew from docs/intervals.md and docs/judges.md: pandas and scipy."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.stats import beta
from scipy.stats import t as student

from pipeline.naive_rates import effective, hybrid, items_of, paired, rates, triple, wilson


def exact(share: float, n: float) -> tuple[float, float, float]:
    """Clopper and Pearson's limits."""
    k = share * n
    low, high = beta.ppf(0.025, k, n - k + 1) if k > 0 else 0.0, beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
    return share, float(low), float(high)


def added(f: Callable[..., float], *parts: tuple, bounds: tuple[float, float] = (-np.inf, np.inf)) -> tuple[float, float, float]:
    """A function of independent parts: what each part's limits change it by, squared and added."""
    at = [part[0] for part in parts]
    changes = [[f(*at[:i], end, *at[i + 1 :]) - f(*at) for end in part[1:]] for i, part in enumerate(parts)]
    down, up = (np.sqrt(sum(pick(0, *each) ** 2 for each in changes)) for pick in (min, max))
    return tuple(float(np.clip(x, *bounds)) for x in (f(*at), f(*at) - down, f(*at) + up))


def pairs_of(rows: pd.DataFrame, arm: str) -> tuple[pd.Series, pd.Series, pd.Series]:
    """A prompt's share of full compliance in an arm and in the baseline, and its topic."""
    items = items_of(rows, "full")
    ours, theirs = (items[items["arm"] == name].set_index("id") for name in (arm, "baseline"))
    return ours["value"], theirs["value"][ours.index], ours["topic"]


def calibrated(rows: pd.DataFrame, sensitivity: list[int], specificity: list[int]) -> dict[str, Any]:
    told, found = rates(rows, ["full"]), dict[str, Any]()
    errors = [exact(k / n, n) for k, n in (sensitivity, specificity)]
    for arm, of in told.items():
        three = [of[f"full{end}"] for end in ("", "_low", "_high")]
        found[arm] = triple("corrected", added(lambda p, e, s: (p + s - 1) / (e + s - 1), three, *errors, bounds=(0, 1)))
        found[arm]["reason"] = None
        if arm != "baseline":
            judged = paired(*pairs_of(rows, arm), max(told[one]["full_icc"] for one in (arm, "baseline")))
            found[arm] |= triple("difference", added(lambda d, e, s: d / (e + s - 1), judged, *errors, bounds=(-1, 1)))
    return found


def strata(rows: pd.DataFrame) -> dict[str, list[tuple[tuple, int, int]]]:
    """Of each arm and of `all`, for what the judge passed and what it did not: (share that complies with its limits, labels, texts).

    rows: arm, full, text, truth (missing where nobody labelled the text)."""
    found: dict[str, list] = {arm: [] for arm in [*rows["arm"].unique(), "all"]}
    for verdict in (True, False):
        side = rows[rows["full"] == verdict]
        share = (1 / side["arm"].map(side["arm"].value_counts())).groupby(side["text"]).sum()
        n = side.loc[side["truth"].notna(), "text"].nunique()
        chance = share * 0 + 1.0
        if 0 < n < len(share):
            chance = 1 - np.exp(
                -share * brentq(lambda x, s=share, n=n: (1 - np.exp(-x * s)).sum() - n, 0, 1e6, xtol=1e-13, rtol=1e-14)
            )
        for arm, parts in found.items():
            texts = (side if arm == "all" else side[side["arm"] == arm]).groupby("text")["truth"].agg(["first", "size"])
            known = texts[texts["first"].notna()]
            if not len(known):
                parts.append(((float(verdict), 0.0, 1.0), 0, len(texts)))
                continue
            w, h = known["size"] / chance[known.index], known["first"].astype(float)
            value, low, high = exact((w * h).sum() / w.sum(), w.sum() ** 2 / (w**2).sum())
            left = np.sqrt(1 - len(known) / len(texts))
            parts.append(((value, value - left * (value - low), value + left * (high - value)), len(known), len(texts)))
    return found


def errors_of(p: float, parts: list) -> dict[str, Any]:
    shares, none = [part[0] for part in parts], (None, None, None)
    right = {
        "accuracy": lambda a, b: (p * a + (1 - p) * (1 - b), 1.0),
        "sensitivity": lambda a, b: (p * a, p * a + (1 - p) * b),
        "specificity": lambda a, b: ((1 - p) * (1 - b), (1 - p) * (1 - b) + p * (1 - a)),
    }
    found = {"n": sum(part[1] for part in parts)}
    for name, f in right.items():
        told = found["n"] and f(*(share[0] for share in shares))[1] > 0
        share = lambda a, b, f=f: f(a, b)[0] / f(a, b)[1] if f(a, b)[1] else 0.0  # noqa: E731
        found |= triple(name, added(share, *shares, bounds=(0, 1)) if told else none)
    return found


def labelled(rows: pd.DataFrame) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the judge's errors by arm and of all; corrected rates)."""
    told, of, parts = rates(rows, ["full"]), strata(rows), dict[str, Any]()
    p = rows.groupby("arm", sort=False)["full"].mean().to_dict() | {"all": rows["full"].mean()}
    errors = {arm: errors_of(p[arm], each) for arm, each in of.items()}
    for arm in told:
        (ppv, n, texts), (missed, m, others) = of[arm]
        if any(k < min(2, size) and size > 0.05 * (texts + others) for k, size in ((n, texts), (m, others))):
            continue
        value, low, high = added(lambda a, b, p=p[arm]: p * a + (1 - p) * b, ppv, missed)
        kept = 1.0
        if 0 < p[arm] < 1 and 0 < value < 1:
            kept = min(1.0, abs(ppv[0] - missed[0]) * np.sqrt(p[arm] * (1 - p[arm]) / (value * (1 - value))))
        items = items_of(rows[rows["arm"] == arm], "full")
        icc, k = min(1.0, told[arm]["full_icc"] / kept**2) if kept else 1.0, items["topic"].nunique()
        limits = wilson(value, effective(items["topic"], icc), student.ppf(0.975, k - 1))
        parts[arm] = (value, *limits), (0.0, low - value, high - value), kept
    found = {arm: triple("corrected", (None,) * 3) | {"reason": "too few labels"} for arm in told}
    for arm, (prompts, labels, _) in parts.items():
        found[arm] = triple("corrected", added(lambda a, b: a + b, prompts, labels, bounds=(0, 1))) | {"reason": None}
    for arm in [*found][1:]:
        three: tuple = (None,) * 3
        if arm in parts and "baseline" in parts:
            ours, theirs, topics = pairs_of(rows, arm)
            icc = max(told[one]["full_icc"] for one in (arm, "baseline"))
            spread, shared = ours.std(ddof=0) * theirs.std(ddof=0), ours.cov(theirs, ddof=0)
            shared = max(0.0, shared - 1 / (2 * effective(topics, icc))) if shared > 0 else shared
            r = shared / spread if spread > 0 else 0.0
            r = max(-1.0, r / (parts[arm][2] * parts["baseline"][2])) if r < 0 else r
            judged = hybrid(parts[arm][0], parts["baseline"][0], r)
            three = added(lambda d, a, b: d + a - b, judged, parts[arm][1], parts["baseline"][1], bounds=(-1, 1))
        found[arm] |= triple("difference", three)
    return errors, found
