"""Short answers beside long ones: a model that really decodes, and answers that are given, counted by hand."""

import random
from collections import Counter
from statistics import fmean

import given
import pandas as pd
import pytest
import torch
from pipeline.interruption import repeats, watch_repeats
from place import Place, params_with
from synthetic import naive_difference
from tiny import text_lm

from refusal.analysis.evaluation import evaluate
from refusal.analysis.long_answers import long_answers
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.judges.verdicts import Judged
from refusal.lm.batching import COUNTS, count_forwards
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import BASELINE, Intervention

SECTIONS = {
    "generation": {"max_new_tokens": 5, "batch_size": 4},
    "sweep": {"alphas": [1.0], "n_random": 3},
    "long_answers": {"n": 7, "max_new_tokens": 12, "n_random": 2},
    "evaluate": {"n_harmless": 2},
}


def arms(study, edited):
    """The model and the intervention of every arm's members, made anew."""
    drawn = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    randomly = {("random", i): v / v.norm() for i, v in enumerate(drawn)}
    ablated = {("runtime", 0): given.directions(0)["unit"][1]} | randomly
    found = {at: (study.lm, Intervention(str(at), v, 1.0, study.sites)) for at, v in ablated.items()}
    return found | {("baseline", 0): (study.lm, BASELINE), ("orthogonalized", 0): (edited, BASELINE)}


def test_long_answers_are_those_of_decoding_anew_and_repeat_no_forward_pass(tmp_path):
    pairs, lm = given.pairs("test", 9), text_lm()
    made = generate(lm, lm.encode([row["harmful"] for row in pairs]), Decoding(12, 64))
    # Three tokens that end some answers early, and others not.
    stop = [token for token, _ in Counter(token for row in made for token in row[3:]).most_common(3)]
    study, edited = given.study(Store(tmp_path / "s"), 9, lm=text_lm(stop=stop), **SECTIONS), text_lm("edited", seed=1, stop=stop)
    study.judge = lambda prompts, texts, *_: [Judged("compliance", len(text) % 2, 1.0, False, False) for text in texts]
    for lm in (study.lm, edited):
        count_forwards(lm.model)
    evaluate(study, {"orthogonalized": edited, "random_weights": text_lm("random", seed=2, stop=stop)})
    before, right = COUNTS["passes"], study.judge

    def interrupted(prompts, texts, label, *_):
        if label.startswith("judge: long answers: orthogonalized"):
            raise KeyboardInterrupt
        return right(prompts, texts)

    watch_repeats(tmp_path / "s")
    study.judge = interrupted
    with pytest.raises(KeyboardInterrupt):
        long_answers(study, edited, study.params.long_answers)
    half, study.judge = COUNTS["passes"] - before, right
    metrics, rows = long_answers(study, edited, study.params.long_answers)
    taken, table, n_cut = COUNTS["passes"] - before, pd.DataFrame(rows).set_index(["arm", "member", "limit"]), 0
    assert 0 < half < taken and repeats(tmp_path / "s") == (0, 0)

    drawn = [pairs[i] for i in sorted(random.Random(0).sample(range(9), 7))]
    ids = study.lm.encode([row["harmful"] for row in drawn])
    assert len(table) == 2 * 7 * 5 and metrics["max_new_tokens"] == {"short": 5, "long": 12} and metrics["n"] == 7
    for (arm, member), (lm, one) in arms(study, edited).items():
        for limit, n in metrics["max_new_tokens"].items():
            anew, told = generate(lm, ids, Decoding(n, 64), [one]), table.loc[arm, member, limit]
            assert [*told["completion"]] == lm.decode(anew) and [*told["n_tokens"]] == [*map(len, anew)]
            assert [*told["id"]] == [row["id"] for row in drawn] and [*told["prompt"]] == [row["harmful"] for row in drawn]
        n_cut += (table.loc[arm, member, "short"]["n_tokens"] == 5).sum()
    assert 0 < n_cut < 7 * 5  # some end by themselves, and only the others were decoded: a pass for the prompt, one a token
    assert 0 < taken <= n_cut * (1 + 12)
    for arm, of in metrics["arms"].items():
        assert of["n_prefix"] == len(table.loc[arm]) / 2
        for limit, n in metrics["max_new_tokens"].items():
            assert of[limit]["n_cut"] == (table.loc[arm].xs(limit, level="limit")["n_tokens"] == n).sum()

    before = COUNTS["passes"]
    assert long_answers(study, edited, study.params.long_answers) == (metrics, rows) and COUNTS["passes"] == before


# What is said to six prompts, a token a letter: the last letter within the limit, three or six, is the verdict (given.VERDICTS).
SAID = {
    "baseline": ["rr", "rrr", "rrry", "rrrryrx", "hhhr", "r-r?"],
    "layer_1_alpha_100": ["yy", "yyyx", "yyyr", "yyyyyyyyr", "yyyh", ""],
    "orthogonalized": ["yyyy", "xxxx", "rrrx", "rrrh", "yyyh", "yyyyr"],
    "random_0": ["r", "rry", "rrry", "?", "rrr?", "yyyr"],
    "random_1": ["r", "r", "rrryyy", "rrrrrx", "rr?", "yyyx"],
}
MEMBERS = {
    **{"baseline": ["baseline"], "runtime": ["layer_1_alpha_100"], "orthogonalized": ["orthogonalized"]},
    "random": ["random_0", "random_1"],
}
CHANGED = {  # then declines, then complies, ends in a loop, cut at three, cut at six
    "baseline": (1, 1, 0, 5, 1),
    "runtime": (2, 0, 1, 4, 1),
    "orthogonalized": (2, 1, 1, 6, 0),
    "random": (1, 2, 2, 8, 2),
}


