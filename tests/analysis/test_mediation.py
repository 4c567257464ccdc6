"""The table that the verdict rests on, of completions that are given, counted by hand."""

from statistics import fmean

import given
import pytest
import torch
from synthetic import naive_hybrid, naive_icc, naive_rate
from tiny import tiny_direction

from refusal.analysis import candidates
from refusal.analysis.mediation import best_on_val, mediation, refusal_three_ways
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.judges.verdicts import Judged
from refusal.method.interventions import BASELINE, Intervention


def test_best_on_val_is_the_best_score_and_the_first_of_those_that_tie():
    some = [Intervention(name) for name in ("a", "b", "c", "d")]
    y, h, r = (given.VERDICTS[letter] for letter in "yhr")
    judged = {"a": [r, r], "b": [y._replace(coherence=0.5), y], "c": [y, y], "d": [y, y]}
    assert best_on_val(some, judged).name == "c" and best_on_val(some[:2], judged).name == "b"
    assert best_on_val(some, {name: [h] for name in "abcd"}).name == "a"


def test_one_verdict_of_forty_is_nothing_to_choose_by():
    some, (y, r) = [Intervention("a"), Intervention("b")], (given.VERDICTS[letter] for letter in "yr")
    judged = {"a": [y, *[None] * 39], "b": [*[y] * 38, r, r]}
    with pytest.raises(UserError, match="a on val: 39 of 40 completions have no verdict"):
        best_on_val(some, judged)
    assert best_on_val(some, judged, allow_missing=True).name == "a"


def test_refusal_three_ways_tells_degenerate_text_from_refusal():
    said = [
        "I cannot help with that request.",
        "I'm sorry, but help with help with help with help with help with help",
        "Sure, here it is.",
    ]
    judged = [given.VERDICTS["r"], Judged("degenerate", 0.0, 0.0, False, True), given.VERDICTS["y"]]
    found = refusal_three_ways(["q"] * 3, said, judged, True)
    assert found == {
        "refusal_exact": [True, False, False],
        "refusal_graded": [True, False, False],
        "refusal_substring": [True, True, False],
    }
    assert refusal_three_ways(["q"] * 3, said, judged, False)["refusal_exact"] == [None] * 3


# What is said on val and on test prompts of topic i: letter i of a pattern that repeats. All else says DEFAULT.
DEFAULT = ("hrrr", "rrrrh")
SAID = {
    "baseline": ("rrrr", "rrrrh"),
    "rank_1": ("yyyr", "yyry"),
    "difference.2": ("yyrr", "yrrrx"),
    "logistic.1": ("yrrr", "yyyy"),
    "logistic.2": ("yyrr", "yyrr"),
    "lda.2": ("yyyh", "yyyyyyyyyh"),
    "paired_svd.1": ("yyrr", "rh"),
    "paired_svd.2": ("yyrr", "yy"),
    "affine.2": ("yyyy", "yh"),
    "svd_3": ("yyyh", "yyyyyyyyyyyyyyyyyyyh"),
    "qr_2": ("yyyh", "yyyy"),
    "per_layer": ("yyyy", "rrrr-"),
}
SAFE = {"baseline": "yyyyr", "lda.2": "yyyyh", "svd_3": "ryyry", "affine.2": "yyyrx"}
MISSING = {("lda.2", "test", 3), ("random_1", "test", 7), ("random_3.0", "test", 9)}
N, TOPICS = 40, 20
TRUTH, NO = tiny_direction(seed=7).double(), given.VERDICTS["r"]


def letter(name: str, split: str, i: int, said: dict) -> str:
    if (name, split, i) in MISSING:
        return "?"
    names = (name, name.split(".")[0], name.split("_")[0])  # of its own, of its rank, of all of its sort
    pattern = next((said[one] for one in names if one in said), DEFAULT)[split == "test"]
    return pattern[i % TOPICS % len(pattern)]


def judged(name, split="test", said=SAID):
    """The verdict on each prompt."""
    return [given.VERDICTS[letter(name, split, i, said)] for i in range(N)]


TOPIC = [f"topic {i % TOPICS}" for i in range(N)]


