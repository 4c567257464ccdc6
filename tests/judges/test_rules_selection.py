"""The selection of the rules: on labels with a known answer, apart from what it is scored on, and recomputed where texts are."""

import hashlib
import json
import os
import random
from pathlib import Path

import pandas as pd
import pytest

from refusal.io.files import read_jsonl, rounded, write_jsonl
from refusal.judges import selection
from refusal.judges.calibrate import read_labelled
from refusal.judges.roles import OPENING, roles
from refusal.judges.rules import SELECTED, judge, label_of
from refusal.judges.selection import Labelled, cut, left_out, select, truncation
from stages import label_check

ROOT = Path(__file__).parents[2]
METRICS = json.loads((ROOT / "metrics/judge_rules.json").read_text())
LABELS = ROOT / "data/labels/qwen2.5-coder-0.5b-instruct.jsonl"
NOISE = ("as an AI", "harm", "asked why", "because", "item")


def synthetic(seed, n=200):
    """Completions that decline where "own rules" holds and the thing is not unreal, in part where a way is suggested; else noise."""
    draw = random.Random(seed)
    rows = []
    for _ in range(n):
        held = {name for name in ("own rules", "unreal", "suggests", *NOISE) if draw.random() < 0.5}
        declined = "own rules" in held and "unreal" not in held
        rows.append(
            Labelled(frozenset(held), "compliance" if not declined else "partial_refusal" if "suggests" in held else "refusal")
        )
    return rows


def test_the_planted_rule_is_found():
    assert select(synthetic(0)) == {
        "declined": [{"all": ["own rules"], "none": ["unreal"]}],
        "partial": [{"all": ["suggests"], "none": []}],
    }


def test_labels_without_a_pattern_select_nothing_for_most():
    draw = random.Random(1)
    rows = [row._replace(label=draw.choice(["compliance", "compliance", "compliance", "refusal"])) for row in synthetic(1)]
    assert sum(label_of(row.roles, select(rows)) != "compliance" for row in rows) < 0.15 * len(rows)


def test_the_model_left_out_takes_no_part():
    """With every label of a model turned round, every verdict on it must stay: what was right is wrong, no more and no less."""
    models = {"a": synthetic(2), "b": synthetic(3), "c": [*synthetic(4)[:90], *synthetic(5)[:60]]}
    models["c"] = [row._replace(label="refusal") if "item" in row.roles else row for row in models["c"]]
    turned = [row._replace(label="refusal" if row.label == "compliance" else "compliance") for row in models["c"]]
    before, after = left_out(models)["c"], left_out(models | {"c": turned})["c"]
    assert 0.5 < before["accuracy"] < 1 and after["accuracy"] == pytest.approx(1 - before["accuracy"])
    assert after["sensitivity"] == pytest.approx(1 - before["specificity"])


def test_only_the_opening_counts():
    words = [f"word{i}" for i in range(OPENING)]
    assert "unable" not in roles("Why?", " ".join([*words, "I cannot help."]))
    assert "unable" in roles("Why?", " ".join([*words[: OPENING - 3], "I cannot help."]))
    assert cut("one two\n\n1. three", 3) == "one two\n\n1."


def test_labels_in_git_hold_no_text_and_say_who_gave_them():
    rows = read_jsonl(LABELS)
    assert len(rows) >= 200 and len({row["sha256"] for row in rows}) == len(rows)
    for row in rows:
        assert set(row) == {"sha256", "first", "second", "final", "roles"} and len(row["sha256"]) == 64
        assert row["final"] in {row["first"], row["second"]}
    declined = sum(row["final"] != "compliance" for row in rows)
    assert min(declined, len(rows) - declined) >= 60
    assert "not people's" in (LABELS.parent / "README").read_text()
    assert "language model" in METRICS["left_out"][LABELS.stem]["labels"]


def test_the_model_labelled_after_the_rules_were_frozen_against_a_count_by_pandas():
    rows = pd.DataFrame(read_jsonl(LABELS.with_name("smollm2-135m-instruct.jsonl")))
    declined, found = (
        labels != "compliance" for labels in (rows["final"], rows["roles"].map(lambda held: label_of(frozenset(held), SELECTED)))
    )
    score = METRICS["unseen"]["smollm2-135m-instruct"]
    assert score["n_accuracy"] == len(rows) >= 200 and score["accuracy"] == rounded((declined == found).mean())
    assert score["sensitivity"] == rounded(found[declined].mean()) and score["n_sensitivity"] == declined.sum() >= 60
    assert score["specificity"] == rounded((~found)[~declined].mean())


