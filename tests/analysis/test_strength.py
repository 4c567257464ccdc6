"""What the strength of an ablation does: as predicted on a model that writes nothing, and counted on given completions."""

import given
import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.analysis.strength import PLACES, additions, collapse_alpha, diverges_beyond, residual_gain, strength
from refusal.io.store import Store
from refusal.method.interventions import POSITIONS, Intervention

IDS = torch.tensor([[1, 7, 9, 30, 31]])


@pytest.mark.parametrize("place", PLACES)
def test_what_is_left_of_the_oldest_write(place):
    """A model whose blocks write nothing: what reaches the last block along v is the embedding's, ablated as often as it says."""
    model, v, alpha = tiny_model("qwen2", tie_word_embeddings=False), tiny_direction(), 1.5
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    seen = []
    with torch.no_grad():
        clean = model(IDS, output_hidden_states=True).hidden_states[0][0] @ v
        with Intervention("one", v, alpha, place).on(model):
            # Last in line, behind the ablation's own hook.
            handle = model.model.layers[-1].input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            model(IDS)
            handle.remove()
    assert torch.allclose(seen[0][0] @ v, residual_gain(3, place, alpha) * clean, atol=1e-5)


def test_collapse():
    curve = [{"alpha": a, "score": s} for a, s in ((0, 0.0), (0.5, 0.4), (1, 1.0), (2, 0.6), (2.5, 0.4), (3, 0.9))]
    assert collapse_alpha(curve) == 2.5
    assert collapse_alpha(curve[:4]) is None


@pytest.mark.parametrize("place", PLACES)
def test_where_it_diverges_depth_makes_it_worse(place):
    limit = diverges_beyond(place) or 2.0
    below, above = (
        abs(residual_gain(24, place, alpha)) / abs(residual_gain(8, place, alpha)) for alpha in (limit - 0.25, limit + 0.25)
    )
    assert (below < 1 < above) if diverges_beyond(place) else below == above == 1


def test_a_basis_a_layer_has_no_curve_as_weights(tmp_path, monkeypatch):
    study = given.study(
        Store(tmp_path / "s"), sweep={"basis": "per_layer"}, science={"strength": {"alphas": [1.0], "n": 2}, "n_harmless": 2}
    )
    study.rank_1 = study.rank_1 | {"name": "sequential_per_layer_1-2_alpha_100"}
    seen = []

    def says(lm, one, prompt, addition):
        seen.append(one)
        return "Yes." if "other" in prompt else given.TEXTS["y"]

    given.answers(monkeypatch, says)
    collapse, curve = strength(study, study.params.science.strength)
    places = ["resid_pre", "paper", "writes"]
    assert [*collapse] == [row["place"] for row in curve] == places and {row["residual_gain"] for row in curve} == {None}
    ablated = [one for one in seen if one.basis is not None]
    assert all(one.per_layer and not one.basis[0].any() and one.basis[1:].any(-1).all() for one in ablated)
    own = [torch.equal(one.basis[1:, 0], given.directions(0)["unit"][1:]) for one in ablated]
    assert any(own) and not all(own)  # and a random one a layer


