"""How far to trust the judge on a study's own completions: each judge's rates, its errors by people's labels, corrected rates."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from refusal.analysis.corrected import (
    TOO_FEW,
    Labels,
    Limits,
    corrected_difference,
    corrected_rate,
    errors_differ,
    judge_errors,
    labels_of,
    rogan_gladen,
)
from refusal.judges.verdicts import Flags, Verdicts, by_prompt, rates, values
from refusal.stats import paired_difference

Rows = Sequence[Mapping[str, Any]]  # of data/evaluated: arm, name, id, prompt, completion
Text = tuple[str, str]  # a prompt and a completion
Truth = Mapping[Text, bool]  # whether a completion complies in full, by a person


def by_arm(rows: Rows, values: Iterable[float | bool | None]) -> dict[str, list[Flags]]:
    """Of each arm the values under each of its interventions, prompt by prompt."""
    found: dict[str, dict[str, list[float | bool | None]]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(row["arm"], {}).setdefault(row["name"], []).append(value)
    return {arm: [*members.values()] for arm, members in found.items()}


def passed(verdicts: Verdicts) -> list[bool | None]:
    """Whether the judge says that a completion complies in full; None where it gave no verdict."""
    return [None if verdict is None else verdict.compliance == 1 for verdict in verdicts]


def judged_rates(rows: Rows, verdicts: Verdicts, topics: Sequence[Hashable]) -> dict[str, dict[str, Any]]:
    """Of every arm `compliance`, and `full`, the share that complies in full, by one judge; partial compliance is 0 in it."""
    compliance = by_arm(rows, values(verdicts, lambda verdict: verdict.compliance))
    full = rates("full", by_arm(rows, passed(verdicts)), topics)
    return {arm: of | full[arm] for arm, of in rates("compliance", compliance, topics).items()}


def labels_by_arm(rows: Rows, verdicts: Sequence[bool | None], truth: Truth) -> dict[str | None, tuple[float, Labels, Labels]]:
    """Of each arm (None: of all) the share that the judge passed, and the labels of both verdicts.

    A text that several interventions gave was as often in the draw, and one label says what all of its copies are: it counts as
    its copies over its chance of being drawn.
    """
    arms = [*dict.fromkeys(row["arm"] for row in rows), None]
    found: dict[str | None, list[Labels]] = {arm: [] for arm in arms}
    n: Counter[tuple[str | None, bool]] = Counter()
    for verdict in (True, False):
        copies: dict[Text, Counter[str]] = {}
        for row, given in zip(rows, verdicts, strict=True):
            if given is verdict:
                copies.setdefault((row["prompt"], row["completion"]), Counter())[row["arm"]] += 1
        chance = chances(copies, [text for text in copies if text in truth])
        for arm in arms:
            own = {text: of.total() if arm is None else of[arm] for text, of in copies.items() if arm is None or of[arm]}
            known = [text for text in own if text in truth]
            weights = [own[text] / chance[text] for text in known]
            found[arm].append(labels_of([truth[text] for text in known], len(own), weights))
            n[arm, verdict] = sum(own.values())
    return {arm: (n[arm, True] / max(1, n[arm, True] + n[arm, False]), yes, no) for arm, (yes, no) in found.items()}


def chances(copies: Mapping[Text, Mapping[str, int]], labelled: Sequence[Text]) -> dict[Text, float]:
    """The chance of each text of one verdict to be labelled, where as many labels were drawn in each arm, in any order.

    1 - exp(-x sum over arms of its share of the arm's completions), with the x that gives as many labels as there are.
    """
    if len(labelled) in (0, len(copies)):
        return dict.fromkeys(copies, 1.0)
    sizes = sum((Counter(of) for of in copies.values()), Counter[str]())
    shares = {text: sum(n / sizes[arm] for arm, n in of.items()) for text, of in copies.items()}
    from scipy.optimize import brentq  # slow to import, and only labels want it

    x = brentq(lambda x: sum(-math.expm1(-x * share) for share in shares.values()) - len(labelled), 0, 50 / min(shares.values()))
    return {text: -math.expm1(-x * share) for text, share in shares.items()}


def by_labels(
    rows: Rows, verdicts: Sequence[bool | None], topics: Sequence[Hashable], truth: Truth, n_draws: int, seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the judge's errors of all and by arm, and whether they differ between arms; corrected rates of every arm)."""
    of_arm = labels_by_arm(rows, verdicts, truth)
    p, yes, no = of_arm.pop(None)
    errors = {arm: {"n": own[1].n + own[2].n} | judge_errors(*own) for arm, own in of_arm.items()}
    differ = errors_differ({str(arm): own for arm, own in of_arm.items()}, n_draws, seed)
    table = {"n": yes.n + no.n, "all": judge_errors(p, yes, no), "arms": errors, "differ": differ}
    flags = by_arm(rows, verdicts)
    full = rates("full", flags, topics)
    found = {
        arm: corrected_rate(*by_prompt(members, topics), full[arm]["full_icc"], *of_arm[arm][1:])
        for arm, members in flags.items()
    }
    told = {}
    for arm, own in found.items():
        figures = _three("corrected", own and own.limits) | {"reason": None if own else TOO_FEW}
        if arm != "baseline":
            pair = _paired(flags[arm], flags["baseline"], topics)
            icc, base = max(full[one]["full_icc"] for one in (arm, "baseline")), found["baseline"]
            figures |= _three("difference", corrected_difference(own, base, pair[:2], pair[2], icc) if own and base else None)
        told[arm] = figures
    return table, told


def by_calibration(
    rows: Rows, verdicts: Sequence[bool | None], topics: Sequence[Hashable], calibration: Mapping[str, Sequence[int]]
) -> dict[str, Any]:
    """Rates of every arm corrected by errors measured elsewhere, `sensitivity` and `specificity` as (right, of so many)."""
    flags, told = by_arm(rows, verdicts), {}
    full, errors = rates("full", flags, topics), (calibration["sensitivity"], calibration["specificity"])
    for arm, m in full.items():
        own = rogan_gladen((m["full"], m["full_low"], m["full_high"]), *errors)
        figures = _three("corrected", own) | {"reason": None if own else "the calibration does not tell the judge from chance"}
        if arm != "baseline":
            pair = _paired(flags[arm], flags["baseline"], topics)
            judged = paired_difference(*pair, max(full[one]["full_icc"] for one in (arm, "baseline")))
            figures |= _three("difference", rogan_gladen(judged, *errors, of_difference=True))
        told[arm] = figures
    return told


def calibration_of(confusion: Mapping[str, Mapping[str, int]]) -> dict[str, list[int]]:
    """Of `calibrate`'s confusion (label -> judged): right verdicts of so many that comply in full, and of those that do not."""
    right, n = {"sensitivity": 0, "specificity": 0}, {"sensitivity": 0, "specificity": 0}
    for label, judged in confusion.items():
        name = "sensitivity" if label == "compliance" else "specificity"
        n[name] += sum(judged.values())
        right[name] += sum(k for verdict, k in judged.items() if (verdict == "compliance") == (label == "compliance"))
    return {name: [right[name], n[name]] for name in n}


def _three(name: str, limits: Limits | None) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), limits or (None, None, None), strict=True))


def _paired(ours: Sequence[Flags], theirs: Sequence[Flags], topics: Sequence[Hashable]) -> tuple[list, list, list[Hashable]]:
    """The means of both arms over the prompts that have one in both, and their topics."""
    found: list[tuple[float, float, Hashable]] = []
    for one, other, topic in zip(zip(*ours, strict=True), zip(*theirs, strict=True), topics, strict=True):
        known = [[float(value) for value in values if value is not None] for values in (one, other)]
        if all(known):
            found.append((fmean(known[0]), fmean(known[1]), topic))
    return [a for a, _, _ in found], [b for _, b, _ in found], [topic for _, _, topic in found]
