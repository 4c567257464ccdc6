"""Rows as files: JSON lines between stages, CSV for plots."""

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from refusal.io.files import write_whole


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, keys in the order given."""
    write_whole(path, *((json.dumps(row, ensure_ascii=False) + "\n").encode() for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read rows written by `write_jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def csv_text(rows: Sequence[dict[str, Any]]) -> str:
    """CSV of rows that share their keys, the form that DVC draws; floats in their shortest exact form, missing values empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
