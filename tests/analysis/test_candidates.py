"""The interventions that are compared, and their controls, on activations whose directions are known."""

from collections import Counter

import given
import numpy as np
import pytest
import torch
from tiny import tiny_direction

from refusal.analysis.candidates import RANKS, control_of, controls, fitted_on, planted, single_directions, subspaces
from refusal.analysis.estimators import lda, logistic
from refusal.analysis.subspaces import captured
from refusal.io.store import Store
from refusal.method.directions import difference_in_means

N, FEW = 80, 5
OPTIMISED = tiny_direction(seed=3).double()


@pytest.fixture
def sets():
    """Train activations of four layers, the first the same for every prompt."""
    generator = torch.Generator().manual_seed(0)
    harmful, safe, unrelated = (torch.randn(N, 4, 32, generator=generator) for _ in range(3))
    harmful += 2 * torch.randn(4, 32, generator=generator)
    harmful[:, 0] = safe[:, 0] = unrelated[:, 0] = 1.0
    return harmful, safe, unrelated


@pytest.fixture
def study(sets, tmp_path):
    """A study of which these are the activations, with its directions of them."""
    study = given.study(Store(tmp_path / "s"), science={"n_random": 10, "n_subspaces": 2})
    harmful, safe, unrelated = sets
    study.activations = {"sequential": {"train.harmful": harmful, "train.safe": safe}}
    study.directions, study.harmless_difference = (vars(difference_in_means(some, safe)) for some in (harmful, unrelated))
    return study


def test_the_unrelated_difference_is_compared_where_the_study_has_one_at_the_layers_asked_for(study, sets):
    study.unrelated_unit = vars(difference_in_means(sets[0], sets[2]))["unit"]
    chosen = {one.name: one for one in single_directions(changed(study, science={"layers": [0, 2, 3]}), OPTIMISED)}
    families = ("unrelated", "logistic", "lda", "paired_svd", "affine")  # layer 0 has no direction, and rank_1 is of layer 1
    names = {f"{family}.{i}" for i in (2, 3) for family in families}
    assert set(chosen) == names | {"rank_1", "difference.2", "difference.3", "optimised"}
    for i in (2, 3):
        means = sets[0][:, i].double().mean(0) - sets[2][:, i].double().mean(0)
        assert torch.allclose(chosen[f"unrelated.{i}"].basis[0], means / means.norm())


def changed(study, **sections):
    study.params = given.params(**sections)
    return study


def test_single_directions_are_each_estimator_at_each_defined_layer(study, sets):
    chosen = {one.name: one for one in single_directions(study, OPTIMISED)}
    names = [
        "rank_1",
        "difference.2",
        "difference.3",
        *(f"{f}.{i}" for i in (1, 2, 3) for f in ("logistic", "lda", "paired_svd", "affine")),
    ]
    assert list(chosen) == [*names, "optimised"]
    assert all(one.rank == one.alpha == 1 and one.sites == "resid_pre" for one in chosen.values())
    assert torch.equal(chosen["optimised"].basis[0], OPTIMISED) and chosen["optimised"].layer is None
    assert [one.name for one in chosen.values() if one.direction_independent] == ["optimised"]
    unit, means = study.directions["unit"], sets[1].double().mean(0)
    for name, one in chosen.items():
        if name != "optimised":
            assert one.family == name.split(".")[0].replace("rank_1", "difference")
            assert one.layer == (1 if name == "rank_1" else int(name[-1]))
        if one.family == "affine":
            assert torch.allclose(one.offset, torch.stack([mean @ unit[one.layer] for mean in means])[:, None])
        if one.family in ("difference", "affine"):
            assert torch.equal(one.basis[0], unit[one.layer]) and (one.offset is None) is (one.family == "difference")
        if one.family in ("logistic", "lda"):
            fit = {"logistic": logistic, "lda": lda}[one.family]
            assert torch.allclose(one.basis[0], fit(*(side[:, one.layer] for side in sets[:2])))
        if one.family == "paired_svd":
            vectors = np.linalg.svd((sets[0].double() - sets[1].double())[:, one.layer].numpy())[2]
            assert abs(one.basis[0].numpy() @ vectors[0]) == pytest.approx(1)
    # At another alpha than 1 the selected layer is a candidate of its own at 1; away from resid_pre there is no affine one.
    study.rank_1 = study.rank_1 | {"alpha": 0.75}
    other = single_directions(changed(study, ablation={"sites": "paper"}), OPTIMISED)
    alphas = {one.name: one.alpha for one in other if one.family == "difference"}
    assert alphas == {"rank_1": 0.75, "difference.1": 1.0, "difference.2": 1.0, "difference.3": 1.0}
    assert all(one.sites == "paper" and one.family != "affine" for one in other)


