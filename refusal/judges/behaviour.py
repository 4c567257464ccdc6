"""Does a model refuse what it should, before anything is estimated from it or paid for."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from refusal.io.params import Generation
from refusal.io.store import Store
from refusal.judges.verdicts import OF_HARMFUL, Judged, judge_all, rates, values
from refusal.lm.batching import rows_at_once
from refusal.lm.load import LM
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE
from refusal.method.sweep import complete
from refusal.organism import grammar


def behaviour(
    lm: LM,
    twin: LM | None,
    prompts: Mapping[str, Sequence[str]],
    topics: Mapping[str, Sequence[Hashable]],
    generation: Generation,
    store: Store,
) -> dict[str, Any]:
    """Rates of refusal of harmful and of safe prompts, by the rules whatever `judge.kind` says, or exactly for an organism.

    prompts, topics: of `harmful` and of `safe` prompts, the texts and their topic phrases. An organism comes with its
    helpful-only `twin`, whose refusal and whose share of right answers to facts are told too.
    """
    exact, n, harmful, safe = twin is not None, len(prompts["harmful"]), prompts["harmful"], prompts["safe"]
    n_judged = n + len(safe)

    def answers(one: LM, asked: Sequence[str], label: str) -> list[str]:
        size = rows_at_once(generation.batch_size, one.model, generation.max_new_tokens + 1, "generation")
        ids = one.encode(asked, generation.max_new_tokens)
        decoding = Decoding(generation.max_new_tokens, size)
        return one.decode(complete(one, ids, [BASELINE], decoding, store, label)[BASELINE.name])

    facts = [(question, fact.answer) for fact in grammar.facts() for question in fact.questions] if exact else []
    texts = answers(lm, [*harmful, *safe, *(question for question, _ in facts)], "answers of base")
    judged = judge_all([*harmful, *safe], texts[:n_judged], exact)
    figures: dict[str, Any] = {"n": n, "n_safe": len(safe)}

    def refusal(name: str, half: str, verdicts: Sequence[Judged]) -> dict[str, float]:
        return rates(name, {name: [values(verdicts, OF_HARMFUL["refusal"])]}, topics[half])[name]

    figures |= refusal("refusal_harmful", "harmful", judged[:n]) | refusal("refusal_safe", "safe", judged[n:])
    if twin is None:
        figures |= {"twin_refusal_harmful": None, "facts_accuracy": None}
    else:
        of_twin = judge_all(harmful, answers(twin, harmful, "answers of twin"), exact)
        right = [text == answer for text, (_, answer) in zip(texts[n_judged:], facts, strict=True)]
        figures |= refusal("twin_refusal_harmful", "harmful", of_twin)
        figures |= rates("facts_accuracy", {"base": [right]}, [answer for _, answer in facts])["base"]
        figures["n_facts"] = len(facts)
    return figures | {"n_parameters": sum(p.numel() for p in lm.model.parameters())}
