"""Prompt pairs and unrelated safe prompts asked of a model behind an OpenAI-compatible endpoint.

The model writes every prompt; here they are only checked, counted and topped up. What is asked for is in
`ask_for_pairs.txt` and `ask_for_unrelated.txt`. A round asks once for every category that is still short; its requests depend on
what earlier rounds gave, and every reply is stored, so that an interrupted run replays to where it was and asks on.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refusal.data.near_duplicates import NearDuplicateIndex, words
from refusal.data.prompts import share_out, split_rows
from refusal.io import store as stores
from refusal.io.endpoint import Endpoint
from refusal.io.errors import UserError
from refusal.io.params import Prompts
from refusal.io.progress import progress
from refusal.io.store import Store
from refusal.judges.endpoint import Chat, Rejected, Unanswered
from refusal.organism import grammar

TEMPERATURE = 1.0
ASKED_AGAIN = 2  # times, where a reply is empty or cut off
SHOWN = 30  # prompts of a category that a request lists as already there, the latest
# What a pair may be: one line a half, at the level of mention, alike but for intent.
MIN_WORDS, MAX_WORDS, MAX_SENTENCES = 3, 40, 2
MAX_LENGTH_RATIO, MIN_OVERLAP = 1.6, 0.3
TELLS_HOW = re.compile(
    r"\bsteps? ?\d|\bsteps?:|(?:^|\s)\d+[.)]\s|^[-*•#]|```|[{}]|\banswer:|\byou(?:'ll| will| should| must| can)\b(?! you)"
    r"|[,;] (?:and )?then\b|\b(?:first|next|finally|afterwards),"
    r"|^(?:sure|certainly|of course|here(?:'s| is| are)|yes|no|sorry|i'm sorry|i can(?:no|')t)\b",
    re.IGNORECASE,
)


_HERE = Path(__file__)


class _Kind(NamedTuple):
    """What is asked for. source: the parameter that asks for it. key: of the list in a reply."""

    name: str
    source: str
    key: str
    instructions: str
    categories: list[str]


PAIRS = _Kind(
    "pairs", "source", "pairs", _HERE.with_name("ask_for_pairs.txt").read_text(encoding="utf-8"), list(grammar.CATEGORIES)
)
UNRELATED = _Kind(
    "unrelated",
    "unrelated",
    "requests",
    _HERE.with_name("ask_for_unrelated.txt").read_text(encoding="utf-8"),
    list(grammar.UNRELATED),
)


def api_pairs(p: Prompts, endpoint: Endpoint, store: Store) -> list[dict[str, Any]]:
    """`n_pairs` pairs over the grammar's categories, in equal shares, split by near-duplicate group.

    Raises UserError as `Chat.run` does, and where `api.max_rounds` rounds do not give so many valid pairs.
    """
    assert p.n_pairs is not None  # checked with the parameters
    rows, categories = _collect(PAIRS, p.n_pairs, p, endpoint, store)
    return split_rows(rows, "params.yaml: prompts.source: api", p.splits.model_dump(), p.near_duplicate, p.seed, categories)


def api_unrelated(p: Prompts, endpoint: Endpoint, store: Store, others: Iterable[str]) -> list[dict[str, Any]]:
    """`n_unrelated` safe prompts on everyday subjects, none a near-duplicate of `others` (the pairs); raises as `api_pairs`."""
    assert p.n_unrelated is not None
    rows, _ = _collect(UNRELATED, p.n_unrelated, p, endpoint, store, others)
    return split_rows(rows, "params.yaml: prompts.unrelated: api", p.splits.model_dump(), p.near_duplicate, p.seed)


def fault(row: Sequence[Any]) -> str | None:
    """What is wrong with a pair (two halves) or a safe prompt (one), or None."""
    for half in row:
        if not isinstance(half, str) or not half.strip():
            return "a half missing" if len(row) == 2 else "empty"
        text = half.strip()
        if len(text.splitlines()) > 1 or not text.isprintable():
            return "not one line"
        if TELLS_HOW.search(text) or len(re.findall(r"[.!?](?=\s|$)", text)) > MAX_SENTENCES:
            return "instructions or answers"
        if not MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return "too short or too long"
    if len(row) == 2:
        bags, lengths = [words(half) for half in row], [len(half.split()) for half in row]
        if bags[0] == bags[1]:
            return "equal halves"
        if max(lengths) > MAX_LENGTH_RATIO * min(lengths) or len(bags[0] & bags[1]) < MIN_OVERLAP * len(bags[0] | bags[1]):
            return "halves unlike in length or wording"
    return None


def _rows(key: str, reply: str) -> list[tuple[Any, ...]]:
    """The rows of a reply as they are, none where the model declined or wrote something else."""
    try:
        rows = json.loads(reply[reply.find("{") : reply.rfind("}") + 1])[key]
    except (ValueError, RecursionError, KeyError, TypeError):
        return []
    if not isinstance(rows, list):
        return []
    if key == "requests":
        return [(row,) for row in rows]
    return [(row.get("harmful"), row.get("safe")) if isinstance(row, dict) else (None, None) for row in rows]


def _collect(
    kind: _Kind, n: int, p: Prompts, endpoint: Endpoint, store: Store, others: Iterable[str] = ()
) -> tuple[list[tuple[str, ...]], list[str]]:
    """`n` valid rows and the category of each, none a near-duplicate of another or of `others`."""
    chat = Chat(endpoint, "params.yaml: endpoint")
    wanted = dict(zip(kind.categories, share_out(n, [1 / len(kind.categories)] * len(kind.categories)), strict=True))
    kept: dict[str, list[tuple[str, ...]]] = {category: [] for category in kind.categories}
    known, left_out, n_batches, n_declined = NearDuplicateIndex(p.near_duplicate, others), Counter[str](), 0, 0
    with progress(n, f"prompts: {kind.name}", "prompt") as bar:
        for round_ in range(p.api.max_rounds):
            there = {c: [row[0] for row in rows] for c, rows in kept.items() if len(rows) < wanted[c]}
            if not there:
                break
            replies = _ask(kind, chat, store, round_, p.api.pairs_per_request, there)
            for category in there:
                rows = _rows(kind.key, replies[category])
                n_batches, n_declined = n_batches + 1, n_declined + (not rows)
                for row in rows:
                    if len(kept[category]) == wanted[category]:
                        break
                    wrong = fault(row)
                    if wrong is None and any(len(known.near(prompt)) for prompt in row):
                        wrong = "near-duplicates"
                    if wrong is not None:
                        left_out[wrong] += 1
                        continue
                    kept[category].append(tuple(prompt.strip() for prompt in row))
                    for prompt in row:
                        known.add(prompt)
                    bar.update()
            bar.set_postfix(declined=n_declined, left_out=left_out.total(), refresh=False)
    counts = ", ".join([f"batches declined {n_declined} of {n_batches}", *(f"{why} {k}" for why, k in left_out.most_common())])
    lacking = {c: wanted[c] - len(rows) for c, rows in kept.items() if len(rows) < wanted[c]}
    if lacking:
        raise UserError(
            f"params.yaml: prompts.{kind.source}: {endpoint.model} gave {n - sum(lacking.values())} of {n} valid {kind.name} in "
            f"{p.api.max_rounds} rounds ({counts}; still lacking: {', '.join(f'{c} {k}' for c, k in lacking.items())}); every "
            f"reply is kept: raise prompts.api.max_rounds, lower prompts.n_{kind.name}, or choose another model"
        )
    print(f"prompts: {n} {kind.name} by {endpoint.model} at {endpoint.base_url}; {counts}", file=sys.stderr)
    return [row for rows in kept.values() for row in rows], [c for c, rows in kept.items() for _ in rows]


def _ask(kind: _Kind, chat: Chat, store: Store, round_: int, number: int, there: dict[str, list[str]]) -> dict[str, str]:
    """{category: the model's reply} of one round, from the store or asked; "" where the endpoint rejects the request, as its
    filters do. `there`: the prompts of each category so far.

    An endpoint that rejects the whole first round has no filter but another trouble: that is an error, and not kept.
    """
    endpoint = chat.endpoint
    messages, keys, replies, rejected = {}, {}, {}, {}
    for category, prompts in there.items():
        user = {"category": category, "number": number, "already_there": prompts[-SHOWN:]}
        messages[category] = [
            {"role": "system", "content": kind.instructions},
            {"role": "user", "content": json.dumps(user, ensure_ascii=False, indent=1)},
        ]
        request = {"base_url": endpoint.base_url, "model": endpoint.model, "messages": messages[category]}
        keys[category] = stores.key("prompts", (), **request, temperature=TEMPERATURE, round=round_)
        if (value := store.get(keys[category])) is not None:
            replies[category] = value.decode()

    def keep(category: str, text: str) -> None:
        store.put(keys[category], text.encode("utf-8", "replace"))
        replies[category] = text

    async def work(category: str) -> str | None:
        for _ in range(1 + ASKED_AGAIN):
            try:
                answer = await chat.ask(messages[category], TEMPERATURE, 500 + 300 * number)
            except Rejected as error:
                rejected[category] = str(error)
                return None
            except Unanswered as error:
                raise chat.error(f"{chat.name} did not answer ({error})", "fix the cause") from None
            if not answer.fault:
                keep(category, answer.text)
                return None
        raise chat.error(f"{chat.name} gave nothing to read: {answer.fault}", "choose a model that answers at once")

    if to_ask := [category for category in there if category not in replies]:
        chat.run(to_ask, work)
    if round_ == 0 and len(rejected) == len(there):
        raise chat.error(f"{chat.name} rejects every request ({next(iter(rejected.values()))})", "fix the cause")
    for category in rejected:
        keep(category, "")
    return replies
