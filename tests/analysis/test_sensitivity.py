"""Positions and padding against plain forwards; fewer prompts against the bootstrap of all."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from synthetic import activations, gaussian, naive_d
from tiny import tiny_lm

from refusal.analysis.sensitivity import by_size, collect, common_suffix, padding, positions, sizes
from refusal.analysis.separation import bootstrap_unit, contrast
from refusal.io.store import Store
from refusal.method.activations import last_token_resid_pre
from refusal.method.directions import difference_in_means

IDS = [[1, 5, 9, 30, 3, 4], [1, 6, 3, 4], [1, 7, 8, 11, 12, 3, 4], [1, 9, 3, 4], [1, 60, 61, 3, 4]]


@pytest.fixture(scope="module")
def lm():
    return tiny_lm()


@pytest.fixture
def study(lm, tmp_path):
    """What `collect` reads of a study: a model, batches of 2 and a store."""
    return SimpleNamespace(
        lm=lm, params=SimpleNamespace(activations=SimpleNamespace(batch_size=2)), store=Store(tmp_path / "store.sqlite")
    )


@torch.no_grad()
def plain(lm, ids):
    """resid_pre at every position of one prompt, from transformers' own hidden states: [seq, n_layers, d_model]."""
    return torch.stack(lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states[:-1], dim=2)[0]


def test_collect_is_the_plain_forward_at_each_position_whatever_the_masked_padding(lm, study):
    for pads in (None, (0, True), (5, True)):
        rows = collect(study, IDS, "test", 3, pads)
        for i, ids in enumerate(IDS):
            assert torch.allclose(rows[i], plain(lm, ids)[-3:], atol=1e-5), (pads, i)
    batches = []
    of_each = collect(study, IDS, "test", 3, of=lambda resid_pre: batches.append(len(resid_pre)) or resid_pre[:, -1, 1])
    assert torch.equal(of_each, collect(study, IDS, "test", 3)[:, -1, 1]) and sorted(batches) == [1, 2, 2]


def test_what_is_stored_is_not_computed_again(study, monkeypatch):
    rows = collect(study, IDS, "test", 3, (2, False))
    others = [collect(study, IDS, "test", n, pads) for n, pads in ((2, (2, False)), (3, (3, False)), (3, (2, True)), (3, None))]
    assert others[0].shape[1] == 2 and not any(torch.equal(rows, other) for other in others)
    monkeypatch.setattr("refusal.analysis.sensitivity.left_pad", lambda *_: pytest.fail("computed again"))
    assert torch.equal(rows, collect(study, IDS, "test", 3, (2, False)))


def test_unmasked_padding_is_a_prompt_that_begins_with_it(lm, study):
    rows = collect(study, IDS, "test", 1, (4, False))
    for i, ids in enumerate(IDS):
        assert torch.allclose(rows[i, 0], plain(lm, [0] * 4 + ids)[-1], atol=1e-5)
        assert not torch.allclose(rows[i, 0], plain(lm, ids)[-1], atol=1e-2)
    without = collect(study, IDS, "test", 1, (0, False))[:, 0]
    assert torch.allclose(without, last_token_resid_pre(lm, IDS, "sequential"), atol=1e-5)


def test_common_suffix():
    assert common_suffix(IDS) == 2
    assert common_suffix([[1, 2], [1, 2]]) == 2 and common_suffix([[1], [2]]) == 0


def test_sizes():
    assert [sizes(n) for n in (10, 16, 17, 60, 64)] == [[10], [16], [16, 17], [16, 32, 60], [16, 32, 64]]


@pytest.mark.parametrize(("pairing", "n"), [("matched", 60), ("unrelated", 50)])
def test_fewer_prompts_are_less_certain_and_all_of_them_are_the_bootstrap(pairing, n):
    sets = activations(60)
    of = contrast(sets | {"train.unrelated": sets["train.unrelated"][:50]}, pairing, 0)
    rows = by_size(of, of.directions, 200, 0)
    assert {r["layer"] for r in rows} == {1, 2, 3}
    at_layer = [r for r in rows if r["layer"] == 1]
    medians = [r["cosine"] for r in at_layer]
    assert medians == sorted(medians) and medians[-1] > medians[0] + 0.02
    assert [(r["n"], r["all"]) for r in at_layer] == [(16, False), (32, False), (n, True)]
    resampled = bootstrap_unit(of.harmful[:, 1], of.safe[:, 1], 200, 0, pairing == "matched") @ of.directions.unit[1]
    assert [at_layer[-1][k] for k in ("low", "high")] == pytest.approx([float(resampled.quantile(q)) for q in (0.025, 0.975)])
    assert all(r["to_reference"] == pytest.approx(1) for r in rows)


def test_shuffled_pairs_give_the_same_full_direction_and_another_set_does_not():
    sets = activations(60)
    reference = contrast(sets, "matched", 0).directions
    shuffled, unrelated = (by_size(contrast(sets, pairing, 0), reference, 20, 0) for pairing in ("shuffled", "unrelated"))
    assert min(r["to_reference"] for r in shuffled) > 1 - 1e-9 > 0.99 > max(r["to_reference"] for r in unrelated)


