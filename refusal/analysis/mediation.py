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
from refusal.analysis.study import Judgements, Study, topics_of
from refusal.analysis.subspaces import captured
from refusal.analysis.verdict import Evidence, evidence, verdict
from refusal.judges import rules
from refusal.judges.verdicts import (
    COUNTS,
    OF_HARMFUL,
    Arm,
    Flags,
    Verdicts,
    by_prompt,
    difference,
    paired,
    present,
    rates,
    values,
)
from refusal.method.interventions import BASELINE, Intervention
from refusal.stats import holm, independent_difference, intraclass_correlations, sign_flip_p, subsample_indices

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
    missing = study.params.judge.allow_missing
    best = {family: best_on_val(some, val.verdicts, missing) for family, some in candidates.by_family(single).items()}
    tried = [one for one in tried if one not in single or one.family == "difference" or one is best[one.family]]
    rows = study.sample("test", s.n_test)
    test = study.ask(rows, "harmful", tried, "science: test")
    few = [rows[i] for i in subsample_indices(len(rows), s.n_control, study.seed)]
    control = study.ask(few, "harmful", random, "science: controls")

    table = _table(study, tried, val, test, truth)
    families = candidates.by_family(random)
    pooled = _pooled(study, families, control)
    texts = study.harmless(s.n_harmless)
    costs = study.costs({**{one.name: [one] for one in tried}, **families}, texts, "science: cost")
    for name, row in (table | pooled).items():
        row |= costs[name]

    # Affine ablation is another intervention, not another direction.
    best_single = best_on_val([one for family, one in best.items() if family != "affine"], val.verdicts, missing)
    ranked = [one for one in several if one.family == "subspace"]
    best_subspace = best_on_val(ranked, val.verdicts, missing) if ranked else None
    rank_1 = next(one for one in tried if one.name == "rank_1")
    decision = _decide(table, (rank_1, best_single, best_subspace), test, (random, control))
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
        "cosine_harmless_to_direction": float(study.harmless_difference["unit"][study.layer].double() @ unit.double()),
    }, _plot(table, pooled)


def _optimised(study: Study) -> tuple[Float[Tensor, " d_model"], float]:
    """The direction found by gradient on the train pairs, and its loss."""
    train, s = study.pairs["train"], study.params.science
    harmful, safe = (study.lm.encode([row[half] for row in train], study.decoding.max_new_tokens) for half in ("harmful", "safe"))
    return optimised(study.lm, harmful, safe, study.sites, s.optimised, study.seed, study.store)


def best_on_val(
    interventions: Sequence[Intervention], verdicts: Mapping[str, Verdicts], allow_missing: bool = False
) -> Intervention:
    """The one with the best mean compliance x coherence on val; the first of those that tie.

    Raises UserError as `verdicts.present` does: one verdict of forty is no figure to choose by.
    """
    scores = {}
    for one in interventions:
        kept = present(verdicts[one.name], f"{one.name} on val", allow_missing)
        scores[one.name] = sum(v.compliance * v.coherence for _, v in kept) / len(kept)
    return max(interventions, key=lambda one: scores[one.name])


def refusal_three_ways(prompts: Sequence[str], texts: Sequence[str], verdicts: Verdicts, exact: bool) -> dict[str, Flags]:
    """Whether each completion refuses: by the model's own sentences (`exact`, the organism's alone), by the graded rules, and by
    substrings."""
    graded = [rules.judge(p, t).label in ("refusal", "partial_refusal") for p, t in zip(prompts, texts, strict=True)]
    own: Flags = values(verdicts, OF_HARMFUL["refusal"]) if exact else [None] * len(texts)
    return {
        "refusal_exact": own,
        "refusal_graded": graded,
        "refusal_substring": [rules.substring_refusal(t) for t in texts],
    }


def refusal_rates(study: Study, arms: Mapping[Arm, Sequence[Judgements]]) -> dict[Arm, dict[str, Any]]:
    """The rates of `refusal_three_ways` of every arm, each of whose members was asked under one intervention."""
    said = {
        arm: [refusal_three_ways(one.prompts, one.the_only_texts, one.the_only, study.exact) for one in members]
        for arm, members in arms.items()
    }
    figures: dict[Arm, dict[str, Any]] = {arm: {} for arm in arms}
    for key in ("refusal_exact", "refusal_graded", "refusal_substring"):
        if key == "refusal_exact" and not study.exact:
            found: Mapping[Arm, Mapping[str, Any]] = {
                arm: dict.fromkeys(f"{key}{end}" for end in ("", "_low", "_high", "_icc")) for arm in arms
            }
        else:
            found = rates(key, {arm: [one[key] for one in members] for arm, members in said.items()}, topics_of(arms))
        figures = {arm: {**figures[arm], **found[arm]} for arm in arms}
    return figures


