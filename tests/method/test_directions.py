"""Directions, projections and cosines against numpy and naive loops; activations in a file against those in memory."""

import json
import weakref

import numpy as np
import pytest
import torch
from place import Place
from safetensors.torch import load_file, save_file
from synthetic import activations, gaussian, naive_d

from perf.harness import Peak
from refusal.analysis.separation import contrast, describe
from refusal.io.errors import UserError
from refusal.method.activations_file import read_activations
from refusal.method.directions import as_json, cohens_d, cosine, cross_layer_cosine, difference_in_means, harmless_kept, project


def test_difference_in_means_is_the_float64_mean():
    harmful, safe = 1000 + gaussian(700, 3, 8), 1000 + gaussian(500, 3, 8, seed=1)
    directions = difference_in_means(harmful, safe)
    for layer in range(3):
        a = sum(row.astype(np.float64) for row in harmful[:, layer].numpy()) / 700
        b = sum(row.astype(np.float64) for row in safe[:, layer].numpy()) / 500
        np.testing.assert_allclose(directions.difference[layer], a - b, rtol=0, atol=1e-11)  # float32 sums are off by 1e-4
        np.testing.assert_allclose(directions.safe_mean[layer], b, rtol=1e-14)
        np.testing.assert_allclose(directions.unit[layer], (a - b) / np.linalg.norm(a - b), rtol=1e-9)
    assert directions.unit.dtype == torch.float64 and directions.layers == [0, 1, 2]


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_a_layer_without_difference_is_undefined(noise):
    harmful, safe = gaussian(30, 3, 8), gaussian(30, 3, 8, seed=1)
    harmful[:, 0] = safe[:, 0] = 5.0
    harmful[:, 0] *= 1 + noise  # rounding noise of float32
    harmful[:, 2] = safe[:, 2] = 0.0
    directions = difference_in_means(harmful, safe)
    assert directions.defined.tolist() == [False, True, False] and directions.layers == [1]
    assert not directions.unit[0].any() and not directions.unit[2].any() and directions.unit.isfinite().all()


def test_what_lies_along_the_safe_mean_is_left_in():
    unit, mean = gaussian(3, 8, dtype=torch.float64), gaussian(3, 8, seed=1)
    unit /= unit.norm(dim=-1, keepdim=True)
    for v, m, kept in zip(unit, mean.double(), harmless_kept(unit, mean), strict=True):
        left = [float(v[i]) - float(v @ m) / float(m @ m) * float(m[i]) for i in range(8)]
        length = sum(x * x for x in left) ** 0.5
        np.testing.assert_allclose(kept, [x / length for x in left], rtol=1e-12)
        assert abs(float(kept @ m)) < 1e-12 and torch.equal(kept, harmless_kept(v, m))


def test_a_small_but_real_difference_is_defined():
    safe = 5 + gaussian(30, 1, 8)
    assert difference_in_means(safe + 1e-3, safe).layers == [0]


def test_cohens_d_equals_the_naive_loop():
    harmful, safe = 100 + 2 * gaussian(9, 3), 99 + gaussian(14, 3, seed=1)
    d = cohens_d(harmful, safe)
    for layer in range(3):
        assert float(d[layer]) == pytest.approx(naive_d(harmful[:, layer].tolist(), safe[:, layer].tolist()), rel=1e-9)
    assert cohens_d(torch.ones(4), torch.ones(3)).isnan()


def test_project_equals_the_naive_loop():
    r, unit = gaussian(5, 3, 8), gaussian(3, 8, seed=1, dtype=torch.float64)
    naive = [
        [sum(float(x) * float(y) for x, y in zip(r[n, layer], unit[layer], strict=True)) for layer in range(3)] for n in range(5)
    ]
    assert torch.allclose(project(r, unit), torch.tensor(naive, dtype=torch.float64), atol=1e-12)


def test_cosines():
    a, b = (gaussian(6, seed=seed, dtype=torch.float64) for seed in (2, 3))
    assert float(cosine(a, 7 * b)) == pytest.approx(float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)), rel=1e-12)
    assert cosine(a, 0 * a).isnan()
    units = torch.tensor([[1.0, 0.0], [3.0, 4.0], [-2.0, 0.0]])
    expected = torch.tensor([[1, 0.6, -1], [0.6, 1, -0.6], [-1, -0.6, 1]], dtype=torch.float64)
    assert torch.allclose(cross_layer_cosine(units), expected)


def test_what_is_not_finite_is_null_in_json():
    assert as_json(torch.tensor([[1.5, torch.nan], [torch.inf, -2.0]])) == [[1.5, None], [None, -2.0]]
    assert as_json(torch.tensor(0.5)) == 0.5 and as_json(torch.tensor(torch.nan)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_activations_in_a_file_are_indexed_as_a_tensor_is(tmp_path, dtype):
    tensors = {name: value.to(dtype) for name, value in activations().items()}
    save_file(tensors, tmp_path / "a.safetensors")
    stored = read_activations(tmp_path / "a.safetensors")
    assert stored.keys() == tensors.keys()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for rows in (slice(None), slice(0, 7), order, torch.tensor([3, 3, 0])):
        for name, value in tensors.items():
            value, of_file = (value[rows], stored[name][rows]) if name.startswith("train") else (value, stored[name])
            assert len(of_file) == len(value) and of_file.shape == value.shape
            for layer in (0, 3):
                assert torch.equal(of_file[:, layer], value[:, layer].double())
    again = tensors["train.safe"][order][2:9]
    assert torch.equal(stored["train.safe"][order][2:9][:, 2], again[:, 2].double())
    assert torch.equal(stored["train.safe"][order][2:9, 2], again[:, 2].double())


@pytest.mark.parametrize("pairing", ["shuffled", "unrelated"])
def test_figures_of_a_file_are_those_of_tensors(tmp_path, pairing):
    save_file(activations(), tmp_path / "a.safetensors")
    both = [activations(), read_activations(tmp_path / "a.safetensors")]
    contrasts = [contrast(sets, pairing, 0) for sets in both]
    figures = [describe(of, sets, [*range(24)] * 2, of.directions, 20, 20, 0) for of, sets in zip(contrasts, both, strict=True)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"\xff" * 64, "cannot be read"), ("rows", r"rows has shape \[3, 4\]")],
)
def test_a_file_that_holds_no_activations_is_named(tmp_path, content, says):
    path = tmp_path / "a.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file({content: torch.ones(3, 4)}, path)
    with pytest.raises(UserError, match=rf"a\.safetensors: {says}.*`dvc repro activations`"):
        read_activations(path)


