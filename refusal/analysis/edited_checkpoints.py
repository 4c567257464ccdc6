"""Edited checkpoints as arms of a study, each beside the study's own arms on the same prompts, and beside what is claimed of it.

A checkpoint's intervals do not depend on which others are looked at: how far prompts of a topic agree is estimated over it and
the arms that `evaluate` has. Of the study's own rank_1 and random direction they are therefore those of `evaluate`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from refusal.analysis.evaluation import HALVES, Asked, ask_arms, completion_rows, rates_of_arms, run_time_arms
from refusal.analysis.harmless_kl import Texts, cost_figures, harmless_kl
from refusal.analysis.study import Judgements, Study
from refusal.analysis.verdict import evidence
from refusal.io.edits import Claims
from refusal.judges.verdicts import OF_HARMFUL, OF_SAFE, Judged, Verdicts, behaves
from refusal.lm.load import LM
from refusal.method.interventions import BASELINE
from refusal.stats import clustered_mean, paired_difference, wilson

OWN_ARMS = {"rank_1": "orthogonalized", "random": "random_weights"}  # what `evaluate` calls these
PAIRED: dict[str, dict[str, Callable[[Judged], float]]] = {
    "harmful": {name: OF_HARMFUL[name] for name in ("compliance", "coherence", "refusal")},
    "safe": OF_SAFE,
}
NOTE = "prompts and judge differ, and KL may (of first tokens, say): neither confirms nor refutes the other"


@dataclass(frozen=True)
class Beside:
    """What every checkpoint is put beside: the study's own arms on test prompts, and harmless texts with the base's
    cross-entropy on each."""

    asked: Asked
    texts: Texts
    entropies: list[float]


def beside(study: Study, own: Mapping[str, Callable[[], LM]]) -> Beside:
    """All arms of `evaluate`, and the texts. own: what loads `rank_1` and `random`, which are in memory one after another."""
    acting, _ = run_time_arms(study)
    asked = ask_arms(study, acting, {})
    for word, arm in OWN_ARMS.items():
        for half, found in ask_checkpoint(study, own[word](), arm).items():
            asked[half][arm] = [found]
    texts = study.harmless(study.params.evaluate.n_harmless)
    base = {"baseline": (study.lm, BASELINE)}
    entropies, _ = harmless_kl(study.lm, base, texts, study.decoding.batch_size, study.store, "cost: baseline")["baseline"]
    return Beside(asked, texts, entropies)


def ask_checkpoint(study: Study, lm: LM, name: str) -> dict[str, Judgements]:
    """What becomes of both halves of the test prompts."""
    return {half: study.ask(study.rows("test", half), half, [BASELINE], f"test, {name}, {half}", lm=lm) for half in HALVES}


def measure(study: Study, of: Beside, name: str, lm: LM) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(figures of a checkpoint, a row for each completion): the rates of `evaluate`, what each is less the base's, KL and
    cross-entropy, and the share of the base's refusals that comply, less that of random directions ablated at run time.

    `name` is `rank_1` or `random` for the study's own of that name, which are not asked again.
    """
    arm, asked = OWN_ARMS.get(name, f"checkpoint {name}"), of.asked
    if name not in OWN_ARMS:
        found = ask_checkpoint(study, lm, name)
        asked = {half: asked[half] | {arm: [found[half]]} for half in HALVES}
    rates, ours = rates_of_arms(study, asked), {half: asked[half][arm][0] for half in HALVES}
    figure = {key: value for key, value in rates[arm].items() if not key.startswith("difference") and key != "n_paired"}
    for half in HALVES:
        baseline = asked[half]["baseline"][0]
        for quantity, value in PAIRED[half].items():
            icc = max(rates[each][f"{quantity}_icc"] for each in (arm, "baseline"))
            figure |= _paired(quantity, value, (ours[half].the_only, baseline.the_only), baseline, icc)
    costs = harmless_kl(study.lm, {name: (lm, BASELINE)}, of.texts, study.decoding.batch_size, study.store, f"cost: {name}")[name]
    figure |= cost_figures([costs], of.texts.topics, study.n_resamples, study.seed)
    figure |= _entropy_difference(study, of, costs[0])
    rows = [row for half in HALVES for row in completion_rows({"checkpoint": name}, half, ours[half])]
    return figure | {"n_harmless": len(of.texts.topics), "evidence": _evidence(asked["harmful"], arm)}, rows


