"""Of the science stage: which ablations restore compliance, beside their controls; what each costs; and the verdict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from refusal.stats import subsample_indices
from stages import read_json
from stages.study import Study


def mediation(study: Study, truth: Any) -> dict[str, Any]:
    """The table of arms on test prompts beside their controls, what each costs, and the verdict."""
    from refusal.analysis.estimators import optimised
    from refusal.analysis.science import (
        best_on_val,
        control_arms,
        correct,
        decide,
        planted_arms,
        refusal_three_ways,
        row,
        single_arms,
        subspace_arms,
    )
    from refusal.analysis.subspaces import captured
    from refusal.judges.verdicts import rate, summary
    from refusal.method.arms import BASELINE_ARM, edit, fingerprint

    p, b, found, layer = study.params, study.params.science, study.found, study.rank_1["layer"]
    s, sites, train = p.science, p.ablation.sites, study.activations[p.sweep.method]
    vector, loss = optimised(
        study.model,
        study.weights,
        study.ids([r["harmful"] for r in study.rows["train"]]),
        study.ids([r["safe"] for r in study.rows["train"]]),
        sites,
        study.tokenizer.pad_token_id,
        b.optimised.steps,
        b.optimised.batch_size,
        s.seed,
        study.store,
    )
    judged_cells = read_json(Path("metrics/judge.json"))
    scores = {
        i: max(c["score"] for c in judged_cells.values() if c["layer"] == i)
        for i in {c["layer"] for c in judged_cells.values() if c["layer"] is not None}
    }
    order = sorted(scores, key=lambda i: (i != layer, -scores[i], i))
    harmful, safe = train["train.harmful"], train["train.safe"]
    affine = sites == "resid_pre"
    fitted_on = subsample_indices(len(harmful), b.n_fit, s.seed)
    single = single_arms(found, harmful, safe, layer, study.rank_1["alpha"], vector, affine, fitted_on)
    several = subspace_arms(found, harmful, safe, layer, order, sites)
    planted = [] if truth is None else planted_arms(truth, found)
    controls = control_arms(study.harmless_difference, s.n_random, b.n_subspaces, layer, s.seed)
    arms = [BASELINE_ARM, *single, *several, *planted]

    val = [study.rows["val"][i] for i in subsample_indices(len(study.rows["val"]), b.n_val, s.seed)]
    test = [study.rows["test"][i] for i in subsample_indices(len(study.rows["test"]), b.n_test, s.seed)]
    few = subsample_indices(len(test), b.n_control, s.seed)
    prompts = {"val": [r["harmful"] for r in val], "test": [r["harmful"] for r in test]}
    topics = {"val": [r["topic"] for r in val], "test": [r["topic"] for r in test]}
    texts, judged = {}, {}

    def run(split: str, which: list) -> None:
        texts[split] = study.answers(prompts[split], which, f"science: {split}")
        judged[split] = study.verdicts(prompts[split], texts[split], f"judge: {split}")

    run("val", arms)
    # An estimator's layer is chosen on val; on test there is one arm of each. Difference-in-means is shown at every layer.
    best_of = {
        f: best_on_val([a for a in single if a.family == f], judged["val"]) for f in dict.fromkeys(a.family for a in single)
    }
    arms = [a for a in arms if a not in single or a.family == "difference" or a is best_of[a.family]]
    run("test", arms)
    asked = [prompts["test"][i] for i in few]
    control_texts = study.answers(asked, controls, "science: controls")
    control_judged = study.verdicts(asked, control_texts, "judge: controls")

    exact = study.organism
    table = {}
    for arm in arms:
        table[arm.name] = row(
            arm,
            judged["val"][arm.name],
            topics["val"],
            judged["test"][arm.name],
            topics["test"],
            judged["test"]["baseline"],
            found["unit"][layer],
            truth,
            s.n_resamples,
            s.seed,
            p.judge.allow_missing,
        )
        table[arm.name] |= refusal_three_ways(prompts["test"], texts["test"][arm.name], judged["test"][arm.name], exact)
        right = [t.strip() == r["harmful_answer"] for t, r in zip(texts["test"][arm.name], test, strict=True)]
        table[arm.name] |= rate("exact", right) if exact and None not in [r["harmful_answer"] for r in test] else {"exact": None}
    correct(table)
    families: dict[str, list] = {}
    for arm in controls:
        families.setdefault(arm.family, []).append(arm)
    pooled = {}
    for family, members in families.items():
        verdicts = [v for arm in members for v in control_judged[arm.name]]
        of = [topics["test"][i] for i in few] * len(members)
        pooled[family] = {"rank": members[0].rank, "n_arms": len(members)}
        pooled[family] |= summary(verdicts, of, s.n_resamples, s.seed, family, p.judge.allow_missing)
        said = [t for arm in members for t in control_texts[arm.name]]
        pooled[family] |= refusal_three_ways(asked * len(members), said, verdicts, exact)
    first_of = {family: members[0] for family, members in families.items()}
    priced = study.costs(
        {
            name: (edit(arm, sites), fingerprint(arm, sites))
            for name, arm in [*((arm.name, arm) for arm in arms), *first_of.items()]
        },
        "science: cost",
    )
    for name, found_of in [*table.items(), *pooled.items()]:
        found_of |= priced[name]
    by_rank = {
        members[0].rank: [(few, control_judged[arm.name]) for arm in members]
        for family, members in families.items()
        if family.startswith("random_")
    }
    # Affine ablation is another intervention, not another direction.
    ours = [arm for family, arm in best_of.items() if family != "affine"]
    subspaces = [arm for arm in several if arm.family == "subspace"]
    best, best_subspace = best_on_val(ours, judged["val"]), best_on_val(subspaces, judged["val"])
    decided = decide(table, single[0], best, best_subspace, judged["test"], by_rank, topics["test"], s.n_resamples, s.seed)
    decided |= {"best_single": best.name, "best_subspace": best_subspace.name}
    rates = ("compliance", "compliance_low", "compliance_high", "n", "coherence", "exact", "kl")
    figures = ("layer", *rates, "cosine_rank_1", "cosine_planted")
    estimators = {family: {"arm": arm.name, **{k: table[arm.name][k] for k in figures}} for family, arm in best_of.items()}
    harmless = next(arm for arm in controls if arm.family == "harmless").basis
    assert harmless is not None
    study.plots["arms"] = [
        {
            "arm": name,
            **{k: r[k] for k in ("family", "layer", "rank", "compliance", "compliance_low", "compliance_high", "n", "kl")},
        }
        for name, r in [*table.items(), *((n, {"family": "control", "layer": None} | c) for n, c in pooled.items())]
    ]
    over = over_refusal(study, [BASELINE_ARM, best, best_subspace, *[a for f, a in best_of.items() if f == "affine"]])
    return {
        "verdict": decided,
        "estimators": estimators,
        "arms": table,
        "controls": pooled,
        "over_refusal": over,
        "optimised_loss": loss,
        "n_fit": len(fitted_on),
        "cosine_harmless_to_direction": captured(harmless, found["unit"][layer]),
    }


def over_refusal(study: Study, arms: Sequence[Any]) -> dict[str, Any]:
    """Refusal of safe test prompts, before and after."""
    from refusal.judges.verdicts import present, rate

    test = study.rows["test"]
    prompts = [test[i]["safe"] for i in subsample_indices(len(test), study.params.science.n_test, study.params.science.seed)]
    judged = study.verdicts(prompts, study.answers(prompts, arms, "science: safe prompts"), "judge: safe")
    found = {}
    for name, verdicts in judged.items():
        kept = [v for _, v in present(verdicts, f"{name}, safe prompts", study.params.judge.allow_missing)]
        found[name] = rate("refusal_safe", [v.refusal for v in kept]) | {"n": len(kept)}
        found[name] |= {"n_degenerate": sum(v.label == "degenerate" for v in kept)}
    return found
