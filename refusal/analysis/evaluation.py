"""The selected direction on test prompts, at run time and as edited weights, compared with the baseline and the controls."""

from collections.abc import Mapping, Sequence
from typing import Any

from refusal.analysis.harmless_kl import Costs, Texts, cost_figures, harmless_kl
from refusal.analysis.study import Judgements, Study
from refusal.judges.verdicts import difference, present, rate
from refusal.judges.verdicts import row as verdict_row
from refusal.lm.architecture import architecture_of
from refusal.lm.load import LM
from refusal.method.interventions import BASELINE, Addition, Intervention
from refusal.method.sweep import grid

CONTROLS = ("random", "harmless")


def evaluate(study: Study, edited: LM) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """(metrics, a row for each completion, cost at every alpha of the selected layer); `edited` is the orthogonalized checkpoint.

    On test prompts, of which nothing was chosen.
    """
    swept = grid(
        study.directions,
        study.harmless_difference,
        study.params.sweep.model_copy(update={"layers": [study.layer]}),
        study.params.ablation,
    )
    at_layer = [one for one in swept if one.layer == study.layer]
    runtime = next(one for one in at_layer if one.alpha == study.rank_1["alpha"])
    controls = {kind: [one for one in swept if one.name.startswith(f"{kind}_")] for kind in CONTROLS}
    members = {"baseline": [BASELINE], "runtime": [runtime], **{kind: some for kind, some in controls.items() if some}}

    test = {half: study.rows("test", half) for half in ("harmful", "safe")}
    acting = [one for some in members.values() for one in some]
    asked = {half: study.ask(rows, half, acting, f"test, {half}") for half, rows in test.items()}
    by_weights = {half: study.ask(rows, half, [BASELINE], f"test, weights, {half}", lm=edited) for half, rows in test.items()}
    metrics: dict[str, Any] = {"layer": study.layer, "alpha": runtime.alpha, "name": study.rank_1["name"]}
    rows: list[dict[str, Any]] = []
    for name, some in members.items():
        metrics[name] = _behaviour(study, name, [one.name for one in some], asked)
        if name not in CONTROLS:
            rows += _rows(name, some[0].name, asked)
    metrics["orthogonalized"] = _behaviour(study, "orthogonalized", ["baseline"], by_weights)
    rows += _rows("orthogonalized", "baseline", by_weights)
    metrics["addition"] = _addition(study)
    baseline = asked["harmful"].verdicts["baseline"]
    for name, verdicts in (
        ("runtime", asked["harmful"].verdicts[runtime.name]),
        ("orthogonalized", by_weights["harmful"].verdicts["baseline"]),
    ):
        metrics[name] |= difference(verdicts, baseline, asked["harmful"].topics, study.n_resamples, study.seed)

    texts = study.harmless(None)
    costs = _costs(study, swept, edited, texts)
    metrics["n_harmless"] = len(texts.topics)
    for name, some in (*members.items(), ("orthogonalized", [])):
        metrics[name] |= _figures(study, [costs[one] for one in ([s.name for s in some] or ["orthogonalized"])], texts)
    metrics["identity"] = _identity(study, edited, texts)
    curve = [
        {"layer": study.layer, "alpha": one.alpha, **_figures(study, [costs[one.name]], texts)} for one in (BASELINE, *at_layer)
    ]
    return metrics, rows, sorted(curve, key=lambda row: row["alpha"])


def _behaviour(study: Study, name: str, members: Sequence[str], asked: Mapping[str, Judgements]) -> dict[str, Any]:
    """Rates over the completions of all members: of harmful prompts, and refusal of safe ones."""
    harmful, safe = ([verdict for one in members for verdict in asked[half].verdicts[one]] for half in ("harmful", "safe"))
    figures = study.summary(harmful, asked["harmful"].topics * len(members), f"{name}, harmful prompts")
    figures |= {f"refusal_harmful{end}": figures[f"refusal{end}"] for end in ("", "_low", "_high")}
    kept = present(safe, f"{name}, safe prompts", study.params.judge.allow_missing)
    figures |= rate("refusal_safe", [verdict.refusal for _, verdict in kept]) | {"n_safe": len(kept)}
    expected = [row.get(f"{half}_answer") for half in ("harmful", "safe") for row in asked[half].rows]
    for key, half in (("exact", "harmful"), ("exact_safe", "safe")):
        right = [
            text.strip() == row.get(f"{half}_answer")
            for one in members
            for text, row in zip(asked[half].texts[one], asked[half].rows, strict=True)
        ]
        figures |= rate(key, right) if study.exact and None not in expected else {key: None}
    return figures


def _rows(name: str, member: str, asked: Mapping[str, Judgements]) -> list[dict[str, Any]]:
    """What is kept of every completion."""
    return [
        {
            "arm": name,
            "id": row["id"],
            "category": row.get("category"),
            "half": half,
            "prompt": prompt,
            "completion": text,
            **verdict_row(verdict),
        }
        for half, a in asked.items()
        for row, prompt, text, verdict in zip(a.rows, a.prompts, a.texts[member], a.verdicts[member], strict=True)
    ]


def _addition(study: Study) -> dict[str, Any]:
    """Refusal of safe prompts with the raw difference added at the whole prompt."""
    addition = Addition(study.directions["difference"][study.layer], study.layer)
    judged = study.ask(study.rows("test", "safe"), "safe", [BASELINE], "test, addition", addition).verdicts["baseline"]
    kept = [verdict for _, verdict in present(judged, "addition, safe prompts", study.params.judge.allow_missing)]
    return {
        **rate("refusal_safe", [verdict.refusal for verdict in kept]),
        "n": len(kept),
        "n_missing": len(judged) - len(kept),
        "n_degenerate": sum(verdict.label == "degenerate" for verdict in kept),
    }


def _costs(study: Study, swept: Sequence[Intervention], edited: LM, texts: Texts) -> Costs:
    """KL and cross-entropy of all that was swept at the layer, and of the edited checkpoint."""
    models = {one.name: (study.lm, one) for one in swept} | {"orthogonalized": (edited, BASELINE)}
    return harmless_kl(study.lm, models, texts, study.decoding.batch_size, study.store, "cost")


def _figures(study: Study, costs: Sequence[tuple[list[float], list[float]]], texts: Texts) -> dict[str, float | None]:
    return cost_figures(costs, texts.topics, study.n_resamples, study.seed)


def _identity(study: Study, edited: LM, texts: Texts) -> dict[str, Any]:
    """KL from the edited checkpoint to run-time ablation at `writes`: none where no norm stands between writer and stream."""
    identity = {"norm_after_writer": architecture_of(study.lm.model.config).norm_after_writer, "kl": None}
    if not study.params.orthogonalize.include_embedding:
        return identity
    v, alpha = study.directions["unit"][study.layer], study.rank_1["alpha"]
    writes = {"writes": (study.lm, Intervention("writes", v, alpha, "writes", layer=study.layer))}
    costs = harmless_kl(edited, writes, texts, study.decoding.batch_size, study.store, "cost: identity")
    return identity | _figures(study, [costs["writes"]], texts)
