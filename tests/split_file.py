"""A user's file of pairs, or of safe prompts, as the rows that the prompts stage makes of it."""

from pathlib import Path
from typing import Any

import yaml
from place import COMMITTED

from refusal.data.prompts import prompts_of
from refusal.io.params import Params


def file_rows(
    path: Path, width: int, n: int | None, splits: dict[str, float], near_duplicate: float, seed: int
) -> list[dict[str, Any]]:
    """`width` 2: pairs; 1: safe prompts. The others are a few of the grammar's."""
    raw = yaml.safe_load(COMMITTED)
    raw["prompts"] |= {"splits": splits, "near_duplicate": near_duplicate, "seed": seed}
    source, count = ("source", "n_pairs") if width == 2 else ("unrelated", "n_unrelated")
    raw["prompts"] |= {"n_pairs": 3, "n_unrelated": 3, source: str(path), count: n}
    pairs, unrelated, _ = prompts_of(Params.model_validate(raw).prompts, Path("none"))
    return pairs if width == 2 else unrelated
