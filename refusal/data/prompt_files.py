"""A user's file of prompts, read and checked row by row."""

import csv
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

from refusal.io.errors import UserError
from refusal.io.files import unique_keys

PROMPT = "one prompt"  # what a row of a published set must be
MAX_PROMPT_CHARACTERS = 4000  # a request at the level of mention is one line


def read_rows(path: Path, width: int) -> list[tuple[str, ...]]:
    """The rows of a user's file: `width` 2 for [harmful, safe] pairs, 1 for safe prompts.

    JSON: a list of two-element lists (the write-up's own format), of objects or, for width 1, of strings. JSONL: one of
    those a line. CSV: a header that names the columns. Objects and headers use `harmful` and `safe`; width 1: `safe` or `prompt`.
    Raises UserError naming the file, the row and the fix.
    """
    shape = "[harmful, safe]" if width == 2 else "one safe prompt"
    return [_check_row(f"{path}: row {number}", row, width, shape) for number, row in read_records(path, shape)]


def read_records(path: Path, shape: str) -> list[tuple[int, Any]]:
    """The rows of a file with their numbers, whatever they are; `shape` is what each must be, as messages have it."""
    text, suffix = _read_text(path), path.suffix.lower()
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    numbered: list[tuple[int, Any]]
    if suffix == ".json":
        rows = _parse(text, path)
        if not isinstance(rows, list):
            raise UserError(f"{path}: the file must hold one JSON list of {shape} rows")
        numbered = list(enumerate(rows, 1))
    elif suffix == ".jsonl":
        numbered = [(number, _parse(line, path, f"row {number}")) for number, line in lines]
    elif suffix in (".csv", ".tsv"):
        numbered = list(enumerate(_parse_csv(text, path), 1))
    elif suffix == ".txt" and shape == PROMPT:
        numbered = [*lines]
    else:
        endings = ".jsonl, .csv, .json or .txt" if shape == PROMPT else ".jsonl, .csv or .json"
        raise UserError(f"{path}: the ending {suffix or '(none)'} is not known; use {endings}")
    if not numbered:
        raise UserError(f"{path}: the file holds no rows; each must be {shape}")
    return numbered


def _read_text(path: Path) -> str:
    if path.exists() and not path.is_file():
        raise UserError(f"{path}: cannot be read: it is no file; give the path of a .jsonl, .csv or .json file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; give prompts.source, unrelated, harmful or harmless in params.yaml a path that exists"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); save it as UTF-8") from None


def _parse(text: str, path: Path, place: str = "it") -> Any:
    """A JSON value; `place` is what of the file it is."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys)
    except RecursionError:
        reason = "brackets are nested too deeply"
    except json.JSONDecodeError as error:
        reason = error.msg
        place = f"line {error.lineno}" if place == "it" else place
    except ValueError as error:
        reason = str(error).partition(";")[0]
    raise UserError(f"{path}: {place} is not JSON ({reason}); correct it")


def _parse_csv(text: str, path: Path) -> list[dict]:
    try:
        header = text.partition("\n")[0]
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True, delimiter="," if "," in header else "\t")
        columns = table.fieldnames or []
        for name in filter(None, columns):
            if columns.count(name) > 1:
                raise UserError(f"{path}: {name} is a duplicate column; delete one")
        rows = list(table)
        for number, row in enumerate(rows, 1):
            if None in row:
                raise UserError(f"{path}: row {number} has more fields than the header; quote fields that contain commas")
        return rows
    except csv.Error as error:
        raise UserError(f"{path}: cannot be read as CSV ({error}); correct the row, or save it as .jsonl") from None


def _check_row(place: str, row: Any, width: int, shape: str) -> tuple[str, ...]:
    """The prompts of a row, stripped; `place` is the file and the row's number."""
    if isinstance(row, dict):
        names = ("harmful", "safe") if width == 2 else (("safe",) if "safe" in row else ("prompt",))
        missing = [name for name in names if row.get(name) is None]
        if missing:
            raise UserError(f"{place} has no {' and no '.join(missing)}; each row must be {shape}")
        row = [row[name] for name in names]
    if isinstance(row, str) and width == 1:
        row = [row]
    if not isinstance(row, list) or len(row) != width or not all(isinstance(prompt, str) for prompt in row):
        raise UserError(f"{place} is not {shape}, {width} text{'s' if width > 1 else ''} a row")
    prompts = tuple(check_prompt(place, prompt) for prompt in row)
    if width == 2 and prompts[0] == prompts[1]:
        raise UserError(f"{place} has equal halves; a pair needs a harmful and a safe prompt")
    return prompts


def check_prompt(place: str, text: str) -> str:
    """The prompt, stripped; `place` is the file and the row's number. Raises UserError where it is none."""
    prompt = text.strip()
    if not any(c.isprintable() and not c.isspace() for c in prompt):
        raise UserError(f"{place} has an empty prompt; fill it or delete the row")
    if len(prompt) > MAX_PROMPT_CHARACTERS:
        raise UserError(f"{place} has a prompt of {len(prompt)} characters; at most {MAX_PROMPT_CHARACTERS}")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in prompt):
        raise UserError(f"{place} has a control character or an unpaired surrogate; delete it")
    return prompt