def test_estimators_that_need_all_pairs_at_once_are_fitted_on_few(study, sets):
    whole = {one.name: one.basis for one in single_directions(study, OPTIMISED)}
    changed(study, science={"n_fit": FEW})
    few, (some, of_safe) = {one.name: one.basis for one in single_directions(study, OPTIMISED)}, fitted_on(study)
    assert some == of_safe and len(some) == FEW and len(whole) == len(few)
    for name, fit in (("logistic.1", logistic), ("lda.2", lda)):
        expected = fit(*(side[some, int(name[-1])] for side in sets[:2]))
        assert torch.allclose(few[name][0], expected) and not torch.allclose(whole[name][0], expected)
    assert torch.equal(few["paired_svd.2"], whole["paired_svd.2"])  # all pairs, however many


def test_subspaces_have_the_ranks_that_the_layers_allow(study, sets):
    unit = study.directions["unit"]
    for layer in (1, 2):
        study.rank_1 = study.rank_1 | {"layer": layer}
        chosen = {one.name: one for one in subspaces(study, [2, 3, 1])}
        assert list(chosen) == ["svd_2", "svd_3", "svd_5", "qr_2", "qr_3", "per_layer"]
        assert {one.family for one in chosen.values()} == {"subspace", "per_layer"}
        # The singular vectors are those of the selected layer, by numpy; their signs are nobody's.
        vectors = np.linalg.svd((sets[0].double() - sets[1].double())[:, layer].numpy(), full_matrices=False)[2]
        for k in RANKS:
            one = chosen[f"svd_{k}"]
            assert (one.layer, one.alpha, one.rank) == (layer, 1.0, k)
            assert np.abs(one.basis.numpy() @ vectors[:k].T) == pytest.approx(np.eye(k), abs=1e-8)
        assert [captured(chosen["qr_2"].basis, unit[i]) for i in (2, 3)] == pytest.approx([1, 1])
        assert captured(chosen["qr_2"].basis, unit[1]) < 0.95 and captured(chosen["qr_3"].basis, unit[1]) == pytest.approx(1)
        assert chosen["per_layer"].per_layer and torch.equal(chosen["per_layer"].basis[:, 0], unit)
    alone = {one.name: one for one in subspaces(study, [2])}
    assert "qr_2" not in alone and torch.equal(alone["per_layer"].basis[:, 0].any(-1), torch.tensor([False, False, True, False]))


