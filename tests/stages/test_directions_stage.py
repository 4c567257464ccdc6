"""What the directions stage writes, recomputed from the activations that it read."""

import json

import torch
from place import Place
from safetensors.torch import load_file, save_file

N, SHAPE = {"train": 6, "val": 4}, (3, 8)


def test_every_direction_is_the_difference_of_its_own_two_sets(tmp_path):
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
    place.set("activations", methods=["sequential"])
    place.set("directions", n_sign_flips=10, n_resamples=10)
    assert place.stage("directions").status == 0
    found, mean = load_file(tmp_path / "models/directions.safetensors"), {name: x.double().mean(0) for name, x in sets.items()}
    expected = {
        "matched": mean["train.harmful"] - mean["train.safe"],
        "unrelated": mean["train.harmful"] - mean["train.unrelated"],
        "harmless": mean["train.unrelated"] - mean["train.safe"],
    }
    for pairing, difference in expected.items():
        name = f"sequential-{pairing}"
        assert torch.allclose(found[f"{name}.difference"].double(), difference, atol=1e-5)
        unit = difference / difference.norm(dim=-1, keepdim=True)
        assert torch.allclose(found[f"{name}.unit"].double(), unit, atol=1e-6) and found[f"{name}.defined"].all()
    norms = json.loads((tmp_path / "metrics/directions.json").read_text())["sequential-matched"]["norm"]
    assert torch.allclose(torch.tensor(norms), expected["matched"].norm(dim=-1).float(), atol=1e-4)
