"""Directions and their geometry against numpy, naive loops, closed forms and simulation; degenerate input is null, not NaN."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from refusal.analysis.science import spectrum_row
from safetensors.torch import save_file

from perf.harness import Peak
from refusal.analysis.separation import _separation_interval, arm, describe, rows_of
from refusal.analysis.subspaces import captured, paired_svd
from refusal.io.errors import UserError
from refusal.lm.checkpoint import Writer, read_stacks
from refusal.method.directions import (
    blocks,
    bootstrap_unit,
    cohens_d,
    cosine,
    cross_layer_cosine,
    difference_in_means,
    effective_rank,
    project,
    sign_flip_null,
    spectrum,
)


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def activations(n=40, n_val=24, n_layers=4, d_model=12, seed=0):
    """Layer 0 alike for all prompts; from layer 1 on harmful prompts lie off in a direction of the layer's own."""
    offset = random(n_layers, d_model, seed=seed + 100)
    offset[0] = 0
    made = {}
    for i, (split, size) in enumerate((("train", n), ("val", n_val))):
        for j, name in enumerate(("harmful", "safe", "unrelated")):
            rows = random(size, n_layers, d_model, seed=seed + 10 * i + j)
            rows[:, 0] = 3.0
            made[f"{split}.{name}"] = rows + (offset if name == "harmful" else 0) + (0.3 if name == "unrelated" else 0)
            made[f"{split}.{name}"][:, 0] = 3.0
    return made


def test_difference_in_means_is_the_float64_mean():
    harmful, safe = 1000 + random(700, 3, 8), 1000 + random(500, 3, 8, seed=1)
    found = difference_in_means(harmful, safe)
    for layer in range(3):
        a = sum(row.astype(np.float64) for row in harmful[:, layer].numpy()) / 700
        b = sum(row.astype(np.float64) for row in safe[:, layer].numpy()) / 500
        np.testing.assert_allclose(found.difference[layer].numpy(), a - b, rtol=0, atol=1e-11)  # float32 sums are off by 1e-4
        np.testing.assert_allclose(found.safe_mean[layer].numpy(), b, rtol=1e-14)
        np.testing.assert_allclose(found.unit[layer].numpy(), (a - b) / np.linalg.norm(a - b), rtol=1e-9)
    assert found.unit.dtype == torch.float64 and found.layers == [0, 1, 2]


def test_the_direction_points_to_harmful():
    harmful, safe = random(50, 2, 8) + 1, random(60, 2, 8, seed=1)
    found = difference_in_means(harmful, safe)
    assert (project(harmful, found.unit).mean(0) > project(safe, found.unit).mean(0) + 1).all()
    assert torch.allclose(difference_in_means(safe, harmful).unit, -found.unit)


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_layer_without_difference_is_undefined(noise):
    harmful, safe = random(30, 3, 8), random(30, 3, 8, seed=1)
    harmful[:, 0] = safe[:, 0] = 5.0
    harmful[:, 0] *= 1 + noise  # rounding noise of float32
    harmful[:, 2] = safe[:, 2] = 0.0
    found = difference_in_means(harmful, safe)
    assert found.defined.tolist() == [False, True, False] and found.layers == [1]
    assert not found.unit[0].any() and not found.unit[2].any() and found.unit.isfinite().all()


def test_a_small_but_real_difference_is_defined():
    safe = 5 + random(30, 1, 8)
    assert difference_in_means(safe + 1e-3, safe).layers == [0]


def test_shuffled_equals_matched_to_rounding_but_pairs_other_prompts():
    data = activations()
    matched, shuffled = arm(data, "matched", 0), arm(data, "shuffled", 0)
    assert (cosine(matched.directions.unit, shuffled.directions.unit)[1:] >= 1 - 1e-12).all()
    assert not torch.equal(matched.safe, shuffled.safe)  # really permuted, not copied
    rows = lambda t: sorted(map(tuple, t.flatten(1).tolist()))  # noqa: E731
    assert rows(matched.safe) == rows(shuffled.safe)
    for layer in (1, 2, 3):  # what pairing does matter to moves
        spectra = [spectrum(a.harmful[:, layer], a.safe[:, layer]) for a in (matched, shuffled)]
        assert not torch.allclose(*spectra, atol=1e-4)
    assert not torch.equal(shuffled.safe, arm(data, "shuffled", 1).safe)
    unrelated = arm(data, "unrelated", 0)
    assert torch.equal(unrelated.safe, data["train.unrelated"])
    assert (cosine(matched.directions.unit, unrelated.directions.unit)[1:] < 0.999).all()


