"""The table that the verdict rests on, of completions that are given, counted by hand."""

import random
from statistics import fmean

import given
import numpy as np
import pytest
import torch
from synthetic import naive_interval
from tiny import tiny_direction

from refusal.analysis import candidates
from refusal.analysis.mediation import best_on_val, mediation, refusal_three_ways
from refusal.io.store import Store
from refusal.judges.verdicts import Judged
from refusal.method.interventions import BASELINE, Intervention


def test_best_on_val_is_the_best_score_and_the_first_of_those_that_tie():
    some = [Intervention(name) for name in ("a", "b", "c", "d")]
    y, h, r = (given.VERDICTS[letter] for letter in "yhr")
    judged = {"a": [r, r], "b": [y._replace(coherence=0.5), y], "c": [y, None], "d": [y, y]}
    assert best_on_val(some, judged).name == "c" and best_on_val(some[:2], judged).name == "b"
    for equal in (h, None):
        assert best_on_val(some, {name: [equal] for name in "abcd"}).name == "a"


def test_refusal_three_ways_tells_degenerate_text_from_refusal():
    said = [
        "I cannot help with that request.",
        "I'm sorry, but help with help with help with help with help with help",
        "Sure, here it is.",
    ]
    judged = [given.VERDICTS["r"], Judged("degenerate", 0.0, 0.0, False, True), given.VERDICTS["y"]]
    rates = refusal_three_ways(["q"] * 3, said, judged, True)
    expected = {"exact": 1, "graded": 1, "substring": 2}
    for name, hits in expected.items():
        assert given.figure(rates, f"refusal_{name}") == given.wilson(hits, 3)
    assert refusal_three_ways(["q"] * 3, said, judged, False)["refusal_exact"] is None


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


def differences(ours, theirs, of=range(N)):
    """(difference in compliance, topic) of the prompts where both have a verdict."""
    return [(ours[i].compliance - theirs[i].compliance, f"topic {i % TOPICS}") for i in of if ours[i] and theirs[i]]


def near(limits, items, least=-1, grain=0.0):
    """Whether these are the limits of the mean of (value, topic), by naive resampling; by Wilson's where all are equal.

    grain: by how much the mean changes with one topic, where few values differ and quantiles jump.
    """
    if len({value for value, _ in items}) == 1:
        value, w = items[0][0], 3.841459 / (len({topic for _, topic in items}) + 3.841459)  # a share of topics that may yet differ, by as much as can be
        low, high = value - w * (value - least), value + w * (1 - value)
    else:
        low, high = naive_interval(*zip(*items, strict=True), 4000, 1)
    return limits == pytest.approx([low, high][: len(limits)], abs=max(0.08 * (high - low), grain))


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
    for name, row in table.items():
        letters, kept = "".join(letter(name, "test", i, SAID) for i in range(N)), [v for v in judged(name) if v]
        assert (row["n"], row["n_val"], row["n_missing"]) == (len(kept), N, letters.count("?"))
        assert row["compliance"] == pytest.approx(fmean(v.compliance for v in kept)), name
        for key, one, n in (
            ("refusal_exact", "r", len(kept)),
            ("refusal_graded", "r", N),
            ("refusal_substring", "r", N),
            ("exact", "y", N),
        ):
            assert given.figure(row, key) == given.wilson(letters.count(one), n), (name, key)
        assert near(given.figure(row, "compliance")[1:], differences(judged(name), [NO] * N), 0)
        gaps = differences(judged(name), judged("baseline"))
        assert row["difference"] == pytest.approx(fmean(gap for gap, _ in gaps))
        assert near(given.figure(row, "difference")[1:], gaps), name
        assert row["compliance_val"] == pytest.approx(fmean(v.compliance for v in judged(name, "val")))
        assert row["val_minus_test"] == pytest.approx(row["compliance_val"] - row["compliance"])
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
    assert metrics["cosine_harmless_to_direction"] == pytest.approx(abs(float(given.directions(1)["unit"][1] @ unit[1])))
    for name, row in metrics["over_refusal"].items():
        letters = [SAFE[name][i % 5] for i in range(N)]
        assert given.figure(row, "refusal_safe") == given.wilson(letters.count("r"), N)
        assert (row["n"], row["n_degenerate"]) == (N, letters.count("x"))
    assert set(metrics["over_refusal"]) == set(SAFE)


def test_the_interval_of_val_less_test_draws_whole_topics_of_each(made):
    _, metrics, _ = made()
    row, resampled = metrics["arms"]["lda.2"], []
    for seed in range(2000):
        drawn = []
        for split in ("val", "test"):
            members: dict = {}
            for i, v in enumerate(judged("lda.2", split)):
                members.setdefault(i % TOPICS, []).extend([v.compliance] if v else [])
            pick = random.Random(f"{seed} {split}")
            drawn.append(fmean(v for group in pick.choices(list(members.values()), k=TOPICS) for v in group))
        resampled.append(drawn[0] - drawn[1])
    # Quantiles of 20 topics, expanded to Student's t: of z = 2.1473 and not 1.96.
    low, high = np.quantile(resampled, [0.01588, 0.98412])
    assert given.figure(row, "val_minus_test")[1:] == pytest.approx([low, high], abs=0.08 * (high - low))