def d_along(direction, harmful, safe):
    return naive_d(*((rows @ direction).tolist() for rows in (harmful, safe)))


def test_positions_score_each_position_by_its_own_direction():
    sets = [gaussian(50, 2, 3, 16, seed=seed) for seed in range(4)]
    for harmful in (sets[0], sets[2]):
        harmful[:, -1] += 1.0  # only the last position tells them apart
    rows = positions(*sets)
    for row in rows:
        harmful, safe, *val = (one[:, row["position"], row["layer"]].double() for one in sets)
        assert row["separation"] == pytest.approx(d_along(harmful.mean(0) - safe.mean(0), *val))
    assert [(r["position"], r["layer"], r["n"]) for r in rows] == [(p, i, 50) for p in (-1, -2) for i in range(3)]
    assert all(r["cosine_to_last"] == pytest.approx(1) and r["separation"] > 2 for r in rows[:3])
    assert all(abs(r["separation"]) < 1 and abs(r["cosine_to_last"]) < 0.9 for r in rows[3:])


def test_padding_rows():
    clean, noise = (gaussian(40, 2, 16) + 2, gaussian(40, 2, 16, seed=1)), gaussian(2, 40, 2, 16, seed=2)
    shifted, noisy = (clean[0] + 3, clean[1] + 3), (clean[0] + 9 * noise[0], clean[1] + noise[1])
    rows = padding(clean, {(True, 8): clean, (False, 8): shifted, (False, "as batched"): noisy})
    length = difference_in_means(*clean).difference.norm(dim=-1).tolist()
    assert [(r["masked"], r["n_pads"], r["layer"], r["n"]) for r in rows] == [
        (masked, n_pads, layer, 40) for masked, n_pads in ((True, 8), (False, 8), (False, "as batched")) for layer in (0, 1)
    ]
    for row in rows[:2]:
        assert row["cosine"] == pytest.approx(1) and row["moved"] == 0 and row["separation"] == row["separation_clean"]
    for row in rows[2:4]:  # all move alike: the difference stays where it was
        assert row["cosine"] == pytest.approx(1) and row["moved"] == pytest.approx(12 / length[row["layer"]], rel=1e-5)
        assert row["separation"] == pytest.approx(row["separation_clean"], rel=1e-4)
    for row in rows[4:]:
        harmful, safe, *without = (rows[:, row["layer"]].double() for rows in (*noisy, *clean))
        direction, length = harmful.mean(0) - safe.mean(0), (without[0].mean(0) - without[1].mean(0)).norm()
        assert row["separation"] == pytest.approx(d_along(direction, harmful, safe)) and row["cosine"] < 0.99
        assert row["separation_clean"] == pytest.approx(d_along(without[0].mean(0) - without[1].mean(0), *without))
        moves = sorted(float(move.norm() / length) for a, b in zip((harmful, safe), without, strict=True) for move in a - b)
        assert row["moved"] == pytest.approx(moves[39])  # the lower median


def test_padding_rows_are_those_of_numpy_layer_by_layer():
    """Prompts of unlike numbers on both sides, each set scored on its own direction; null where padding leaves none."""
    generator = torch.Generator().manual_seed(1)

    def drawn(n):
        return torch.randn(n, 3, 16, generator=generator)

    shift = 2 * torch.randn(3, 16, generator=generator)
    clean = drawn(30) + shift, drawn(20)
    padded = {
        (True, 4): (clean[0] + 3 * drawn(30), clean[1] + 3 * drawn(20)),
        (False, 32): (drawn(30) - shift.flip(0), drawn(20)),
    }
    padded[False, 32][0][:, 2] = padded[False, 32][1][:, 2] = 1.0  # to the model all prompts are one
    rows = {(r["masked"], r["n_pads"], r["layer"]): r for r in padding(clean, padded)}
    assert set(rows) == {(*key, layer) for key in padded for layer in range(3)}

    def scored(harmful, safe):
        """The unit difference of means, its length, and Cohen's d on it."""
        difference = harmful.mean(0) - safe.mean(0)
        unit = difference / np.linalg.norm(difference)
        a, b = harmful @ unit, safe @ unit
        pooled = (np.square(a - a.mean()).sum() + np.square(b - b.mean()).sum()) / (len(a) + len(b) - 2)
        return unit, np.linalg.norm(difference), (a.mean() - b.mean()) / np.sqrt(pooled)

    for (masked, n_pads, layer), made in rows.items():
        before, after = ([side[:, layer].double().numpy() for side in sets] for sets in (clean, padded[masked, n_pads]))
        unit, length, separation = scored(*before)
        assert made["separation_clean"] == pytest.approx(separation) and made["n"] == 30
        far = sorted(np.linalg.norm(b - a) for sides in zip(before, after, strict=True) for a, b in zip(*sides, strict=True))
        assert made["moved"] == pytest.approx(far[24] / length)  # of 50 the lower median, as torch's
        if (masked, layer) == (False, 2):
            assert made["cosine"] is None and made["separation"] is None
        else:
            its_unit, _, its_separation = scored(*after)
            assert (made["cosine"], made["separation"]) == pytest.approx((unit @ its_unit, its_separation))
            assert abs(made["cosine"]) < 0.97  # so that one direction in place of the other would show