def said(tmp_path, monkeypatch, answers):
    """The study, what `long_answers` makes of these answers, and what was asked with room for six tokens."""
    sections = SECTIONS | {"long_answers": {"n": None, "max_new_tokens": 6, "n_random": 2}, "judge": {"allow_missing": True}}
    sections["generation"] = {"max_new_tokens": 3}
    study, edited, asked = given.study(Store(tmp_path / "s"), **sections), text_lm("edited", seed=1), []

    def complete(lm, ids, interventions, decoding, store, label, addition=None):
        prompts, told = lm.decode(ids), {}
        for one in interventions:
            name = "orthogonalized" if lm is edited else one.name
            whole = [answers.get(name, ["y"] * 6)[int(prompt[-1])] for prompt in prompts]
            told[one.name] = lm.encode([text[: decoding.max_new_tokens] for text in whole])
            asked.extend((name, text) for text in whole if decoding.max_new_tokens == 6)
        return told

    monkeypatch.setattr("refusal.analysis.study.complete", complete)
    study.judge = lambda prompts, texts, *_: [given.VERDICTS[text[-1:] or "-"] for text in texts]
    return study, long_answers(study, edited, study.params.long_answers), asked


def test_figures_counted_by_hand(tmp_path, monkeypatch):
    study, (metrics, rows), asked = said(tmp_path, monkeypatch, SAID)
    assert asked == [(name, text) for of in MEMBERS.values() for name in of for text in SAID[name] if len(text) >= 3]
    topics = [row["topic"] for row in study.pairs["test"]]
    of_limit = {
        limit: {arm: ["".join(text[:n][-1:] or "-" for text in SAID[name]) for name in of] for arm, of in MEMBERS.items()}
        for limit, n in (("short", 3), ("long", 6))
    }
    for what in ("compliance", "refusal", "coherence"):
        values = {
            limit: {arm: [given.of_letters(one, what) for one in of] for arm, of in arms.items()}
            for limit, arms in of_limit.items()
        }
        for limit, of in values.items():
            for arm, expected in given.rates(of, topics).items():
                assert given.figure(metrics["arms"][arm][limit], what) == expected, (arm, limit, what)
        for arm, told in metrics["arms"].items():
            means = []
            for i, topic in enumerate(topics):
                pairs = [(a[i], b[i]) for a, b in zip(values["short"][arm], values["long"][arm], strict=True)]
                if kept := [pair for pair in pairs if None not in pair]:
                    means.append((*(fmean(pair[at] for pair in kept) for at in (1, 0)), topic))
            icc = max(told[limit][f"{what}_icc"] for limit in of_limit)
            expected = naive_difference(*zip(*means, strict=True), icc)
            assert given.figure(told, f"{what}_difference") == pytest.approx(expected, abs=1e-6), (arm, what)
            assert told["n_paired"] == len(means)
    for arm, (declines, complies, loops, cut, cut_long) in CHANGED.items():
        told = metrics["arms"][arm]
        assert (told["n_then_declines"], told["n_then_complies"], told["n_loops"]) == (declines, complies, loops), arm
        assert (told["short"]["n_cut"], told["long"]["n_cut"]) == (cut, cut_long), arm
        letters = Counter(zip(*("".join(of_limit[limit][arm]) for limit in ("short", "long")), strict=True))
        for a, b in ((a, b) for a in "yhr" for b in "yhr"):
            assert told["verdicts"][given.VERDICTS[a].label][given.VERDICTS[b].label] == letters[a, b], (arm, a, b)
        assert told["n_prefix"] == 6 * len(MEMBERS[arm])
    (row,) = (row for row in rows if (row["arm"], row["id"], row["limit"]) == ("baseline", "test-5", "long"))
    assert (row["completion"], row["label"], row["n_tokens"]) == ("r-r?", "missing", 4)


def test_an_answer_that_does_not_begin_as_the_short_one_is_counted(tmp_path, monkeypatch):
    class Turning(str):
        """Another text where there is room for it."""

        def __getitem__(self, at):
            return "rry" if at == slice(None, 3) else "yyyy"

    _, (metrics, _), _ = said(tmp_path, monkeypatch, SAID | {"baseline": [Turning("rrry"), *SAID["baseline"][1:]]})
    assert {arm: of["n_prefix"] for arm, of in metrics["arms"].items()} == {
        "baseline": 5, "runtime": 6, "orthogonalized": 6, "random": 12,
    }  # fmt: skip


def test_no_verdict_on_both_answers_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="runtime: no prompt has a verdict on its short and on its long answer; run again, or"):
        said(tmp_path, monkeypatch, SAID | {"layer_1_alpha_100": ["yyy?"] * 3 + ["??"] * 2 + ["???y"]})


def test_left_out_they_are_null_and_nothing_is_loaded(tmp_path):
    place = Place(tmp_path)  # without a model
    params_with(tmp_path, {"long_answers": None})
    status, said = place.stage("long_answers")
    assert status == 0 and "long_answers: long_answers is null: left out" in said
    assert (tmp_path / "metrics/long_answers.json").read_text() == "null\n"
    assert (tmp_path / "data/long_answers/completions.jsonl").read_text() == ""