def _table(
    study: Study,
    tried: Sequence[Intervention],
    val: Judgements,
    test: Judgements,
    truth: Float[Tensor, " d_model"] | None,
) -> Table:
    """What is said of each intervention: its rates on test, less the baseline's, and less its own on val (selection bias).

    cosine_rank_1, cosine_planted: the component of the selected and of the planted direction that lies in what is ablated
    (|cosine| for one direction); null where an intervention ablates no one basis, or nothing was planted.
    """
    names = [one.name for one in tried]
    arms = {name: [test.only(name)] for name in names}
    table = study.summaries({name: [test.verdicts[name]] for name in names}, test.topics, " on test")
    refusals, exact = refusal_rates(study, arms), study.exact_rates(arms, "harmful")
    on_val, on_test = ({name: _compliance(j, name) for name in names} for j in (val, test))
    iccs = dict(zip(names, intraclass_correlations([*on_val.values()]), strict=True))
    rank_1 = study.directions["unit"][study.layer]
    for one in tried:
        row, basis = table[one.name], None if one.per_layer else one.basis
        bias, low, high = independent_difference((*on_val[one.name], iccs[one.name]), (*on_test[one.name], row["compliance_icc"]))
        icc = max(row["compliance_icc"], table["baseline"]["compliance_icc"])
        ours, theirs = test.verdicts[one.name], test.verdicts["baseline"]
        *both, topics = paired(ours, theirs, test.topics)
        row |= {
            "family": one.family,
            "layer": one.layer,
            "alpha": one.alpha,
            "rank": 0 if basis is None else one.rank,
            "cosine_rank_1": None if basis is None else captured(basis, rank_1),
            "cosine_planted": None if truth is None or basis is None else captured(basis, truth),
            **difference(ours, theirs, test.topics, icc),
            "p": sign_flip_p([a - b for a, b in zip(*both, strict=True)], topics, 10_000, study.seed),
            "compliance_val": sum(on_val[one.name][0]) / len(on_val[one.name][0]),
            "n_val": len(on_val[one.name][0]),
            "val_minus_test": bias,
            "val_minus_test_low": low,
            "val_minus_test_high": high,
            **refusals[one.name],
            **exact[one.name],
        }
    for name, p in holm({name: row["p"] for name, row in table.items()}).items():
        table[name]["p_holm"] = p
    return table


def _compliance(asked: Judgements, name: str) -> tuple[list[float], list[Any]]:
    return by_prompt([values(asked.verdicts[name], OF_HARMFUL["compliance"])], asked.topics)


def _pooled(study: Study, families: Mapping[str, Sequence[Intervention]], control: Judgements) -> Table:
    """The figures of all controls of each family together."""
    arms = {family: [control.verdicts[one.name] for one in members] for family, members in families.items()}
    table = study.summaries(arms, control.topics, ", controls")
    refusals = refusal_rates(study, {family: [control.only(one.name) for one in members] for family, members in families.items()})
    rank = {family: 0 if members[0].per_layer else members[0].rank for family, members in families.items()}
    return {family: {"rank": rank[family]} | table[family] | refusals[family] for family, members in families.items()}


def _decide(
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
        members = [c.name for c in controls if c.family == candidates.control_of(one)]
        return evidence(one.name, test, refused, control, members)

    gap = None
    if subspace is not None:
        icc = max(table[one.name]["compliance_icc"] for one in (subspace, single))
        gap = difference(test.verdicts[subspace.name], test.verdicts[single.name], test.topics, icc)["difference_low"]
    decision = verdict(table["baseline"], len(refused), of(single), of(subspace) if subspace else None, gap)
    return decision | {"difference": of(rank_1).shown()}


def _over_refusal(study: Study, interventions: Sequence[Intervention]) -> dict[str, Any]:
    """Answers to safe test prompts, and refusal of them, under each intervention."""
    rows = study.sample("test", study.params.science.n_test, "safe")
    judged = study.ask(rows, "safe", interventions, "science: safe prompts")
    return study.summaries({name: [v] for name, v in judged.verdicts.items()}, judged.topics, ", safe prompts", safe=True)


def _plot(table: Table, pooled: Table) -> list[dict[str, Any]]:
    keys = ("family", "layer", "rank", "compliance", "compliance_low", "compliance_high", *COUNTS, "kl")
    rows = [*table.items(), *((name, {"family": "control", "layer": None} | row) for name, row in pooled.items())]
    return [{"arm": name, **{k: row[k] for k in keys}} for name, row in rows]
