"""What the directions stage writes, recomputed from the activations that it read."""

import json

import pytest
import torch
from place import Place
from safetensors.torch import load_file, save_file

from refusal.io.params_file import load_params
from stages.study import load_study

N, SHAPE = {"train": 6, "val": 4}, (3, 8)


def differences(sets, kept):
    """Of the prompts that are kept, by pairing."""
    mean = {name: x[[*kept]].double().mean(0) for name, x in sets.items() if name.startswith("train")}
    return {
        "matched": mean["train.harmful"] - mean["train.safe"],
        "unrelated": mean["train.harmful"] - mean["train.unrelated"],
        "harmless": mean["train.unrelated"] - mean["train.safe"],
    }


@pytest.mark.parametrize("kept", [range(6), (0, 2, 5)], ids=["all", "behaving"])
def test_every_direction_is_the_difference_of_its_own_two_sets(tmp_path, monkeypatch, kept):
    place = Place(tmp_path)
    generator = torch.Generator().manual_seed(0)
    sets = {
        f"{split}.{part}": torch.randn(n, *SHAPE, generator=generator)
        for split, n in N.items()
        for part in ("harmful", "safe", "unrelated")
    }
    for i, part in enumerate(("harmful", "safe", "unrelated")):
        for split in N:
            sets[f"{split}.{part}"] += 3 * i
    (tmp_path / "data/activations").mkdir(parents=True)
    save_file(sets, tmp_path / "data/activations/sequential.safetensors")
    rows = [
        {"id": f"p{i}", "split": split, "topic": i, "harmful": f"h{i}", "safe": f"s{i}"}
        for split, n in N.items()
        for i in range(n)
    ]
    for name, of in (("pairs", rows), ("unrelated", [row | {"harmful": None} for row in rows])):
        place.write(f"data/prompts/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in of))
    behaviour = [
        {"set": f"train.{part}", "id": f"p{i}", "kept": i in kept}
        for part in ("harmful", "safe", "unrelated")
        for i in range(N["train"])
    ]
    place.write("data/behaviour/train.jsonl", "".join(json.dumps(row) + "\n" for row in behaviour))
    place.set("activations", methods=["sequential"])
    place.set("directions", n_sign_flips=10, n_resamples=10)
    assert place.stage("directions").status == 0
    found, everything = load_file(tmp_path / "models/directions.safetensors"), differences(sets, range(6))
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
        assert m["cosine_to_all"] == (None if len(kept) == 6 else pytest.approx(cosines.tolist(), rel=1e-5))
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
