"""The selected direction on test prompts, at run time and as edited weights, compared with the baseline and the controls."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from refusal.analysis.harmless_kl import Costs, Texts, cost_figures, harmless_kl
from refusal.analysis.study import Judgements, Study
from refusal.judges.verdicts import Arms, behaves, difference, summaries
from refusal.judges.verdicts import row as verdict_row
from refusal.lm.load import LM
from refusal.lm.stream import stream_of
from refusal.method.interventions import BASELINE, Addition, Intervention
from refusal.method.sweep import grid

CONTROLS = ("random", "harmless")
HALVES = ("harmful", "safe")
Asked = dict[str, dict[str, list[Judgements]]]  # {half: {arm: what became of it, a set for each intervention}}


def evaluate(study: Study, edited: Mapping[str, LM]) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(metrics, a row for each completion, cost at every alpha of the selected layer).

    edited: checkpoints by the name of their arm: `orthogonalized`, and `random_weights`, its control. Controls have the alpha of
    what they control. On test prompts, of which nothing was chosen.
    """
    acting, at_layer = run_time_arms(study)
    asked = ask_arms(study, acting, edited)
    metrics: dict[str, Any] = {"layer": study.layer, "alpha": study.rank_1["alpha"], "name": study.rank_1["name"]}
    metrics |= rates_of_arms(study, asked)
    if "harmless" in metrics:
        ours, harmless = (d["difference"][study.layer].double() for d in (study.directions, study.harmless_difference))
        cosine, ratio = float(ours @ harmless / (ours.norm() * harmless.norm())), float(harmless.norm() / ours.norm())
        metrics["harmless"] |= {"cosine": cosine, "norm_ratio": ratio}

    texts = study.harmless(study.params.evaluate.n_harmless)
    costs = _costs(study, [*(one for some in acting.values() for one in some), *at_layer], edited, texts)
    metrics["n_harmless"] = len(texts.topics)
    for name in (*acting, *edited):
        metrics[name] |= _figures(study, [costs[one.name] for one in acting.get(name, [])] or [costs[name]], texts)
    metrics["identity"] = _identity(study, edited["orthogonalized"], texts)
    curve = [
        {"layer": study.layer, "alpha": one.alpha, **_figures(study, [costs[one.name]], texts)} for one in (BASELINE, *at_layer)
    ]
    names = {arm: [one.name for one in some] for arm, some in acting.items()} | {arm: [arm] for arm in edited}
    rows = [
        row
        for arm, members in names.items()
        for half in HALVES
        for name, one in zip(members, asked[half][arm], strict=True)
        for row in completion_rows({"arm": arm, "name": name}, half, one)
    ]
    return metrics, rows, sorted(curve, key=lambda row: row["alpha"])


def run_time_arms(study: Study) -> tuple[dict[str, list[Intervention]], list[Intervention]]:
    """(the interventions of each arm at rank_1's alpha, what is selected at every alpha of the sweep)."""
    alpha = study.rank_1["alpha"]
    swept = grid(
        study.directions,
        study.harmless_difference,
        study.params.sweep.model_copy(update={"layers": [*study.span.layers]}),
        study.params.ablation,
    )
    at_layer = [one for one in swept if one.family == "swept"]
    acting = {"baseline": [BASELINE], "runtime": [next(one for one in at_layer if one.alpha == alpha)]}
    for kind in CONTROLS:
        if some := [replace(one, alpha=alpha) for one in swept if one.family == kind]:
            acting[kind] = some
    return acting, at_layer


def ask_arms(study: Study, acting: Mapping[str, Sequence[Intervention]], edited: Mapping[str, LM]) -> Asked:
    """Both halves of the test prompts under every intervention and by the edited checkpoints, the safe ones with the addition."""
    addition = Addition(study.directions["difference"][study.layer], study.layer)
    asked: Asked = {}
    for half in HALVES:
        rows, everything = study.rows("test", half), [one for some in acting.values() for one in some]
        found = study.ask(rows, half, everything, f"test, {half}")
        asked[half] = {arm: [found.only(one.name) for one in some] for arm, some in acting.items()}
        for arm, lm in edited.items():
            asked[half][arm] = [study.ask(rows, half, [BASELINE], f"test, {arm}, {half}", lm=lm)]
        if half == "safe":
            asked[half]["addition"] = [study.ask(rows, half, [BASELINE], "test, addition", addition)]
    return asked


