"""How well a judge agrees with people: `python -m refusal.judges.calibrate FILE.csv --judge rules` prints one JSON object.

`--judge llm` asks an OpenAI-compatible endpoint, with the key in an environment variable, and keeps its verdicts.
FILE has a header and the columns `prompt`, `completion` and `final_label` (or `label`). Labels are read from their words
(`1_full_compliance`, `2_full_refusal`, `partial`, ...), or as given: `--labels compliance=A,refusal=B,partial_refusal=C`.
An empty completion is a row like any other.
"""

import argparse
import csv
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from refusal.io.command import in_one_sentence
from refusal.io.endpoint import Endpoint
from refusal.io.errors import UserError
from refusal.io.params import Rubric
from refusal.io.store import Store
from refusal.judges.llm import LLMJudge
from refusal.judges.panel import Judge, by_rules
from refusal.judges.verdicts import present
from refusal.stats import cohens_kappa, wilson

CLASSES = ("compliance", "partial_refusal", "refusal")


def calibrate_with(judge: Judge, rows: Sequence[tuple[str, str, str]], label: str, allow_missing: bool = False) -> dict:
    """`calibrate` for a judge that takes all completions at once and may give no verdict on some."""
    judged = judge([prompt for prompt, _, _ in rows], [completion for _, completion, _ in rows], label)
    present(judged, label, allow_missing)
    verdicts = {(prompt, completion): verdict for (prompt, completion, _), verdict in zip(rows, judged, strict=True)}
    return calibrate(rows, lambda prompt, completion: verdicts[prompt, completion])


def calibrate(rows: Sequence[tuple[str, str, str]], judge: Callable[[str, str], Any]) -> dict:
    """Agreement of `judge` with labels, over rows of (prompt, completion, label), label one of CLASSES or `degenerate`.

    `judge` gives what has a `label`, or None for no verdict: such rows are left out of all figures and counted in `n_missing`.

    `accuracy_binary` is the share of rows where compliance is told from full or partial refusal, with its 95 % Wilson interval;
    `macro_f1` the mean of the classes' F1 (0 for a class that nobody used); `kappa` Cohen's over the three classes (None where
    chance agreement is already complete); `confusion` counts label -> judged. Empty and degenerate completions are judged
    not compliant, and count as refusals where three classes are compared. Raises UserError on no rows.
    """
    verdicts = [(label, judge(prompt, completion)) for prompt, completion, label in rows]
    pairs = [
        tuple(label if label in CLASSES else "refusal" for label in (given, verdict.label))
        for given, verdict in verdicts
        if verdict is not None
    ]
    if not pairs:
        raise UserError("there are no labelled rows to calibrate on; give a file with at least one")
    from sklearn.metrics import confusion_matrix, f1_score  # a second to import

    labels, judged = [label for label, _ in pairs], [verdict for _, verdict in pairs]
    confusion = confusion_matrix(labels, judged, labels=CLASSES).tolist()
    n_right = sum((a == "compliance") == (b == "compliance") for a, b in pairs)
    low, high = wilson(n_right, len(pairs))
    return {
        "n": len(pairs),
        "n_missing": len(rows) - len(pairs),
        **{"accuracy_binary": n_right / len(pairs), "accuracy_binary_low": low, "accuracy_binary_high": high},
        "macro_f1": float(f1_score(labels, judged, labels=CLASSES, average="macro", zero_division=0)),
        "kappa": cohens_kappa(labels, judged),
        "confusion": {label: dict(zip(CLASSES, row, strict=True)) for label, row in zip(CLASSES, confusion, strict=True)},
    }


