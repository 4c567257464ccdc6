"""The selected direction on sets of prompts that nothing was chosen on: chosen on ours, tested on theirs."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from refusal.analysis.evaluation import run_time_arms
from refusal.analysis.study import Judgements, Study
from refusal.analysis.verdict import evidence
from refusal.data.held_out import HALVES, HeldOut
from refusal.io.errors import UserError
from refusal.judges.verdicts import behaves, difference
from refusal.judges.verdicts import row as verdict_row
from refusal.lm.load import LM, render_chats
from refusal.method.interventions import Intervention

Acting = Mapping[str, list[Intervention]]  # by arm


def generalize(study: Study, sets: Mapping[str, HeldOut]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(of every set its counts and a figure for each system prompt, a row for each completion).

    Arms: the baseline, rank_1 `ablated` at run time, and `random` directions at its alpha. A figure has each arm's rates,
    clustered by category or by prompt, the ablated arm's paired difference to the baseline, and the share of the baseline's
    refusals that it removes, less the random arm's (`verdict.evidence`).
    """
    g, found, rows = study.params.generalization, dict[str, Any](), list[dict[str, Any]]()
    lms = [replace(study.lm, system_prompt=text) for text in g.system_prompts]
    acting = _acting(study)
    for name, held_out in sets.items():
        figures = []
        for lm in lms:
            figure, asked = _figure(study, name, held_out, lm, acting)
            figures.append(figure)
            rows += [row for half, one in asked.items() for row in _rows(name, half, lm, one)]
        counts = {
            f"{count}{'_safe' * (half == 'safe')}": getattr(held_out, count)[half]
            for half in HALVES
            for count in ("n_read", "n_near_duplicates")
        }
        found[name] = counts | {"figures": figures}
    rank_1 = {"layer": study.layer, "alpha": study.rank_1["alpha"], "name": study.rank_1["name"]}
    return rank_1 | {"sets": found}, rows


def _acting(study: Study) -> Acting:
    g = study.params.generalization
    sweep = study.params.sweep.model_copy(update={"alphas": [study.rank_1["alpha"]], "n_random": g.n_random})
    arms, _ = run_time_arms(replace(study, params=study.params.model_copy(update={"sweep": sweep})))
    return {"baseline": arms["baseline"], "ablated": arms["runtime"], "random": arms["random"]}


def _figure(study: Study, name: str, held_out: HeldOut, lm: LM, acting: Acting) -> tuple[dict[str, Any], dict[str, Judgements]]:
    """What is said of a set under one system prompt, and what became of its prompts. `template` is the word `prompt` in the
    model's template: no sentence of a set is in the figures."""
    everything, asked = [one for some in acting.values() for one in some], dict[str, Judgements]()
    figure: dict[str, Any] = {"system_prompt": lm.system_prompt}
    try:
        figure["template"] = render_chats(lm.tokenizer, ["prompt"], lm.system_prompt)[0]
    except UserError as error:
        raise UserError(str(error).replace("model.system_prompt", "generalization.system_prompts")) from None
    figure |= {arm: {} for arm in acting}
    for half in HALVES:
        if not (rows := held_out.rows[half]):
            continue
        asked[half] = found = study.ask(rows, half, everything, f"{name}, {half}", lm=lm)
        arms = {arm: [found.verdicts[one.name] for one in some] for arm, some in acting.items()}
        for arm, rates in study.summaries(arms, found.topics, f", {half} prompts of {name}", safe=half == "safe").items():
            figure[arm] |= rates
        if half == "harmful":
            (ours,), (baseline,) = arms["ablated"], arms["baseline"]
            icc = max(figure[arm]["compliance_icc"] for arm in ("ablated", "baseline"))
            figure["ablated"] |= difference(ours, baseline, found.topics, icc)
            refused = {row["id"] for row, is_refused in zip(rows, behaves(baseline, half), strict=True) if is_refused}
            (ablated,), randoms = acting["ablated"], [one.name for one in acting["random"]]
            figure |= {"n_refused": len(refused), "evidence": evidence(ablated.name, found, refused, found, randoms).shown()}
    return figure, asked


def _rows(name: str, half: str, lm: LM, asked: Judgements) -> list[dict[str, Any]]:
    """What is kept of every completion."""
    return [
        {
            "set": name,
            "system_prompt": lm.system_prompt,
            "intervention": intervention,
            "half": half,
            **{key: row[key] for key in ("id", "category")},
            "prompt": row[half],
            "completion": text,
            **verdict_row(verdict),
        }
        for intervention, verdicts in asked.verdicts.items()
        for row, text, verdict in zip(asked.rows, asked.texts[intervention], verdicts, strict=True)
    ]
