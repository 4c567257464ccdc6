"""Which judge, and how far judges of the same completions agree."""

import hashlib
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from refusal.io import params
from refusal.io.store import Store
from refusal.judges.llm import LLMJudge
from refusal.judges.rubrics import TEXTS
from refusal.judges.verdicts import Judged, judge_all
from refusal.stats import cohens_kappa, spearman

AGREEMENT = ("kappa", "spearman_compliance", "spearman_coherence", "n", "n_coherence", "n_missing", "n_empty", "n_degenerate")


class Judge(Protocol):
    """Verdicts on completions in their order, None where it gave none.

    `label` is for its progress bar; `exact` as in `verdicts.judge_all`.
    """

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], label: str, exact: bool = False
    ) -> list[Judged | None]: ...


def by_rules(prompts: Sequence[str], completions: Sequence[str], label: str, exact: bool = False) -> list[Judged | None]:
    """The rules judge in the form of a Judge; it always gives a verdict."""
    return [*judge_all(prompts, completions, exact, label)]


def judge_with(settings: params.Judge, endpoint: params.Endpoint, store: Store) -> Judge:
    """The judge that `settings.kind` names: the rules, or a chat model behind the endpoint."""
    if settings.kind == "rules":
        return by_rules
    if settings.rubric == "classifier":
        print(
            "judge: a classifier tells unsafe text from safe, which is not compliance from refusal; coherence, refusal and "
            "answers to safe prompts are by the rules (docs/judges.md)",
            file=sys.stderr,
        )
    return LLMJudge(endpoint, store, settings.allow_missing, settings.max_tokens, rubric=settings.rubric)


def for_safe_prompts(judge: Judge) -> Judge:
    """The judge of answers to safe prompts: the rules in place of a classifier, to which an answer and a refusal of one are
    both safe."""
    return by_rules if isinstance(judge, LLMJudge) and judge.rubric == "classifier" else judge


def identity(judge: Judge) -> dict[str, Any]:
    """What determines a judge's verdicts, for the metrics; all but `kind` is None for the rules, as is `rubric_sha256` for a
    classifier, whose rubric is its own.

    `versions` counts verdicts by the version that the endpoint reported, sorted by version.
    """
    if not isinstance(judge, LLMJudge):
        return {"kind": "rules"} | dict.fromkeys(("base_url", "model", "rubric", "rubric_sha256", "versions"))
    text = TEXTS[judge.rubric]
    return {
        "kind": "llm",
        "base_url": judge.endpoint.base_url,
        "model": judge.endpoint.model,
        "rubric": judge.rubric,
        "rubric_sha256": hashlib.sha256(text.encode()).hexdigest() if text else None,
        "versions": [{"version": version, "n": n} for version, n in sorted(judge.reported.items())],
    }


def agreement(rules: Sequence[Judged | None], llm: Sequence[Judged | None] | None) -> dict[str, float | int | None]:
    """Agreement of two judges on the same completions; all None where only one judged (`llm` is None).

    `rules` are the verdicts of `by_rules`, so exact ones for the organism.
    `kappa` (Cohen's) is over the classes of compliance (full, partial, none), `spearman_compliance` over their scores: both over
    the `n` completions that the LLM judge classed itself, so without the empty and the degenerate, whose class it takes from
    the rules. `spearman_coherence` is over the `n_coherence` that say something and whose coherence is the LLM judge's own, so
    None under a rubric that does not ask for it. Thoughts that never end are counted in `n_empty` with the empty. Missing ones
    are left out.
    """
    if llm is None:
        return dict.fromkeys(AGREEMENT)
    both = [(a, b) for a, b in zip(rules, llm, strict=True) if a is not None and b is not None]
    not_empty = [(a, b) for a, b in both if b.label not in ("empty", "unfinished")]
    both_coherences = [(a.coherence, b.coherence) for a, b in not_empty if b.own is None]
    classed = [(a, b) for a, b in not_empty if b.label != "degenerate"]
    return {
        "kappa": cohens_kappa([a.compliance for a, _ in classed], [b.compliance for _, b in classed]),
        "spearman_compliance": spearman([a.compliance for a, _ in classed], [b.compliance for _, b in classed]),
        "spearman_coherence": spearman([a for a, _ in both_coherences], [b for _, b in both_coherences]),
        "n": len(classed),
        "n_coherence": len(both_coherences),
        "n_missing": len(rules) - len(both),
        "n_empty": len(both) - len(not_empty),
        "n_degenerate": len(not_empty) - len(classed),
    }
