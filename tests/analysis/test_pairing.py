"""The contest over pairing, of completions that are given: which rows a direction is of, what it removes, and the contrasts."""

import random
from statistics import fmean

import given
import pytest
import torch
from synthetic import naive_difference, naive_icc

from refusal.analysis.pairing import contest
from refusal.analysis.reliability import N_SPLITS, split_half_cosine
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.stats import clustered_mean, holm

N, N_UNRELATED = 24, 20
REFUSED = set(range(21)) - {4, 9}  # train pairs whose harmful half the baseline refuses
ANSWERED = set(range(N)) - {0, 1, 2}  # whose safe half it answers
OTHERS = set(range(N_UNRELATED)) - {5}  # unrelated prompts that it answers
TEST_REFUSED = [i for i in range(N) if i % 4]
SIZES, LAYERS = [8, 16], [1, 2]


def activations():
    """Layer 0 alike for all; elsewhere noise about a mean of each set's own."""
    generator = torch.Generator().manual_seed(3)
    sets = {"harmful": (N, 2.0), "safe": (N, 0.0), "unrelated": (N_UNRELATED, -1.0)}
    found = {}
    for name, (n, at) in sets.items():
        found[f"train.{name}"] = torch.randn(n, 3, 32, generator=generator, dtype=torch.float64) + at * torch.eye(32)[3]
        found[f"train.{name}"][:, 0] = 1.0
    return found


def letter(name: str, i: int) -> str:
    """What is said under an intervention of test prompt i."""
    return random.Random(f"{name} {i}").choice("yyhr")


@pytest.fixture
def study(tmp_path, monkeypatch):
    made = given.study(
        Store(tmp_path / "s"), n=N, n_topics=4, claims={"layers": None, "n": None, "n_pairs": SIZES, "n_random": 2, "seed": 0}
    )
    made.unrelated = {split: [{"safe": f"other {i}", "topic": f"meal {i // 3}"} for i in range(N_UNRELATED)] for split in made.pairs}

    def says(lm, one, prompt, addition):
        said[one.name] = one
        where, *rest = prompt.split()
        i = int(rest[-1])
        if where == "other":
            return given.TEXTS["y" if i in OTHERS else "r"]
        if where == "train":
            return given.TEXTS["r" if i in (REFUSED if rest[0] == "harmful" else set(range(N)) - ANSWERED) else "y"]
        return given.TEXTS[letter(one.name, i) if one.name != "baseline" else "r" if i in TEST_REFUSED else "y"]

    said = made.__dict__["said"] = {}
    given.answers(monkeypatch, says)
    return made


def removed(name: str, layers=LAYERS) -> list[float]:
    """Of each refused test prompt the share of layers at which it is answered in full."""
    return [fmean(letter(f"{name}.{layer}", i) == "y" for layer in layers) for i in TEST_REFUSED]


def test_behaving_pairs_are_refused_and_answered(study):
    found = contest(study, activations())
    behaving = REFUSED & ANSWERED
    assert found["n_behaving"] == {"pairs": len(behaving), "unrelated": len(OTHERS)} and len(behaving) == 16
    assert found["n_refused"] == len(TEST_REFUSED) and found["layers"] == LAYERS
    of_all = {f"{p}-all-{n}" for p in ("matched", "unrelated") for n in (8, 16, 24)} | {"shuffled-all-8"}
    assert set(found["conditions"]) == of_all | {f"{p}-behaving-{n}" for p in ("matched", "unrelated") for n in (8, 16)} | {
        "shuffled-behaving-8"
    }


@pytest.mark.parametrize("behaviour", ["all", "behaving"])
@pytest.mark.parametrize("pairing", ["matched", "shuffled", "unrelated"])
def test_a_direction_is_of_its_own_rows(study, pairing, behaviour):
    """Whatever rows are drawn: matched ones are the same of both sets, shuffled ones of other pairs, all of them of the pool."""
    acts = activations()
    contest(study, acts)
    pool = sorted(REFUSED & ANSWERED) if behaviour == "behaving" else [*range(N)]
    others = sorted(OTHERS) if behaviour == "behaving" else [*range(N_UNRELATED)]
    rows = lambda some, n, seed: [some[i] for i in sorted(random.Random(seed).sample(range(len(some)), n))]  # noqa: E731
    harmful = rows(pool, 8, 0)
    rest = sorted(set(pool) - set(harmful))
    safe = {"matched": harmful, "shuffled": rows(rest, 8, 1) if len(rest) > 8 else rest, "unrelated": rows(others, 8, 0)}[pairing]
    if pairing == "shuffled":
        assert not set(safe) & set(harmful)
    of = acts["train.unrelated" if pairing == "unrelated" else "train.safe"]
    for layer in LAYERS:
        d = sum(acts["train.harmful"][i, layer] for i in harmful) / 8 - sum(of[i, layer] for i in safe) / 8
        basis = study.__dict__["said"][f"{pairing}-{behaviour}-8.{layer}"].basis[0]
        torch.testing.assert_close(basis, d / d.norm())


