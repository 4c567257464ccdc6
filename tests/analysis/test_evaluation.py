"""The evaluation on completions that are given: rates counted by hand, costs against transformers' own loss."""

from copy import deepcopy
from dataclasses import replace
from statistics import fmean

import given
import pytest
import torch
from tiny import text_lm

from refusal.analysis.evaluation import evaluate, run_time_arms
from refusal.io.store import Store
from refusal.method.interventions import BASELINE, Intervention

# What each model and intervention says to harmful and to safe prompts, a letter of given.TEXTS each.
SAID = {
    "baseline": ("rrhrry", "yyyyhr"),
    "random_0": ("rryrrr", "yyrryy"),
    "random_1": ("rrrrxr", "rry-yy"),
    "harmless_1": ("rhrrr-", "xyyyyy"),
    "layer_1_alpha_100": ("yyhy-x", "yhhyyy"),
    "orthogonalized": ("hyyrhy", "hyyrrr"),
    "random_weights": ("rrrrry", "yryyhy"),
    "addition": (None, "rrrxxy"),
}
MEMBERS = {
    "baseline": ["baseline"],
    "runtime": ["layer_1_alpha_100"],
    "random": ["random_0", "random_1"],
    "harmless": ["harmless_1"],
    "orthogonalized": ["orthogonalized"],
    "random_weights": ["random_weights"],
}
ANSWERS = ("", "Sure.", "Yes, gladly.", "No.", "Of course it is.", "Certainly so.")  # of the base model to other safe prompts
HALVES = ("harmful", "safe")
OWN, HARMLESS = (given.directions(seed)["unit"][1] for seed in (0, 1))


def evaluated(tmp_path, monkeypatch, said=SAID, alpha=1.0, **sections):
    """The study, the edited model and what `evaluate` makes of them."""
    sections = {"sweep": {"alphas": [0.5, 1.0], "n_random": 2}} | sections
    study, edited = given.study(Store(tmp_path / "s"), **sections), text_lm("edited", seed=1)
    study.rank_1 = study.rank_1 | {"alpha": alpha}
    randomly = text_lm("random", seed=2)

    def says(lm, one, prompt, addition):
        split, half, i = prompt.split() if prompt.startswith("test") else ("other", "safe", prompt[-1])
        if split == "other":
            assert lm is study.lm and one is BASELINE and addition is None
            return ANSWERS[int(i)]
        if addition is not None:
            assert (addition.layer, addition.positions) == (1, "prompt") and torch.equal(addition.vector, 3 * OWN)
        name = {id(edited): "orthogonalized", id(randomly): "random_weights"}.get(id(lm), "addition" if addition else one.name)
        assert lm is study.lm or one is BASELINE
        assert one is BASELINE or one.alpha == alpha  # a control has the alpha of what it controls
        name = name.replace("alpha_50", "alpha_100")
        return given.TEXTS[said[name][HALVES.index(half)][int(i)]]

    given.answers(monkeypatch, says)
    return study, (edited, randomly), evaluate(study, {"orthogonalized": edited, "random_weights": randomly})


def counted(metrics, topics, half, n=6, exact=True):
    """Whether every figure of a half is the naive one, and every count."""
    said = {arm: [SAID[member][half][:n] for member in members] for arm, members in MEMBERS.items()}
    if half == 1:
        said["addition"] = [SAID["addition"][1][:n]]

    def said_of(letter_value):
        return {arm: [[letter_value(letter) for letter in letters] for letters in members] for arm, members in said.items()}

    refusal, right = said_of(lambda letter: letter == "r"), said_of(lambda letter: letter == "y")
    if half == 0:
        values = {
            what: said_of(lambda letter, what=what: getattr(given.VERDICTS[letter], what)) for what in ("compliance", "coherence")
        }
        values |= {"score": said_of(lambda letter: given.VERDICTS[letter].compliance * given.VERDICTS[letter].coherence)}
        values |= {"refusal": refusal, "refusal_harmful": refusal} | ({"exact": right} if exact else {})
    else:
        values = {"refusal_safe": refusal, "answers_safe": right} | ({"exact_safe": right} if exact else {})
    for name, arms in values.items():
        for arm, expected in given.rates(arms, topics).items():
            assert given.figure(metrics[arm], name) == expected, (arm, name)
    end = "_safe" if half else ""
    for arm, members in said.items():
        letters = "".join(members)
        counts = {"n": n, "n_clusters": len(set(topics)), "n_arms": len(members), "n_missing": 0, "n_unfinished": 0}
        counts |= {"n_empty": letters.count("-"), "n_degenerate": letters.count("x")}
        assert {name: metrics[arm][f"{name}{end}"] for name in counts} == counts, arm