def test_curves_are_counted_at_each_place_and_alpha(tmp_path, monkeypatch):
    said = {(0.5, place): "rryrhr" for place in PLACES} | {(1.0, place): "yyhyyy" for place in PLACES}
    said |= {(2.0, "resid_pre"): "xxxxyx", (2.0, "paper"): "x-xrhr", (2.0, "writes"): "yyyyxx", (2.0, "weights"): "rrrrrh"}

    control, drawn = {(alpha, place): "rrrrrh" for alpha in (0.5, 1.0) for place in PLACES}, []
    control |= {(2.0, place): "rrrrxr" for place in PLACES}

    def says(lm, one, prompt, addition):
        assert prompt.startswith("test harmful")
        own = torch.equal(one.basis[0], given.directions(0)["unit"][1])
        if not own:
            drawn.append(one.basis[0])
        return given.TEXTS[(said if own else control)[one.alpha, one.sites][int(prompt[-1])]]

    alphas = [0.5, 1.0, 2.0]
    study = given.study(Store(tmp_path / "s"), science={"strength": {"alphas": alphas, "n": 6}, "n_harmless": 2})
    given.answers(monkeypatch, lambda lm, one, prompt, addition: "Yes." if "other" in prompt else says(lm, one, prompt, addition))
    collapse, curve = strength(study, study.params.science.strength)
    assert all(torch.equal(v, drawn[0]) for v in drawn) and drawn[0].norm() == pytest.approx(1)
    # A random direction's best is a partial answer of six, gone at alpha 2.
    assert {place: found.pop("random_measured") for place, found in collapse.items()} == dict.fromkeys(PLACES, 2.0)
    assert collapse == {  # scores are 7.5/24, 5.25/6 and as said at alpha 2
        "resid_pre": {"measured": 2.0, "diverges_beyond": 2.0},
        "paper": {"measured": 2.0, "diverges_beyond": 2.0},
        "writes": {"measured": None, "diverges_beyond": None},
        "weights": {"measured": 2.0, "diverges_beyond": None},
    }
    assert [(row["place"], row["alpha"]) for row in curve] == [(place, alpha) for place in PLACES for alpha in alphas]
    topics, texts = [row["topic"] for row in study.pairs["test"]], study.harmless(2)
    rows = [*zip(texts.prompts, texts.answers, strict=True)]
    for row in curve:
        theirs = [given.VERDICTS[letter] for letter in control[row["alpha"], row["place"]]]
        assert row["random_compliance"] == pytest.approx(sum(v.compliance for v in theirs) / 6) and row["random_n"] == 6
        letters, place = said[row["alpha"], row["place"]], row["place"]
        verdicts = [given.VERDICTS[letter] for letter in letters]
        of_place = {
            f"{of}{alpha}": [given.of_letters(letters[alpha, place], "compliance")]
            for of, letters in (("", said), ("random_", control))
            for alpha in alphas
        }
        rates = given.rates(of_place, topics)
        assert given.figure(row, "compliance") == rates[f"{row['alpha']}"]
        assert given.figure(row, "random_compliance") == rates[f"random_{row['alpha']}"]
        assert row["coherence"] == pytest.approx(sum(v.coherence for v in verdicts) / 6)
        assert row["score"] == pytest.approx(sum(v.compliance * v.coherence for v in verdicts) / 6)
        assert (row["refusal"], row["n_degenerate"], row["n"]) == (letters.count("r") / 6, letters.count("x"), 6)
        assert row["residual_gain"] == (1 - row["alpha"]) ** (3 if place in ("resid_pre", "paper") else 1)
        reference = [given.log_probs(study.lm.model, *text) for text in rows]
        for of, v in (("", given.directions(0)["unit"][1]), ("random_", drawn[0])):
            with Intervention("one", v, row["alpha"], place).on(study.lm.model):
                losses, kl = given.text_costs(study.lm.model, reference, rows)
            assert (row[f"{of}cross_entropy"], row[f"{of}kl"]) == pytest.approx((sum(losses) / 2, sum(kl) / 2), rel=1e-3)


def test_additions_of_the_difference_and_of_a_random_vector_of_its_length(tmp_path, monkeypatch):
    said = {"difference": ("rrrrxr", "rryyyy", "r?-xrr"), "random": ("yyyyyy", "yryyyy", "yyyyyx")}
    difference, added = given.directions(0)["difference"][1], []

    def says(lm, one, prompt, addition):
        assert prompt.startswith("test safe") and one.basis is None and addition.layer == 1
        name = "difference" if torch.equal(addition.vector, difference) else "random"
        added.append(addition.vector)
        return given.TEXTS[said[name][POSITIONS.index(addition.positions)][int(prompt[-1])]]

    given.answers(monkeypatch, says)
    study = given.study(Store(tmp_path / "s"), judge={"allow_missing": True})
    figures = additions(study)
    assert figures.pop("layer") == 1 and {tuple(v) for v in figures.values()} == {POSITIONS}
    arms = {(name, position): letters for name in said for position, letters in zip(POSITIONS, said[name], strict=True)}
    topics = [row["topic"] for row in study.pairs["test"]]
    exact = given.rates({arm: [given.of_letters(letters, "refusal")] for arm, letters in arms.items()}, topics)
    substring = given.rates({arm: [[float(c == "r") for c in letters]] for arm, letters in arms.items()}, topics)
    for (name, position), letters in arms.items():
        row, n_missing = figures[name][position], letters.count("?")
        assert given.figure(row, "refusal_exact") == exact[name, position]
        assert given.figure(row, "refusal_substring") == substring[name, position]
        assert [row[k] for k in ("n", "n_degenerate", "n_missing")] == [6 - n_missing, letters.count("x"), n_missing]
    random = next(vector for vector in added if not torch.equal(vector, difference))
    assert random.norm() == pytest.approx(difference.norm()) and abs(random @ difference) < 0.9 * difference.norm() ** 2
