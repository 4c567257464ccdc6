"""What the strength of an ablation does, at each of the sites and as edited weights, and what is predicted; and additions."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from refusal.analysis.mediation import refusal_rates
from refusal.analysis.study import Study
from refusal.io.params import Strength
from refusal.judges.verdicts import COUNTS, counts
from refusal.method.directions import random_unit
from refusal.method.interventions import BASELINE, POSITIONS, SITES, Addition, Intervention
from refusal.method.subspaces import random_of

PLACES = (*SITES, "weights")
RATES = ("compliance", "compliance_low", "compliance_high", "coherence", "score", "refusal", *COUNTS)
COSTS = ("cross_entropy", "kl")


def strength(study: Study, settings: Strength) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Where compliance x coherence collapses at each of PLACES, measured and predicted; and the curves that say so.

    A curve is compliance, coherence and cost of the selected direction or subspace ablated on harmful test prompts, against
    alpha, and of a random one of its rank, the control.
    """
    texts = study.harmless(study.params.science.n_harmless)
    vectors = {"": study.basis, "random_": random_of(study.span, study.directions, 1, study.seed)[0]}
    test, rows = study.sample("test", settings.n), []
    # In memory weights are edited with one basis for all layers.
    places = PLACES if study.basis.ndim == 2 else SITES
    for place in places:
        interventions = [
            Intervention(f"{of}{alpha:g}", vector, alpha, place, None, study.layer, "alpha")
            for of, vector in vectors.items()
            for alpha in settings.alphas
        ]
        judged = study.ask(test, "harmful", interventions, f"science: alphas, {place}")
        costs = study.costs({one.name: [one] for one in interventions}, texts, f"cost: {place}")
        found = study.summaries({name: [v] for name, v in judged.verdicts.items()}, judged.topics, f", {place}")
        for alpha in settings.alphas:
            gain = residual_gain(study.lm.n_layers, place, alpha) if study.basis.ndim == 2 else None  # of a basis a layer: none
            row = {"place": place, "alpha": alpha, "residual_gain": gain}
            for of in vectors:
                row |= {f"{of}{key}": costs[f"{of}{alpha:g}"][key] for key in COSTS}
                row |= {f"{of}{key}": found[f"{of}{alpha:g}"][key] for key in RATES}
            rows.append(row)
    collapse = {}
    for place in places:
        curve = [row for row in rows if row["place"] == place]
        measured = {f"{of}measured": collapse_alpha(curve, f"{of}score") for of in vectors}
        collapse[place] = measured | {"diverges_beyond": diverges_beyond(place)}
    return collapse, rows


def residual_gain(n_layers: int, place: str, alpha: float) -> float:
    """Share of what the embedding writes along v that reaches the last block, as predicted: (1 - alpha)^(times it is ablated).

    `resid_pre` and `paper` ablate it again at the input of every block, `writes` and `weights` once. Beyond alpha = 2 its size
    exceeds 1, and where it is ablated again and again it grows with depth.
    """
    return (1 - alpha) ** (n_layers if place in ("resid_pre", "paper") else 1)


def diverges_beyond(place: str) -> float | None:
    """The alpha from which `residual_gain` grows with depth; None where nothing is ablated twice, and nothing can grow."""
    return 2.0 if place in ("resid_pre", "paper") else None


def collapse_alpha(curve: Sequence[dict[str, Any]], score: str = "score") -> float | None:
    """The least alpha above 1 whose score (compliance x coherence) is below half of the curve's best; None if none is."""
    best = max(row[score] for row in curve)
    beyond = sorted(row["alpha"] for row in curve if row["alpha"] > 1 and row[score] < best / 2)
    return beyond[0] if beyond else None


def additions(study: Study) -> dict[str, Any]:
    """Refusal of safe test prompts when the selected raw difference is added, and when a random vector of its length is."""
    difference, rows = study.directions["difference"][study.layer], study.sample("test", study.params.science.n_test, "safe")
    random = random_unit(len(difference), 1, study.seed)[0] * difference.norm()
    arms = {}
    for name, vector in (("difference", difference), ("random", random)):
        for positions in POSITIONS:
            added = replace(Addition(vector, study.layer), positions=positions)
            judged = study.ask(rows, "safe", [BASELINE], f"science: {name} added, {positions}", added)
            arms[name, positions] = [judged]
    found = refusal_rates(study, arms)
    figures: dict[str, Any] = {"layer": study.layer, "difference": {}, "random": {}}
    for (name, positions), (judged,) in arms.items():
        of = counts([judged.the_only], judged.topics, f"{name} added", study.params.judge.allow_missing)
        figures[name][positions] = found[name, positions] | of
    return figures
