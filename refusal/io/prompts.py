"""What the rows of data/prompts hold. All that depends on whether prompts are pairs asks here.

pairs.jsonl has a row for each harmful prompt, with its safe counterpart, `safe`: null in every row where prompts are no pairs.
unrelated.jsonl has the harmless prompts without counterpart, which then are the safe prompts of the study.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refusal.io.errors import UserError

Rows = Sequence[Mapping[str, Any]]
WITHOUT_PAIRS = (
    "what contrasts the halves of a pair is left out, and null: the matched and shuffled pairings, the spectra of paired "
    "differences, and the directions and subspaces found from them (paired_svd, svd_k, optimised)"
)


def is_paired(pairs: Rows) -> bool:
    """Whether harmful prompts have safe counterparts."""
    return all(row["safe"] is not None for row in pairs)


def safe_rows(pairs: Rows, unrelated: Rows) -> Rows:
    """The rows whose `safe` are the safe prompts of a study: the pairs, or where there are none the harmless prompts."""
    return pairs if is_paired(pairs) else unrelated


def prompt_sets(pairs: Rows, unrelated: Rows, splits: Sequence[str]) -> dict[str, list[str]]:
    """The prompts of each set: `<split>.harmful`, `<split>.safe` of pairs alone, `<split>.unrelated` of other safe prompts."""
    parts = [("harmful", pairs, "harmful"), ("safe", pairs, "safe"), ("unrelated", unrelated, "safe")]
    return {
        f"{split}.{name}": [row[field] for row in rows if row["split"] == split]
        for split in splits
        for name, rows, field in parts
        if name != "safe" or is_paired(pairs)
    }


def by_split(rows: Rows) -> dict[str, Rows]:
    """The rows of each split."""
    return {split: [row for row in rows if row["split"] == split] for split in ("train", "val", "test")}


def kept_rows(behaviour: Rows) -> dict[str, list[int]]:
    """Of each train set the places of the prompts that directions are fitted on, from data/behaviour/train.jsonl."""
    sets: dict[str, list[bool]] = {}
    for row in behaviour:
        sets.setdefault(row["set"], []).append(row["kept"])
    return {name: [i for i, keep in enumerate(kept) if keep] for name, kept in sets.items()}


def with_kept(splits: Mapping[str, Rows], kept: Sequence[int]) -> dict[str, Rows]:
    """The rows of each split, of train those in these places."""
    return {**splits, "train": [splits["train"][i] for i in kept]}


def resolve_pairing(wanted: str, method: str, names: Iterable[str]) -> str:
    """The pairing that `auto` means: matched where there are directions of that name, unrelated where the prompts are no pairs.

    names: `<method>-<pairing>`, with or without more after a dot. Raises UserError where the pairing wanted is not among them.
    """
    there = {name.partition(".")[0] for name in names}
    choices = ("matched", "unrelated") if wanted == "auto" else (wanted,)
    if found := [pairing for pairing in choices if f"{method}-{pairing}" in there]:
        return found[0]
    raise UserError(
        f"params.yaml: sweep.pairing: there are no directions {method}-{choices[0]}: run `dvc repro directions`, which writes "
        "them, or where the prompts are no pairs set sweep.pairing to auto"
    )