def naive_d(a, b):
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    squares = sum((x - mean(a)) ** 2 for x in a) + sum((x - mean(b)) ** 2 for x in b)
    return (mean(a) - mean(b)) / math.sqrt(squares / (len(a) + len(b) - 2))


def test_cohens_d_equals_the_naive_loop():
    harmful, safe = 100 + 2 * random(9, 3), 99 + random(14, 3, seed=1)
    found = cohens_d(harmful, safe)
    for layer in range(3):
        assert float(found[layer]) == pytest.approx(naive_d(harmful[:, layer].tolist(), safe[:, layer].tolist()), rel=1e-9)
    assert cohens_d(torch.ones(4), torch.ones(3)).isnan()


def test_project_equals_the_naive_loop():
    r, unit = random(5, 3, 8), random(3, 8, seed=1, dtype=torch.float64)
    naive = [
        [sum(float(x) * float(y) for x, y in zip(r[n, layer], unit[layer], strict=True)) for layer in range(3)] for n in range(5)
    ]
    assert torch.allclose(project(r, unit), torch.tensor(naive, dtype=torch.float64), atol=1e-12)


def test_cosines():
    a, b = (random(6, seed=seed, dtype=torch.float64) for seed in (2, 3))
    naive = float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))
    assert float(cosine(a, 7 * b)) == pytest.approx(naive, rel=1e-12)
    assert cosine(a, 0 * a).isnan()
    units = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]])
    assert torch.allclose(
        cross_layer_cosine(units), torch.tensor([[1, 0.6, -1], [0.6, 1, -0.6], [-1, -0.6, 1]], dtype=torch.float64)
    )


def test_spectrum_equals_numpys_svd():
    harmful, safe = random(20, 7) + 2, random(20, 7, seed=1)
    values = np.linalg.svd(harmful.double().numpy() - safe.double().numpy(), compute_uv=False) ** 2
    np.testing.assert_allclose(spectrum(harmful, safe).numpy(), values / values.sum(), rtol=1e-9)
    # Uncentred: a common offset is the first singular vector, not removed.
    assert spectrum(harmful + 50, safe)[0] > 0.99


def test_effective_rank_of_known_shapes():
    shape = lambda differences: effective_rank(spectrum(differences, torch.zeros_like(differences)))  # noqa: E731
    assert shape(torch.outer(random(200), random(9, seed=1))) == pytest.approx(1)
    assert effective_rank(torch.full((5,), 0.2)) == pytest.approx(5)
    assert 8.9 < shape(random(20000, 9)) <= 9
    assert shape(random(20000, 9) * torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])) == pytest.approx(3, abs=0.05)


def test_sign_flip_null_equals_all_flips():
    """Four pairs have sixteen ways to flip: the null is drawn from exactly these, each as often as the others."""
    differences = random(4, 3) + torch.tensor([1.0, 0, 0])
    every = sorted(
        {
            round(
                float(
                    np.linalg.norm((np.array([[1 - 2 * (k >> i & 1)] for i in range(4)]) * differences.double().numpy()).mean(0))
                ),
                9,
            )
            for k in range(16)
        }
    )
    drawn = [round(x, 9) for x in sign_flip_null(differences, torch.zeros(4, 3), 8000, 0).tolist()]
    assert sorted(set(drawn)) == pytest.approx(every)
    shares = [drawn.count(x) / 8000 for x in sorted(set(drawn))]
    assert len(shares) == 8 and max(abs(share - 1 / 8) for share in shares) < 0.02  # a flip and its mirror are as long


def test_sign_flips_tell_agreement_from_none():
    nothing, common = random(100, 20), random(100, 20) + 0.5
    for differences, agrees in ((nothing, False), (common, True)):
        null = sign_flip_null(differences, torch.zeros(100, 20), 1000, 0)
        above = float(differences.double().mean(0).norm()) > float(null.quantile(0.95))
        assert above is agrees


