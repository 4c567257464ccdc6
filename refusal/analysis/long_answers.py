"""The headline arms on test prompts with room for a whole answer, beside the short answers that every other figure is of.

Decoding is greedy, so a short answer is where the long one begins, and compliance of an answer that the limit cuts is the absence
of a refusal up to there. An answer that ended by itself is both: only those that were cut are decoded anew.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from refusal.analysis.evaluation import run_time_arms
from refusal.analysis.study import Judgements, Study
from refusal.io.errors import UserError
from refusal.io.params import LongAnswers
from refusal.io.prompts import Rows
from refusal.judges.verdicts import OF_HARMFUL, Judged, by_prompt
from refusal.judges.verdicts import row as verdict_row
from refusal.lm.load import LM
from refusal.method.interventions import BASELINE, Intervention
from refusal.stats import paired_difference, subsample_indices

ARMS = ("baseline", "runtime", "orthogonalized", "random")
LIMITS = ("short", "long")
LABELS = ("compliance", "partial_refusal", "refusal")  # from full compliance to none
QUANTITIES = ("compliance", "refusal", "coherence")
Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True)
class _Answers:
    """What one intervention made of the prompts, by limit: token ids, and texts with verdicts."""

    tokens: Mapping[str, Tokens]
    judged: Mapping[str, Judgements]

    @property
    def pairs(self) -> list[tuple[Judged, Judged] | None]:
        """The verdicts on the short and on the long answer to each prompt; None where one of them is missing."""
        both = zip(*(self.judged[limit].the_only for limit in LIMITS), strict=True)
        return [(short, long) if short and long else None for short, long in both]


def long_answers(study: Study, edited: LM, section: LongAnswers) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(metrics, a row for each answer at each limit) of prompts drawn by `section.seed`; `edited` has rank_1 in its weights.

    Raises UserError where too few verdicts came (`verdicts.present`), or an arm has no prompt with a verdict on both answers.
    """
    rows = study.rows("test", "harmful")
    some = subsample_indices(len(rows), section.n, section.seed)
    acting, _ = run_time_arms(study)
    # Asked for as `evaluate` does, all prompts and interventions at once: so they are in the store.
    found = study.completions(rows, "harmful", [one for of in acting.values() for one in of], "test, harmful")
    by_edited = study.completions(rows, "harmful", [BASELINE], "test, orthogonalized, harmful", lm=edited)
    asked = {arm: [(study.lm, one, found[one.name]) for one in acting.get(arm, [])] for arm in ARMS}
    asked["orthogonalized"] = [(edited, BASELINE, by_edited[BASELINE.name])]
    asked["random"] = asked["random"][: section.n_random]

    generation = study.params.generation.model_copy(update={"max_new_tokens": section.max_new_tokens})
    studies = {"short": study, "long": replace(study, params=study.params.model_copy(update={"generation": generation}))}
    kept = [rows[i] for i in some]
    arms = {
        arm: [_answers(studies, kept, arm, (lm, one), [tokens[i] for i in some]) for lm, one, tokens in of]
        for arm, of in asked.items()
    }
    limits = {limit: of.decoding.max_new_tokens for limit, of in studies.items()}
    figures = {"n": len(some), "max_new_tokens": limits, "arms": _figures(study, arms, limits)}
    return figures, [row for arm, members in arms.items() for i, answers in enumerate(members) for row in _rows(arm, i, answers)]


def _answers(
    studies: Mapping[str, Study], rows: Rows, arm: str, asked: tuple[LM, Intervention], short: list[list[int]]
) -> _Answers:
    """Both answers to every prompt, judged: the long one is the short one where that had ended."""
    lm, one = asked
    long, limit = list(short), studies["short"].decoding.max_new_tokens
    if cut := [i for i, tokens in enumerate(short) if len(tokens) == limit]:
        decoded = studies["long"].completions([rows[i] for i in cut], "harmful", [one], f"long answers: {arm}", lm=lm)
        for i, tokens in zip(cut, decoded[one.name], strict=True):
            long[i] = tokens
    both: dict[str, Tokens] = {"short": short, "long": long}
    judged = {which: of.judged(rows, "harmful", {arm: both[which]}, f"{which} answers", lm) for which, of in studies.items()}
    return _Answers(both, judged)


def _figures(study: Study, arms: Mapping[str, Sequence[_Answers]], limits: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Of every arm the rates at either limit, their paired differences, and how verdicts changed, over all its interventions.

    `verdicts` is {label of the short answer: {of the long one: n}}, where each complies, does in part, or refuses: what complies
    less later on lies above its diagonal (`n_then_declines`), what complies more below (`n_then_complies`). `n_loops`: degenerate
    in the long answer alone. `n_cut`: no end within the limit. `n_prefix`: the long answer begins as the short one.
    """
    topics = arms["baseline"][0].judged["short"].topics
    rates = {
        limit: study.summaries(
            {arm: [one.judged[limit].the_only for one in members] for arm, members in arms.items()}, topics, f", {limit} answers"
        )
        for limit in LIMITS
    }
    figures = {}
    for arm, members in arms.items():
        told: dict[str, Any] = {
            limit: rates[limit][arm]
            | {"n_cut": sum(len(tokens) == limits[limit] for one in members for tokens in one.tokens[limit])}
            for limit in LIMITS
        }
        for name in QUANTITIES:
            icc = max(rates[limit][arm][f"{name}_icc"] for limit in LIMITS)
            told |= _difference(name, [one.pairs for one in members], topics, icc, arm)
        changes = Counter((a.label, b.label) for one in members for a, b in filter(None, one.pairs))
        figures[arm] = told | {
            "verdicts": {a: {b: changes[a, b] for b in LABELS} for a in LABELS},
            "n_then_declines": sum(changes[a, b] for i, a in enumerate(LABELS) for b in LABELS[i + 1 :]),
            "n_then_complies": sum(changes[a, b] for i, a in enumerate(LABELS) for b in LABELS[:i]),
            "n_loops": sum(n for (a, b), n in changes.items() if a != "degenerate" and b == "degenerate"),
            "n_prefix": sum(
                long[: len(short)] == short
                for one in members
                for short, long in zip(one.tokens["short"], one.tokens["long"], strict=True)
            ),
        }
    return figures


def _difference(
    name: str, members: Sequence[Sequence[tuple[Judged, Judged] | None]], topics: Sequence[Hashable], icc: float, arm: str
) -> dict[str, float | int]:
    """Mean of long - short in a quantity over the prompts with both verdicts, paired, with its limits."""
    of = OF_HARMFUL[name]
    short, clusters = by_prompt([[pair and of(pair[0]) for pair in pairs] for pairs in members], topics)
    long, _ = by_prompt([[pair and of(pair[1]) for pair in pairs] for pairs in members], topics)
    if not clusters:
        raise UserError(f"{arm}: no prompt has a verdict on its short and on its long answer; run again, or choose another judge")
    value, low, high = paired_difference(long, short, clusters, icc)
    return {f"{name}_difference": value, f"{name}_difference_low": low, f"{name}_difference_high": high, "n_paired": len(short)}


def _rows(arm: str, member: int, answers: _Answers) -> list[dict[str, Any]]:
    """What is kept of every answer."""
    return [
        {
            "arm": arm,
            "member": member,
            "id": row["id"],
            "limit": limit,
            "n_tokens": len(tokens),
            "prompt": prompt,
            "completion": text,
            **verdict_row(verdict),
        }
        for limit, a in answers.judged.items()
        for row, tokens, prompt, text, verdict in zip(
            a.rows, answers.tokens[limit], a.prompts, a.the_only_texts, a.the_only, strict=True
        )
    ]
