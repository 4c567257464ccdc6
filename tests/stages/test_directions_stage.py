"""What the directions stage writes, recomputed from the activations that it read."""

import json
import math

import numpy as np
import pytest
import torch
from pipeline import naive_geometry as naive
from place import Place
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize

from refusal.analysis.estimated import OF_MEANS
from refusal.io.params_file import load_params
from stages.study import load_study

N, SHAPE = {"train": 12, "val": 4}, (3, 8)


def differences(sets, kept):
    """Of the prompts that are kept, by pairing."""
    mean = {name: x[[*kept]].double().mean(0) for name, x in sets.items() if name.startswith("train")}
    return {
        "matched": mean["train.harmful"] - mean["train.safe"],
        "unrelated": mean["train.harmful"] - mean["train.unrelated"],
        "harmless": mean["train.unrelated"] - mean["train.safe"],
    }


def added(sets, pairing, layer, kept):
    """What each prompt adds."""
    harmful, safe, unrelated = (sets[f"train.{of}"][[*kept], layer].double().numpy() for of in ("harmful", "safe", "unrelated"))
    return {"harmful": harmful, "unrelated": -unrelated} if pairing == "unrelated" else {"harmful": harmful - safe}


def prepared(folder, kept=range(12)):
    """A folder with activations, prompts and which of them are kept, and the activations."""
    place = Place(folder)
    generator = torch.Generator().manual_seed(0)
    sets = {
        f"{split}.{part}": torch.randn(n, *SHAPE, generator=generator)
        for split, n in N.items()
        for part in ("harmful", "safe", "unrelated")
    }
    for i, part in enumerate(("harmful", "safe", "unrelated")):
        for split in N:
            sets[f"{split}.{part}"] += 3 * i
    (folder / "data/activations").mkdir(parents=True)
    save_file(sets, folder / "data/activations/sequential.safetensors")
    rows = [
        {"id": f"p{i}", "split": split, "topic": i, "category": "ab"[i % 2] if split == "train" else "c", "harmful": f"h{i}", "safe": f"s{i}"}
        for split, n in reversed(N.items())
        for i in range(n)
    ]
    for name, of in (("pairs", rows), ("unrelated", [row | {"harmful": None} for row in rows])):
        place.write_rows(f"data/prompts/{name}.jsonl", of)
    behaviour = [
        {"set": f"train.{part}", "id": f"p{i}", "kept": i in kept}
        for part in ("harmful", "safe", "unrelated")
        for i in range(N["train"])
    ]
    place.write_rows("data/behaviour/train.jsonl", behaviour)
    place.set("activations", methods=["sequential"])
    place.set("directions", n_sign_flips=10, n_resamples=10)
    return place, sets


