"""Calibration: its figures against naive counting, its reading of label words, and what it says about bad files."""

import csv
import json
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refusal.io.errors import UserError
from refusal.judges import calibrate as module
from refusal.judges.calibrate import CLASSES, calibrate, main, read_labelled
from refusal.judges.rules import Verdict
from refusal.stats import wilson

SURE, SORRY = "Sure, here is how to open the bakery door.", "I'm sorry, but I can't help with that."


def parrot(prompt, completion):
    """A judge that reads its verdict off the completion."""
    return None if completion == "none" else Verdict(completion, 0.0, 1.0)


JUDGED = st.sampled_from((*CLASSES, "empty", "degenerate", "none"))


@given(st.lists(st.tuples(st.sampled_from(CLASSES), JUDGED), min_size=1))
@settings(deadline=None)  # the first imports scikit-learn
def test_figures_equal_naive_counting(rows):
    labelled = [("", judged, label) for label, judged in rows]
    pairs = [(label, "refusal" if judged in {"empty", "degenerate"} else judged) for label, judged in rows if judged != "none"]
    if not pairs:
        with pytest.raises(UserError, match="no labelled rows"):
            calibrate(labelled, parrot)
        return
    figures, n = calibrate(labelled, parrot), len(pairs)
    assert (figures["n"], figures["n_missing"]) == (n, len(rows) - n)
    right = [(a == "compliance") == (b == "compliance") for a, b in pairs]
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
    counts = {
        ("compliance", "compliance"): 20,
        ("compliance", "refusal"): 5,
        ("refusal", "compliance"): 10,
        ("refusal", "refusal"): 15,
    }
    assert calibrate([("", b, a) for (b, a), k in counts.items() for _ in range(k)], parrot)["kappa"] == pytest.approx(0.4)


def test_degenerate_text_is_no_compliance_and_a_refusal_where_three_classes_are_compared():
    figures = calibrate([("", "refusal", "degenerate"), ("", "compliance", "compliance")], parrot)
    assert figures["accuracy_binary"] == 1 and figures["confusion"]["refusal"]["refusal"] == 1


def write(path, rows, header=("prompt", "completion", "label")):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


GUESSED = {
    "compliance": ["1_full_compliance", "Compliance", "complied", "not refused", "no refusal", "non-refusal", "didn't refuse"],
    "refusal": ["2_full_refusal", "REFUSAL", "refused", "non-compliance", " refusal ", "incompliant", "does not comply"],
    "partial_refusal": ["3_partial_refusal", "Partial", "partial compliance"],
    "degenerate": ["degenerate", "4_degenerate"],
}


@pytest.mark.parametrize(("label", "value"), [(label, value) for label, values in GUESSED.items() for value in values])
def test_label_words_are_guessed(tmp_path, label, value):
    assert read_labelled(write(tmp_path / "a.csv", [("p", "c", value)])) == [("p", "c", label)]


def test_labels_may_be_given_and_columns_stand_in_any_order(tmp_path):
    header = "final_label", "label", "completion", "prompt"
    file = write(tmp_path / "a.csv", [("B", "x", "c1", "p1"), ("C", "x", "", "p2")], header)
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
    "two meanings": ("prompt,completion,label\np,c,refusal or compliance\n", [], "row 1: label"),
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


def test_a_bad_option_of_the_endpoint_is_named(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,completion,label\np,c,refusal\n")
    with pytest.raises(SystemExit) as exit:
        main([str(tmp_path / "rows.csv"), "--judge", "llm", "--max-attempts", "0", "--store", str(tmp_path / "store.sqlite")])
    assert exit.value.code.startswith("--max-attempts: ") and "\n" not in exit.value.code


def test_no_rows_is_an_error():
    with pytest.raises(UserError, match="no labelled rows"):
        calibrate([], parrot)