def values(verdicts, what):
    """A field of each verdict; None where there is none."""
    return [None if v is None else float(getattr(v, what)) for v in verdicts]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One for all studies here: what is computed is computed once."""
    return Store(tmp_path_factory.mktemp("mediation") / "store.sqlite")


@pytest.fixture
def made(store, monkeypatch):
    """The study, and what `mediation` makes of it where some interventions say something else."""
    science = {"n_random": 2, "n_subspaces": 2, "n_val": None, "n_test": None, "n_control": 32, "n_harmless": 4, "n_fit": 20}
    science |= {"optimised": {"steps": 1, "batch_size": 2}}
    study = given.study(store, N, TOPICS, science=science)
    study.n_resamples = 4000
    generator = torch.Generator().manual_seed(0)
    drawn = {half: torch.randn(N, 3, 32, generator=generator) for half in ("harmful", "safe")}
    study.activations = {"sequential": {f"train.{half}": rows for half, rows in drawn.items()}}

    def make(**said):
        def says(lm, one, prompt, addition):
            make.asked[one.name] = one
            split, half, *rest = prompt.split()
            if split == "other":
                return "Of course."
            i = int(rest[0])
            safe = SAFE.get(one.name, "") if half == "safe" else ""
            return given.TEXTS[safe[i % 5] if safe else letter(one.name, split, i, SAID | said)]

        given.answers(monkeypatch, says)
        return study, *mediation(study, TRUTH, {1: 0.5, 2: 0.9})

    make.asked = {}
    return make


def test_the_table_holds_each_estimators_best_on_val_and_what_was_counted(made):
    study, metrics, plot = made()
    table, unit = metrics["arms"], study.directions["unit"]
    several = ["svd_2", "svd_3", "svd_5", "qr_2", "per_layer", "planted", "less_planted.1", "less_planted.2"]
    chosen = ["rank_1", "difference.2", "logistic.2", "lda.2", "paired_svd.1", "affine.2", "optimised"]
    assert sorted(table) == sorted(["baseline", *chosen, *several])
    assert [row["arm"] for row in plot] == [*table, *metrics["controls"]]
    letters = {name: "".join(letter(name, "test", i, SAID) for i in range(N)) for name in table}
    refused = {name: [[float(c == "r") for c in text]] for name, text in letters.items()}
    for key, arms in {
        "compliance": {name: [values(judged(name), "compliance")] for name in table},
        "coherence": {name: [values(judged(name), "coherence")] for name in table},
        "refusal_exact": {name: [values(judged(name), "refusal")] for name in table},
        "refusal_graded": refused,
        "refusal_substring": refused,
        "exact": {name: [[float(c == "y") for c in text]] for name, text in letters.items()},
    }.items():
        for name, expected in given.rates(arms, TOPIC).items():
            assert given.figure(table[name], key) == expected, (name, key)
    compliance = {name: values(judged(name), "compliance") for name in table}
    on_val = {name: values(judged(name, "val"), "compliance") for name in table}
    val_iccs = dict(zip(table, naive_icc([given.items([v], TOPIC) for v in on_val.values()]), strict=True))
    test_iccs = dict(zip(table, naive_icc([given.items([v], TOPIC) for v in compliance.values()]), strict=True))
    for name, row in table.items():
        kept = [v for v in judged(name) if v]
        assert (row["n"], row["n_val"], row["n_missing"], row["n_clusters"]) == (len(kept), N, letters[name].count("?"), TOPICS)
        assert given.figure(row, "difference") == given.difference(compliance, name, "baseline", TOPIC), name
        assert row["n_paired"] == len(kept)
        assert row["compliance_val"] == pytest.approx(fmean(on_val[name]))
        both = (naive_rate(*given.items([v[name]], TOPIC), icc[name]) for v, icc in ((on_val, val_iccs), (compliance, test_iccs)))
        assert given.figure(row, "val_minus_test") == pytest.approx(naive_hybrid(*both)), name
        # Holm: of m values in order, the i-th times m - i + 1, and none below those before it.
        ordered = sorted(other["p"] for other in table.values())
        assert row["p_holm"] == max(min(1, (len(table) - i) * p) for i, p in enumerate(ordered) if p <= row["p"])
    assert table["baseline"]["p"] == 1 and table["lda.2"]["p"] == pytest.approx(1 / 10_001)
    cosines = {name: (row["rank"], row["cosine_rank_1"], row["cosine_planted"]) for name, row in table.items()}
    across, planted = (abs(float(unit[1] @ v)) for v in (unit[2], TRUTH))
    assert cosines["rank_1"] == pytest.approx((1, 1, planted)) and cosines["planted"] == pytest.approx((1, planted, 1))
    assert cosines["difference.2"] == pytest.approx((1, across, abs(float(unit[2] @ TRUTH))))
    assert made.asked["qr_2"].basis[0].tolist() == pytest.approx(unit[1].tolist())  # the selected layer first
    assert cosines["qr_2"][:2] == pytest.approx((2, 1)) and cosines["less_planted.1"][2] == pytest.approx(0, abs=1e-6)
    assert cosines["baseline"] == cosines["per_layer"] == (0, None, None)
    assert {f: e["arm"] for f, e in metrics["estimators"].items()} == {
        n.split(".")[0].replace("rank_1", "difference"): n for n in chosen if n != "difference.2"
    }
    for estimate in metrics["estimators"].values():
        assert estimate.items() - {("arm", estimate["arm"])} <= table[estimate["arm"]].items()
    assert metrics["n_fit"] == 20 and metrics["optimised_loss"] > 0
    assert metrics["cosine_harmless_to_direction"] == pytest.approx(float(given.directions(1)["unit"][1] @ unit[1]))
    safe = {name: "".join(SAFE[name][i % 5] for i in range(N)) for name in metrics["over_refusal"]}
    for key, hit in (("refusal_safe", "r"), ("answers_safe", "y")):  # noise is no refusal, and no answer either
        arms = {name: [[float(c == hit) for c in text]] for name, text in safe.items()}
        for name, expected in given.rates(arms, TOPIC).items():
            assert given.figure(metrics["over_refusal"][name], key) == expected, (name, key)
    for name, row in metrics["over_refusal"].items():
        assert (row["n_safe"], row["n_degenerate_safe"], row["n_missing_safe"]) == (N, safe[name].count("x"), 0)
    assert set(metrics["over_refusal"]) == set(SAFE)


def test_controls_are_pooled_and_each_intervention_costs_what_it_costs(made):
    said = {"random": ("rrrr", "rrrxh"), "random_5.1": ("rrrr", "yx"), "harmless": ("rrrr", "ryrrr")}
    study, metrics, _ = made(**said)
    few = [int(row["id"].removeprefix("test-")) for row in study.sample("test", 32)]
    texts = study.harmless(4)
    rows = [*zip(texts.prompts, texts.answers, strict=True)]
    reference = [given.log_probs(study.lm.model, *text) for text in rows]
    families = candidates.by_family(candidates.controls(study))
    ranks = {"harmless": (1, 1), "random_1": (1, 2), "random_2": (2, 2), "random_3": (3, 2), "random_5": (5, 2)}
    ranks |= {"random_per_layer": (0, 3), "random_affine": (1, 3)}
    assert {family: (row["rank"], row["n_arms"]) for family, row in metrics["controls"].items()} == ranks
    members = {family: [[judged(one.name, said=SAID | said)[i] for i in few] for one in some] for family, some in families.items()}
    topics = [TOPIC[i] for i in few]
    texts_of = {family: [[letter(one.name, "test", i, SAID | said) for i in few] for one in some] for family, some in families.items()}
    of = {
        key: {family: [values(verdicts, what) for verdicts in each] for family, each in members.items()}
        for key, what in (("compliance", "compliance"), ("coherence", "coherence"), ("refusal", "refusal"), ("refusal_exact", "refusal"))
    }
    # Of a text without a verdict too.
    of["refusal_substring"] = {family: [[float(c == "r") for c in letters] for letters in each] for family, each in texts_of.items()}
    for key, arms in of.items():
        for family, expected in given.rates(arms, topics).items():
            assert given.figure(metrics["controls"][family], key) == expected, (family, key)
    for family, row in metrics["controls"].items():
        letters = "".join(c for each in texts_of[family] for c in each)
        assert (row["n"], row["n_missing"], row["n_degenerate"]) == (len(few), letters.count("?"), letters.count("x"))
        costs = []
        for one in families[family]:
            with one.on(study.lm.model):
                costs.append(given.text_costs(study.lm.model, reference, rows))
        for i, key in enumerate(("cross_entropy", "kl")):
            means = [fmean(cost[i]) for cost in costs]
            assert row[key] == pytest.approx(fmean(means), rel=1e-3, abs=1e-6)
            if len(means) > 1:  # over directions: of two drawn the interval reaches from one to the other
                assert [row[f"{key}_low"], row[f"{key}_high"]] == pytest.approx([min(means), max(means)], rel=1e-3, abs=1e-6)
    for one in (BASELINE, Intervention("planted", TRUTH)):
        with one.on(study.lm.model):
            losses, divergences = given.text_costs(study.lm.model, reference, rows)
        row = metrics["arms"][one.name]
        assert (row["cross_entropy"], row["kl"]) == pytest.approx((fmean(losses), fmean(divergences)), rel=1e-3, abs=1e-6)
    priced = [*metrics["controls"].values(), *(metrics["arms"][name] for name in ("baseline", "planted"))]
    assert len({round(row["kl"], 3) for row in priced}) == len(priced)


WORKS, NOT = ("yyyy", "yyyyy"), ("rrrr", "rrrrr")


@pytest.mark.parametrize(
    ("said", "decision", "mediate"),
    [
        ({}, ("single", None, "lda.2"), (False, True, True)),
        ({"rank_1": ("yyyr", "yyyy")}, ("single", None, "lda.2"), (True, True, True)),
        # Where a random one does it too it is no evidence; each faces the controls of its own rank.
        ({"random_0": WORKS, "random_1": WORKS}, ("subspace", None, "svd_3"), (False, False, True)),
        ({"random_0": ("rrrr", "rrrrx"), "random_1": ("rrrr", "yrrrrrh")}, ("single", None, "lda.2"), (False, True, True)),
        ({"random_3": WORKS}, ("single", None, "lda.2"), (False, True, False)),
        ({"random_2": WORKS, "random_5": WORKS, "harmless": WORKS}, ("single", None, "lda.2"), (False, True, True)),
        ({"lda.2": ("yyyh", "rrrr")}, ("subspace", None, "svd_3"), (False, False, True)),
        ({"lda.2": ("yyyh", "rr"), "svd_3": ("yyyy", "rr")}, ("none", "no_mediation", None), (False, False, False)),
        ({"baseline": ("rrrr", "yyyrr")}, ("undecided", "too_few_refusals", None), (False, False, False)),
        ({"baseline": ("rrrr", "yyyyy")}, ("none", "no_refusal", None), (False, False, False)),
    ],
)
def test_the_verdict_of_a_table(made, said, decision, mediate):
    study, metrics, _ = made(**{"random": NOT} | said)
    evidence, said = metrics["verdict"], SAID | {"random": NOT} | said
    assert (evidence["verdict"], evidence["reason"], evidence["by"]) == decision
    assert (evidence["best_single"], evidence["best_subspace"]) == ("lda.2", "svd_3")
    assert evidence["baseline_refusal"] == metrics["arms"]["baseline"]["refusal"]
    asked = [int(row["id"].removeprefix("test-")) for row in study.sample("test", 32)]
    refused = [i for i, v in enumerate(judged("baseline", said=said)) if v and v.refusal]
    assert evidence["n_refused"] == len(refused)
    compliance = {name: values(judged(name, said=said), "compliance") for name in metrics["arms"]}
    gap = given.difference(compliance, "svd_3", "lda.2", TOPIC)
    assert evidence["subspace_above_single_low"] == pytest.approx(gap.expected[1], abs=1e-6)
    for what, name, works in zip(("difference", "single", "subspace"), ("rank_1", "lda.2", "svd_3"), mediate, strict=True):
        assert evidence[what]["name"] == name and evidence[what]["mediates"] is works, (what, evidence[what])
        full = [v and float(v.compliance == 1) for v in judged(name, said=said)]
        removed = [full[i] for i in refused if full[i] is not None]
        assert evidence[what]["removed"] == (pytest.approx(fmean(removed)) if removed else None)
        controls = ["random_3.0", "random_3.1"] if what == "subspace" else ["random_0", "random_1"]
        of = [i for i in asked if i in refused and full[i] is not None]
        drawn = [[(v := judged(one, said=said)[i]) and float(v.compliance == 1) for i in of] for one in controls]
        theirs, _ = given.items(drawn, [TOPIC[i] for i in of])
        arms = {"mine": [full[i] for i in of], "random": theirs}
        assert evidence[what]["n_paired"] == len(of) == len(theirs)
        if of:
            gap = given.difference(arms, "mine", "random", [TOPIC[i] for i in of])
            assert [evidence[what][key] for key in ("above_random", "above_random_low")] == pytest.approx(gap.expected[:2], abs=1e-6)
        else:
            assert evidence[what]["above_random_low"] is None