@pytest.mark.parametrize("paired", [True, False])
def test_bootstrap_unit_has_the_spread_of_naive_resampling(paired):
    n, m = 30, 30 if paired else 45
    shared = 3 * random(n, 1, 6, seed=5)  # what the halves of a pair have in common: only whole pairs cancel it
    harmful = random(n, 2, 6, seed=6) + shared + 1
    safe = random(m, 2, 6, seed=7) + (shared if paired else 0)
    found = torch.stack([bootstrap_unit(harmful[:, layer], safe[:, layer], 3000, 0, paired) for layer in range(2)], dim=1)
    assert found.shape == (3000, 2, 6)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3000, 2, dtype=torch.float64))
    rng = np.random.default_rng(0)
    naive = []
    for _ in range(3000):
        rows = rng.integers(0, n, n)
        others = rows if paired else rng.integers(0, m, m)
        d = harmful.double().numpy()[rows].mean(0) - safe.double().numpy()[others].mean(0)
        naive.append(d / np.linalg.norm(d, axis=-1, keepdims=True))
    naive = np.stack(naive)
    np.testing.assert_allclose(found.mean(0).numpy(), naive.mean(0), atol=0.02)
    np.testing.assert_allclose(found.std(0).numpy(), naive.std(0), rtol=0.12, atol=2e-3)
    if paired:  # a bootstrap that broke pairs would be much wider
        assert bootstrap_unit(harmful[:, 0], safe[:, 0], 3000, 0, False).std(0).mean() > 1.5 * found[:, 0].std(0).mean()


def test_resamples_drawn_in_parts_are_those_drawn_at_once(monkeypatch):
    harmful, safe = random(40, 6, seed=1), random(50, 6, seed=2)
    calls = [
        lambda: bootstrap_unit(harmful, safe[:40], 9, 3, True),
        lambda: bootstrap_unit(harmful, safe, 9, 3, False, 17),
        lambda: sign_flip_null(harmful, safe[:40], 9, 3),
    ]
    at_once = [call() for call in calls]
    monkeypatch.setattr("refusal.stats.AT_ONCE", 100)
    for call, wanted in zip(calls, at_once, strict=True):
        assert torch.allclose(call(), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_read_layer_by_layer_is_the_tensor(tmp_path, dtype):
    data = {name: value.to(dtype) for name, value in activations().items()}
    save_file(data, tmp_path / "a.safetensors")
    stacks = read_stacks(tmp_path / "a.safetensors")
    assert stacks.keys() == data.keys()
    order = torch.randperm(len(data["train.safe"]), generator=torch.Generator().manual_seed(0))
    for name, value in data.items():
        stack = stacks[name]
        assert len(stack) == len(value) and stack.shape == value.shape
        assert all(torch.equal(stack[:, layer][:], value[:, layer]) for layer in range(4))
    assert torch.equal(stacks["train.safe"][order][order][:, 2][:], data["train.safe"][order][order][:, 2])
    assert torch.equal(stacks["train.safe"][:7][2:][:, 3][:], data["train.safe"][2:7][:, 3]) and len(stacks["train.safe"][:7]) == 7
    topics = [f"topic {i % 8}" for i in range(len(data["val.harmful"]))]
    for pairing in ("matched", "shuffled", "unrelated"):
        ours, theirs = arm(stacks, pairing, 0), arm(data, pairing, 0)
        assert torch.equal(ours.directions.unit, theirs.directions.unit)
        told = [describe(a, of, pairing, theirs.directions, topics, 20, 20, 0) for a, of in ((ours, stacks), (theirs, data))]
        assert told[0] == told[1]


def test_what_is_read_in_blocks_is_what_one_block_gives(tmp_path, monkeypatch):
    data = activations(n=57, n_val=31)
    save_file(data, tmp_path / "a.safetensors")
    stacks = read_stacks(tmp_path / "a.safetensors")
    reference = arm(data, "matched", 0).directions
    topics = [f"topic {i % 8}" for i in range(31)]

    def told():
        harmful, safe = stacks["train.harmful"][:, 2], stacks["train.safe"][:, 2]
        return (
            [describe(arm(stacks, p, 0), stacks, p, reference, topics, 20, 20, 0) for p in ("matched", "unrelated")],
            spectrum_row(harmful, safe, 20, 0),
            paired_svd(harmful, safe, 3),
        )

    at_once, in_blocks = told(), []
    monkeypatch.setattr("refusal.method.directions.BLOCK", 1)  # d_model rows
    assert [len(part) for part in blocks(stacks["train.harmful"][:, 0])] == [12, 12, 12, 12, 9]
    for draws in (7, 300):
        monkeypatch.setattr("refusal.stats.AT_ONCE", draws)
        in_blocks.append(told())
    for metrics, row, vectors in in_blocks:
        assert flat(metrics) == pytest.approx(flat(at_once[0]), rel=1e-9, abs=1e-12, nan_ok=True)
        assert row == pytest.approx(at_once[1], rel=1e-9)
        assert captured(vectors, at_once[2][0]) == pytest.approx(1) == captured(vectors, at_once[2][2])
    # And by numpy, all rows at once.
    differences = (data["train.harmful"].double() - data["train.safe"].double())[:, 2].numpy()
    _, values, right = np.linalg.svd(differences, full_matrices=False)
    assert in_blocks[0][1]["first_share"] == pytest.approx(values[0] ** 2 / (values**2).sum())
    np.testing.assert_allclose(np.abs(in_blocks[0][2].numpy() @ right[:3].T), np.eye(3), atol=1e-9)


def flat(value):
    """The numbers in nested lists and dicts, in order; None is NaN."""
    if isinstance(value, dict | list):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in flat(item)]
    return [math.nan if value is None else float(value)]


