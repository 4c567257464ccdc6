"""Sets of prompts as their authors publish them: recognised by columns or keys, read as they are.

Harmful sets have no safe counterparts, but for two: XSTest's contrasts, each written for a safe prompt of the same file, and
JBB-Behaviors, whose benign twins are a second file with the same indices.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refusal.data.prompt_files import PROMPT, check_prompt, read_records
from refusal.io.errors import UserError


class Item(NamedTuple):
    """A prompt of a set. safe: the counterpart that the set itself gives it. number: JBB's index, which its twin has too."""

    prompt: str
    file: str
    category: str | None = None
    safe: str | None = None
    number: str | None = None


class _Format(NamedTuple):
    """columns: those that tell it. needs: a column of what a prompt cannot be asked without, where it holds anything."""

    name: str
    columns: tuple[str, ...]
    prompt: str
    category: str | None = None
    needs: str | None = None


# The first whose columns are all there.
FORMATS = (
    _Format("XSTest", ("prompt", "type", "focus"), "prompt", "type"),
    _Format("JBB-Behaviors", ("Goal", "Behavior", "Category"), "Goal", "Category"),
    _Format("HarmBench", ("Behavior", "SemanticCategory"), "Behavior", "SemanticCategory", "ContextString"),
    _Format("AdvBench", ("goal", "target"), "goal"),
    _Format("StrongREJECT", ("forbidden_prompt",), "forbidden_prompt", "category"),
    _Format("Alpaca", ("instruction", "input"), "instruction", None, "input"),
    _Format("instructions", ("instruction",), "instruction", "category"),
    _Format("prompts", ("prompt",), "prompt", "category"),
)
XSTEST_TWINS = {"discr": "real_group_nons_discr", "privacy": "privacy_fictional"}  # other contrasts have their safe type's name


def read_set(path: Path, harmful: bool) -> tuple[list[Item], Counter[str]]:
    """The harmful or the harmless prompts of a file, and how many rows were left out, by the reason.

    A file of texts alone (one a line, or a JSON list) is a set too. Raises UserError naming the file, the row and the fix.
    """
    records = read_records(path, PROMPT)
    if isinstance(records[0][1], str):
        rows = [(f"{path}: row {number}", {"prompt": row}) for number, row in records]
        format_ = FORMATS[-1]
    else:
        rows = [(f"{path}: row {number}", row) for number, row in records]
        format_ = _format_of(path, records[0][1])
    items, left_out = list[Item](), Counter[str]()
    for place, row in rows:
        if not isinstance(row, dict) or not isinstance(text := row.get(format_.prompt), str):
            raise UserError(f"{place} has no {format_.prompt}, the prompt in {format_.name}; fill it or delete the row")
        if format_.needs and str(row.get(format_.needs) or "").strip():
            left_out[f"ask about a text of their own ({format_.needs})"] += 1
            continue
        category = row.get(format_.category) if format_.category else None
        number = next((str(row[key]) for key in ("Index", "index", "") if row.get(key) is not None), None)
        number = number if format_.name == "JBB-Behaviors" else None
        items.append(Item(check_prompt(place, text), str(path), str(category) if category else None, number=number))
    if format_.name == "XSTest":
        return _xstest(items, [row for _, row in rows], harmful)
    return items, left_out


def safe_prompts(path: Path) -> list[Item]:
    """The safe prompts that a file has beside its harmful ones: XSTest's. Raises UserError as `read_set` does."""
    first = read_records(path, PROMPT)[0][1]
    return read_set(path, harmful=False)[0] if isinstance(first, dict) and _format_of(path, first) is FORMATS[0] else []


def with_twins(harmful: Sequence[Item], benign: Sequence[Item]) -> list[Item]:
    """The harmful prompts of JBB-Behaviors whose benign twin, of the same index, is there; none where some are of other sets."""
    if any(item.number is None for item in harmful):
        return []
    twin = {item.number: item.prompt for item in benign if item.number is not None}
    return [item._replace(safe=twin[item.number]) for item in harmful if item.number in twin]


def _format_of(path: Path, first: Any) -> _Format:
    columns = list(first) if isinstance(first, dict) else []
    for format_ in FORMATS:
        if set(format_.columns) <= set(columns):
            return format_
    known = "; ".join(f"{one.name}: {', '.join(one.columns)}" for one in FORMATS)
    raise UserError(f"{path}: its rows are of no set that is known ({known}); name the column or key of the prompts `prompt`")


def _xstest(items: Iterable[Item], rows: Iterable[Mapping[str, Any]], harmful: bool) -> tuple[list[Item], Counter[str]]:
    """The contrasts with their counterparts, in each type in the order of ids; or the safe prompts."""
    types: dict[str, list[Item]] = {}
    numbered = sorted(zip(rows, items, strict=True), key=lambda one: _number(one[0].get("id")))
    for _, item in numbered:
        types.setdefault(str(item.category), []).append(item)
    safe = [item for name, some in types.items() if not name.startswith("contrast_") for item in some]
    if not harmful:
        return safe, Counter({"are its contrasts, which are harmful": sum(map(len, types.values())) - len(safe)})
    found: list[Item] = []
    for name, contrasts in types.items():
        if name.startswith("contrast_"):
            kind = name.removeprefix("contrast_")
            twins = types.get(XSTEST_TWINS.get(kind, kind), [])
            matched = [one.prompt for one in twins] if len(twins) == len(contrasts) else [None] * len(contrasts)
            found += [one._replace(category=kind, safe=twin) for one, twin in zip(contrasts, matched, strict=True)]
    unused = len(safe) - sum(item.safe is not None for item in found)
    return found, Counter({"are safe and have no contrast": unused} if unused else {})


def _number(text: Any) -> int:
    return int("".join(c for c in str(text) if c.isdecimal() and c.isascii())[:18] or 0)
