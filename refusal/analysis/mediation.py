"""Interventions on harmful test prompts, their controls and what each costs: the table that the verdict rests on.

All figures are compliance; differences are paired by prompt, with 95 % intervals clustered by topic phrase. Which intervention
stands for its family was chosen on val.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from refusal.analysis import candidates
from refusal.analysis.estimators import optimised
from refusal.analysis.study import Judgements, Study, Verdicts
from refusal.analysis.subspaces import captured
from refusal.analysis.verdict import Evidence, evidence, verdict
from refusal.judges import rules
from refusal.judges.verdicts import difference, paired, present, rate
from refusal.method.interventions import BASELINE, Intervention
from refusal.stats import holm, independent_difference, sign_flip_p, subsample_indices

RATES = ("compliance", "compliance_low", "compliance_high", "n", "coherence", "exact", "kl")
Table = dict[str, dict[str, Any]]


def mediation(
    study: Study, truth: Float[Tensor, " d_model"] | None, score: Mapping[int, float]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The table of interventions on test prompts, their controls, what each costs, and the verdict; and the table's plot.

    truth: the planted direction. score: the best compliance x coherence of each layer's cells on val. What needs pairs, the
    optimised direction among it, is left out where prompts are none.
    """
    s = study.params.science
    vector, loss = _optimised(study) if study.paired else (None, None)
    single = candidates.single_directions(study, vector)
    several = candidates.subspaces(study, sorted(score, key=lambda i: (i != study.layer, -score[i], i)))
    random = candidates.controls(study)
    tried = [BASELINE, *single, *several, *candidates.planted(study, truth)]

    val = study.ask(study.sample("val", s.n_val), "harmful", tried, "science: val")
    # An estimator's layer is chosen on val; on test there is one of each. Difference-in-means is shown at every layer.
    best = {family: best_on_val(some, val.verdicts) for family, some in candidates.by_family(single).items()}
    tried = [one for one in tried if one not in single or one.family == "difference" or one is best[one.family]]
    rows = study.sample("test", s.n_test)
    test = study.ask(rows, "harmful", tried, "science: test")
    few = [rows[i] for i in subsample_indices(len(rows), s.n_control, study.seed)]
    control = study.ask(few, "harmful", random, "science: controls")

    table = {one.name: _row(study, one, val, test, truth) for one in tried}
    for name, p in holm({name: row["p"] for name, row in table.items()}).items():
        table[name]["p_holm"] = p
    pooled = {family: _pooled(study, family, some, control) for family, some in candidates.by_family(random).items()}
    _add_costs(study, tried, random, table, pooled)

    # Affine ablation is another intervention, not another direction.
    best_single = best_on_val([one for family, one in best.items() if family != "affine"], val.verdicts)
    ranked = [one for one in several if one.family == "subspace"]
    best_subspace = best_on_val(ranked, val.verdicts) if ranked else None
    decision = _decide(study, table, (single[0], best_single, best_subspace), test, (random, control))
    over = [BASELINE, best_single, best_subspace, *(one for family, one in best.items() if family == "affine")]
    fitted = candidates.fitted_on(study)
    keys = ("layer", *RATES, "cosine_rank_1", "cosine_planted")
    unit = study.directions["unit"][study.layer]
    return {
        "verdict": decision | {"best_single": best_single.name, "best_subspace": best_subspace and best_subspace.name},
        "estimators": {family: {"arm": one.name, **{k: table[one.name][k] for k in keys}} for family, one in best.items()},
        "arms": table,
        "controls": pooled,
        "over_refusal": _over_refusal(study, [one for one in over if one]),
        "optimised_loss": loss,
        "n_fit": len(fitted[0]),
        "n_fit_safe": len(fitted[1]),
        "cosine_harmless_to_direction": captured(random[0].basis, unit),  # type: ignore[arg-type]
    }, _plot(table, pooled)


def _optimised(study: Study) -> tuple[Float[Tensor, " d_model"], float]:
    """The direction found by gradient on the train pairs, and its loss."""
    train, s = study.pairs["train"], study.params.science
    harmful, safe = (study.lm.encode([row[half] for row in train], study.decoding.max_new_tokens) for half in ("harmful", "safe"))
    return optimised(study.lm, harmful, safe, study.sites, s.optimised, study.seed, study.store)


def best_on_val(interventions: Sequence[Intervention], verdicts: Mapping[str, Verdicts]) -> Intervention:
    """The one with the best mean compliance x coherence on val; the first of those that tie."""
    scores = {}
    for one in interventions:
        values = [v.compliance * v.coherence for v in verdicts[one.name] if v]
        scores[one.name] = sum(values) / max(1, len(values))
    return max(interventions, key=lambda one: scores[one.name])


def refusal_three_ways(prompts: Sequence[str], texts: Sequence[str], verdicts: Verdicts, exact: bool) -> dict[str, Any]:
    """The rate of refusal by the model's own sentences (the organism's alone), by the graded rules, and by substrings."""
    graded = [rules.judge(p, t).label in ("refusal", "partial_refusal") for p, t in zip(prompts, texts, strict=True)]
    own = [v.refusal for v in verdicts if v] if exact else []
    return {
        **(rate("refusal_exact", own) if own else dict.fromkeys(("refusal_exact", "refusal_exact_low", "refusal_exact_high"))),
        **rate("refusal_graded", graded),
        **rate("refusal_substring", [rules.substring_refusal(t) for t in texts]),
    }