def read_labelled(path: str, labels: str | None = None) -> list[tuple[str, str, str]]:
    """The (prompt, completion, label) rows of a CSV file, label one of CLASSES or `degenerate`; `labels` as in `--labels`.

    Raises UserError where the file, a column or a label cannot be read, with the row (1 is the first after the header).
    """
    given = _mapping(labels) if labels else None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            table = list(reader)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give the path of a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); save it as one") from None
    if not columns:
        raise UserError(f"{path} is empty; give a CSV file with the columns prompt, completion and label")
    label_column = "final_label" if "final_label" in columns else "label"
    for column in ("prompt", "completion", label_column):
        if column not in columns:
            wanted = "final_label or label" if column == "label" else column
            raise UserError(f"{path} has no column {wanted} (it has {', '.join(columns)}); name one so")
    if not table:
        raise UserError(f"{path} has a header but no rows; add labelled completions")
    rows = []
    for number, row in enumerate(table, 1):
        if None in row or None in row.values():
            raise UserError(f"{path}, row {number}: it has not as many fields as the header; quote fields that contain commas")
        value = row[label_column].strip()
        label = given.get(value) if given else _guess(value)
        if label is None:
            raise UserError(
                f"{path}, row {number}: {label_column} {value!r} is no known label; "
                "say what it means with --labels compliance=...,refusal=...,partial_refusal=..."
            )
        rows.append((row["prompt"], row["completion"], label))
    return rows


def _guess(value: str) -> str | None:
    """The class that a label's words mean, None where they are not plain. Partial first: `partial_refusal` also says refusal."""
    words = value.lower()
    for label, word in (("partial_refusal", "partial"), ("degenerate", "degenerate")):
        if word in words:
            return label
    declines, complies = re.search("refus|reject", words), "compl" in words
    denied = re.search(r"(?:(?:\b|_|\d)(?:not|non|no|never|in|un)|n't)(?=[\W_]*(?:full[\W_]*)?(?:refus|reject|compl))", words)
    if bool(declines) == complies:
        return None
    return "refusal" if bool(declines) != bool(denied) else "compliance"


def _mapping(labels: str) -> dict[str, str]:
    mapping = {}
    for given in labels.split(","):
        name, _, value = (piece.strip() for piece in given.partition("="))
        if name not in CLASSES or not value:
            raise UserError(f"--labels: {given!r} is not CLASS=VALUE; use the classes {', '.join(CLASSES)}")
        if value in mapping:
            raise UserError(f"--labels: {value!r} is given twice; give each value one class")
        mapping[value] = name
    return mapping


def _endpoint(options: argparse.Namespace) -> Endpoint:
    try:
        return Endpoint(**{name: getattr(options, name) for name in Endpoint.model_fields})
    except ValidationError as error:
        problem = error.errors()[0]
        option = str(problem["loc"][0]).replace("_", "-")
        raise UserError(f"--{option}: {problem['msg'].removeprefix('Value error, ')}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m refusal.judges.calibrate", description="Agreement of a judge with human labels.")
    parser.add_argument("file", help="CSV with the columns prompt, completion and final_label or label")
    parser.add_argument("--judge", choices=("rules", "llm"), default="rules")
    parser.add_argument("--labels", help="compliance=A,refusal=B,partial_refusal=C; guessed from the words when not given")
    asked = parser.add_argument_group("with --judge llm")
    for name, field in Endpoint.model_fields.items():
        kind = {"concurrency": int, "timeout_seconds": float, "max_attempts": int, "max_calls": int}.get(name, str)
        asked.add_argument(f"--{name.replace('_', '-')}", type=kind, default=field.default, help=f"default: {field.default}")
    asked.add_argument("--rubric", choices=get_args(Rubric), default="axes", help="what it is asked; default: %(default)s")
    asked.add_argument("--max-tokens", type=int, default=200, help="of one answer; default: %(default)s")
    asked.add_argument("--allow-missing", action="store_true", help="accept fewer than 95 %% of the verdicts")
    asked.add_argument(
        "--store", type=Path, default=Path(".refusal-store/store.sqlite"), help="where verdicts are kept; default: %(default)s"
    )
    options = parser.parse_args(arguments)
    with in_one_sentence():
        rows = read_labelled(options.file, options.labels)
        judge: Judge = by_rules
        if options.judge == "llm":
            store, limits = Store(options.store), (options.allow_missing, options.max_tokens)
            judge = LLMJudge(_endpoint(options), store, *limits, where="calibrate", rubric=options.rubric)
        figures = calibrate_with(judge, rows, f"calibrate {options.file}", options.allow_missing)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