def test_memory_does_not_grow_with_the_prompts(tmp_path, monkeypatch):
    """A layer of the larger file is 32 MB in float64 (all rows at once take 170), and of a prompt a number a layer is kept."""
    monkeypatch.setattr("refusal.method.directions.BLOCK", 2**16)
    monkeypatch.setattr("refusal.stats.AT_ONCE", 2**16)
    names = [f"{split}.{name}" for split in ("train", "val") for name in ("harmful", "safe")]
    for n in (1000, 16_000):
        path = tmp_path / f"{n}.safetensors"
        with Writer(path, dict.fromkeys(names, (torch.float32, (n, 2, 256)))) as out:
            for number, name in enumerate(names):
                for first in range(0, n, 1000):
                    out.put(name, range(first, first + 1000), number + random(1000, 2, 256, seed=n + first + number))
    peaks = {}
    for n in (1000, 16_000, 1000, 16_000):  # the second time, all is imported and allocated that stays
        stacks, told = read_stacks(tmp_path / f"{n}.safetensors"), []
        with Peak() as peak:
            a = arm(stacks, "matched", 0)
            told.append(describe(a, stacks, "matched", a.directions, range(n), 8, 8, 0))
            told.append(spectrum_row(a.harmful[:, 1], a.safe[:, 1], 8, 0))
        peaks[n] = peak.mb
        assert told[0]["n_harmful"] == told[1]["n"] == n and told[0]["layers"] == [0, 1]
    assert peaks[16_000] < peaks[1000] + 40


