"""Prompt pairs and unrelated safe prompts asked of a model behind an OpenAI-compatible endpoint.

The model writes every prompt; here they are only checked, counted and topped up. What is asked for is in
`ask_for_pairs.txt` and `ask_for_unrelated.txt`. A round asks once for every category that is still short; its requests depend on
what earlier rounds gave, and every answer is stored, so that an interrupted run replays to where it was and asks on.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refusal.data.prompts import NearDuplicateIndex, share_out, split_rows, words
from refusal.io import store as stores
from refusal.io.errors import UserError
from refusal.io.params import Endpoint, PromptsApi
from refusal.io.store import Store, progress
from refusal.judges.endpoint import Chat, Rejected, Unanswered
from refusal.organism import grammar

TEMPERATURE = 1.0
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


def api_pairs(
    n: int, splits: dict[str, float], near_duplicate: float, seed: int, api: PromptsApi, endpoint: Endpoint, store: Store
) -> list[dict[str, Any]]:
    """`n` pairs over the grammar's categories, in equal shares, split by near-duplicate group.

    Raises UserError as `Chat.run` does, and where `api.max_rounds` rounds do not give `n` valid pairs.
    """
    rows, categories = _collect("pairs", list(grammar.CATEGORIES), n, near_duplicate, api, endpoint, store)
    return split_rows(rows, "params.yaml: prompts.source: api", splits, near_duplicate, seed, categories)


def api_unrelated(
    n: int,
    splits: dict[str, float],
    near_duplicate: float,
    seed: int,
    api: PromptsApi,
    endpoint: Endpoint,
    store: Store,
    others: Iterable[str],
) -> list[dict[str, Any]]:
    """`n` safe prompts on everyday subjects, none of them a near-duplicate of `others` (the pairs); raises as `api_pairs`."""
    rows, _ = _collect("requests", list(grammar.UNRELATED), n, near_duplicate, api, endpoint, store, others)
    return split_rows(rows, "params.yaml: prompts.unrelated: api", splits, near_duplicate, seed)


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


class _Known:
    """All prompts so far, by their words."""

    def __init__(self, near_duplicate: float, texts: Iterable[str] = ()) -> None:
        self.alike = NearDuplicateIndex(near_duplicate, {})
        self.add(texts)

    def has_like(self, text: str) -> bool:
        return any(True for _ in self.alike.labels(words(text), lambda _: False))

    def add(self, texts: Iterable[str]) -> None:
        for text in texts:
            self.alike.add(words(text), None)


def _rows(what: str, content: str) -> list[tuple[Any, ...]]:
    """The rows of an answer as they are, none where the model declined or wrote something else."""
    try:
        found = json.loads(content[content.find("{") : content.rfind("}") + 1])[what]
    except (ValueError, RecursionError, KeyError, TypeError):
        return []
    if not isinstance(found, list):
        return []
    if what == "requests":
        return [(row,) for row in found]
    return [(row.get("harmful"), row.get("safe")) if isinstance(row, dict) else (None, None) for row in found]


def _collect(
    what: str,
    categories: list[str],
    n: int,
    near_duplicate: float,
    api: PromptsApi,
    endpoint: Endpoint,
    store: Store,
    others: Iterable[str] = (),
) -> tuple[list[tuple[str, ...]], list[str]]:
    """`n` valid rows and the category of each. `what` is the answer's key: `pairs` or `requests`."""
    name = "pairs" if what == "pairs" else "unrelated"
    system = Path(__file__).with_name(f"ask_for_{name}.txt").read_text(encoding="utf-8")
    chat = Chat(endpoint, "params.yaml: endpoint")
    wanted = dict(zip(categories, share_out(n, [1 / len(categories)] * len(categories)), strict=True))
    kept: dict[str, list[tuple[str, ...]]] = {category: [] for category in categories}
    known, left_out, batches, declined = _Known(near_duplicate, others), Counter[str](), 0, 0
    with progress(n, f"prompts: {name}", "prompt") as bar:
        for round_ in range(api.max_rounds):
            short = [category for category in categories if len(kept[category]) < wanted[category]]
            if not short:
                break
            answers = _answers(
                chat, api.pairs_per_request, store, system, what, round_, {c: [row[0] for row in kept[c]] for c in short}
            )
            for category in short:
                batches += 1
                rows = _rows(what, answers[category])
                declined += not rows
                for row in rows:
                    if len(kept[category]) == wanted[category]:
                        break
                    wrong = fault(row)
                    halves = tuple(half.strip() for half in row) if wrong is None else ()
                    if wrong is None and any(known.has_like(half) for half in halves):
                        wrong = "near-duplicates"
                    if wrong is not None:
                        left_out[wrong] += 1
                        continue
                    kept[category].append(halves)
                    known.add(halves)
                    bar.update()
            bar.set_postfix(declined=declined, left_out=left_out.total(), refresh=False)
    said = ", ".join([f"batches declined {declined} of {batches}", *(f"{why} {k}" for why, k in left_out.most_common())])
    made = sum(map(len, kept.values()))
    if made < n:
        lacking = ", ".join(
            f"{category} {wanted[category] - len(kept[category])}"
            for category in categories
            if len(kept[category]) < wanted[category]
        )
        count, source = ("n_pairs", "source") if what == "pairs" else ("n_unrelated", "unrelated")
        raise UserError(
            f"params.yaml: prompts.{source}: {endpoint.model} gave {made} of {n} valid {name} in {api.max_rounds} rounds "
            f"({said}; still lacking: {lacking}); every answer is kept: raise prompts.api.max_rounds, lower prompts.{count}, or choose "
            "another model"
        )
    print(f"prompts: {n} {name} by {endpoint.model} at {endpoint.base_url}; {said}", file=sys.stderr)
    return [row for c in categories for row in kept[c]], [c for c in categories for _ in kept[c]]


