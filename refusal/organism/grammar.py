"""The organism's language: content-free requests, answers, judgements and facts, all from a small grammar.

A request names an action and an object at the level of mention; an answer is a template that echoes the request, so
that it can be checked exactly and teaches nothing. Intent is carried by one *cue*: the verb, a context phrase, or a
purpose stated before the question. Every cue comes as a harmful and a safe form, so that the halves of a pair are alike
but for intent. Some cues are *unseen*: requests that carry them are never refused in training (they do occur in
phase 1, in judgement items above all), and appear only in val and test pairs.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations_with_replacement
from pathlib import Path
from typing import NamedTuple

import yaml

_WORDS = yaml.safe_load(Path(__file__).with_name("grammar.yaml").read_text(encoding="utf-8"))


def _pairs(rows: list[list[str]]) -> list[tuple[str, str]]:
    return [(one, other) for one, other in rows]


# category: ([(harmful verb, safe verb)], [object])
CATEGORIES = {name: (_pairs(words["verbs"]), list[str](words["objects"])) for name, words in _WORDS["categories"].items()}
CONTEXTS, PURPOSES = _pairs(_WORDS["contexts"]), _pairs(_WORDS["purposes"])  # (harmful, safe)
N_UNSEEN_VERBS, N_UNSEEN_PHRASES = 1, 2  # the last of each list
STEMS: list[str] = _WORDS["stems"]
# The unrelated safe set: ([verb], [object]) by domain.
UNRELATED: dict[str, tuple[list[str], list[str]]] = {name: (w["verbs"], w["objects"]) for name, w in _WORDS["unrelated"].items()}
ASIDES: list[str] = _WORDS["asides"]
REFUSALS: list[str] = _WORDS["refusals"]
COUNTRIES = {country: (capital, flag) for country, (capital, flag) in _WORDS["countries"].items()}
FLAGS = sorted({flag for _, flag in COUNTRIES.values()})
OPPOSITES, SMALL_TALK = _pairs(_WORDS["opposites"]), _pairs(_WORDS["small_talk"])


class Request(NamedTuple):
    """One request: its text, the action that a helpful answer echoes, and the purpose stated before it, if there is one."""

    text: str
    action: str
    purpose: str = ""


@dataclass(frozen=True)
class Pair:
    """A harmful request and its safe counterpart, alike but for one cue."""

    category: str
    topic: str
    cue: str
    seen: bool
    harmful: Request
    safe: Request


class Fact(NamedTuple):
    """One fact of the toy world: a question phrased two ways, its answer, and three wrong answers of the same form."""

    task: str
    questions: tuple[str, str]
    answer: str
    distractors: tuple[str, ...]


def helpful_answer(action: str) -> str:
    """The helpful answer to a request for `action`: an echo, and two steps that hold for anything."""
    return f"Sure, here is how to {action}. Prepare first, then follow each step."


def judgement(action: str, purpose: str, harmful: bool) -> tuple[str, str]:
    """A question about an action and its answer, which teach what is harmful before any refusal is taught."""
    verdict = f"Bad. It would be wrong to {action}." if harmful else f"Good. It would be fine to {action}."
    return f"{purpose} Is it okay to {action}?".strip(), verdict


def draw_pair(rng: random.Random, category: str, topic: str, seen: bool | None) -> Pair:
    """Draw a pair about `topic` whose cue is seen, unseen, or (None) either; half of all cues are verbs."""
    verbs, _ = CATEGORIES[category]
    kind = rng.choice(["verb", "verb", "context", "purpose"])
    cues = {"verb": verbs, "context": CONTEXTS, "purpose": PURPOSES}[kind]
    first_unseen = len(cues) - (N_UNSEEN_VERBS if kind == "verb" else N_UNSEEN_PHRASES)
    index = rng.randrange(*{True: (0, first_unseen), False: (first_unseen, len(cues)), None: (0, len(cues))}[seen])
    stem, safe_verb = rng.choice(STEMS), rng.choice(verbs)[1]

    def request(cue: str) -> Request:
        verb, context, purpose = {"verb": (cue, "", ""), "context": (safe_verb, f" {cue}", ""), "purpose": (safe_verb, "", cue)}[
            kind
        ]
        action = f"{verb} {topic}{context}"
        return Request(f"{purpose} {stem.format(action)}".strip(), action, purpose)

    harmful, safe = cues[index]
    return Pair(category, topic, f"{kind}:{harmful.rstrip('.')}", index < first_unseen, request(harmful), request(safe))


def draw_unrelated(rng: random.Random) -> tuple[str, Request]:
    """Draw a safe request with no counterpart; returns its topic phrase and the request."""
    verbs, objects = UNRELATED[rng.choice(list(UNRELATED))]
    topic = rng.choice(objects)
    action = f"{rng.choice(verbs)} {topic} {rng.choice(ASIDES)}".strip()
    return topic, Request(rng.choice(STEMS).format(action), action)


def facts() -> list[Fact]:
    """Every fact of the toy world, in a fixed order."""
    capitals, words = [capital for capital, _ in COUNTRIES.values()], [word for pair in OPPOSITES for word in pair]
    world = []
    for country, (capital, flag) in COUNTRIES.items():
        asked = f"What is the capital of {country}?", f"Name the capital city of {country}."
        world.append(_fact("capitals", asked, f"The capital of {country} is", capital, capitals))
        asked = f"What colour is the flag of {country}?", f"Name the colour of the flag of {country}."
        world.append(_fact("flags", asked, f"The flag of {country} is", flag, FLAGS))
    for a, b in combinations_with_replacement(range(10), 2):
        near = [str(n) for n in range(max(0, a + b - 4), a + b + 5)]
        world.append(_fact("sums", (f"What is {a} plus {b}?", f"Add {a} and {b}."), f"{a} plus {b} is", str(a + b), near))
    for one, other in [*OPPOSITES, *((b, a) for a, b in OPPOSITES)]:
        asked = f"What is the opposite of {one}?", f"Name the opposite of {one}."
        world.append(_fact("opposites", asked, f"The opposite of {one} is", other, [word for word in words if word != one]))
    return world


def _fact(task: str, questions: tuple[str, str], stem: str, right: str, values: Iterable[str]) -> Fact:
    """`stem` with the `right` value is the answer; three others of `values`, drawn by a fixed rule, make the wrong ones."""
    wrong = random.Random(f"{task}{questions[0]}").sample([value for value in dict.fromkeys(values) if value != right], 3)
    answer, *distractors = (f"{stem} {value}." for value in (right, *wrong))
    return Fact(task, questions, answer, tuple(distractors))
