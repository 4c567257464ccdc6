"""Harmful prompts and harmless ones, pairs or not: from the grammar or a user's files, checked, and split without leaks."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from refusal.data.near_duplicates import NearDuplicateIndex, near_duplicate_groups
from refusal.data.prompt_files import read_records, read_rows
from refusal.data.published_sets import Item, read_set, with_twins
from refusal.io.errors import UserError
from refusal.io.params import Prompts
from refusal.organism import grammar

SPLITS = ("train", "val", "test")
MISSES = 1000  # drawings of nothing new after which the grammar is taken to be exhausted
GENERATED = ("grammar", "api")


def prompts_of(p: Prompts, own_harmless: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """The rows of pairs.jsonl and of unrelated.jsonl, of the grammar or of files, and what is to be said of the files.

    What `api` is to write is left out. `own_harmless`: the file of the package's own harmless prompts, which go with harmful ones
    where no others are named. Files are split together: near-duplicates stay in one split, whichever file they are from.
    """
    splits = p.splits.model_dump()
    harmful, harmless, said = _read_files(p, own_harmless)
    files = ", ".join(dict.fromkeys(item.file for item in harmful + harmless))
    rows = split_rows(
        [(item.prompt,) if item.safe is None else (item.prompt, item.safe) for item in harmful + harmless],
        files,
        splits,
        p.near_duplicate,
        p.seed,
        [item.category for item in harmful],
    )
    pairs, unrelated = rows[: len(harmful)], rows[len(harmful) :]
    if p.source == "grammar" and not p.harmful:
        assert p.n_pairs is not None  # checked with the parameters
        pairs = grammar_pairs(p.n_pairs, splits, p.near_duplicate, p.seed)
    if p.unrelated == "grammar" and not harmless:
        assert p.n_unrelated is not None
        unrelated = grammar_unrelated(p.n_unrelated, splits, p.seed)
    return pairs, unrelated, said


def _read_files(p: Prompts, own_harmless: Path) -> tuple[list[Item], list[Item], list[str]]:
    """The harmful and the harmless prompts that files hold, each text once and at most as many as asked for; and what to say."""
    said: list[str] = []

    def read(path: str, is_harmful: bool) -> list[Item]:
        items, left_out = read_set(Path(path), is_harmful)
        said.extend(f"{path}: {n} rows {why}, and are left out" for why, n in left_out.items())
        if not items:
            raise UserError(
                f"{path}: no row is a {'harmful' if is_harmful else 'harmless'} prompt to ask alone; give another file"
            )
        return items

    harmful = [item for path in p.harmful or () for item in read(path, True)]
    harmless = read(p.harmless, False) if p.harmless else []
    if paired := with_twins(harmful, harmless):
        if lacking := len(harmful) - len(paired):
            said.append(f"{p.harmless}: {lacking} harmful prompts have no benign twin in it, and are left out")
        harmful, harmless = paired, []
    elif (have := sum(item.safe is not None for item in harmful)) < len(harmful) and have:
        said.append(f"{len(harmful) - have} harmful prompts have no safe counterpart, so those of the other {have} are left out")
        harmful = [item._replace(safe=None) for item in harmful]
    if p.source not in GENERATED:
        harmful = [Item(h, p.source, category, s) for (h, s), category in zip(*_user_rows(p.source, 2), strict=True)]
    if p.unrelated not in GENERATED:
        harmless = [Item(row[0], p.unrelated) for row in _user_rows(p.unrelated, 1)[0]]
    elif p.unrelated == "grammar" and p.harmful and not harmless:
        if not own_harmless.exists():
            raise UserError(f"{own_harmless}: the package's own harmless prompts are not there; name others in prompts.harmless")
        harmless = read(str(own_harmless), False)
    seen: dict[str, str] = {}
    harmful, harmless = _distinct(harmful, seen, said), _distinct(harmless, seen, said)
    return _at_most(harmful, p.n_pairs, p.seed), _at_most(harmless, p.n_unrelated, p.seed), said


def _distinct(items: Sequence[Item], seen: dict[str, str], said: list[str]) -> list[Item]:
    """The items of which no prompt is in `seen`, {text as it is compared: its file}, which grows by theirs."""
    kept, repeated = list[Item](), Counter[tuple[str, str]]()
    for item in items:
        texts = [" ".join(text.casefold().split()).rstrip(".?!") for text in (item.prompt, item.safe) if text is not None]
        if earlier := next((seen[text] for text in texts if text in seen), None):
            repeated[item.file, earlier] += 1
        else:
            kept.append(item)
            seen |= dict.fromkeys(texts, item.file)
    if items and not kept:
        raise UserError(f"{items[0].file}: every prompt of it is in another file of this study; give other prompts")
    for (file, earlier), n in repeated.items():
        said.append(f"{file}: {n} prompts are in {earlier} already, and count once")
    return kept


def _at_most(items: list[Item], n: int | None, seed: int) -> list[Item]:
    """`n` of the items, drawn by the seed; all where there are no more."""
    if n is None or n >= len(items):
        return items
    return [items[i] for i in sorted(random.Random(f"subset {seed}").sample(range(len(items)), n))]


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


def _user_rows(source: str, width: int) -> tuple[list[tuple[str, ...]], list[str | None]]:
    """The rows of a user's own file of pairs (width 2) or safe prompts (width 1), none of which may repeat one; categories."""
    rows = read_rows(Path(source), width)
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for prompt in row:
            if prompt in first:
                raise UserError(f"{source}: row {number} repeats a prompt of row {first[prompt]}; delete one of the two")
        first.update(dict.fromkeys(row, number))
    named = [row.get("category") if isinstance(row, dict) else None for _, row in read_records(Path(source), "a row")]
    return rows, [name if isinstance(name, str) and name.strip() else None for name in named]


