"""Sets of prompts on which nothing was chosen: found or fetched, and rid of what the study's own prompts say already.

A set that has a `sha256` is that very file or none, wherever it comes from.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
from huggingface_hub import constants

from refusal.data.near_duplicates import NearDuplicateIndex
from refusal.data.published_sets import read_set, safe_prompts
from refusal.io.errors import UserError
from refusal.io.files import write_whole
from refusal.io.prompts import Rows
from refusal.io.section import PromptSet
from refusal.stats import subsample_indices

MOST_BYTES = 100_000_000  # of a file of prompts
HALVES = ("harmful", "safe")


class HeldOut(NamedTuple):
    """What is asked of a set, by half: rows with `id`, `category`, `topic` (the category, or the prompt where it has none) and
    `harmful` or `safe`, the prompt. n_read: how many prompts the file has; n_near_duplicates: how many of these are left out."""

    rows: Mapping[str, Rows]
    n_read: Mapping[str, int]
    n_near_duplicates: Mapping[str, int]


def held_out(
    paths: Mapping[str, Path], own: Iterable[str], near_duplicate: float, n: int, seed: int
) -> tuple[dict[str, HeldOut], list[str]]:
    """At most `n` prompts of each half of each set, drawn by the seed, and what is to be said of the files.

    paths: by the name of the set. own: all prompts of the study; their near-duplicates, and those of a set before, are left out.
    Raises UserError as `read_set` does, and for a set of which no harmful prompt is left.
    """
    sets, said, index = dict[str, HeldOut](), list[str](), NearDuplicateIndex(near_duplicate, own)
    for name, path in paths.items():
        harmful, unusable = read_set(path, harmful=True)
        safe = safe_prompts(path)
        if not safe:  # else what is unusable as harmful is safe
            said += [f"{name}: {count} rows {why}, and are left out" for why, count in unusable.items()]
        items = dict(zip(HALVES, (harmful, safe), strict=True))
        kept = {half: [i for i, item in enumerate(some) if not len(index.near(item.prompt))] for half, some in items.items()}
        if not kept["harmful"]:
            raise UserError(
                f"{path}: none of its {len(harmful)} harmful prompts is new: they are near-duplicates of the study's own or of "
                "a set before; take it out of generalization.sets"
            )
        for item in [*harmful, *safe]:
            index.add(item.prompt)
        rows: dict[str, Rows] = {}
        for half, some in items.items():
            drawn = [kept[half][i] for i in subsample_indices(len(kept[half]), n, seed)]
            rows[half] = [_row(f"{name}-{half}-{i:05d}", half, some[i].prompt, some[i].category) for i in drawn]
        n_read = {half: len(some) for half, some in items.items()}
        sets[name] = HeldOut(rows, n_read, {half: n_read[half] - len(kept[half]) for half in HALVES})
    return sets, said


def _row(id_: str, half: str, prompt: str, category: str | None) -> dict[str, Any]:
    return {"id": id_, "category": category, "topic": category or prompt, half: prompt}


def locate(wanted: PromptSet, kept: Path, copies: Path | None) -> Path:
    """The file of a set: where it should be; else, of one with a hash, what an earlier run put into the folder `kept`; else a
    copy of that content from the folder `copies`, whatever its name; else from its url.

    Raises UserError for a file of another hash, and where there is none to be had.
    """
    file = Path(wanted.file)
    if file.is_file():
        if wanted.sha256 not in (None, found := _sha256(file.read_bytes())):
            raise UserError(
                f"{file}: its SHA-256 is {found}, and generalization.sets in params.yaml says {wanted.sha256}: take the file "
                "away, or correct sha256"
            )
        return file
    if wanted.sha256 is None:
        raise UserError(f"{file}: no such file: put the set there, or give it a url and its sha256 in generalization.sets")
    place = kept / wanted.sha256 / file.name
    if not place.is_file() or _sha256(place.read_bytes()) != wanted.sha256:
        content = _copied(wanted.sha256, copies)
        write_whole(place, _fetched(wanted) if content is None else content)
    return place


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _copied(sha256: str, copies: Path | None) -> bytes | None:
    """The content of the file in a folder that has this hash."""
    if copies is None:
        return None
    if not copies.is_dir():
        raise UserError(f"REAL_SETS: {copies} is no folder; give one that holds copies of the sets, or none to fetch them")
    files = (path for path in sorted(copies.iterdir()) if path.is_file() and path.stat().st_size <= MOST_BYTES)
    return next((content for content in (path.read_bytes() for path in files) if _sha256(content) == sha256), None)


def _fetched(wanted: PromptSet) -> bytes:
    by_hand = f"put the file of SHA-256 {wanted.sha256} there, or a copy of it into a folder that REAL_SETS names"
    if wanted.url is None:
        raise UserError(f"{wanted.file}: no such file, and no url to fetch it from: {by_hand}")
    if constants.is_offline_mode():
        raise UserError(f"{wanted.file}: not fetched yet, and HF_HUB_OFFLINE is set: unset it, or {by_hand}")
    content = b""
    try:
        with httpx2.stream("GET", wanted.url, follow_redirects=True, timeout=60) as response:
            response.raise_for_status()
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > MOST_BYTES:
                    raise UserError(f"{wanted.url}: is larger than {MOST_BYTES // 1_000_000} MB, which is no set of prompts")
    except (httpx2.HTTPError, httpx2.InvalidURL, ImportError, ValueError) as error:  # the last two of proxies
        why = " ".join(str(error).split())[:150] or type(error).__name__
        raise UserError(f"{wanted.url}: cannot be fetched ({why}): run again, or {by_hand}") from None
    if (found := _sha256(content)) != wanted.sha256:
        raise UserError(f"{wanted.url}: its content has the SHA-256 {found}, and not that of generalization.sets: {by_hand}")
    return content
