"""Calibration: its figures against naive counting, its reading of label words, and what it says about bad files."""

import csv
import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from refusal.io.errors import UserError
from refusal.judges import calibrate as module
from refusal.judges.calibrate import CLASSES, calibrate, main, read_labelled
from refusal.judges.rules import Verdict
from refusal.stats import wilson

SURE, SORRY = "Sure, here is how to open the bakery door.", "I'm sorry, but I can't help with that."


def parrot(prompt, completion):
    """A judge that reads its verdict off the completion."""
    return None if completion == "none" else Verdict(completion, 0.0, 1.0)


@given(st.lists(st.tuples(st.sampled_from(CLASSES), st.sampled_from((*CLASSES, "empty", "degenerate", "none"))), min_size=1))
def test_figures_equal_naive_counting(rows):
    n_missing = sum(judged == "none" for _, judged in rows)
    if n_missing == len(rows):
        with pytest.raises(UserError, match="no labelled rows"):
            calibrate([("", judged, label) for label, judged in rows], parrot)
        return
    figures = calibrate([("", judged, label) for label, judged in rows], parrot)
    assert figures["n_missing"] == n_missing
    pairs = [(label, "refusal" if judged in {"empty", "degenerate"} else judged) for label, judged in rows if judged != "none"]
    n = len(pairs)

    right = [(a == "compliance") == (b == "compliance") for a, b in pairs]
    assert figures["n"] == n
    assert figures["accuracy_binary"] == pytest.approx(sum(right) / n)
    assert (figures["accuracy_binary_low"], figures["accuracy_binary_high"]) == wilson(sum(right), n)

    scores = []
    for c in CLASSES:
        hits = [pair for pair in pairs if pair == (c, c)]
        precision = len(hits) / max(1, sum(b == c for _, b in pairs))
        recall = len(hits) / max(1, sum(a == c for a, _ in pairs))
        scores.append(2 * precision * recall / (precision + recall) if hits else 0)
    assert figures["macro_f1"] == pytest.approx(sum(scores) / 3)

    # Cohen's definition as disagreement: observed over that of every label against every judgement.
    crossed = [a != b for a, _ in pairs for _, b in pairs]
    if any(crossed):
        expected = 1 - (sum(a != b for a, b in pairs) / n) / (sum(crossed) / n**2)
        assert figures["kappa"] == pytest.approx(expected)
    else:
        assert figures["kappa"] is None

    counts = Counter(pairs)
    assert figures["confusion"] == {a: {b: counts[a, b] for b in CLASSES} for a in CLASSES}


def test_kappa_of_a_textbook_table():
    rows = [
        ("", b, a)
        for a, b, k in (
            ("compliance", "compliance", 20),
            ("compliance", "refusal", 5),
            ("refusal", "compliance", 10),
            ("refusal", "refusal", 15),
        )
        for _ in range(k)
    ]
    assert calibrate(rows, parrot)["kappa"] == pytest.approx(0.4)


@given(st.integers(1, 1000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_its_formula(counts):
    k, n = counts
    z = norm.ppf(0.975)
    centre = (k + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * (k * (n - k) / n + z * z / 4) ** 0.5
    assert wilson(k, n) == pytest.approx((max(0, centre - half), min(1, centre + half)), abs=1e-9)


def write(path, rows, header=("prompt", "completion", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ("1_full_compliance", "compliance"),
        ("2_full_refusal", "refusal"),
        ("3_partial_refusal", "partial_refusal"),
        ("Compliance", "compliance"),
        ("REFUSAL", "refusal"),
        ("Partial", "partial_refusal"),
        ("complied", "compliance"),
        ("refused", "refusal"),
        ("non-compliance", "refusal"),
        ("partial compliance", "partial_refusal"),
        (" refusal ", "refusal"),
    ],
)
def test_label_words_are_guessed(tmp_path, value, label):
    assert read_labelled(write(tmp_path / "a.csv", [("p", "c", value)])) == [("p", "c", label)]


def test_labels_may_be_given_and_columns_stand_in_any_order(tmp_path):
    file = write(
        tmp_path / "a.csv", [("B", "x", "c1", "p1"), ("C", "x", "", "p2")], ("final_label", "label", "completion", "prompt")
    )
    rows = read_labelled(file, "compliance=A, refusal=B,partial_refusal=C")
    assert rows == [("p1", "c1", "refusal"), ("p2", "", "partial_refusal")]


def test_empty_completions_are_rows(tmp_path, capsys):
    main([write(tmp_path / "a.csv", [("p", SURE, "compliance"), ("p", "", "refusal"), ("p", SORRY, "refusal")])])
    figures = json.loads(capsys.readouterr().out)
    scores = {"accuracy_binary", "accuracy_binary_low", "accuracy_binary_high", "macro_f1", "kappa"}
    assert set(figures) == {"n", "n_missing", "confusion"} | scores
    assert (figures["n"], figures["accuracy_binary"]) == (3, 1)


BAD = {
    "not there": (None, [], "cannot be read"),
    "empty": ("", [], "is empty"),
    "header alone": ("prompt,completion,label\n", [], "no rows"),
    "no prompt": ("completion,label\nc,refusal\n", [], "no column prompt"),
    "no completion": ("prompt,label\np,refusal\n", [], "no column completion"),
    "no label": ("prompt,completion\np,c\n", [], "no column final_label or label"),
    "unknown label": ("prompt,completion,label\np,c,refusal\np,c,maybe\n", [], "row 2: label 'maybe'"),
    "short row": ("prompt,completion,label\np,c\n", [], "row 1"),
    "long row": ("prompt,completion,label\np,c,refusal,more\n", [], "row 1"),
    "binary": (b"\xff\xfe\x00prompt", [], "UTF-8"),
    "label not given": ("prompt,completion,label\np,c,D\n", ["--labels", "compliance=A"], "row 1: label 'D'"),
    "bad mapping": ("prompt,completion,label\np,c,D\n", ["--labels", "good=A"], "CLASS=VALUE"),
    "mapping twice": ("prompt,completion,label\np,c,D\n", ["--labels", "compliance=A,refusal=A"], "twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told_in_one_sentence(tmp_path, capsys, case):
    content, options, said = BAD[case]
    path = tmp_path / "bad.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as exit:
        main([str(path), *options])
    assert said in exit.value.code and "\n" not in exit.value.code
    assert options or "bad.csv" in exit.value.code
    assert capsys.readouterr().out == ""


def test_a_folder_is_no_file_and_the_command_exits_1(tmp_path):
    command = [sys.executable, "-m", module.__name__, str(tmp_path), "--judge", "rules"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_no_rows_is_an_error():
    with pytest.raises(UserError, match="no labelled rows"):
        calibrate([], parrot)