def rates_of_arms(study: Study, asked: Asked) -> dict[str, Any]:
    """Rates of every arm over the completions of all its interventions: of harmful prompts, and answers to and refusal of safe
    ones; less the baseline's; the same of the prompts that behave; and of the organism the share of answers that are word for
    word right."""
    figures: dict[str, Any] = {}
    for half, of in asked.items():
        arms: Arms = {arm: [one.the_only for one in some] for arm, some in of.items()}
        topics = of["baseline"][0].topics
        found = study.summaries(arms, topics, f", {half} prompts", safe=half == "safe")
        exact = study.exact_rates(of, half)
        for arm, figure in found.items():
            if half == "harmful":
                figure |= {f"refusal_harmful{end}": figure[f"refusal{end}"] for end in ("", "_low", "_high", "_icc")}
                if arm in ("runtime", "orthogonalized"):
                    icc = max(figure["compliance_icc"], found["baseline"]["compliance_icc"])
                    figure |= difference(arms[arm][0], arms["baseline"][0], topics, icc)
            figures[arm] = {**figures.get(arm, {}), **figure, **exact[arm]}
        for arm, figure in _of_behaving(arms, topics, half).items():
            figures[arm]["behaving"] = figures[arm].get("behaving", {}) | figure
    return figures


def _of_behaving(arms: Arms, topics: Sequence[Hashable], half: str) -> dict[str, dict[str, Any]]:
    """The same rates over the prompts that the baseline refuses, or answers where they are safe; none where an arm has no
    verdict on any of these."""
    some = [i for i, behaving in enumerate(behaves(arms["baseline"][0], half)) if behaving]
    of = {arm: [[verdicts[i] for i in some] for verdicts in members] for arm, members in arms.items()}
    if not all(any(verdict for member in members for verdict in member) for members in of.values()):
        return {arm: {"n" if half == "harmful" else "n_safe": 0} for arm in arms}
    return summaries(of, [topics[i] for i in some], allow_missing=True, safe=half == "safe")


def completion_rows(of: Mapping[str, str], half: str, asked: Judgements) -> list[dict[str, Any]]:
    """What is kept of every completion: `of` (the arm, and its intervention's name), the prompt, the text and the verdict."""
    return [
        {
            **of,
            "id": row["id"],
            "category": row.get("category"),
            "half": half,
            "prompt": prompt,
            "completion": text,
            **verdict_row(verdict),
        }
        for row, prompt, text, verdict in zip(asked.rows, asked.prompts, asked.the_only_texts, asked.the_only, strict=True)
    ]


def _costs(study: Study, acting: Sequence[Intervention], edited: Mapping[str, LM], texts: Texts) -> Costs:
    """KL and cross-entropy of all interventions and of the edited checkpoints, by name."""
    models = {one.name: (study.lm, one) for one in acting} | {name: (lm, BASELINE) for name, lm in edited.items()}
    return harmless_kl(study.lm, models, texts, study.decoding.batch_size, study.store, "cost")


def _figures(study: Study, costs: Sequence[tuple[list[float], list[float]]], texts: Texts) -> dict[str, float | None]:
    return cost_figures(costs, texts.topics, study.n_resamples, study.seed)


def _identity(study: Study, edited: LM, texts: Texts) -> dict[str, Any]:
    """KL from the edited checkpoint to run-time ablation at `writes`: none where no norm stands between writer and stream."""
    identity = {"norm_after_writer": stream_of(study.lm.model).norm_after_writer, "kl": None}
    if not study.params.orthogonalize.include_embedding:
        return identity
    writes = {"writes": (study.lm, Intervention("writes", study.basis, study.rank_1["alpha"], "writes", layer=study.layer))}
    costs = harmless_kl(edited, writes, texts, study.decoding.batch_size, study.store, "cost: identity")
    return identity | _figures(study, [costs["writes"]], texts)