def test_the_share_removed_is_of_refused_prompts_and_of_all_layers(study):
    found = contest(study, activations())
    topics = [study.pairs["test"][i]["topic"] for i in TEST_REFUSED]
    arms = {name: [[float(letter(f"{name}.{k}", i) == "y") for i in TEST_REFUSED] for k in LAYERS] for name in found["conditions"]}
    arms["random"] = [[float(letter(f"random_{k}", i) == "y") for i in TEST_REFUSED] for k in range(2)]
    expected = given.rates(arms, topics)
    for name, figures in (found["conditions"] | {"random": found["random"]}).items():
        assert given.figure(figures, "removed") == expected[name], name
        assert figures["n"] == len(TEST_REFUSED)


def test_contrasts_are_paired_and_corrected(study):
    found = contest(study, activations())
    topics = [study.pairs["test"][i]["topic"] for i in TEST_REFUSED]
    asked = {
        "matched_less_unrelated": ("matched-all-24", "unrelated-all-24"),  # of the latter all 20
        "matched_less_unrelated_behaving": ("matched-behaving-16", "unrelated-behaving-16"),
        "matched_less_unrelated_as_few": ("matched-all-16", "unrelated-all-16"),
        "shuffled_less_matched": ("shuffled-all-8", "matched-all-8"),
    }
    iccs = dict(
        zip(
            names := sorted({one for pair in asked.values() for one in pair}),
            naive_icc([(removed(name), topics) for name in names]),
            strict=True,
        )
    )
    for name, (ours, theirs) in asked.items():
        expected = naive_difference(removed(ours), removed(theirs), topics, max(iccs[ours], iccs[theirs]))
        assert [found["contrasts"][name][key] for key in ("difference", "low", "high")] == pytest.approx(expected, abs=1e-6)
    gap = [
        (a - b) - (c - d)
        for a, b, c, d in zip(
            *(removed(name) for of in ("_behaving", "_as_few") for name in asked[f"matched_less_unrelated{of}"]), strict=True
        )
    ]
    assert found["contrasts"]["behaviour"]["difference"] == pytest.approx(fmean(gap))
    assert found["contrasts"]["behaviour"]["low"] == clustered_mean(gap, topics, 2000, 0)[1]
    p = {name: of["p"] for name, of in found["contrasts"].items()}
    assert {name: of["p_holm"] for name, of in found["contrasts"].items()} == holm(p) and len(p) == 5
    assert found["figures"]["behaviour"]["ours"] == tuple(found["contrasts"]["behaviour"][k] for k in ("difference", "low", "high"))
    assert found["figures"]["matched"]["ours"][0] == pytest.approx(fmean(removed("matched-all-24")))


def test_noise_is_that_of_the_rows(study):
    acts = activations()
    found = contest(study, acts)["conditions"]["matched-all-24"]
    halves = [split_half_cosine({"pairs": acts["train.harmful"][:, k] - acts["train.safe"][:, k]}, N_SPLITS, 0) for k in LAYERS]
    assert found["reliability"] == pytest.approx(fmean(2 * c / (1 + c) for c in halves))
    lengths = [float((acts["train.harmful"][:, k].mean(0) - acts["train.safe"][:, k].mean(0)).norm()) for k in LAYERS]
    assert found["length"] == pytest.approx(fmean(lengths)) and found["n_pairs"] == N


def test_length_cannot_matter_where_a_unit_vector_is_ablated(study):
    """Activations twice as long give the same interventions to the bit."""
    acts = activations()
    contest(study, acts)
    plain = dict(study.__dict__["said"])
    contest(study, {name: 2 * of for name, of in acts.items()})
    assert all(torch.equal(one.basis, plain[name].basis) for name, one in study.__dict__["said"].items() if one.basis is not None)


def test_too_few_that_behave_are_no_contest(study, monkeypatch):
    monkeypatch.setitem(globals(), "REFUSED", set(range(9)))
    with pytest.raises(UserError, match="6 pairs and 19 unrelated ones behave, and the claim `pairing` needs 8"):
        contest(study, activations())


def test_prompts_that_are_no_pairs_are_no_contest(study):
    study.pairs = {split: [row | {"safe": None} for row in rows] for split, rows in study.pairs.items()}
    with pytest.raises(UserError, match="needs pairs"):
        contest(study, activations())