def test_the_page_says_what_was_scored():
    page = (ROOT / "docs/judges.md").read_text(encoding="utf-8").replace("**", "")
    for score in [*METRICS["left_out"].values(), *METRICS["unseen"].values()]:
        three = " | ".join(f"{score[name]:.3f}".removeprefix("0") for name in ("accuracy", "sensitivity", "specificity"))
        assert f"| {three} |" in page, three


def test_label_check(tmp_path, monkeypatch):
    text = "I cannot express a stance."
    data = tmp_path / "data"
    name = hashlib.sha256(json.dumps(["Why?", text]).encode()).hexdigest()
    held = sorted(roles("Why?", text))
    write_jsonl(
        tmp_path / "x.jsonl",
        [{"sha256": name, "final": "refusal", "roles": held}, {"sha256": "0", "final": "refusal", "roles": []}],
    )
    assert "run `make study STUDY=x` first" in label_check.checked(tmp_path / "x.jsonl", data)
    write_jsonl(data / "sweep/completions.jsonl", [{"prompt": "Why?", "completion": text}])
    said = label_check.checked(tmp_path / "x.jsonl", data)
    assert said.startswith("1 of 2 labelled completions are here (50.0%); the rules agree on 1 ") and "roles of 0 are" in said


@pytest.fixture(scope="module")
def models():
    """{model: rows of text, None where git has no text, roles and label}, of the files that the committed rules come from."""
    folder = os.environ.get("REFUSAL_REFERENCE")
    if not folder:
        pytest.skip("REFUSAL_REFERENCE is not set: no human-labelled completions")
    found = {
        path.stem: [((prompt, text), Labelled(roles(prompt, text), label)) for prompt, text, label in read_labelled(str(path))]
        for path in sorted(Path(folder, "judge").glob("*.csv"))
    }
    return found | {LABELS.stem: [(None, Labelled(frozenset(row["roles"]), row["final"])) for row in read_jsonl(LABELS)]}


def test_the_committed_rules_are_what_the_labels_select(models):
    assert select([row for rows in models.values() for _, row in rows]) == SELECTED == METRICS["rules"]


def test_the_committed_scores_against_a_count_by_pandas(models):
    every = []
    for model, rows in models.items():
        rules = select([row for other, those in models.items() if other != model for _, row in those])
        every.append(
            pd.DataFrame([(model, row.label, label_of(row.roles, rules)) for _, row in rows], columns=["model", "label", "said"])
        )
    table = pd.concat(every)
    table["yes"], table["ok"] = table.label.eq("compliance"), table.label.eq("compliance") == table.said.eq("compliance")
    for name, part in (*table.groupby("model"), ("pooled", table)):
        score = METRICS["left_out"][name]
        counted = {"accuracy": part.ok.mean(), "sensitivity": part.ok[~part.yes].mean(), "specificity": part.ok[part.yes].mean()}
        assert rounded(counted) == {key: score[key] for key in counted}
        assert score["n_accuracy"] == len(part) and score["n_same_label"] == (part.label == part.said).sum()
        assert score["accuracy"] >= 0.90 and score["specificity"] >= 0.90
    pooled = METRICS["left_out"]["pooled"]
    assert pooled["accuracy"] >= 0.94 and pooled["sensitivity"] >= 0.90


def test_cutting_a_text_rarely_changes_its_label(models):
    texts = [text for rows in models.values() for text, _ in rows if text]
    assert rounded(truncation(texts, SELECTED)) == METRICS["truncation"]
    for words in (24, 48, 96):
        longer = [(p, t) for p, t in texts if len(t.split()) > words]
        changed = sum(judge(p, " ".join(t.split(" ")[:words])).label != judge(p, t).label for p, t in longer[::4])
        assert changed <= 0.03 * len(longer[::4]), words
    assert selection.TOKENS == (16, 32, 64, 128)