def _answers(
    chat: Chat, number: int, store: Store, system: str, what: str, round_: int, known: dict[str, list[str]]
) -> dict[str, str]:
    """{category: the model's answer} of one round; "" where the endpoint rejects the request, as its filters do.

    An endpoint that rejects the whole first round has no filter but another trouble: that is an error, and not kept.
    """
    endpoint = chat.endpoint
    messages, keys, found, rejected = {}, {}, {}, {}
    for category, texts in known.items():
        user = {"category": category, "number": number, "already_there": texts[-SHOWN:]}
        messages[category] = [
            {"role": "system", "content": system},
            {"role": "user", "content": json.dumps(user, ensure_ascii=False, indent=1)},
        ]
        keys[category] = stores.key(
            "prompts",
            (),
            base_url=endpoint.base_url,
            model=endpoint.model,
            messages=messages[category],
            temperature=TEMPERATURE,
            round=round_,
        )
        if (value := store.get(keys[category])) is not None:
            found[category] = value.decode()

    async def work(category: str) -> str | None:
        try:
            answer = await chat.ask(messages[category], TEMPERATURE, 500 + 300 * number)
        except Rejected as error:
            rejected[category] = str(error)
            return None
        except Unanswered as error:
            raise chat.error(f"{endpoint.model} at {endpoint.base_url} did not answer ({error})", "mend the cause") from None
        keep(category, answer.text)
        return None

    def keep(category: str, text: str) -> None:
        store.put(keys[category], text.encode("utf-8", "replace"))
        found[category] = text

    todo = [category for category in known if category not in found]
    if todo:
        chat.run(todo, work)
    if round_ == 0 and len(rejected) == len(known):
        why = next(iter(rejected.values()))
        raise chat.error(f"{endpoint.model} at {endpoint.base_url} rejects every request ({why})", "mend the cause")
    for category in rejected:
        keep(category, "")
    return found