@pytest.mark.parametrize("kept", [range(12), (0, 2, 5)], ids=["all", "behaving"])
def test_every_direction_is_the_difference_of_its_own_two_sets(tmp_path, monkeypatch, kept):
    place, sets = prepared(tmp_path, kept)
    assert place.stage("directions").status == 0
    found, everything = load_file(tmp_path / "models/directions.safetensors"), differences(sets, range(12))
    expected = differences(sets, kept)
    for pairing, difference in expected.items():
        name = f"sequential-{pairing}"
        assert torch.allclose(found[f"{name}.difference"].double(), difference, atol=1e-5)
        unit = difference / difference.norm(dim=-1, keepdim=True)
        assert torch.allclose(found[f"{name}.unit"].double(), unit, atol=1e-6) and found[f"{name}.defined"].all()
    written = json.loads((tmp_path / "metrics/directions.json").read_text())
    for pairing in ("matched", "unrelated"):
        m = written[f"sequential-{pairing}"]
        assert m["n_harmful"] == m["n_safe"] == len(kept) and m["n_val"] == 4
        cosines = torch.cosine_similarity(expected[pairing], everything[pairing], dim=-1)
        assert m["cosine_to_all"] == (None if len(kept) == 12 else pytest.approx(cosines.tolist(), rel=1e-5))
        of = [added(sets, pairing, layer, kept) for layer in range(3)]
        figures = [naive.noise(own, 0) for own in of]
        assert all(m[key] == pytest.approx([at[key] for at in figures], rel=1e-5) for key in figures[0])
        ceiling = [naive.of_all(own, dict.fromkeys(own, 3 / 12)) for own in of]
        assert m["cosine_to_all_ceiling"] == (None if len(kept) == 12 else pytest.approx(ceiling, rel=1e-5))
        other = written["sequential-matched"]["reliability"]
        both = [r and s and math.sqrt(r * s) for r, s in zip(m["reliability"], other, strict=True)]
        assert m["cosine_to_sequential_ceiling"] == pytest.approx(both, rel=1e-5)
    assert "categories" not in written["sequential-unrelated"]
    groups = written["sequential-matched"]["categories"]
    if len(kept) == 3:
        assert groups is None
    else:
        assert groups.pop("n") == {"a": 6, "b": 6}
        figures = [naive.geometry(added(sets, "matched", layer, kept), [*"ab" * 6], 10, 0) for layer in range(3)]
        assert all(values == pytest.approx([at[key] for at in figures], rel=1e-5) for key, values in groups.items())
    norms = written["sequential-matched"]["norm"]
    assert torch.allclose(torch.tensor(norms), expected["matched"].norm(dim=-1).float(), atol=1e-4)
    # What science fits on by itself are the same prompts, and those of val and test are all there are.
    place.write("metrics/select.json", json.dumps({"rank_1": {"name": "sequential_layer_1_alpha_100", "layer": 1, "alpha": 1.0}}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("stages.study.load_lm", lambda *_, **__: None)
    params = load_params(tmp_path / "params.yaml")
    study = load_study(params, params.science)
    assert (
        [row["id"] for row in study.pairs["train"]] == [row["id"] for row in study.unrelated["train"]] == [f"p{i}" for i in kept]
    )
    assert [len(study.pairs[split]) for split in ("val", "test")] == [4, 0]
    assert torch.equal(study.directions["unit"], found["sequential-matched.unit"])


@pytest.mark.parametrize("kept", [range(12), (0, 2, 5)], ids=["all", "behaving"])
def test_another_estimator_gives_every_direction_and_no_figure_of_means(tmp_path, kept):
    place, sets = prepared(tmp_path, kept)
    place.set("directions", estimator="geometric_median")
    assert place.stage("directions").status == 0
    found = load_file(tmp_path / "models/directions.safetensors")
    centre = {name: geometric_median_of(x[[*kept]]) for name, x in sets.items() if name.startswith("train")}
    expected = {
        "matched": centre["train.harmful"] - centre["train.safe"],
        "shuffled": centre["train.harmful"] - centre["train.safe"],
        "unrelated": centre["train.harmful"] - centre["train.unrelated"],
        "harmless": centre["train.unrelated"] - centre["train.safe"],
    }
    for pairing, difference in expected.items():
        assert torch.allclose(found[f"sequential-{pairing}.difference"].double(), difference, atol=1e-4), pairing
    m = json.loads((tmp_path / "metrics/directions.json").read_text())["sequential-matched"]
    assert all(m[name] == [None] * 3 for name in OF_MEANS) and m["categories"] is None
    assert None not in m["separation"] and m["cosine_to_all_ceiling"] is None
    assert (m["cosine_to_all"] is None) == (len(kept) == 12)


def geometric_median_of(x):
    """By layer, by a general minimiser."""
    layers = [x[:, i].double().numpy() for i in range(x.shape[1])]
    found = [minimize(lambda y, p=p: np.linalg.norm(p - y, axis=1).sum(), p.mean(0), options={"gtol": 1e-9}).x for p in layers]
    return torch.from_numpy(np.stack(found))