def test_a_file_cut_short_while_it_is_read_is_said(tmp_path):
    save_file(activations(), tmp_path / "a.safetensors")
    stack = read_stacks(tmp_path / "a.safetensors")["val.unrelated"]
    with (tmp_path / "a.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="became shorter"):
        _ = stack[:, 0][:]


def naive_interval(harmful, safe, n_topics, n_resamples, seed):
    """Of Cohen's d, prompt i being of topic i % n_topics."""
    drawn = torch.randint(0, n_topics, (n_resamples, n_topics), generator=torch.Generator().manual_seed(seed)).tolist()
    naive = []
    for topic_numbers in drawn:  # the same resamples
        rows = [i for number in topic_numbers for i in range(len(harmful)) if i % n_topics == number]
        naive.append(naive_d(harmful[rows].tolist(), safe[rows].tolist()))
    return np.quantile(naive, [0.025, 0.975])


def test_separation_interval_equals_naive_resampling_of_topics():
    topics = [f"topic {i % 5}" for i in range(30)]
    level = 3 * random(5, 2, seed=3)[[i % 5 for i in range(30)]]
    harmful = 1000 + (random(30, 2, seed=1) + level + 2).double()  # far from zero: squares would lose digits
    safe = 1000 + (random(30, 2, seed=2) - level).double()
    low, high = _separation_interval(harmful, safe, topics, 400, 7)
    for layer in range(2):
        wanted = naive_interval(harmful[:, layer], safe[:, layer], 5, 400, 7)
        np.testing.assert_allclose([float(low[layer]), float(high[layer])], wanted, rtol=1e-9)


def test_separation_interval_covers():
    """A true d of 1.5, 60 topics: about 95 % of the intervals hold it (400 layers are as many samples)."""
    n = 120
    harmful, safe = random(n, 400, seed=1, dtype=torch.float64) + 1.5, random(n, 400, seed=2, dtype=torch.float64)
    low, high = _separation_interval(harmful, safe, [i // 2 for i in range(n)], 400, 0)
    covered = float(((low <= 1.5) & (high >= 1.5)).double().mean())
    assert 0.91 < covered < 0.98


def told(data, pairing="matched", topics=None, **counts):
    reference = arm(data, "matched", 0).directions
    topics = [f"topic {i % 8}" for i in range(len(data["val.harmful"]))] if topics is None else topics
    return describe(arm(data, pairing, 0), data, pairing, reference, topics, *counts.get("n", (50, 50)), 0)


@pytest.mark.parametrize("pairing", ["matched", "shuffled", "unrelated"])
def test_describe_says_what_the_parts_say(pairing):
    data = activations()
    found = told(data, pairing)
    a = arm(data, pairing, 0)
    d_val = [
        naive_d(*[(data[f"val.{side}"][:, layer].double() @ a.directions.unit[layer]).tolist() for side in ("harmful", "safe")])
        for layer in (1, 2, 3)
    ]
    assert found["separation"][0] is None and found["separation"][1:] == pytest.approx(d_val)  # matched val whatever was fitted
    assert found["separation_in_sample"][1:] == pytest.approx(
        [
            naive_d(*[(side[:, layer].double() @ a.directions.unit[layer]).tolist() for side in (a.harmful, a.safe)])
            for layer in (1, 2, 3)
        ]
    )
    assert found["layers"] == [1, 2, 3] and found["separation_first"] == found["separation"][1]
    assert found["peak_separation"] == pytest.approx(max(d_val)) and found["peak_layer"] == 1 + d_val.index(max(d_val))
    assert found["separation_last_half_min"] == pytest.approx(min(d_val[1:]))
    assert found["cosine_to_sequential"][0] is None
    assert found["cosine_to_sequential_min"] == min(found["cosine_to_sequential"][1:])
    assert (found["cosine_to_sequential_min"] > 1 - 1e-12) is (pairing != "unrelated")
    assert all(
        low < value < high
        for low, value, high in list(zip(found["separation_low"], found["separation"], found["separation_high"], strict=True))[1:]
    )
    assert ("spectrum" in found) is (pairing != "unrelated")
    assert found["cross_layer_cosine"][0] == [None] * 4 and found["cross_layer_cosine"][2][2] == pytest.approx(1)


@pytest.mark.parametrize("pairing", ["matched", "unrelated"])
def test_describe_gives_each_figure_of_each_layer(pairing):
    """By numpy, a layer at a time, with the same draws; prompts of a topic alike, so that resampling prompts is another thing."""
    data = activations()
    level = 2 * random(8, 1, 12, seed=9)[[i % 8 for i in range(24)]]
    data |= {f"val.{side}": data[f"val.{side}"] + sign * level for side, sign in (("harmful", 1), ("safe", -1))}
    data["train.unrelated"] = data["train.unrelated"][:33]
    found, reference = told(data, pairing), arm(data, "matched", 0).directions.unit
    harmful, safe = (data[f"train.{side}"].double() for side in ("harmful", "unrelated" if pairing == "unrelated" else "safe"))
    n, m = len(harmful), len(safe)
    assert (found["n_harmful"], found["n_safe"], found["n_val"]) == (40, m, 24)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, n, (50, n), generator=generator).tolist()
    second = torch.randint(0, m, (50, m), generator=generator).tolist() if pairing == "unrelated" else first
    flips = torch.randint(0, 2, (50, n), generator=torch.Generator().manual_seed(0)).numpy() * 2 - 1
    units = [(harmful[:, i].mean(0) - safe[:, i].mean(0)).numpy() for i in range(4)]
    for layer in (1, 2, 3):
        ours, theirs, v = harmful[:, layer].numpy(), safe[:, layer].numpy(), units[layer]
        cosine_to = lambda u, v=v: float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))  # noqa: E731
        assert found["norm"][layer] == pytest.approx(np.linalg.norm(v)) and not 0.99 < found["norm"][layer] < 1.01
        assert found["cosine_to_sequential"][layer] == pytest.approx(cosine_to(reference[layer].numpy()))
        assert found["cross_layer_cosine"][layer] == [None, *(pytest.approx(cosine_to(u)) for u in units[1:])]
        resampled = [cosine_to(ours[a].mean(0) - theirs[b].mean(0)) for a, b in zip(first, second, strict=True)]
        shown = [found[f"bootstrap_cosine_{name}"][layer] for name in ("low", "median")]
        assert shown == pytest.approx(np.quantile(resampled, [0.025, 0.5]).tolist())
        unit = torch.from_numpy(v / np.linalg.norm(v))
        on_val = (data[f"val.{side}"][:, layer].double() @ unit for side in ("harmful", "safe"))
        shown = [found[f"separation_{name}"][layer] for name in ("low", "high")]
        assert shown == pytest.approx(naive_interval(*on_val, 8, 50, 0).tolist())
        if pairing == "matched":
            differences = ours - theirs
            energy = np.linalg.svd(differences, compute_uv=False) ** 2
            energy /= energy.sum()
            assert found["spectrum"][layer] == pytest.approx(energy[:10].tolist()) and len(energy) == 12
            assert found["effective_rank"][layer] == pytest.approx(1 / (energy**2).sum())
            null = [np.linalg.norm((flip[:, None] * differences).mean(0)) for flip in flips]
            assert found["sign_flip_null_95"][layer] == pytest.approx(np.quantile(null, 0.95))


