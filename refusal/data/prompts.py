"""Prompt pairs and the unrelated safe set: from the grammar or a user's file, checked, and split without leaks."""

import csv
import io
import json
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from refusal.io.errors import UserError
from refusal.io.files import unique_keys
from refusal.io.params import Prompts
from refusal.organism import grammar

SPLITS = ("train", "val", "test")
MAX_PROMPT_CHARACTERS = 4000  # a request at the level of mention is one line
MISSES = 1000  # drawings of nothing new after which the grammar is taken to be exhausted
WORDS = re.compile(r"\w+")


def words(text: str) -> frozenset[str]:
    """The distinct words of a prompt, case folded."""
    return frozenset(WORDS.findall(text.casefold()))


class NearDuplicateIndex:
    """Word sets under labels, and the labels under which one lies that overlaps (Jaccard) with another by `threshold` or more.

    Compared are those that share one of each set's rarest words: a pair above the threshold must share one among the rarest
    (1 - threshold) * n + 1 of them (prefix filtering: Chaudhuri et al. 2006, "A Primitive Operator for Similarity Joins").
    `frequency` says which words are rare: whatever it says the answers are right, and soon there where it is true.
    """

    def __init__(self, threshold: float, frequency: Mapping[str, int]):
        self.threshold, self.frequency = threshold, frequency
        self.seen_in: dict[str, dict[Hashable, list[frozenset[str]]]] = {}

    def _rarest(self, set_: frozenset[str]) -> list[str]:
        rarest = sorted(set_, key=lambda word: (self.frequency.get(word, 0), word))
        return rarest[: len(rarest) - int(-(-self.threshold * len(rarest) // 1)) + 1]

    def add(self, set_: frozenset[str], label: Hashable) -> None:
        for word in self._rarest(set_):
            self.seen_in.setdefault(word, {}).setdefault(label, []).append(set_)

    def labels(self, set_: frozenset[str], skip: Callable[[Any], bool]) -> Iterator[Any]:
        """Labels, some of them twice, but for those of which `skip` holds at their turn."""
        for word in self._rarest(set_):
            for label, others in self.seen_in.get(word, {}).items():
                if not skip(label) and any(len(set_ & other) >= self.threshold * len(set_ | other) for other in others):
                    yield label


def grammar_pairs(n_pairs: int, splits: dict[str, float], near_duplicate: float, seed: int) -> list[dict[str, Any]]:
    """`n_pairs` pairs from the grammar, split by topic phrase; half of val and test carry cues unseen in refusal training.

    A pair too like one of another split is drawn again, so no near-duplicate crosses.
    """
    rng = random.Random(seed)
    topics: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for category, (_, objects) in grammar.CATEGORIES.items():
        shuffled = rng.sample(objects, len(objects))
        for split, part in zip(SPLITS, _cut(shuffled, _filled(len(objects), splits)), strict=True):
            topics[split] += [(category, topic) for topic in part]
    counts = dict(zip(SPLITS, _filled(n_pairs, splits), strict=True))
    used: set[str] = set()
    drawn = (grammar.draw_pair(random.Random(i), *topics["train"][i % len(topics["train"])], None) for i in range(500))
    alike = NearDuplicateIndex(near_duplicate, Counter(word for pair in drawn for word in words(pair.harmful.text)))
    rows: list[dict[str, Any]] = []
    for split in SPLITS:
        misses = 0  # one after another, on one topic
        # Topics in turn, so that every category and topic phrase is as frequent as every other.
        order = rng.sample(topics[split], len(topics[split]))
        made = 0
        while made < counts[split]:
            misses += 1
            if misses > MISSES:
                raise UserError(
                    f"params.yaml: prompts.n_pairs: the grammar has no {n_pairs} distinct pairs; ask for fewer, or for a file"
                )
            category, topic = order[made % len(order)]
            seen = True if split == "train" else made // len(order) % 2 == 0
            pair = grammar.draw_pair(rng, category, topic, seen)
            texts = [pair.harmful.text, pair.safe.text]
            bags = [words(text) for text in texts]
            if used & set(texts) or any(True for bag in bags for _ in alike.labels(bag, split.__eq__)):
                continue
            used |= set(texts)
            for bag in bags:
                alike.add(bag, split)
            made, misses = made + 1, 0
            rows.append(
                {
                    "id": f"pair-{len(rows):05d}",
                    "split": split,
                    "category": category,
                    "topic": topic,
                    "cue": pair.cue,
                    "seen": pair.seen,
                    "harmful": texts[0],
                    "safe": texts[1],
                    "harmful_answer": grammar.helpful_answer(pair.harmful.action),
                    "safe_answer": grammar.helpful_answer(pair.safe.action),
                }
            )
    return rows


def grammar_unrelated(n: int, splits: dict[str, float], seed: int) -> list[dict[str, Any]]:
    """`n` safe requests with no counterpart, split by topic phrase."""
    rng = random.Random(f"unrelated {seed}")
    topics = rng.sample(every := [t for _, objects in grammar.UNRELATED.values() for t in objects], len(every))
    split_of = {t: s for s, part in zip(SPLITS, _cut(topics, _filled(len(topics), splits)), strict=True) for t in part}
    wanted = dict(zip(SPLITS, _filled(n, splits), strict=True))
    found: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
    misses = 0
    while any(len(found[split]) < wanted[split] for split in SPLITS):
        misses += 1
        if misses > 10 * MISSES:
            raise UserError(f"params.yaml: prompts.n_unrelated: the grammar has no {n} distinct safe requests; ask for fewer")
        topic, request = grammar.draw_unrelated(rng)
        split = split_of[topic]
        if len(found[split]) < wanted[split] and request.text not in found[split]:
            found[split][request.text], misses = topic, 0
    rows = [(split, text, topic) for split in SPLITS for text, topic in found[split].items()]
    return [{"id": f"unrelated-{i:05d}", "split": s, "topic": t, "safe": text} for i, (s, text, t) in enumerate(rows)]


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


def share_out(n: int, shares: Sequence[float]) -> list[int]:
    """Whole numbers that add up to n in proportion to `shares` (largest remainder)."""
    counts = [int(n * share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda i: counts[i] - n * shares[i])
    for i in by_remainder[: n - sum(counts)]:
        counts[i] += 1
    return counts


def _filled(n: int, splits: dict[str, float]) -> list[int]:
    """`n` shared out over the splits, at least one to each."""
    if n < len(SPLITS):
        raise UserError(f"params.yaml: prompts.n_pairs and n_unrelated must be at least {len(SPLITS)}, one a split ({n} given)")
    counts = share_out(n, [splits[split] for split in SPLITS])
    while 0 in counts:
        counts[counts.index(max(counts))] -= 1
        counts[counts.index(0)] += 1
    return counts


def _cut(items: Sequence[Any], counts: Iterable[int]) -> list[list[Any]]:
    parts, start = [], 0
    for count in counts:
        parts.append(list(items[start : start + count]))
        start += count
    return parts


def read_rows(path: Path, width: int) -> list[tuple[str, ...]]:
    """The rows of a user's file: `width` 2 for [harmful, safe] pairs, 1 for safe prompts.

    JSON: a list of two-element lists (the write-up's own format), of objects or, for width 1, of strings. JSONL: one of
    those a line. CSV: a header that names the columns. Objects and headers use `harmful` and `safe`; width 1: `safe` or `prompt`.
    Raises UserError naming the file, the row and the fix.
    """
    shape = "[harmful, safe]" if width == 2 else "one safe prompt"
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be read: it is no file; give the path of a .jsonl, .csv or .json file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give prompts.source or prompts.unrelated in params.yaml a path that exists"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None
    suffix = path.suffix.lower()
    try:
        if suffix == ".json":
            raw = json.loads(text, object_pairs_hook=unique_keys)
            if not isinstance(raw, list):
                raise UserError(f"{path}: the file must hold one JSON list of {shape} rows")
            numbered = list(enumerate(raw, 1))
        elif suffix == ".jsonl":
            numbered = []
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    try:
                        numbered.append((number, json.loads(line, object_pairs_hook=unique_keys)))
                    except (ValueError, RecursionError) as error:
                        raise UserError(f"{path}: row {number} is not JSON ({_why(error)}); correct it") from None
        elif suffix == ".csv":
            table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
            columns = table.fieldnames or []
            for name in ("harmful", "safe", "prompt"):
                if columns.count(name) > 1:
                    raise UserError(f"{path}: the column {name} stands twice; delete one")
            numbered = list(enumerate(table, 1))
        else:
            raise UserError(f"{path}: the ending {suffix or '(none)'} is not known; use .jsonl, .csv or .json")
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); correct the row, or save it as .jsonl") from None
    except (ValueError, RecursionError) as error:
        line = f"line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "it"
        raise UserError(f"{path}: {line} is not JSON ({_why(error)}); correct it") from None
    if not numbered:
        raise UserError(f"{path}: the file holds no rows; each must be {shape}")
    return [_row(path, number, row, width, shape) for number, row in numbered]


def _why(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "too many brackets in one another"
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]


def _row(path: Path, number: int, row: Any, width: int, shape: str) -> tuple[str, ...]:
    if isinstance(row, dict):
        names = ("harmful", "safe") if width == 2 else (("safe",) if "safe" in row else ("prompt",))
        missing = [name for name in names if row.get(name) is None]
        if missing:
            raise UserError(f"{path}: row {number} has no {' and no '.join(missing)}; each row must be {shape}")
        row = [row[name] for name in names]
    if isinstance(row, str) and width == 1:
        row = [row]
    if not isinstance(row, list) or len(row) != width or not all(isinstance(half, str) for half in row):
        raise UserError(f"{path}: row {number} is not {shape}, {width} text{'s' if width > 1 else ''} a row")
    halves = tuple(half.strip() for half in row)
    for half in halves:
        if not any(c.isprintable() and not c.isspace() for c in half):
            raise UserError(f"{path}: row {number} has an empty prompt; fill it or delete the row")
        if len(half) > MAX_PROMPT_CHARACTERS:
            raise UserError(f"{path}: row {number} has a prompt of {len(half)} characters; at most {MAX_PROMPT_CHARACTERS}")
        if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in half):
            raise UserError(f"{path}: row {number} has a control character or half a character; delete it")
    if width == 2 and halves[0] == halves[1]:
        raise UserError(f"{path}: row {number} has equal halves; a pair needs a harmful and a safe prompt")
    return halves


def file_rows(
    path: Path, width: int, n: int | None, splits: dict[str, float], near_duplicate: float, seed: int
) -> list[dict[str, Any]]:
    """A user's pairs (width 2) or safe prompts (width 1), at most `n`, checked, and split by groups of near-duplicates."""
    rows = read_rows(path, width)
    first: dict[str, int] = {}
    for number, row in enumerate(rows, 1):
        for half in row:
            if half in first:
                raise UserError(f"{path}: row {number} repeats a prompt of row {first[half]}; delete one of the two")
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
    groups = _groups(rows, near_duplicate)
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    order = random.Random(seed).sample(sorted(members), len(members))
    # Largest groups first, each to the split that lacks most: sizes come out close to what was asked for.
    order.sort(key=lambda group: -len(members[group]))
    wanted = dict(zip(SPLITS, share_out(len(rows), [splits[split] for split in SPLITS]), strict=True))
    split_of: dict[int, str] = {}
    for group in order:
        split = max(SPLITS, key=lambda s: wanted[s])
        split_of[group] = split
        wanted[split] -= len(members[group])
    empty = [split for split in SPLITS if split not in split_of.values()]
    if empty:
        raise UserError(f"{source}: its {len(rows)} rows leave the split {empty[0]} empty; give more rows that differ in wording")
    found = []
    for i, row in enumerate(rows):
        shared = {"split": split_of[groups[i]], "topic": f"group {groups[i]}"}
        if len(row) == 2:
            found.append(
                {
                    "id": f"pair-{i:05d}",
                    **shared,
                    "category": "imported" if categories is None else categories[i],
                    "cue": None,
                    "seen": None,
                    "harmful": row[0],
                    "safe": row[1],
                    "harmful_answer": None,
                    "safe_answer": None,
                }
            )
        else:
            found.append({"id": f"unrelated-{i:05d}", **shared, "safe": row[0]})
    return found


def _groups(rows: Sequence[tuple[str, ...]], near_duplicate: float) -> list[int]:
    """The group of each row: rows joined by near-duplicate halves, directly or through others (union-find)."""
    parent = list(range(len(rows)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    def together(i: int, j: int) -> bool:
        return root(i) == root(j)

    bags = [[words(half) for half in row] for row in rows]
    alike = NearDuplicateIndex(near_duplicate, Counter(word for row in bags for bag in row for word in bag))
    for i, row in enumerate(bags):
        for bag in row:
            # What is in one group already need not be compared: else many prompts that are all alike would take the square of it.
            for group in alike.labels(bag, partial(together, i)):
                parent[max(root(group), root(i))] = min(root(group), root(i))
        for bag in row:
            alike.add(bag, root(i))
    return [root(i) for i in range(len(rows))]