@pytest.mark.parametrize(
    ("sweep", "name", "family", "control"),
    [
        ({"basis": "qr", "rank": 2, "layers": [1, 2, 3]}, "qr_2-3", "subspace", "random_2"),
        ({"basis": "svd", "rank": 4, "layers": [2]}, "svd_2_rank_4", "subspace", "random_4"),
        ({"basis": "per_layer"}, "per_layer_1-3", "per_layer", "random_per_layer"),
    ],
)
def test_a_selected_subspace_is_no_single_direction_and_has_controls_of_its_rank(study, sets, sweep, name, family, control):
    changed(study, sweep=sweep)
    study.directions = study.directions | {"singular": torch.eye(32).double()[None, :10].repeat(4, 1, 1)}
    study.rank_1 = {"name": f"sequential_{name}_alpha_50", "layer": 2, "alpha": 0.5}
    single, several = single_directions(study, OPTIMISED), subspaces(study, [2, 3, 1])
    assert [one.name for one in single if one.family == "difference"] == ["difference.1", "difference.2", "difference.3"]
    first = several[0]
    assert (first.name, first.family, first.alpha, control_of(first)) == ("rank_1", family, 0.5, control)
    units = study.directions["unit"]
    if sweep["basis"] == "qr":
        assert [captured(first.basis, units[i]) for i in (2, 3)] == pytest.approx([1, 1]) and captured(first.basis, units[1]) < 0.95
    elif sweep["basis"] == "svd":
        assert torch.equal(first.basis, torch.eye(32).double()[:4])
    else:
        assert torch.equal(first.basis[:, 0], units)
    drawn = [one for one in controls(study) if one.family == control]
    assert len(drawn) == (3 if family == "per_layer" else 2)
    assert all(one.rank == first.rank and one.per_layer == first.per_layer for one in drawn)
    assert [one.name for one in several[1:]] == ["svd_2", "svd_3", "svd_5", "qr_2", "qr_3", "per_layer"]


def test_controls_are_drawn_evenly_and_that_of_harmless_sets_is_their_difference(study, sets):
    chosen, other = (
        [one for one in controls(study) if ("layer" in one.family or "affine" in one.family) is odd] for odd in (False, True)
    )
    ranks = {"harmless": 1, "random_1": 1, "random_2": 2, "random_3": 3, "random_5": 5}
    counts = {family: sum(one.family == family for one in chosen) for family in ranks}
    assert counts == {"harmless": 1, "random_1": 10, "random_2": 2, "random_3": 2, "random_5": 2} and len(chosen) == 17
    expected = sets[2][:, 1].double().mean(0) - sets[1][:, 1].double().mean(0)
    assert captured(chosen[0].basis, expected) == pytest.approx(1) and chosen[0].layer == 1
    assert [one.direction_independent for one in chosen] == [False] + [True] * 16
    for one in chosen:
        assert one.basis.shape == (ranks[one.family], 32) and one.alpha == 1.0
        assert torch.allclose(one.basis @ one.basis.T, torch.eye(one.rank, dtype=torch.float64), atol=1e-9)
    # Three as every layer's own, three towards the safe mean.
    assert Counter(one.family for one in other) == {"random_per_layer": 3, "random_affine": 3}
    unit, safe_mean = study.directions["unit"], study.directions["safe_mean"].double()
    for one in other:
        if one.family == "random_affine":
            assert one.basis.shape == (1, 32) and torch.allclose(one.offset[:, 0], safe_mean @ one.basis[0])
        else:
            assert one.per_layer and one.offset is None and one.basis.shape == (len(unit), 1, 32)
            assert torch.allclose(
                one.basis.norm(dim=-1)[:, 0], unit.norm(dim=-1).double(), atol=1e-6
            )  # none where there is no direction
    # No two are alike, of one rank or another, and another seed draws others.
    first = [one.basis[0] for one in chosen[1:]] + [v for one in other for v in one.basis.reshape(-1, 32) if v.any()]
    study.seed = 5
    first += [one.basis[0] for one in controls(study)[1:] if not one.per_layer]
    assert torch.corrcoef(torch.stack(first)).fill_diagonal_(0).abs().max() < 0.9


def test_what_is_left_without_the_planted_direction_holds_nothing_of_it(study):
    assert planted(study, None) == []
    truth = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)
    chosen = planted(study, truth)
    assert [one.name for one in chosen] == ["planted", "less_planted.1", "less_planted.2", "less_planted.3"]
    assert torch.equal(chosen[0].basis[0], truth) and chosen[0].direction_independent
    for one in chosen[1:]:
        assert captured(one.basis, truth) < 1e-9 and not one.direction_independent
        assert captured(torch.stack([one.basis[0], truth]), study.directions["unit"][one.layer]) == pytest.approx(1)
