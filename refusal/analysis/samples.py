"""Two models on the same documents of lm-eval's tasks, by the files that `lm_eval --log_samples` writes."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refusal.io.errors import UserError
from refusal.io.files import read_jsonl
from refusal.stats import holm, intraclass_correlations, paired_difference

_NAME = re.compile(r"samples_(.+?)(?:_\d{4}-\d\d-\d\dT[^_]*)?\.jsonl")


@dataclass(frozen=True)
class Samples:
    """One task's documents in order: their ids, what they hold (equal where it is the same), and their scores within 0 and 1."""

    path: Path
    ids: Sequence[int]
    documents: Sequence[str]
    scores: Sequence[float]


def read_samples(path: Path) -> dict[str, Samples]:
    """The documents of each task: of `samples_<task>_<date>.jsonl`, or of all such files below a folder.

    The score is acc_norm where the task reports it, acc elsewhere, by the first filter of several. Raises UserError for what is
    no such file, and for two of one task.
    """
    tasks: dict[str, Samples] = {}
    for file in [path] if path.is_file() else sorted(path.rglob("samples_*.jsonl")):
        match = _NAME.fullmatch(file.name)
        task = match[1] if match else file.stem
        if task in tasks:
            raise UserError(f"{file}: {tasks[task].path} is of the task {task} too: name one of the two.")
        tasks[task] = _read(file)
    return tasks


def _read(file: Path) -> Samples:
    try:
        rows = read_jsonl(file)
        rows = sorted((row for row in rows if row.get("filter") == rows[0].get("filter")), key=lambda row: row["doc_id"])
        metric = "acc_norm" if "acc_norm" in rows[0] else "acc"
        ids, scores = [row["doc_id"] for row in rows], [float(row[metric]) for row in rows]
        documents = [str(row.get("doc_hash") or json.dumps(row.get("doc"), sort_keys=True)) for row in rows]
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file}: no samples of lm-eval with doc_id and acc or acc_norm in each row ({type(error).__name__}: {error}): "
            "write them with lm_eval --log_samples."
        ) from None
    if len(set(ids)) < len(ids) or not all(0 <= score <= 1 for score in scores):
        raise UserError(f"{file}: a doc_id is there twice, or a score is beyond 0 and 1: write it anew.")
    return Samples(file, ids, documents, scores)


def compare_samples(base: Mapping[str, Samples], edited: Mapping[str, Samples]) -> dict[str, dict[str, Any]]:
    """Of each task of both: `paired_row`, documents of the same content one cluster, with Holm's correction over the tasks.

    Raises UserError where no task is shared, or documents differ.
    """
    shared = [task for task in base if task in edited]
    if not shared:
        raise UserError(f"no task is in both: the base has {', '.join(base) or 'none'}, the other {', '.join(edited) or 'none'}.")
    for task in shared:
        ours, theirs = base[task], edited[task]
        if ours.ids != theirs.ids or ours.documents != theirs.documents:
            said = f"{theirs.path}: its documents are not those of {ours.path}"
            raise UserError(f"{said}: score both on the same, with one --limit.")
    return with_holm({task: paired_row(base[task].scores, edited[task].scores, base[task].documents) for task in shared})


def paired_row(
    base: Sequence[float], edited: Sequence[float], clusters: Sequence[Hashable], icc: float | None = None
) -> dict[str, Any]:
    """Two models' scores within 0 and 1 of the same items: their means, the difference edited - base with its 95 % interval, how
    many items were gained and lost, and McNemar's exact test, None where scores are not 0 and 1.

    icc: the intraclass correlation where more rates tell of it, else that of these two. Source: `paired_difference`; McNemar
    1947, "Note on the Sampling Error of the Difference between Correlated Proportions or Percentages", with the binomial
    distribution.
    """
    from scipy.stats import binomtest  # a second to import

    icc = max(intraclass_correlations([(base, clusters), (edited, clusters)])) if icc is None else icc
    difference, low, high = paired_difference(edited, base, clusters, icc)
    gained, lost = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((edited, base), (base, edited)))
    whole = {*edited, *base} <= {0.0, 1.0}
    p = binomtest(gained, gained + lost, 0.5).pvalue if whole and gained + lost else 1.0 if whole else None
    return {
        **{"n": len(base), "n_clusters": len(set(clusters)), "base": sum(base) / len(base), "edited": sum(edited) / len(base)},
        **{"difference": difference, "difference_low": low, "difference_high": high},
        **{"n_gained": gained, "n_lost": lost, "p": None if p is None else float(p)},
    }


def with_holm(table: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows with `p_holm`: p corrected for the number of rows that have one."""
    corrected = holm({name: row["p"] for name, row in table.items() if row["p"] is not None})
    return {name: row | {"p_holm": corrected.get(name)} for name, row in table.items()}