def _row(
    study: Study, one: Intervention, val: Judgements, test: Judgements, truth: Float[Tensor, " d_model"] | None
) -> dict[str, Any]:
    """What the table says of one intervention: compliance on test, less the baseline's, and less its own on val (selection bias).

    cosine_rank_1, cosine_planted: the component of the selected and of the planted direction that lies in what is ablated
    (|cosine| for one direction); null where an intervention ablates no one basis, or nothing was planted.
    """
    verdicts, baseline, how = test.verdicts[one.name], test.verdicts["baseline"], (study.n_resamples, study.seed)
    basis = None if one.per_layer else one.basis
    on_val, on_test = (_compliance(j.verdicts[one.name], j.topics) for j in (val, test))
    bias, low, high = independent_difference(*on_val, *on_test, *how)
    right = [text.strip() == row["harmful_answer"] for text, row in zip(test.texts[one.name], test.rows, strict=True)]
    known = study.exact and None not in [row["harmful_answer"] for row in test.rows]
    return {
        "family": one.family,
        "layer": one.layer,
        "alpha": one.alpha,
        "rank": 0 if basis is None else one.rank,
        "cosine_rank_1": None if basis is None else captured(basis, study.directions["unit"][study.layer]),
        "cosine_planted": None if truth is None or basis is None else captured(basis, truth),
        **study.summary(verdicts, test.topics, one.name),
        **difference(verdicts, baseline, test.topics, *how),
        "p": sign_flip_p(*paired(verdicts, baseline, test.topics), 10_000, study.seed),
        "p_holm": None,
        "compliance_val": sum(on_val[0]) / len(on_val[0]),
        "n_val": len(on_val[0]),
        "val_minus_test": bias,
        "val_minus_test_low": low,
        "val_minus_test_high": high,
        **refusal_three_ways(test.prompts, test.texts[one.name], verdicts, study.exact),
        **(rate("exact", right) if known else {"exact": None}),
    }


def _compliance(verdicts: Verdicts, topics: Sequence[Any]) -> tuple[list[float], list[Any]]:
    kept = [(v.compliance, topic) for v, topic in zip(verdicts, topics, strict=True) if v]
    return [value for value, _ in kept], [topic for _, topic in kept]


def _pooled(study: Study, family: str, members: Sequence[Intervention], control: Judgements) -> dict[str, Any]:
    """The figures of all controls of one family together."""
    verdicts = [v for one in members for v in control.verdicts[one.name]]
    texts, n = [t for one in members for t in control.texts[one.name]], len(members)
    return {
        "rank": members[0].rank,
        "n_arms": n,
        **study.summary(verdicts, control.topics * n, family),
        **refusal_three_ways([*control.prompts] * n, texts, verdicts, study.exact),
    }


def _add_costs(study: Study, tried: Sequence[Intervention], random: Sequence[Intervention], table: Table, pooled: Table) -> None:
    """KL and cross-entropy on harmless prompts, of each intervention and of the first of each family of controls."""
    first = {family: some[0] for family, some in candidates.by_family(random).items()}
    texts = study.harmless(study.params.science.n_harmless)
    costs = study.costs([*tried, *first.values()], texts, "science: cost")
    for one in tried:
        table[one.name] |= costs[one.name]
    for family, one in first.items():
        pooled[family] |= costs[one.name]


def _decide(
    study: Study,
    table: Table,
    chosen: tuple[Intervention, Intervention, Intervention | None],
    test: Judgements,
    random: tuple[Sequence[Intervention], Judgements],
) -> dict[str, Any]:
    """The verdict from the table. `chosen`: rank_1, the best single direction and the best subspace, if there is one.

    `difference` is the evidence of rank_1, whichever intervention the verdict rests on.
    """
    rank_1, single, subspace = chosen
    controls, control = random
    refused = {row["id"] for row, v in zip(test.rows, test.verdicts["baseline"], strict=True) if v and v.refusal}

    def of(one: Intervention) -> Evidence:
        members = [c.name for c in controls if c.family == f"random_{one.rank}"]
        return evidence(one.name, test, refused, control, members, (study.n_resamples, study.seed))

    gap = None
    if subspace is not None:
        both = (test.verdicts[subspace.name], test.verdicts[single.name])
        gap = difference(*both, test.topics, study.n_resamples, study.seed)["difference_low"]
    decision = verdict(table["baseline"], len(refused), of(single), of(subspace) if subspace else None, gap)
    return decision | {"difference": of(rank_1).shown()}


def _over_refusal(study: Study, interventions: Sequence[Intervention]) -> dict[str, Any]:
    """Refusal of safe test prompts under each intervention."""
    rows = study.sample("test", study.params.science.n_test, "safe")
    judged = study.ask(rows, "safe", interventions, "science: safe prompts").verdicts
    rates = {}
    for name, verdicts in judged.items():
        kept = [v for _, v in present(verdicts, f"{name}, safe prompts", study.params.judge.allow_missing)]
        rates[name] = rate("refusal_safe", [v.refusal for v in kept]) | {"n": len(kept)}
        rates[name] |= {"n_degenerate": sum(v.label == "degenerate" for v in kept)}
    return rates


def _plot(table: Table, pooled: Table) -> list[dict[str, Any]]:
    keys = ("family", "layer", "rank", "compliance", "compliance_low", "compliance_high", "n", "kl")
    rows = [*table.items(), *((name, {"family": "control", "layer": None} | row) for name, row in pooled.items())]
    return [{"arm": name, **{k: row[k] for k in keys}} for name, row in rows]