class Watched:
    """Activations that know how many of their layers are in use."""

    def __init__(self, rows):
        self.rows, self.shape, self.given = rows.double(), rows.shape, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        layer = self.rows[index].clone()
        self.given = [ref for ref in self.given if ref() is not None] + [weakref.ref(layer)]
        assert len(self.given) <= 2  # the new one, and the old one that it takes the place of
        return layer


def test_memory_holds_a_layer_of_each_set_and_not_the_file(tmp_path):
    sets = {name: Watched(rows) for name, rows in activations().items()}
    of = contrast(sets, "matched", 0)
    describe(of, sets, [*range(24)] * 2, of.directions, 8, 8, 0)
    assert all(rows.given for name, rows in sets.items() if "unrelated" not in name)
    save_file({"all": torch.rand(2000, 64, 256)}, tmp_path / "a.safetensors")  # 262 MB in float64, a layer of which is 4
    stored = read_activations(tmp_path / "a.safetensors")["all"]
    with Peak() as peak:
        assert all(0.49 < float(stored[:, layer].mean()) < 0.51 for layer in range(64))
    assert peak.mb < 80


def test_the_stage_writes_every_set_of_directions_under_its_own_name(tmp_path):
    """By numpy, of three sets that all differ, for two methods that differ."""
    place, methods = Place(tmp_path), ("sequential", "batched")
    place.set("activations", methods=[*methods])
    place.set("directions", n_resamples=5, n_sign_flips=5)
    pairs = [
        {"split": split, "topic": f"topic {i % 6}", "category": None, "safe": "s"}
        for split, n in (("train", 40), ("val", 24))
        for i in range(n)
    ]
    place.write_rows("data/prompts/pairs.jsonl", pairs)
    kept = [{"set": f"train.{part}", "kept": True} for part in ("harmful", "safe", "unrelated") for _ in range(40)]
    place.write_rows("data/behaviour/train.jsonl", kept)
    (tmp_path / "data/activations").mkdir()
    given = {method: activations(seed=seed) for seed, method in enumerate(methods)}
    for method, tensors in given.items():
        save_file(tensors, tmp_path / f"data/activations/{method}.safetensors")
    status, output = place.stage("directions")
    assert status == 0, output
    written = load_file(tmp_path / "models/directions.safetensors")
    sides = dict.fromkeys(("matched", "shuffled"), ("harmful", "safe"))
    sides |= {"unrelated": ("harmful", "unrelated"), "harmless": ("unrelated", "safe")}
    names = ("difference", "unit", "defined", "safe_mean")
    singular = {f"{method}-matched.singular" for method in methods}
    assert set(written) == {f"{method}-{pairing}.{name}" for method in methods for pairing in sides for name in names} | singular
    for method in methods:
        harmful, safe = (given[method][f"train.{side}"].double().numpy() for side in ("harmful", "safe"))
        vectors = np.linalg.svd(harmful[:, 2] - safe[:, 2])[2][:10]
        found = written[f"{method}-matched.singular"].numpy()
        assert np.abs(found[2] @ vectors.T) == pytest.approx(np.eye(10), abs=1e-6) and not found[0].any()
    units = {}
    for method in methods:
        for pairing, (ours, theirs) in sides.items():
            of = f"{method}-{pairing}"
            means = [given[method][f"train.{side}"].double().numpy().mean(0) for side in (ours, theirs)]
            difference = means[0] - means[1]
            units[of] = difference[1:] / np.linalg.norm(difference[1:], axis=1, keepdims=True)
            assert written[f"{of}.difference"].numpy() == pytest.approx(difference, abs=1e-12)
            assert written[f"{of}.safe_mean"].numpy() == pytest.approx(means[1])
            assert written[f"{of}.unit"].numpy() == pytest.approx(np.vstack([np.zeros(12), units[of]]))
            assert written[f"{of}.defined"].tolist() == [False, True, True, True]
    metrics = json.loads((tmp_path / "metrics/directions.json").read_text())
    assert set(metrics) == {f"{method}-{pairing}" for method in methods for pairing in ("matched", "shuffled", "unrelated")}
    for of, made in metrics.items():
        method = of.split("-")[0]
        cosines = (units[of] * units["sequential-matched"]).sum(1)
        assert made["cosine_to_sequential"] == [None, *(pytest.approx(cosine, rel=5e-6, abs=5e-7) for cosine in cosines)]
        projected = [given[method][f"val.{side}"][:, 1].double().numpy() @ units[of][0] for side in ("harmful", "safe")]
        spread = np.sqrt(sum(np.var(side, ddof=1) for side in projected) / 2)
        assert made["separation"][1] == pytest.approx((projected[0].mean() - projected[1].mean()) / spread, rel=5e-6)
