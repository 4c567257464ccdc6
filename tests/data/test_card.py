"""The package's own prompts: what their card says of them, recomputed, and the measure that it rests on."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from place import ROOT

from refusal.data.card import lengths, word_auroc
from refusal.data.near_duplicates import near_duplicate_groups, words
from refusal.data.prompt_files import read_rows
from refusal.data.published_sets import read_set
from refusal.organism import grammar

REFERENCE = Path(os.environ.get("REFUSAL_REFERENCE", "none")) / "prompts"
CARD = " ".join((ROOT / "docs/prompts.md").read_text(encoding="utf-8").split())
PAIRS, HARMLESS = ROOT / "data/raw/pairs.jsonl", ROOT / "data/raw/harmless.jsonl"


@pytest.fixture(scope="module")
def pairs():
    return [(harmful, safe) for harmful, safe in read_rows(PAIRS, 2)]


def made_up(n, harmful, safe):
    """Pairs of words drawn at random, each half with one of its own now and then."""
    rng, common = random.Random(0), [f"w{i}" for i in range(30)]
    return [(" ".join([*rng.sample(common, 5), harmful(i)]), " ".join([*rng.sample(common, 5), safe(i)])) for i in range(n)]


def test_a_word_that_gives_a_half_away_is_seen_and_one_of_the_harmful_alone_is_not():
    value, low, high = word_auroc(made_up(200, lambda i: "plain", lambda i: "safely"), 200, 0)
    assert value == 1 and low == pytest.approx(1) == high
    value, low, high = word_auroc(made_up(200, lambda i: f"x{i}", lambda i: "safely" if i % 2 else "plain"), 200, 0)
    assert value == 1
    value, low, high = word_auroc(made_up(200, lambda i: f"x{i}", lambda i: f"y{i}"), 200, 0)
    assert 0.4 < value < 0.6 and low < 0.5 < high and value - 0.1 < low < high < value + 0.1
    value, *_ = word_auroc(made_up(2000, lambda i: "a" if i % 4 else "b", lambda i: "a" if i % 4 == 0 else "b"), 5, 0)
    assert value == pytest.approx(0.75, abs=0.06)  # .75 x .75, and half of the ties: .75 x .25


def test_the_card_says_what_the_files_hold(pairs):
    rows = [json.loads(line) for line in PAIRS.read_text(encoding="utf-8").splitlines()]
    categories = Counter(row["category"] for row in rows)
    assert categories.keys() == grammar.CATEGORIES.keys() and set(categories.values()) == {51} and len(rows) == 510
    harmless = [prompt for (prompt,) in read_rows(HARMLESS, 1)]
    harmful_words, safe_words, apart = lengths(pairs)
    value, low, high = word_auroc(pairs, 400, 0)
    openings = len({half.split()[0] for pair in pairs for half in pair})
    shortest, longest = (of(len(half.split()) for pair in pairs for half in pair) for of in (min, max))
    shared = sum(len(words(h) & words(s)) / len(words(h) | words(s)) for h, s in pairs) / len(pairs)
    said = [
        f"{len(rows)} pairs, 51 of each of the ten categories, and {len(harmless)} harmless requests",
        f"{harmful_words:.1f} words in harmful halves, {safe_words:.1f} in safe ones, {apart:.2f} apart in a pair, {shortest} to {longest}",
        f"the halves of a pair share {shared:.0%} of their words",
        f"{openings} different first words",
        f"AUROC {value:.2f} [{low:.2f}, {high:.2f}]",
    ]
    assert [sentence for sentence in said if sentence not in CARD] == []
    assert apart <= 2 and value < 0.75


def test_no_two_are_alike(pairs):
    harmless = read_rows(HARMLESS, 1)
    groups = near_duplicate_groups([*pairs, *harmless], 0.7)
    assert len(set(groups)) == len(pairs) + len(harmless)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="REFUSAL_REFERENCE names no folder of published sets")
def test_no_prompt_is_one_of_a_published_set(pairs):
    published = {item.prompt for path in sorted(REFERENCE.iterdir()) for item in read_set(path, "harmless" not in path.name)[0]}
    own = [*pairs, *read_rows(HARMLESS, 1)]
    groups = near_duplicate_groups([*own, *((text,) for text in sorted(published))], 0.8)
    assert not set(groups[: len(own)]) & set(groups[len(own) :]) and len(published) > 1000
