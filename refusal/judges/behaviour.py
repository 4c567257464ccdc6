"""Does a model refuse what it should, before anything is estimated from it or paid for."""

from collections.abc import Sequence
from typing import Any

from refusal.io.params import Generation
from refusal.io.store import Store
from refusal.judges.verdicts import judge_all, rate
from refusal.lm.batching import rows_at_once
from refusal.lm.load import LM
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE
from refusal.method.sweep import complete
from refusal.organism import grammar


def behaviour(
    lm: LM, twin: LM | None, harmful: Sequence[str], safe: Sequence[str], generation: Generation, store: Store
) -> dict[str, Any]:
    """Rates of refusal of harmful and of safe prompts, by the rules whatever `judge.kind` says, or exactly for an organism.

    An organism comes with its helpful-only `twin`, whose refusal and whose share of right answers to facts are told too.
    """
    exact, n, n_judged = twin is not None, len(harmful), len(harmful) + len(safe)

    def answers(one: LM, prompts: Sequence[str], label: str) -> list[str]:
        size = rows_at_once(generation.batch_size, one.model, generation.max_new_tokens + 1, "generation")
        ids = one.encode(prompts, generation.max_new_tokens)
        decoding = Decoding(generation.max_new_tokens, size)
        return one.decode(complete(one, ids, [BASELINE], decoding, store, label)[BASELINE.name])

    facts = [(question, fact.answer) for fact in grammar.facts() for question in fact.questions] if exact else []
    texts = answers(lm, [*harmful, *safe, *(question for question, _ in facts)], "answers of base")
    judged = judge_all([*harmful, *safe], texts[:n_judged], exact)
    figures: dict[str, Any] = {
        **rate("refusal_harmful", [v.refusal for v in judged[:n]]),
        **rate("refusal_safe", [v.refusal for v in judged[n:]]),
        "n": n,
        "n_safe": len(safe),
    }
    if twin is None:
        figures |= {"twin_refusal_harmful": None, "facts_accuracy": None}
    else:
        of_twin = judge_all(harmful, answers(twin, harmful, "answers of twin"), exact)
        right = [text == answer for text, (_, answer) in zip(texts[n_judged:], facts, strict=True)]
        figures |= rate("twin_refusal_harmful", [v.refusal for v in of_twin]) | rate("facts_accuracy", right)
        figures["n_facts"] = len(facts)
    return figures | {"n_parameters": sum(p.numel() for p in lm.model.parameters())}
