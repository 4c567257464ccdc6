"""Prompt pairs and the unrelated safe set: from the grammar or a user's file, checked, and split without leaks."""

import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from refusal.data.near_duplicates import NearDuplicateIndex, near_duplicate_groups
from refusal.data.prompt_files import read_rows
from refusal.io.errors import UserError
from refusal.io.params import Prompts
from refusal.organism import grammar

SPLITS = ("train", "val", "test")
MISSES = 1000  # drawings of nothing new after which the grammar is taken to be exhausted


def pairs_of(p: Prompts) -> list[dict[str, Any]]:
    """The pairs that `prompts.source` names: the grammar's or a file's."""
    splits = p.splits.model_dump()
    if p.source == "grammar":
        assert p.n_pairs is not None  # checked with the parameters
        return grammar_pairs(p.n_pairs, splits, p.near_duplicate, p.seed)
    return file_rows(Path(p.source), 2, p.n_pairs, splits, p.near_duplicate, p.seed)


def unrelated_of(p: Prompts) -> list[dict[str, Any]]:
    """The safe prompts without counterpart that `prompts.unrelated` names: the grammar's or a file's."""
    splits = p.splits.model_dump()
    if p.unrelated == "grammar":
        assert p.n_unrelated is not None
        return grammar_unrelated(p.n_unrelated, splits, p.seed)
    return file_rows(Path(p.unrelated), 1, p.n_unrelated, splits, p.near_duplicate, p.seed)


def grammar_pairs(n_pairs: int, splits: dict[str, float], near_duplicate: float, seed: int) -> list[dict[str, Any]]:
    """`n_pairs` pairs from the grammar, split by topic phrase; half of val and test carry cues unseen in refusal training.

    A near-duplicate of a prompt in another split is drawn again, so none crosses.
    """
    rng = random.Random(seed)
    topics: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for category, (_, objects) in grammar.CATEGORIES.items():
        for split, some in _deal(rng, objects, splits).items():
            topics[split] += [(category, topic) for topic in some]
    counts = dict(zip(SPLITS, _at_least_one(n_pairs, splits), strict=True))
    rows: list[dict[str, Any]] = []
    texts: set[str] = set()
    earlier = NearDuplicateIndex(near_duplicate)  # the prompts of the splits before
    for split in SPLITS:
        # Topics in a cycle, so that every category and topic phrase is as frequent as every other.
        order = rng.sample(topics[split], len(topics[split]))
        made: list[grammar.Pair] = []
        misses = 0  # one after another, on one topic
        while len(made) < counts[split]:
            category, topic = order[len(made) % len(order)]
            seen = split == "train" or len(made) // len(order) % 2 == 0
            pair = grammar.draw_pair(rng, category, topic, seen)
            both = pair.harmful.text, pair.safe.text
            if texts.isdisjoint(both) and not any(len(earlier.near(text)) for text in both):
                texts.update(both)
                made.append(pair)
                misses = 0
            elif (misses := misses + 1) == MISSES:
                raise UserError(
                    f"params.yaml: prompts.n_pairs: the grammar has no {n_pairs} distinct pairs; ask for fewer, or for a file"
                )
        for pair in made:
            rows.append(_grammar_row(len(rows), split, pair))
            earlier.add(pair.harmful.text)
            earlier.add(pair.safe.text)
    return rows


def _grammar_row(number: int, split: str, pair: grammar.Pair) -> dict[str, Any]:
    return {
        "id": f"pair-{number:05d}",
        "split": split,
        "category": pair.category,
        "topic": pair.topic,
        "cue": pair.cue,
        "seen": pair.seen,
        "harmful": pair.harmful.text,
        "safe": pair.safe.text,
        "harmful_answer": grammar.helpful_answer(pair.harmful.action),
        "safe_answer": grammar.helpful_answer(pair.safe.action),
    }


