"""What stands beside cosines in metrics/directions.json, by the naive path, and against what halves of prompts really have."""

import math

import numpy as np
import pytest
import torch
from pipeline import naive_geometry as naive
from synthetic import activations, gaussian

from refusal.analysis.ceilings import categories, ceiling_to_all, ceilings, describe_noise
from refusal.analysis.separation import contrast, cosine_to_all
from refusal.method.directions import cosine


def rows(sets, pairing, layer):
    harmful, safe, unrelated = (sets[f"train.{of}"][:, layer].double().numpy() for of in ("harmful", "safe", "unrelated"))
    return {"harmful": harmful, "unrelated": -unrelated} if pairing == "unrelated" else {"harmful": harmful - safe}


@pytest.mark.parametrize("pairing", ["matched", "shuffled", "unrelated"])
def test_noise_of_each_layer_is_the_naive_one(pairing):
    """Shuffled pairs have one direction with the matched, and so its noise; 33 unrelated prompts against 40 harmful ones."""
    sets, other = activations(), activations(seed=50)
    sets["train.unrelated"] = sets["train.unrelated"][:33]
    other["train.harmful"] = (other["train.harmful"] + 2 * sets["train.harmful"]) / 3
    found = describe_noise(contrast(sets, pairing, 0), contrast(other, "matched", 0), 5)
    for layer in (1, 2, 3):
        ours, reference = rows(sets, pairing, layer), rows(other, "matched", layer)
        expected = naive.noise(ours, 5) | naive.without_noise(ours, reference)
        assert {name: values[layer] for name, values in found.items()} == pytest.approx(expected, rel=1e-5)
    assert {values[0] for values in found.values()} == {None}


def test_no_figure_where_there_is_no_direction_no_signal_or_one_prompt():
    sets, nothing = activations(), activations()
    nothing["train.safe"][:, 2] = nothing["train.harmful"][:, 2]
    found = describe_noise(contrast(sets, "matched", 0), contrast(nothing, "matched", 0), 0)
    assert [value is None for value in found["cosine_to_sequential_corrected"]] == [True, False, True, False]
    assert [value is None for value in found["reliability"]] == [True, False, False, False]
    around_zero = torch.cat([torch.eye(12), -torch.eye(12)])[:, None] + 1e-3
    sets = {"train.harmful": around_zero, "train.safe": torch.zeros(24, 1, 12)}
    found = describe_noise(of := contrast(sets, "matched", 0), of, 0)
    assert ceiling_to_all(of, contrast({name: x.repeat(9, 1, 1) for name, x in sets.items()}, "matched", 0)) == [0.0]
    assert found["split_half_cosine"][0] < 0 and {found[name][0] for name in found} == {found["split_half_cosine"][0], None}
    one = {name: x[:1] for name, x in activations().items()}
    of = contrast(one, "matched", 0)
    assert describe_noise(of, of, 0)["split_half_cosine"] == [None] * 4
    assert ceilings([0.81, None, 0.5], [0.49, 0.9, None]) == [pytest.approx(0.63), None, None]


@pytest.mark.parametrize("pairing", ["matched", "unrelated"])
def test_ceiling_to_all_is_what_random_prompts_have(pairing):
    """The mean cosine of directions of 12 and 30 of 40 prompts, drawn again and again, with the direction of all."""
    sets = {
        name: 0.2 * gaussian(40, 1, 500, seed=i) + torch.eye(500)[i] for i, name in enumerate(("train.harmful", "train.safe"))
    }
    sets["train.unrelated"] = sets["train.safe"]
    generator, cosines, ceilings_ = torch.Generator().manual_seed(0), [], []
    everything = contrast(sets, pairing, 0)
    for _ in range(30):
        some = torch.randperm(40, generator=generator)
        of = contrast({name: x[some[: 30 if name.endswith("unrelated") else 12]] for name, x in sets.items()}, pairing, 0)
        cosines += cosine_to_all(of, everything)
        ceilings_ += ceiling_to_all(of, everything)
    assert np.mean(ceilings_) == pytest.approx(np.mean(cosines), abs=0.01) and 0.5 < np.mean(cosines) < 0.9
    assert ceiling_to_all(everything, everything) is None
    one = contrast({name: x[:1] for name, x in sets.items()}, pairing, 0)
    assert ceiling_to_all(one, everything) == [None]


@pytest.mark.parametrize("pairing", ["matched", "unrelated"])
def test_categories_are_those_of_the_naive_path_by_layer(pairing):
    sets, names = activations(), [*"abca" * 10]
    found = categories(contrast(sets, pairing, 0), names, 20, 3)
    assert found.pop("n") == {"a": 20, "b": 10, "c": 10}
    for layer in (1, 2, 3):
        expected = naive.geometry(rows(sets, pairing, layer), names, 20, 3)
        assert {key: values[layer] for key, values in found.items()} == pytest.approx(expected)
    assert {values[0] for values in found.values()} == {None} and len(found) == 8


@pytest.mark.parametrize("names", [["a"] * 40, [*"ab" * 19, None, "a"], [*"a" * 36, *"b" * 4]], ids=["one", "none", "small"])
def test_no_categories_to_tell_of(names):
    assert categories(contrast(activations(), "matched", 0), names, 20, 0) is None


def test_the_ceiling_is_what_two_samples_of_one_direction_have():
    """Directions of 20 prompts and of 60 others, of one difference in 400 dimensions: their cosine is sqrt(r_a r_b)."""
    found, expected = [], []
    for seed in range(20):
        pair = []
        for n, at in ((20, 0), (60, 100)):
            harmful = gaussian(n, 1, 400, seed=seed + at) * 0.2 + torch.eye(1, 400)
            pair.append(contrast({"train.harmful": harmful, "train.safe": torch.zeros(n, 1, 400)}, "matched", 0))
        found.append(float(cosine(pair[0].directions.unit, pair[1].directions.unit)[0]))
        reliability = [describe_noise(of, of, 0)["reliability"] for of in pair]
        expected += ceilings(*reliability)
    assert np.mean(found) == pytest.approx(np.mean(expected), abs=0.01)
    assert np.mean(found) == pytest.approx(1 / math.sqrt((1 + 16 / 20) * (1 + 16 / 60)), abs=0.01)  # N = 400 0.2^2 = 16


def test_a_pairing_of_some_of_the_prompts_has_its_own_noise_and_nothing_that_needs_all():
    sets = activations(40)
    everything = contrast(sets, "matched", 0)
    half = contrast({name: x[:20] for name, x in sets.items()}, "matched", 0)
    found = describe_noise(half, everything, 0)
    assert found["split_half_cosine"] == describe_noise(half, half, 0)["split_half_cosine"]
    assert found["cosine_to_sequential_corrected"] == [None] * len(half.directions.unit)
    assert categories(half, [i % 3 for i in range(40)], 20, 0) is None is not categories(half, [i % 3 for i in range(20)], 20, 0)
