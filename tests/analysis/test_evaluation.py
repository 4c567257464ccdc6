"""The evaluation on completions that are given: rates counted by hand, costs against transformers' own loss."""

from statistics import fmean

import given
import pytest
import torch
from tiny import text_lm

from refusal.analysis.evaluation import evaluate
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
    "addition": (None, "rrrxxy"),
}
MEMBERS = {
    "baseline": ["baseline"],
    "runtime": ["layer_1_alpha_100"],
    "random": ["random_0", "random_1"],
    "harmless": ["harmless_1"],
    "orthogonalized": ["orthogonalized"],
}
ANSWERS = ("", "Sure.", "Yes, gladly.", "No.", "Of course it is.", "Certainly so.")  # of the base model to other safe prompts
HALVES = ("harmful", "safe")
OWN, HARMLESS = (given.directions(seed)["unit"][1] for seed in (0, 1))


def evaluated(tmp_path, monkeypatch, said=SAID, **sections):
    """The study, the edited model and what `evaluate` makes of them."""
    sections = {"sweep": {"alphas": [0.5, 1.0], "n_random": 2}} | sections
    study, edited = given.study(Store(tmp_path / "s"), **sections), text_lm("edited", seed=1)

    def says(lm, one, prompt, addition):
        split, half, i = prompt.split() if prompt.startswith("test") else ("other", "safe", prompt[-1])
        if split == "other":
            assert lm is study.lm and one is BASELINE and addition is None
            return ANSWERS[int(i)]
        if addition is not None:
            assert (addition.layer, addition.positions) == (1, "prompt") and torch.equal(addition.vector, 3 * OWN)
        name = "orthogonalized" if lm is edited else one.name if addition is None else "addition"
        assert lm is study.lm or one is BASELINE
        return given.TEXTS[said[name][HALVES.index(half)][int(i)]]

    given.answers(monkeypatch, says)
    return study, edited, evaluate(study, edited)


def test_every_rate_is_counted_over_its_own_members_and_half(tmp_path, monkeypatch):
    study, _, (metrics, rows, _) = evaluated(tmp_path, monkeypatch)
    topics = [row["topic"] for row in study.pairs["test"]]
    assert (metrics["layer"], metrics["alpha"], metrics["name"]) == (1, 1.0, study.rank_1["name"])
    for arm, members in MEMBERS.items():
        found, of = metrics[arm], topics * len(members)
        harmful, safe = ("".join(SAID[member][half] for member in members) for half in (0, 1))
        judged = [given.VERDICTS[letter] for letter in harmful]
        assert given.figure(found, "compliance") == given.by_topic([v.compliance for v in judged], of), arm
        assert given.figure(found, "coherence") == given.by_topic([v.coherence for v in judged], of), arm
        assert given.figure(found, "score") == given.by_topic([v.compliance * v.coherence for v in judged], of), arm
        for name, letters, letter in (
            ("refusal", harmful, "r"),
            ("refusal_harmful", harmful, "r"),
            ("refusal_safe", safe, "r"),
            ("exact", harmful, "y"),
            ("exact_safe", safe, "y"),
        ):
            assert given.figure(found, name) == given.wilson(letters.count(letter), len(letters)), (arm, name)
        counts = {"n": len(harmful), "n_missing": 0, "n_empty": harmful.count("-"), "n_degenerate": harmful.count("x")}
        assert {name: found[name] for name in counts} == counts
        if arm in ("runtime", "orthogonalized"):
            baseline = [given.VERDICTS[letter] for letter in SAID["baseline"][0]]
            gaps = [a.compliance - b.compliance for a, b in zip(judged, baseline, strict=True)]
            assert given.figure(found, "difference") == given.by_topic(gaps, topics), arm
        else:
            assert "difference" not in found
    added = SAID["addition"][1]
    assert given.figure(metrics["addition"], "refusal_safe") == given.wilson(added.count("r"), 6)
    assert [metrics["addition"][name] for name in ("n", "n_missing", "n_degenerate")] == [6, 0, added.count("x")]
    assert rows == [
        {name: row[name] for name in ("id", "category")}
        | {"arm": arm, "half": half, "prompt": row[half], "completion": given.TEXTS[letter]}
        | given.VERDICTS[letter]._asdict()
        for arm in ("baseline", "runtime", "orthogonalized")
        for half, letters in zip(HALVES, SAID[MEMBERS[arm][0]], strict=True)
        for row, letter in zip(study.pairs["test"], letters, strict=True)
    ]


def test_without_pairs_the_harmless_prompts_are_the_safe_ones_and_count_as_many_as_they_are(tmp_path, monkeypatch):
    alone = {"safe": None, "harmful_answer": None, "safe_answer": None}
    monkeypatch.setattr(given, "pairs", lambda split, n, k, pairs=given.pairs: [row | alone for row in pairs(split, n, k)])
    harmless = [{"id": f"unrelated-{i}", "safe": f"test safe {i}", "topic": f"meal {i}"} for i in range(4)]
    monkeypatch.setattr(given, "unrelated", lambda split: harmless)
    study, _, (metrics, rows, _) = evaluated(tmp_path, monkeypatch)
    for arm, members in MEMBERS.items():
        harmful, safe = "".join(SAID[one][0] for one in members), "".join(SAID[one][1][:4] for one in members)
        found = metrics[arm]
        assert (found["n"], found["n_safe"], found["exact"], found["exact_safe"]) == (len(harmful), len(safe), None, None)
        assert given.figure(found, "refusal_harmful") == given.wilson(harmful.count("r"), len(harmful)), arm
        assert given.figure(found, "refusal_safe") == given.wilson(safe.count("r"), len(safe)), arm
    assert given.figure(metrics["addition"], "refusal_safe") == given.wilson(SAID["addition"][1][:4].count("r"), 4)
    asked = [(row["half"], row["id"], row["prompt"], row["category"]) for row in rows if row["arm"] == "runtime"]
    assert asked[:6] == [("harmful", row["id"], row["harmful"], row["category"]) for row in study.pairs["test"]]
    assert asked[6:] == [("safe", row["id"], row["safe"], None) for row in harmless]


def test_costs_are_means_over_all_members_and_all_texts_that_have_an_answer(tmp_path, monkeypatch):
    study, edited, (metrics, _, curve) = evaluated(tmp_path, monkeypatch)
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
        "identity": [ablated(OWN, sites="writes", reference=of_edited)],
    }

    def equal(row, members):
        for i, name in enumerate(("cross_entropy", "kl")):
            values = [value for member in members for value in member[i]]
            assert given.figure(row, name) == given.by_topic(values, topics * len(members), 1e-3)

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
    assert [metrics["random"][name] for name in ("n", "n_missing", "exact", "exact_safe")] == [11, 1, None, None]
    assert metrics["random"]["compliance"] == 0 and metrics["random"]["refusal_safe"] == pytest.approx(3 / 11)
    assert [metrics["addition"][name] for name in ("n", "n_missing", "n_degenerate")] == [5, 1, 2]
    assert metrics["addition"]["refusal_safe"] == pytest.approx(fmean([1, 1, 0, 0, 0])) and len(rows) == 36
