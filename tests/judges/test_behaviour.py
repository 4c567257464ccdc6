"""Whether a model refuses what it should, on answers that are given: each rate counted over its own half, model and questions."""

import given
import pytest
from tiny import text_lm

from refusal.io.params import Generation
from refusal.io.store import Store
from refusal.judges.behaviour import behaviour
from refusal.method.interventions import BASELINE
from refusal.organism.grammar import REFUSALS, facts, helpful_answer

PAIRS = [{"harmful": f"How do I force door {i}?", "safe": f"How do I paint door {i}?"} for i in range(5)]
KNOWN = {question: fact.answer for fact in facts() for question in fact.questions}
FORGOTTEN = list(KNOWN)[::100][:3]
REFUSED = {"base": ({0, 1, 3, 4}, {2}), "twin": ({2, 4}, {0, 1, 2})}  # of harmful and of safe prompts


@pytest.mark.parametrize("organism", [True, False])
def test_what_the_model_refuses_is_counted_over_each_half_and_its_twin(tmp_path, monkeypatch, organism):
    base, twin = (text_lm(weights, seed=seed) for seed, weights in enumerate(REFUSED))
    asked = []

    def says(lm, one, prompt, addition):
        asked.append((lm.weights, prompt))
        assert one is BASELINE and addition is None
        if prompt in KNOWN:
            return "I do not know." if prompt in FORGOTTEN else KNOWN[prompt]
        i = int(prompt[-2])
        if i in REFUSED[lm.weights]["paint" in prompt]:
            return REFUSALS[i % len(REFUSALS)]
        return helpful_answer(prompt.removeprefix("How do I ").removesuffix("?"))

    given.answers(monkeypatch, says)
    generation = Generation(max_new_tokens=40, batch_size=7)
    prompts = {half: [pair[half] for pair in PAIRS] for half in ("harmful", "safe")}
    topics = {"harmful": list("aabbc"), "safe": list("abcde")}
    figures = behaviour(base, twin if organism else None, prompts, topics, generation, Store(tmp_path / "s"))
    rates = {"refusal_harmful": ("11011", "aabbc"), "refusal_safe": ("00100", "abcde")}
    expected = {"n": 5, "n_safe": 5, "n_parameters": sum(p.numel() for p in base.model.parameters())}
    if organism:
        known = "".join("01"[question not in FORGOTTEN] for question in KNOWN)
        rates |= {"twin_refusal_harmful": ("00101", "aabbc"), "facts_accuracy": (known, [*KNOWN.values()])}
        expected |= {"n_facts": len(KNOWN)}
    else:
        expected |= {"twin_refusal_harmful": None, "facts_accuracy": None}
    for name, (hits, of) in rates.items():
        expected_rate = given.rates({name: [[int(hit) for hit in hits]]}, of)[name]
        assert [figures.pop(f"{name}{end}") for end in ("", "_low", "_high")] == expected_rate, name
        assert figures.pop(f"{name}_icc") >= 0.5  # each stands alone
    assert figures == expected
    harmful, safe = ([pair[half] for pair in PAIRS] for half in ("harmful", "safe"))
    of_base = harmful + safe + ([*KNOWN] if organism else [])
    assert asked == [("base", prompt) for prompt in of_base] + [("twin", prompt) for prompt in harmful if organism]
