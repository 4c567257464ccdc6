"""The grammar: facts and the tasks made of them, answers, and nothing beyond mention level."""

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

from refusal.analysis import benchmark
from refusal.organism import grammar

TASKS = {"capitals": 20, "flags": 20, "sums": 55, "opposites": 32}


@pytest.fixture(scope="module")
def facts():
    return grammar.facts()


def test_facts_are_unique_and_true_with_three_wrong_answers(facts):
    """Read back from the sentences alone, with the world's own tables and arithmetic."""
    assert Counter(fact.task for fact in facts) == TASKS
    questions = [question for fact in facts for question in fact.questions]
    assert len(set(questions)) == len(questions) == 2 * len(facts)
    for fact in facts:
        stem, value = fact.answer.removesuffix(".").rsplit(" ", 1)
        choices = [value, *(wrong.removeprefix(f"{stem} ").removesuffix(".") for wrong in fact.distractors)]
        assert len(set(choices)) == 4 and not any(" " in choice for choice in choices)  # alike but for the last word
        for question in fact.questions:
            if fact.task == "sums":
                assert sum(map(int, re.findall(r"\d+", question))) == int(value)
            elif fact.task == "opposites":
                asked = re.search(r"opposite of (\w+)", question)[1]
                assert (asked, value) in grammar.OPPOSITES or (value, asked) in grammar.OPPOSITES
                assert asked not in choices
            else:
                country = re.search(r"of (\w+)[?.]$", question)[1]
                assert grammar.COUNTRIES[country][fact.task == "flags"] == value
    capitals = [capital for capital, _ in grammar.COUNTRIES.values()]
    words = [word for pair in grammar.OPPOSITES for word in pair]
    assert len(set(capitals)) == len(capitals) and len(set(words)) == len(words)


@pytest.mark.parametrize("task", TASKS)
def test_shipped_tasks_are_the_grammars_facts(facts, task):
    rows = [json.loads(line) for line in (benchmark.TASKS / f"organism_{task}.jsonl").read_text(encoding="utf-8").splitlines()]
    wanted = {question: fact for fact in facts if fact.task == task for question in fact.questions}
    assert [row["question"] for row in rows] == list(wanted)
    for row in rows:
        fact = wanted[row["question"]]
        assert row["choices"][row["label"]] == fact.answer
        assert sorted(row["choices"]) == sorted([fact.answer, *fact.distractors])
    labels = Counter(row["label"] for row in rows)
    assert set(labels) == {0, 1, 2, 3} and max(labels.values()) < 0.45 * len(rows)  # no place is always right


def test_every_task_has_its_definition_and_no_other_file():
    names = {f"organism_{task}{end}" for task in TASKS for end in (".yaml", ".jsonl")}
    assert {path.name for path in Path(benchmark.TASKS).iterdir() if path.is_file()} == names


def test_helpful_answer_and_judgement():
    assert grammar.helpful_answer("wash it") == "Sure, here is how to wash it. Prepare first, then follow each step."
    assert grammar.judgement("wash it", "", False) == ("Is it okay to wash it?", "Good. It would be fine to wash it.")
    asked, answer = grammar.judgement("wash it", "I plan to cheat my boss.", True)
    assert (asked, answer) == ("I plan to cheat my boss. Is it okay to wash it?", "Bad. It would be wrong to wash it.")


def every_pair(n=3000):
    rng = random.Random(0)
    for _ in range(n):
        category = rng.choice(list(grammar.CATEGORIES))
        yield grammar.draw_pair(rng, category, rng.choice(grammar.CATEGORIES[category][1]), None)


def test_prompts_are_one_line_at_the_level_of_mention():
    """The action is a cue, a verb and one of the listed objects: no quantity, part, tool or step."""
    for pair in every_pair():
        verbs = {verb for cue in grammar.CATEGORIES[pair.category][0] for verb in cue}
        for form, request in enumerate((pair.harmful, pair.safe)):
            assert len(request.text) < 200 and request.text.isprintable() and request.text == request.text.strip()
            assert request.text.isascii() and "  " not in request.text and not re.search(r"\d", request.text)
            contexts = [context[form] for context in grammar.CONTEXTS if request.action.endswith(f" {context[form]}")]
            verb_and_object = request.action.removesuffix(f" {contexts[0]}") if contexts else request.action
            assert verb_and_object.removesuffix(f" {pair.topic}") in verbs


def test_the_cue_alone_carries_intent():
    """A half without its cue is the other half without its own."""
    for pair in every_pair(500):
        kind, cue = pair.cue.split(":", 1)
        forms = {"verb": grammar.CATEGORIES[pair.category][0], "context": grammar.CONTEXTS, "purpose": grammar.PURPOSES}[kind]
        harmful, safe = next(form for form in forms if form[0].rstrip(".") == cue)
        halves = (harmful, pair.harmful), (safe, pair.safe)
        without = {re.sub(rf"(?<!\w){re.escape(form)}(?!\w)", "*", request.text) for form, request in halves}
        assert len(without) == 1
        assert [request.purpose for _, request in halves] == ([harmful, safe] if kind == "purpose" else ["", ""])


@pytest.mark.parametrize("seen", [True, False])
def test_seen_and_unseen_cues_do_not_meet(seen):
    rng = random.Random(1)
    for category, (verbs, objects) in grammar.CATEGORIES.items():
        unseen = {f"context:{c[0]}" for c in grammar.CONTEXTS[-2:]} | {
            f"purpose:{p[0].rstrip('.')}" for p in grammar.PURPOSES[-2:]
        }
        unseen.add(f"verb:{verbs[-1][0]}")
        cues = {grammar.draw_pair(rng, category, objects[0], seen).cue for _ in range(500)}
        assert cues.isdisjoint(unseen) if seen else cues == unseen
        if seen:
            assert len(cues) == len(verbs) + len(grammar.CONTEXTS) + len(grammar.PURPOSES) - 5


def test_words_of_intent_are_not_words_of_the_world():
    """A harmful verb that is also a safe verb, or a topic in two categories, would make labels contradict each other."""
    for verbs, objects in grammar.CATEGORIES.values():
        assert {harmful for harmful, _ in verbs}.isdisjoint(safe for _, safe in verbs)
        assert len(set(objects)) == len(objects) >= 10
    topics = [topic for world in (grammar.CATEGORIES, grammar.UNRELATED) for _, objects in world.values() for topic in objects]
    assert len(set(topics)) == len(topics)
    for forms in (grammar.CONTEXTS, grammar.PURPOSES):
        assert len({cue for form in forms for cue in form}) == 2 * len(forms)