def test_rows_of_are_the_figures_of_defined_layers():
    m = {
        "layers": [1],
        "separation": [None, 3.0],
        "separation_low": [None, 2.0],
        "separation_high": [None, 4.0],
        "separation_in_sample": [None, 5.0],
        "cosine_to_sequential": [None, 0.9],
        "bootstrap_cosine_low": [None, 0.8],
        "cross_layer_cosine": [[None, None], [None, 1.0]],
    }
    who = {"arm": "batched-matched", "method": "batched", "pairing": "matched", "layer": 1}
    of_pairs = rows_of({"batched-matched": m | {"spectrum": [None, [0.7, 0.3]]}})
    assert of_pairs == {
        "separation": [who | {"separation": 3.0, "low": 2.0, "high": 4.0, "in_sample": 5.0}],
        "cosine_to_sequential": [who | {"cosine": 0.9, "bootstrap_low": 0.8}],
        "cross_layer_cosine": [who | {"other_layer": 1, "cosine": 1.0}],
        "spectrum": [who | {"component": 1, "share": 0.7}, who | {"component": 2, "share": 0.3}],
    }
    without = rows_of({"batched-unrelated": m | {"cosine_to_sequential": [None, None]}})
    assert without["cosine_to_sequential"] == without["spectrum"] == [] and without["separation"][0]["pairing"] == "unrelated"


def assert_sane(found):
    """No NaN and no infinity, nor one dressed up as the largest float; an interval only where there is a value."""
    text = json.dumps(found, allow_nan=False)
    assert "e+308" not in text
    for value, low, high in zip(found["separation"], found["separation_low"], found["separation_high"], strict=True):
        assert value is not None or (low is None and high is None)
    json.dumps(rows_of({"sequential-matched": found}), allow_nan=False)


def test_ordinary_input_has_no_nan():
    assert_sane(told(activations()))


def test_one_prompt_a_set():
    found = told({name: rows[:1] for name, rows in activations().items()})
    assert found["separation"] == [None] * 4 and found["peak_layer"] is None and found["layers"] == [1, 2, 3]
    assert_sane(found)


def test_two_prompts_a_set():
    found = told({name: rows[:2] for name, rows in activations().items()})
    assert found["separation"][1] is not None
    assert_sane(found)


def test_equal_prompts():
    data = activations()
    found = told({name: rows[:1].expand(len(rows), -1, -1) for name, rows in data.items()})
    assert found["layers"] == [1, 2, 3] and found["separation"] == [None] * 4  # no spread: no effect size
    assert_sane(found)


def test_harmful_equal_to_safe():
    data = activations()
    same = copy.copy(data) | {"train.harmful": data["train.safe"], "val.harmful": data["val.safe"]}
    found = told(same)
    assert found["layers"] == [] and found["peak_separation"] is None and found["separation_first"] is None
    assert found["norm"] == [None] * 4 and found["spectrum"] == [None] * 4
    assert_sane(found)


def test_one_topic_in_val():
    found = told(activations(), topics=["same"] * 24)
    assert_sane(found)