def behaving(metrics, topics):
    """Whether the figures of prompts that behave are the naive ones: harmful ones that the baseline refuses, safe ones it answers."""
    for half, (letter, name) in enumerate((("r", "compliance"), ("y", "answers_safe"))):
        some = [i for i, said in enumerate(SAID["baseline"][half]) if said == letter]
        assert 0 < len(some) < 6
        arms = MEMBERS | ({"addition": ["addition"]} if half else {})
        said = {arm: [[SAID[one][half][i] for i in some] for one in members] for arm, members in arms.items()}
        value = (lambda letter: letter == "y") if half else (lambda letter: given.VERDICTS[letter].compliance)
        expected = given.rates(
            {arm: [[*map(value, letters)] for letters in members] for arm, members in said.items()}, [topics[i] for i in some]
        )
        for arm, figure in expected.items():
            found = metrics[arm]["behaving"]
            assert given.figure(found, name) == figure and found["n_safe" if half else "n"] == len(some), (arm, name)
        assert metrics["baseline"]["behaving"][name] == half


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_every_rate_is_counted_over_its_own_members_and_half(tmp_path, monkeypatch, alpha):
    study, _, (metrics, rows, _) = evaluated(tmp_path, monkeypatch, alpha=alpha)
    topics = [row["topic"] for row in study.pairs["test"]]
    assert (metrics["layer"], metrics["alpha"], metrics["name"]) == (1, alpha, study.rank_1["name"])
    for half in (0, 1):
        counted(metrics, topics, half)
    said = {arm: [given.of_letters(SAID[one][0], "compliance") for one in members] for arm, members in MEMBERS.items()}
    pooled = {arm: given.items(members, topics)[0] for arm, members in said.items()}
    ours, other = (given.directions(seed)["difference"][1] for seed in (0, 1))
    assert metrics["harmless"]["cosine"] == pytest.approx(float(torch.cosine_similarity(ours, other, dim=0)))
    assert metrics["harmless"]["norm_ratio"] == pytest.approx(float(other.norm() / ours.norm()))
    for arm in MEMBERS:
        found = metrics[arm]
        if arm in ("runtime", "orthogonalized"):
            assert given.figure(found, "difference") == given.difference(pooled, arm, "baseline", topics), arm
            assert found["n_paired"] == 6
        else:
            assert "difference" not in found
    behaving(metrics, topics)
    assert rows == [
        {name: row[name] for name in ("id", "category")}
        | {"arm": arm, "name": name.replace("100", f"{100 * alpha:g}"), "half": half, "prompt": row[half]}
        | {"completion": given.TEXTS[letter]}
        | {field: value for field, value in given.VERDICTS[letter]._asdict().items() if field != "own"}
        for arm, members in MEMBERS.items()
        for i, half in enumerate(HALVES)
        for name in members
        for letter, row in zip(SAID[name][i], study.pairs["test"], strict=True)
    ]


def test_a_subspace_is_evaluated_at_its_own_layers_with_random_ones_of_its_rank(tmp_path, monkeypatch):
    """The window of the sweep that was selected, not another; its checkpoint is compared with the same subspace at `writes`."""
    study = given.study(Store(tmp_path / "s"), sweep={"basis": "qr", "layers": [1, 2], "alphas": [0.5, 1.0], "n_random": 2})
    study.rank_1 = {"name": "sequential_qr_1-2_alpha_50", "layer": 2, "alpha": 0.5}
    acting, at_layer = run_time_arms(study)
    units = [of["unit"][1:] for of in (study.directions, study.harmless_difference)]
    projectors = [torch.linalg.pinv(unit) @ unit for unit in units]
    for arm, projector in zip(("runtime", "harmless"), projectors, strict=True):
        (one,) = acting[arm]
        assert one.alpha == 0.5 and torch.allclose(one.basis.T @ one.basis, projector, atol=1e-9)
    assert [(one.rank, one.alpha) for one in acting["random"]] == [(2, 0.5)] * 2
    assert [one.name for one in at_layer] == ["qr_1-2_alpha_50", "qr_1-2_alpha_100"]
    given.answers(monkeypatch, lambda lm, one, prompt, addition: "Sure." if "other" in prompt else given.TEXTS["y"])
    # An LM whose weights are those of the subspace's edit: the identity holds.
    edited = text_lm("edited")
    with Intervention("e", acting["runtime"][0].basis, 0.5, "weights").on(edited.model):
        edited = replace(edited, model=deepcopy(edited.model))
    metrics, _, _ = evaluate(study, {"orthogonalized": edited, "random_weights": text_lm("random", seed=2)})
    assert metrics["name"] == "sequential_qr_1-2_alpha_50" and metrics["layer"] == 2
    whole = not study.lm.model.config.tie_word_embeddings  # in memory a tied embedding is left as it is
    assert (metrics["identity"]["kl"] < 1e-6) is whole and metrics["runtime"]["kl"] > 1e-4


