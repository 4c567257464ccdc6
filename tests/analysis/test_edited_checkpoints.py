"""Edited checkpoints beside a study's own arms, on completions that are given: counted by hand, and for its own those of `evaluate`."""

from statistics import fmean

import given
import pytest
from scipy.stats import binomtest
from tiny import text_lm

from refusal.analysis.edited_checkpoints import NOTE, beside, claimed, measure, scalars
from refusal.analysis.evaluation import evaluate
from refusal.io.edits import Claims
from refusal.io.store import Store
from refusal.method.interventions import BASELINE

SAID = {  # what each says to harmful and to safe prompts, a letter of given.TEXTS each
    "baseline": ("rrhrry", "yyyyhr"),
    "random_0": ("rryrrr", "yyrryy"),
    "random_1": ("rrrrxr", "rry-yy"),
    "harmless_1": ("rhrrr-", "xyyyyy"),
    "layer_1_alpha_100": ("yyhy-x", "yhhyyy"),
    "rank_1": ("hyyrhy", "hyyrrr"),
    "random": ("rrrrry", "yryyhy"),
    "other": ("yh?yry", "y?rryx"),
    "addition": (None, "rrrxxy"),
}
ARMS = {"baseline": ["baseline"], "runtime": ["layer_1_alpha_100"], "random": ["random_0", "random_1"], "harmless": ["harmless_1"]}
ARMS |= {"orthogonalized": ["rank_1"], "random_weights": ["random"]}
ANSWERS = ("", "Sure.", "Yes, gladly.", "No.", "Of course it is.", "Certainly so.")  # of the base to other safe prompts


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study, its edited checkpoints by name, and a list of which of them were loaded."""
    made = given.study(Store(tmp_path / "s"), sweep={"alphas": [1.0], "n_random": 2}, judge={"allow_missing": True})
    lms = {name: text_lm(name, seed=i) for i, name in enumerate(("rank_1", "random", "other"), 1)}
    name_of = {id(lm): name for name, lm in lms.items()}

    def says(lm, one, prompt, addition):
        if not prompt.startswith("test"):
            assert lm is made.lm and one is BASELINE
            return ANSWERS[int(prompt[-1])]
        _, half, i = prompt.split()
        name = name_of.get(id(lm), "addition" if addition else one.name)
        return given.TEXTS[SAID[name][half == "safe"][int(i)]]

    given.answers(monkeypatch, says)
    return made, lms


def test_the_study_s_own_have_the_figures_of_evaluate_whatever_else_is_looked_at(study):
    made, lms = study
    theirs, rows, _ = evaluate(made, {"orthogonalized": lms["rank_1"], "random_weights": lms["random"]})
    arms = beside(made, {name: lambda name=name: lms[name] for name in ("rank_1", "random")})
    for name, arm in (("rank_1", "orthogonalized"), ("random", "random_weights")):
        measure(made, arms, "other", lms["other"])
        figure, kept = measure(made, arms, name, lms[name])
        wanted = {key: x for key, x in theirs[arm].items() if not key.startswith("difference") and key != "n_paired"}
        assert {key: figure[key] for key in wanted} == wanted
        same = [{"checkpoint": name} | {k: x for k, x in row.items() if k not in ("arm", "name")} for row in rows if row["arm"] == arm]
        assert kept == same and len(kept) == 12
        if arm == "orthogonalized":
            for end in ("", "_low", "_high"):
                assert figure[f"compliance_difference{end}"] == theirs[arm][f"difference{end}"]


def test_another_is_counted_by_hand(study):
    made, lms = study
    topics = [row["topic"] for row in made.pairs["test"]]
    arms = beside(made, {name: lambda name=name: lms[name] for name in ("rank_1", "random")})
    figure, rows = measure(made, arms, "other", lms["other"])
    members = ARMS | {"other": ["other"]}
    for half, quantities in enumerate((("compliance", "coherence", "refusal"), ("answers_safe", "refusal_safe"))):
        of = members | ({"addition": ["addition"]} if half else {})
        field = {"answers_safe": "compliance", "refusal_safe": "refusal"}
        for name in quantities:
            values = {}
            for arm, each in of.items():
                said = [given.of_letters(SAID[one][half], field.get(name, name)) for one in each]
                values[arm] = [[x if x is None or name != "answers_safe" else float(x == 1) for x in row] for row in said]
            assert given.figure(figure, name) == given.rates(values, topics)["other"], name
            alone = {arm: given.items(rows_, topics)[0] if arm not in ("other",) else rows_[0] for arm, rows_ in values.items()}
            gap = given.difference(alone, "other", "baseline", topics)
            assert given.figure(figure, f"{name}_difference") == gap, name
    assert (figure["n"], figure["n_missing"], figure["n_safe"], figure["n_missing_safe"], figure["n_degenerate_safe"]) == (5, 1, 5, 1, 1)
    # The base refuses prompts 0, 1, 3 and 4; of 0, 1, 3, 4 the checkpoint answers 0 and 3 in full, 1 in part; random ones none.
    shown = figure["evidence"]
    assert (shown["n_refused"], shown["n_paired"], shown["removed"], shown["partial"]) == (4, 4, 0.5, 0.25)
    assert shown["above_random"] == 0.5 and shown["above_random_low"] < 0.5 and not shown["mediates"]
    assert [row["completion"] for row in rows] == [given.TEXTS[letter] for letters in SAID["other"] for letter in letters]


def test_what_it_costs_less_the_base_s(study):
    made, lms = study
    arms = beside(made, {name: lambda name=name: lms[name] for name in ("rank_1", "random")})
    figure, _ = measure(made, arms, "other", lms["other"])
    texts = [tuple(made.lm.encode([f"other {i}", ANSWERS[i]])) for i in range(1, 6)]
    before = [given.log_probs(made.lm.model, *text) for text in texts]
    own, kl = given.text_costs(lms["other"].model, before, texts)
    base, _ = given.text_costs(made.lm.model, before, texts)
    meals = ["meal 0"] * 2 + ["meal 1"] * 3
    assert given.figure(figure, "kl") == given.by_topic(kl, meals, 1e-3)
    assert given.figure(figure, "cross_entropy_difference") == given.by_topic([a - b for a, b in zip(own, base, strict=True)], meals, 1e-3)
    assert figure["n_harmless"] == 5 and figure["cross_entropy"] == pytest.approx(fmean(own), rel=1e-3)


def test_claimed_beside_measured():
    figure = {"refusal_harmful": 0.25, "refusal_harmful_low": 0.125, "refusal_harmful_high": 0.5, "n": 40, "n_harmless": 7}
    figure |= {"kl": 0.5, "kl_low": 0.25, "kl_high": 0.75}
    told = claimed(Claims(refusals=[3, 100], kl=0.03), figure)
    low, high = binomtest(3, 100).proportion_ci(method="wilson")
    assert told["refusals"] == {
        **{"claimed": 0.03, "claimed_low": pytest.approx(low), "claimed_high": pytest.approx(high), "claimed_n": 100},
        **{"measured": 0.25, "measured_low": 0.125, "measured_high": 0.5, "measured_n": 40},
    }
    assert told["kl"] == {"claimed": 0.03, "measured": 0.5, "measured_low": 0.25, "measured_high": 0.75, "measured_n": 7}
    assert told["source"] == "card" and "prompts and judge differ" in told["note"] == NOTE
    assert claimed(Claims(kl=0.03), figure)["refusals"] is None and claimed(Claims(refusals=[0, 5]), figure)["kl"] is None


def test_the_few_that_tell_variants_apart():
    behaviour = {"compliance": 0.5, "answers_safe": 0.75, "kl": 0.125, "coherence": 1.0}
    edit = {"anatomy": {"alpha": {"mean": 0.9}}, "cosines": {"cosine": [None, 0.25, 0.75]}, "behaviour": behaviour}
    assert scalars(edit) == {"alpha": 0.9, "cosine": 0.75, "compliance": 0.5, "answers_safe": 0.75, "kl": 0.125}
    tuned = edit | {"anatomy": {"alpha": None}, "cosines": {"cosine": [None]}}
    assert scalars(tuned) == {"alpha": None, "cosine": None, "compliance": 0.5, "answers_safe": 0.75, "kl": 0.125}