def _paired(
    name: str, of: Callable[[Judged], float], both: tuple[Verdicts, Verdicts], baseline: Judgements, icc: float
) -> dict[str, float | None]:
    """Mean of ours - the base's over the prompts with both verdicts, with its limits; None where no prompt has both."""
    items = [(of(a), of(b), topic) for a, b, topic in zip(*both, baseline.topics, strict=True) if a and b]
    three: tuple[float | None, ...] = (None, None, None)
    if items:
        first, second, topics = zip(*items, strict=True)
        three = paired_difference(first, second, topics, icc)
    return dict(zip((f"{name}_difference{end}" for end in ("", "_low", "_high")), three, strict=True))


def _entropy_difference(study: Study, of: Beside, entropies: list[float]) -> dict[str, float | None]:
    """Cross-entropy less the base's, paired by text."""
    if not of.texts.topics:
        return {"cross_entropy_difference": None}
    gaps = [a - b for a, b in zip(entropies, of.entropies, strict=True)]
    three = clustered_mean(gaps, of.texts.topics, study.n_resamples, study.seed)
    return dict(zip((f"cross_entropy_difference{end}" for end in ("", "_low", "_high")), three, strict=True))


def _evidence(asked: Mapping[str, list[Judgements]], arm: str) -> dict[str, Any]:
    """`verdict.evidence` of a checkpoint on the prompts that the base refuses, beside random directions at run time."""
    (baseline,), (ours,) = asked["baseline"], asked[arm]
    flags = behaves(baseline.the_only, "harmful")
    refused = {row["id"] for row, is_refused in zip(baseline.rows, flags, strict=True) if is_refused}
    drawn = {str(i): one.the_only for i, one in enumerate(asked["random"])}
    control = Judgements(baseline.rows, baseline.prompts, {}, drawn)
    test = Judgements(ours.rows, ours.prompts, {}, {arm: ours.the_only})
    shown = evidence(arm, test, refused, control, [*drawn]).shown()
    return {"n_refused": len(refused)} | {key: value for key, value in shown.items() if key != "name"}


def claimed(claims: Claims, figure: Mapping[str, Any]) -> dict[str, Any]:
    """What is claimed of a checkpoint beside what was measured of it. A claim's refusals have Wilson's interval, of so many
    independent prompts, since it says nothing of their topics."""
    told: dict[str, Any] = {"source": claims.source, "note": NOTE, "refusals": None, "kl": None}
    if claims.refusals is not None:
        n_refused, n = claims.refusals
        low, high = wilson(n_refused, n)
        theirs = {"claimed": n_refused / n, "claimed_low": low, "claimed_high": high, "claimed_n": n}
        told["refusals"] = theirs | _measured(figure, "refusal_harmful", "n")
    if claims.kl is not None:
        told["kl"] = {"claimed": claims.kl} | _measured(figure, "kl", "n_harmless")
    return told


def _measured(figure: Mapping[str, Any], key: str, n: str) -> dict[str, Any]:
    return {f"measured{end}": figure.get(f"{key}{end}") for end in ("", "_low", "_high")} | {"measured_n": figure[n]}


def scalars(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """The few figures of a checkpoint that tell variants apart: mean alpha, the greatest |cosine| with a layer's direction of the
    study, compliance, full answers to safe prompts, and KL. The first two are None without an edit."""
    alpha, behaviour = figures["anatomy"]["alpha"], figures["behaviour"]
    return {
        "alpha": alpha and alpha["mean"],
        "cosine": max((c for c in figures["cosines"]["cosine"] if c is not None), default=None),
        **{key: behaviour[key] for key in ("compliance", "answers_safe", "kl")},
    }
