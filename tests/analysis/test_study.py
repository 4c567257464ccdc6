"""What every analysis asks of a study: completions by its own model or another, its judge's verdicts, samples, and costs."""

import random

import given
import pytest
import torch
from tiny import text_lm, tiny_direction

from refusal.io.endpoint import Endpoint
from refusal.io.store import Store
from refusal.judges.llm import LLMJudge
from refusal.judges.verdicts import Judged, judge_all
from refusal.method.interventions import BASELINE, Addition, Intervention

V = tiny_direction(seed=5)
ABLATED = [Intervention(f"ablated {sites}", V, 1.5, sites) for sites in ("resid_pre", "writes", "weights")]
ADDED = 3 * tiny_direction(seed=9)
ADDED -= (ADDED @ V) * V  # orthogonal, so that it does not matter which of the two acts first


def greedy(lm, one, prompt, addition, n_new):
    """Without a cache or a batch, by the intervention's own context and a hook that adds at the whole prompt."""
    (ids,), handle = lm.encode([prompt]), None
    n = len(ids)
    if addition is not None:
        add = lambda _, args: (torch.cat([args[0][:, :n] + addition.vector, args[0][:, n:]], 1), *args[1:])  # noqa: E731
        handle = lm.model.model.layers[addition.layer].register_forward_pre_hook(add)
    with torch.no_grad(), one.on(lm.model):
        for _ in range(n_new):
            ids = [*ids, int(lm.model(torch.tensor([ids])).logits[0, -1].argmax())]
    if handle:
        handle.remove()
    return lm.decode([ids[n:]])[0]


@pytest.mark.parametrize("half", ["harmful", "safe"])
@pytest.mark.parametrize("other", [None, text_lm("other", seed=1)])
@pytest.mark.parametrize("addition", [None, Addition(ADDED, 1)])
def test_what_is_asked_is_completed_and_judged(tmp_path, half, other, addition):
    study, judged = given.study(Store(tmp_path / "s"), n=3, generation={"max_new_tokens": 3, "batch_size": 4}), []

    def judge(prompts, texts, label, exact):
        judged.append((prompts, texts, label, exact))
        return [Judged(text, 1.0, 1.0, False, False) for text in texts]

    study.judge = judge
    asked = study.ask(study.pairs["val"], half, [BASELINE, *ABLATED], "some label", addition, other)
    assert asked.rows == study.pairs["val"] and asked.topics == ["topic 0", "topic 0", "topic 1"]
    assert asked.prompts == [f"val {half} {i}" for i in range(3)]
    texts = {one.name: [greedy(other or study.lm, one, p, addition, 3) for p in asked.prompts] for one in (BASELINE, *ABLATED)}
    assert asked.texts == texts and len({str(of) for of in texts.values()}) == 3  # weights do what writes does
    assert asked.verdicts == {name: [Judged(text, 1.0, 1.0, False, False) for text in of] for name, of in texts.items()}
    assert judged == [(asked.prompts, of, f"judge: some label: {name}", True) for name, of in texts.items()]


def test_a_classifier_is_asked_of_harmful_prompts_alone(tmp_path, monkeypatch):
    study = given.study(Store(tmp_path / "s"), n=3, generation={"max_new_tokens": 3, "batch_size": 4})
    study.judge, unsafe = LLMJudge(Endpoint(), study.store, rubric="classifier"), Judged("compliance", 1.0, 0.5, False, False)
    monkeypatch.setattr(LLMJudge, "__call__", lambda self, prompts, texts, label, exact: [unsafe] * len(texts))
    harmful, safe = (study.ask(study.pairs["val"], half, [BASELINE], "some label") for half in ("harmful", "safe"))
    assert harmful.the_only == [unsafe] * 3
    assert safe.the_only == judge_all(safe.prompts, safe.texts["baseline"], study.exact) != [unsafe] * 3


def test_a_sample_is_drawn_once_by_the_seed_in_the_order_of_the_file(tmp_path):
    study = given.study(Store(tmp_path / "s"), n=20)
    for n in (None, 20, 99):
        assert study.sample("test", n) == study.pairs["test"]
    some = study.sample("test", 7)
    assert [row["id"] for row in some] == [f"test-{i}" for i in sorted(random.Random(0).sample(range(20), 7))]
    study.seed = 1
    assert study.sample("test", 7) != some


def test_costs_and_the_texts_they_are_measured_on(tmp_path, monkeypatch):
    """Texts are the baseline's answers where there is one; against transformers' loss and the definition of KL."""
    study = given.study(Store(tmp_path / "s"))
    said = ["", "Sure.", "Yes, gladly.", "No.", "", "Certainly so."]
    given.answers(monkeypatch, lambda lm, one, prompt, addition: said[int(prompt[-1])])
    texts = study.harmless(None)
    assert texts.prompts == study.lm.encode([f"other {i}" for i in (1, 2, 3, 5)])
    assert texts.answers == study.lm.encode([said[i] for i in (1, 2, 3, 5)])
    assert texts.topics == ["meal 0", "meal 0", "meal 1", "meal 1"]
    assert len(study.harmless(1).topics) <= 1
    rows = [*zip(texts.prompts, texts.answers, strict=True)]
    reference = [given.log_probs(study.lm.model, *row) for row in rows]
    figures = study.costs({one.name: [one] for one in (BASELINE, *ABLATED)}, texts, "cost")
    for one in (BASELINE, *ABLATED):
        with one.on(study.lm.model):
            losses, divergences = given.text_costs(study.lm.model, reference, rows)
        row = figures[one.name]
        assert given.figure(row, "cross_entropy") == given.by_topic(losses, texts.topics, 1e-3)
        assert given.figure(row, "kl") == given.by_topic(divergences, texts.topics, 1e-3)
        assert row["n_harmless"] == 4
    assert len({round(row["kl"], 3) for row in figures.values()}) == 3


def test_what_a_study_says_of_itself(tmp_path):
    study = given.study(Store(tmp_path / "s"), ablation={"sites": "paper"}, generation={"max_new_tokens": 9, "batch_size": 5})
    assert (study.layer, study.layers, study.sites, study.exact) == (1, [1, 2], "paper", True)
    assert (study.decoding.max_new_tokens, study.decoding.batch_size) == (9, 5)
    study.params = given.params(model={"id": "a/folder"}, judge={"allow_missing": True})
    assert not study.exact
    verdicts, topics = [given.VERDICTS[letter] for letter in "y?r?h?"], [row["topic"] for row in study.pairs["test"]]
    figures = study.summaries({"one": [verdicts]}, topics, "")["one"]
    assert given.figure(figures, "compliance") == given.rates({"one": [[1.0, None, 0.0, None, 0.5, None]]}, topics)["one"]
    assert (figures["n"], figures["n_missing"]) == (3, 3)