def split_rows(
    rows: Sequence[tuple[str, ...]],
    source: str,
    splits: dict[str, float],
    near_duplicate: float,
    seed: int,
    categories: Sequence[str | None] = (),
) -> list[dict[str, Any]]:
    """Rows with no known answers, grouped by near-duplicate and split by group; `source` is where they are from.

    The first rows, as many as there are `categories`, are harmful prompts, alone or with the safe half of the pair; the others
    are harmless ones. Each of the two is split as asked for. Raises UserError where a split of either stays empty.
    """
    groups = near_duplicate_groups(rows, near_duplicate)
    kinds = [i >= len(categories) for i in range(len(rows))]
    totals = Counter(kinds)
    members: dict[int, Counter[bool]] = {}
    for kind, group in zip(kinds, groups, strict=True):
        members.setdefault(group, Counter())[kind] += 1
    order = random.Random(seed).sample(sorted(members), len(members))
    # Largest groups first, each to the split that lacks most: sizes come out close to what was asked for.
    order.sort(key=lambda group: -members[group].total())
    shares = [splits[split] for split in SPLITS]
    lacking = {kind: dict(zip(SPLITS, share_out(n, shares), strict=True)) for kind, n in totals.items()}
    split_of: dict[int, str] = {}

    def neediest(group: int) -> str:
        of = members[group].items()
        return max(SPLITS, key=lambda split: sum(n * lacking[kind][split] / totals[kind] ** 2 for kind, n in of))

    for group in order:
        split_of[group] = neediest(group)
        for kind, n in members[group].items():
            lacking[kind][split_of[group]] -= n
    for kind, n in totals.items():
        of = "harmless " if kind and len(totals) > 1 else ""
        filled = {split_of[group] for group, of in members.items() if of[kind]}
        if empty := [split for split in SPLITS if split not in filled]:
            raise UserError(f"{source}: its {n} {of}rows leave the split {empty[0]} empty; give more rows that differ in wording")
    result: list[dict[str, Any]] = []
    for i, (row, group) in enumerate(zip(rows, groups, strict=True)):
        shared = {"split": split_of[group], "topic": f"group {group}"}
        if kinds[i]:
            result.append({"id": f"unrelated-{i - len(categories):05d}", **shared, "safe": row[0]})
            continue
        id_, safe = (f"pair-{i:05d}", row[1]) if len(row) == 2 else (f"harmful-{i:05d}", None)
        known = {"category": categories[i] or "imported", "cue": None, "seen": None, "harmful": row[0], "safe": safe}
        result.append({"id": id_, **shared, **known, "harmful_answer": None, "safe_answer": None})
    return result