def grammar_unrelated(n: int, splits: dict[str, float], seed: int) -> list[dict[str, Any]]:
    """`n` safe requests with no counterpart, split by topic phrase."""
    rng = random.Random(f"unrelated {seed}")
    dealt = _deal(rng, [topic for _, objects in grammar.UNRELATED.values() for topic in objects], splits)
    split_of = {topic: split for split, topics in dealt.items() for topic in topics}
    counts = dict(zip(SPLITS, _at_least_one(n, splits), strict=True))
    topic_of: dict[str, dict[str, str]] = {split: {} for split in SPLITS}  # by the text of a request
    misses = 0
    while any(len(topic_of[split]) < counts[split] for split in SPLITS):
        topic, request = grammar.draw_unrelated(rng)
        of_split = topic_of[split := split_of[topic]]
        if len(of_split) < counts[split] and request.text not in of_split:
            of_split[request.text] = topic
            misses = 0
        elif (misses := misses + 1) == 10 * MISSES:
            raise UserError(f"params.yaml: prompts.n_unrelated: the grammar has no {n} distinct safe requests; ask for fewer")
    rows = [(split, topic, text) for split in SPLITS for text, topic in topic_of[split].items()]
    return [{"id": f"unrelated-{i:05d}", "split": s, "topic": topic, "safe": text} for i, (s, topic, text) in enumerate(rows)]


def share_out(n: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to n in proportion to `shares` (largest remainder)."""
    counts = [int(n * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - n * shares[i])
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts


def _at_least_one(n: int, splits: dict[str, float]) -> list[int]:
    """`n` shared out over the splits, at least one to each."""
    if n < len(SPLITS):
        raise UserError(f"params.yaml: prompts.n_pairs and n_unrelated must be at least {len(SPLITS)}, one a split ({n} given)")
    counts = share_out(n, [splits[split] for split in SPLITS])
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def _deal(rng: random.Random, topics: Sequence[str], splits: dict[str, float]) -> dict[str, list[str]]:
    """The topic phrases of each split, drawn at random."""
    shuffled = rng.sample(topics, len(topics))
    ends = list(accumulate(_at_least_one(len(topics), splits)))
    return {split: shuffled[start:end] for split, start, end in zip(SPLITS, [0, *ends], ends, strict=False)}


def file_rows(
    path: Path, width: int, n: int | None, splits: dict[str, float], near_duplicate: float, seed: int
) -> list[dict[str, Any]]:
    """A user's pairs (width 2) or safe prompts (width 1), at most `n`, checked, and split by groups of near-duplicates."""
    rows = read_rows(path, width)
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for prompt in row:
            if prompt in first:
                raise UserError(f"{path}: row {number} repeats a prompt of row {first[prompt]}; delete one of the two")
        first.update(dict.fromkeys(row, number))
    if n is not None and n < len(rows):
        rows = [rows[i] for i in sorted(random.Random(f"subset {seed}").sample(range(len(rows)), n))]
    return split_rows(rows, str(path), splits, near_duplicate, seed)


def split_rows(
    rows: Sequence[tuple[str, ...]],
    source: str,
    splits: dict[str, float],
    near_duplicate: float,
    seed: int,
    categories: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Pairs or safe prompts with no known answers, grouped by near-duplicate and split by group; `source` is where they are from.

    Raises UserError where a split stays empty.
    """
    groups = near_duplicate_groups(rows, near_duplicate)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    order = random.Random(seed).sample(sorted(members), len(members))
    # Largest groups first, each to the split that lacks most: sizes come out close to what was asked for.
    order.sort(key=lambda group: -len(members[group]))
    lacking = dict(zip(SPLITS, share_out(len(rows), [splits[split] for split in SPLITS]), strict=True))
    split_of: dict[int, str] = {}
    for group in order:
        split_of[group] = max(SPLITS, key=lambda split: lacking[split])
        lacking[split_of[group]] -= len(members[group])
    empty = [split for split in SPLITS if split not in split_of.values()]
    if empty:
        raise UserError(f"{source}: its {len(rows)} rows leave the split {empty[0]} empty; give more rows that differ in wording")
    result: list[dict[str, Any]] = []
    for i, (row, group) in enumerate(zip(rows, groups, strict=True)):
        shared = {"split": split_of[group], "topic": f"group {group}"}
        if len(row) == 1:
            result.append({"id": f"unrelated-{i:05d}", **shared, "safe": row[0]})
            continue
        category = "imported" if categories is None else categories[i]
        known = {"category": category, "cue": None, "seen": None, "harmful": row[0], "safe": row[1]}
        result.append({"id": f"pair-{i:05d}", **shared, **known, "harmful_answer": None, "safe_answer": None})
    return result