def test_controls_are_pooled_and_each_intervention_costs_what_it_costs(made):
    said = {"random": ("rrrr", "rrrxh"), "random_5.1": ("rrrr", "yx"), "harmless": ("rrrr", "ryrrr")}
    study, metrics, _ = made(**said)
    few = [int(row["id"].removeprefix("test-")) for row in study.sample("test", 32)]
    texts = study.harmless(4)
    rows = [*zip(texts.prompts, texts.answers, strict=True)]
    reference = [given.log_probs(study.lm.model, *text) for text in rows]
    families = candidates.by_family(candidates.controls(study))
    ranks = {"harmless": (1, 1), "random_1": (1, 2), "random_2": (2, 2), "random_3": (3, 2), "random_5": (5, 2)}
    assert {family: (row["rank"], row["n_arms"]) for family, row in metrics["controls"].items()} == ranks
    for family, row in metrics["controls"].items():
        letters = "".join(letter(one.name, "test", i, SAID | said) for one in families[family] for i in few)
        n = len(letters) - letters.count("?")
        assert (row["n"], row["n_missing"], row["n_degenerate"]) == (n, letters.count("?"), letters.count("x"))
        items = [item for one in families[family] for item in differences(judged(one.name, said=SAID | said), [NO] * N, few)]
        assert row["compliance"] == pytest.approx(fmean(value for value, _ in items)) and len(items) == n
        assert near(given.figure(row, "compliance")[1:], items, 0)
        assert given.figure(row, "refusal_exact") == given.wilson(letters.count("r"), n)
        assert given.figure(row, "refusal_substring") == given.wilson(letters.count("r"), len(letters))
    priced = {family: (some[0], metrics["controls"][family]) for family, some in families.items()}
    priced |= {"baseline": (BASELINE, metrics["arms"]["baseline"])}
    priced |= {"planted": (Intervention("planted", TRUTH), metrics["arms"]["planted"])}
    for one, row in priced.values():
        with one.on(study.lm.model):
            losses, divergences = given.text_costs(study.lm.model, reference, rows)
        assert (row["cross_entropy"], row["kl"]) == pytest.approx((fmean(losses), fmean(divergences)), rel=1e-3, abs=1e-6)
    assert len({round(row["kl"], 3) for _, row in priced.values()}) == len(priced)


WORKS, NOT = ("yyyy", "yyyyy"), ("rrrr", "rrrrr")


@pytest.mark.parametrize(
    ("said", "decision", "mediate"),
    [
        ({}, ("single", None, "lda.2"), (False, True, True)),
        ({"rank_1": ("yyyr", "yyyy")}, ("single", None, "lda.2"), (True, True, True)),
        # Where a random one does it too it is no evidence; each faces the controls of its own rank.
        ({"random_0": WORKS, "random_1": WORKS}, ("subspace", None, "svd_3"), (False, False, True)),
        ({"random_0": ("rrrr", "rrrrx"), "random_1": ("rrrr", "yrh")}, ("single", None, "lda.2"), (False, True, True)),
        ({"random_3": WORKS}, ("single", None, "lda.2"), (False, True, False)),
        ({"random_2": WORKS, "random_5": WORKS, "harmless": WORKS}, ("single", None, "lda.2"), (False, True, True)),
        ({"lda.2": ("yyyh", "rrrr")}, ("subspace", None, "svd_3"), (False, False, True)),
        ({"lda.2": ("yyyh", "rr"), "svd_3": ("yyyy", "rr")}, ("none", "no_mediation", None), (False, False, False)),
        ({"baseline": ("rrrr", "yyyrr")}, ("undecided", "too_few_refusals", None), (True, False, False)),
        ({"baseline": ("rrrr", "yyyyyyyyyyyyyyyyyyyr")}, ("none", "no_refusal", None), (False, False, False)),
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
    gaps = differences(judged("svd_3", said=said), judged("lda.2", said=said))
    assert near([evidence["subspace_above_single_low"]], gaps, grain=1.01 / TOPICS)
    for what, name, works in zip(("difference", "single", "subspace"), ("rank_1", "lda.2", "svd_3"), mediate, strict=True):
        assert evidence[what]["name"] == name and evidence[what]["mediates"] is works, (what, evidence[what])
        full = [v and v._replace(compliance=float(v.compliance == 1)) for v in judged(name, said=said)]
        assert evidence[what]["removed"] == pytest.approx(fmean(full[i].compliance for i in refused if full[i]))
        controls = ["random_3.0", "random_3.1"] if what == "subspace" else ["random_0", "random_1"]
        gaps = []
        for control in controls:
            drawn = [v and v._replace(compliance=float(v.compliance == 1)) for v in judged(control, said=said)]
            gaps += differences(full, drawn, [i for i in asked if i in refused])
        assert evidence[what]["n_paired"] == len(gaps)
        low = evidence[what]["above_random_low"]
        assert near([low], gaps) if gaps else low is None, what
