"""Other sets on completions that are given: rates and intervals by the naive path, the share of refusals removed by hand."""

from statistics import fmean

import given
import pandas as pd
import pytest

from refusal.analysis.generalization import generalize
from refusal.data.held_out import HeldOut
from refusal.io.store import Store

# What is said to harmful and to safe prompts of each set, a letter of given.TEXTS each: without a system prompt, and with one.
SAID = {
    "a": {
        "baseline": ("rrhrryrr", "yyry"),
        "ablated": ("yrhyyyxr", "yyyh"),
        "random_0": ("rryrrrrr", "yrry"),
        "random_1": ("rryryrrr", "yyry"),
    },
    "b": {"baseline": ("yyyyyr", ""), "ablated": ("yyyyyy", ""), "random_0": ("yyyyyy", ""), "random_1": ("ryyyyr", "")},
}
WITH = {"baseline": "r", "ablated": "y", "random_0": "r", "random_1": "h"}  # to every prompt
TOPICS = {"a": ["t0", "t1", "t0", "t1", "t2", "t2", "t0", "t1"], "b": [f"b harmful {i}" for i in range(6)]}
ARMS = {"baseline": ["baseline"], "ablated": ["ablated"], "random": ["random_0", "random_1"]}


def held_out(name):
    harmful = [
        {"id": f"{name}-{i}", "category": None, "topic": topic, "harmful": f"{name} harmful {i}"}
        for i, topic in enumerate(TOPICS[name])
    ]
    safe = [
        {"id": f"{name}-safe-{i}", "category": "c", "topic": f"s{i % 2}", "safe": f"{name} safe {i}"}
        for i in range(len(SAID[name]["baseline"][1]))
    ]
    return HeldOut({"harmful": harmful, "safe": safe}, {"harmful": 9, "safe": 5}, {"harmful": 1, "safe": 0})


@pytest.fixture
def found(tmp_path, monkeypatch):
    """The metrics and the rows as a table, of two sets with and without a system prompt, at an alpha that is not the sweep's."""
    section = {"sets": ["data/raw/a.csv", "data/raw/b.csv"], "n_random": 2, "system_prompts": [None, "Be brief."]}
    study = given.study(Store(tmp_path / "s"), generalization=section, sweep={"alphas": [0.5, 1.0], "n_random": 5})
    study.rank_1 = study.rank_1 | {"alpha": 0.5}

    def says(lm, one, prompt, addition):
        assert addition is None and lm.model is study.lm.model and one.alpha == (0 if one.name == "baseline" else 0.5)
        name, half, i = prompt.split()
        arm = "ablated" if one.name == "layer_1_alpha_50" else one.name
        return given.TEXTS[WITH[arm] if lm.system_prompt else SAID[name][arm][("harmful", "safe").index(half)][int(i)]]

    given.answers(monkeypatch, says)
    metrics, rows = generalize(study, {name: held_out(name) for name in SAID})
    return metrics, pd.DataFrame(rows).replace({"layer_1_alpha_50": "ablated"})


@pytest.mark.parametrize("name", SAID)
def test_every_figure_is_that_of_its_set_and_arm(found, name):
    metrics, _ = found
    assert (metrics["layer"], metrics["alpha"]) == (1, 0.5) and list(metrics["sets"]) == [*SAID]
    figure = metrics["sets"][name]["figures"][0]
    assert figure["system_prompt"] is None and (metrics["sets"][name]["n_read"], metrics["sets"][name]["n_near_duplicates"]) == (
        9,
        1,
    )
    letters = {arm: [SAID[name][one] for one in members] for arm, members in ARMS.items()}
    for what in ("compliance", "coherence", "refusal"):
        values = {arm: [given.of_letters(some[0], what) for some in members] for arm, members in letters.items()}
        for arm, expected in given.rates(values, TOPICS[name]).items():
            assert given.figure(figure[arm], what) == expected, (arm, what)
    said = {arm: given.of_letters(members[0][0], "compliance") for arm, members in letters.items()}
    pooled = said | {
        "random": [
            fmean(both) for both in zip(*(given.of_letters(one[0], "compliance") for one in letters["random"]), strict=True)
        ]
    }
    assert given.figure(figure["ablated"], "difference") == given.difference(pooled, "ablated", "baseline", TOPICS[name])
    counts = {"n": len(TOPICS[name]), "n_clusters": len(set(TOPICS[name])), "n_missing": 0}
    assert all({key: figure[arm][key] for key in counts} == counts for arm in ARMS)
    assert [figure[arm]["n_arms"] for arm in ARMS] == [1, 1, 2]
    if name == "b":
        assert "answers_safe" not in figure["ablated"]
        return
    for what, letter in (("answers_safe", "y"), ("refusal_safe", "r")):
        values = {arm: [[one == letter for one in some[1]] for some in members] for arm, members in letters.items()}
        for arm, expected in given.rates(values, ["s0", "s1"] * 2).items():
            assert given.figure(figure[arm], what) == expected, (arm, what)


def test_of_the_refusals_of_the_baseline_the_share_removed_is_above_that_of_random_directions(found):
    _, rows = found
    for name in SAID:
        table = rows[(rows["set"] == name) & (rows["half"] == "harmful") & rows["system_prompt"].isna()]
        full = table.assign(full=table["compliance"] == 1).pivot(index="id", columns="intervention", values="full").astype(float)
        refused = full.loc[table[(table["intervention"] == "baseline") & table["refusal"]]["id"]]
        figure = found[0]["sets"][name]["figures"][0]
        removed, drawn = refused["ablated"].mean(), refused[["random_0", "random_1"]].mean(axis=1).mean()
        assert figure["n_refused"] == len(refused) == figure["evidence"]["n_paired"]
        assert figure["evidence"]["removed"] == pytest.approx(removed)
        assert figure["evidence"]["above_random"] == pytest.approx(removed - drawn)
    a = found[0]["sets"]["a"]["figures"][0]["evidence"]  # three of six, against one of twelve
    assert (a["removed"], a["above_random"]) == (pytest.approx(1 / 2), pytest.approx(1 / 2 - 1 / 12))
    assert found[0]["sets"]["b"]["figures"][0]["evidence"]["above_random"] == pytest.approx(1 - 1 / 2)


def test_each_system_prompt_has_a_figure_and_rows_of_its_own(found):
    metrics, rows = found
    assert len(rows) == 2 * 4 * (8 + 4 + 6) and rows["completion"].notna().all()
    for name in SAID:
        figure = metrics["sets"][name]["figures"][1]
        assert figure["system_prompt"] == "Be brief." and figure["template"] == "prompt"
        assert [figure[arm]["compliance"] for arm in ARMS] == [0, 1, pytest.approx(0.25)]
        assert figure["n_refused"] == len(TOPICS[name])