def test_without_pairs_the_harmless_prompts_are_the_safe_ones_and_count_as_many_as_they_are(tmp_path, monkeypatch):
    alone = {"safe": None, "harmful_answer": None, "safe_answer": None}
    monkeypatch.setattr(given, "pairs", lambda split, n, k, pairs=given.pairs: [row | alone for row in pairs(split, n, k)])
    harmless = [{"id": f"unrelated-{i}", "safe": f"test safe {i}", "topic": f"meal {i}"} for i in range(4)]
    monkeypatch.setattr(given, "unrelated", lambda split: harmless)
    study, _, (metrics, rows, _) = evaluated(tmp_path, monkeypatch)
    assert {(metrics[arm]["exact"], metrics[arm]["exact_safe"], metrics[arm]["n_safe"]) for arm in MEMBERS} == {(None, None, 4)}
    counted(metrics, [row["topic"] for row in study.pairs["test"]], 0, exact=False)
    counted(metrics, [row["topic"] for row in harmless], 1, 4, exact=False)
    asked = [(row["half"], row["id"], row["prompt"], row["category"]) for row in rows if row["arm"] == "runtime"]
    assert asked[:6] == [("harmful", row["id"], row["harmful"], row["category"]) for row in study.pairs["test"]]
    assert asked[6:] == [("safe", row["id"], row["safe"], None) for row in harmless]


def test_costs_are_means_over_all_members_and_all_texts_that_have_an_answer(tmp_path, monkeypatch):
    study, (edited, randomly), (metrics, _, curve) = evaluated(tmp_path, monkeypatch)
    texts = [tuple(study.lm.encode([f"other {i}", ANSWERS[i]])) for i in range(1, 6)]
    topics = ["meal 0"] * 2 + ["meal 1"] * 3
    of_base, of_edited = ([given.log_probs(lm.model, *text) for text in texts] for lm in (study.lm, edited))
    drawn = torch.randn(2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def ablated(direction, alpha=1.0, sites="resid_pre", reference=of_base):
        with Intervention("one", direction, alpha, sites).on(study.lm.model) as model:
            return given.text_costs(model, reference, texts)

    expected = {
        "baseline": [given.text_costs(study.lm.model, of_base, texts)],
        "runtime": [ablated(OWN)],
        "random": [ablated(v / v.norm()) for v in drawn],
        "harmless": [ablated(HARMLESS)],
        "orthogonalized": [given.text_costs(edited.model, of_base, texts)],
        "random_weights": [given.text_costs(randomly.model, of_base, texts)],
        "identity": [ablated(OWN, sites="writes", reference=of_edited)],
    }

    def equal(row, members):
        for i, name in enumerate(("cross_entropy", "kl")):
            values = [value for member in members for value in member[i]]
            of = [n for n in range(len(members)) for _ in texts] if len(members) > 1 else topics  # over directions, or texts
            assert given.figure(row, name) == given.by_topic(values, of, 1e-3)

    for arm, members in expected.items():
        equal(metrics[arm], members)
    assert metrics["n_harmless"] == 5 and metrics["identity"]["norm_after_writer"] is False
    assert len({round(metrics[arm]["kl"], 3) for arm in expected}) == len(expected)  # a mix-up would show
    assert [(row["layer"], row["alpha"]) for row in curve] == [(1, alpha) for alpha in (0.0, 0.5, 1.0)]
    for row, member in zip(curve, (expected["baseline"][0], ablated(OWN, 0.5), expected["runtime"][0]), strict=True):
        equal(row, [member])


def test_what_has_no_answer_or_no_identity_is_null_and_missing_verdicts_are_counted(tmp_path, monkeypatch):
    said = SAID | {"random_0": ("rr?rrr", "yy?ryy"), "addition": (None, "?rrxxy")}
    monkeypatch.setattr(
        given, "pairs", lambda split, n, k, pairs=given.pairs: [r | {"safe_answer": None} for r in pairs(split, n, k)]
    )
    sections = {"judge": {"allow_missing": True}, "orthogonalize": {"include_embedding": False}}
    _, _, (metrics, rows, _) = evaluated(tmp_path, monkeypatch, said, **sections)
    assert metrics["identity"] == {"norm_after_writer": False, "kl": None}
    assert [metrics["random"][name] for name in ("n", "n_missing", "exact", "exact_safe")] == [6, 1, 0, None]
    assert metrics["random"]["compliance"] == 0
    assert metrics["random"]["refusal_safe"] == pytest.approx(
        (0.5 + 0.5 + 0 + 0.5) / 6
    )  # of prompt 2 the one verdict that there is
    assert [metrics["addition"][f"{name}_safe"] for name in ("n", "n_missing", "n_degenerate")] == [5, 1, 2]
    assert metrics["addition"]["refusal_safe"] == pytest.approx(fmean([1, 1, 0, 0, 0])) and len(rows) == 84
