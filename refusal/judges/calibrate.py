"""How well a judge agrees with people: `python -m refusal.judges.calibrate FILE.csv --judge rules` prints one JSON object.

FILE has a header and the columns `prompt`, `completion` and `final_label` (or `label`). Labels are read from their words
(`1_full_compliance`, `2_full_refusal`, `partial`, ...), or as given: `--labels compliance=A,refusal=B,partial_refusal=C`.
An empty completion is a row like any other.
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Sequence

from refusal.errors import RefusalError
from refusal.judges import rules
from refusal.statistics import wilson

CLASSES = ("compliance", "partial_refusal", "refusal")
JUDGES: dict[str, Callable[[str, str], rules.Verdict]] = {"rules": rules.judge}


def calibrate(rows: Sequence[tuple[str, str, str]], judge: Callable[[str, str], rules.Verdict]) -> dict:
    """Agreement of `judge` with labels, over rows of (prompt, completion, label) where label is one of CLASSES.

    `accuracy_binary` is the share of rows where compliance is told from full or partial refusal, with its 95 % Wilson interval;
    `macro_f1` the mean of the classes' F1 (0 for a class that nobody used); `kappa` Cohen's over the three classes (None where
    chance agreement is already complete); `confusion` counts label -> judged. Empty and degenerate completions are judged
    not compliant, and count as refusals where three classes are compared. Raises RefusalError on no rows.
    """
    if not rows:
        raise RefusalError("there are no labelled rows to calibrate on; give a file with at least one")
    confusion = {label: dict.fromkeys(CLASSES, 0) for label in CLASSES}
    for prompt, completion, label in rows:
        judged = judge(prompt, completion).label
        confusion[label][judged if judged in CLASSES else "refusal"] += 1
    n = len(rows)
    labelled = {c: sum(confusion[c].values()) for c in CLASSES}
    judged_as = {c: sum(confusion[label][c] for label in CLASSES) for c in CLASSES}
    right = sum(k for label in CLASSES for c, k in confusion[label].items() if (label == "compliance") == (c == "compliance"))
    low, high = wilson(right, n)
    observed = sum(confusion[c][c] for c in CLASSES) / n
    chance = sum(labelled[c] * judged_as[c] for c in CLASSES) / n**2
    return {
        "n": n,
        "accuracy_binary": right / n,
        "accuracy_binary_low": low,
        "accuracy_binary_high": high,
        "macro_f1": sum(2 * confusion[c][c] / max(1, labelled[c] + judged_as[c]) for c in CLASSES) / len(CLASSES),
        "kappa": None if chance == 1 else (observed - chance) / (1 - chance),
        "confusion": confusion,
    }


def read_labelled(path: str, labels: str | None = None) -> list[tuple[str, str, str]]:
    """The (prompt, completion, label) rows of a CSV file, label one of CLASSES; `labels` as in `--labels`.

    Raises RefusalError where the file, a column or a label cannot be read, with the row (1 is the first after the header).
    """
    given = _mapping(labels) if labels else None
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            table = list(reader)
    except OSError as error:
        raise RefusalError(f"{path} cannot be read ({error.strerror}); give the path of a CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise RefusalError(f"{path} is not a CSV file in UTF-8 ({error}); save it as one") from None
    if not columns:
        raise RefusalError(f"{path} is empty; give a CSV file with the columns prompt, completion and label")
    label_column = "final_label" if "final_label" in columns else "label"
    for column in ("prompt", "completion", label_column):
        if column not in columns:
            wanted = "final_label or label" if column == "label" else column
            raise RefusalError(f"{path} has no column {wanted} (it has {', '.join(columns)}); name one so")
    if not table:
        raise RefusalError(f"{path} has a header but no rows; add labelled completions")
    rows = []
    for number, row in enumerate(table, 1):
        if None in row or None in row.values():
            raise RefusalError(f"{path}, row {number}: it has not as many fields as the header; quote fields that contain commas")
        value = row[label_column].strip()
        label = given.get(value) if given else _guess(value)
        if label is None:
            raise RefusalError(
                f"{path}, row {number}: {label_column} {value!r} is no known label; "
                "say what it means with --labels compliance=...,refusal=...,partial_refusal=..."
            )
        rows.append((row["prompt"], row["completion"], label))
    return rows


def _guess(value: str) -> str | None:
    """The class that a label's words mean. Partial first: `partial_refusal` also says refusal, `non_compliance` compliance."""
    words = value.lower()
    if "partial" in words:
        return "partial_refusal"
    if any(word in words for word in ("refus", "reject", "non-compl", "noncompl", "non_compl", "non compl", "not compl")):
        return "refusal"
    return "compliance" if "compl" in words else None


def _mapping(labels: str) -> dict[str, str]:
    mapping = {}
    for part in labels.split(","):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or name not in CLASSES or not value:
            raise RefusalError(f"--labels: {part!r} is not CLASS=VALUE; use the classes {', '.join(CLASSES)}")
        if value in mapping:
            raise RefusalError(f"--labels: {value!r} is given twice; give each value one class")
        mapping[value] = name
    return mapping


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m refusal.judges.calibrate", description="Agreement of a judge with human labels.")
    parser.add_argument("file", help="CSV with the columns prompt, completion and final_label or label")
    parser.add_argument("--judge", choices=sorted(JUDGES), default="rules")
    parser.add_argument("--labels", help="compliance=A,refusal=B,partial_refusal=C; guessed from the words when not given")
    options = parser.parse_args(arguments)
    try:
        figures = calibrate(read_labelled(options.file, options.labels), JUDGES[options.judge])
    except RefusalError as error:
        sys.exit(str(error))  # to stderr, with exit status 1
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
