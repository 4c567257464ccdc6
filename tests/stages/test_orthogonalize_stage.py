"""The variants of the edit as the stage writes them, on a tiny model: what is left of the direction in the weights."""

import json

import pytest
import torch
from checkpoints import LLAMA, byte_level
from place import Place
from safetensors.torch import load_file, save_file

O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture
def place(tmp_path):
    """A place with a tiny checkpoint, its directions, which are not orthogonal to the safe means, and one selected cell."""
    made = Place(tmp_path)
    byte_level(tmp_path / "models/base", "llama", LLAMA)
    made.tensors = {name: torch.randn(3, 32, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(("d", "m"))}
    unit = made.tensors["d"] / made.tensors["d"].norm(dim=-1, keepdim=True)
    arm = {"difference": made.tensors["d"], "unit": unit, "safe_mean": made.tensors["m"], "defined": torch.ones(3, dtype=torch.bool)}
    save_file({f"sequential-matched.{name}": tensor for name, tensor in arm.items()}, tmp_path / "models/directions.safetensors")
    cell = {"name": "sequential_layer_1_alpha_100", "layer": 1, "alpha": 1.0}
    made.write("metrics/select.json", json.dumps({"rank_1": cell}))
    return made


def edited(place, variant):
    """W of one writer before, after, and as a random direction leaves it, in float64."""
    place.set("orthogonalize", variant=variant)
    done = place.stage("orthogonalize")
    assert done.status == 0, done.said
    names = {rank: of["name"] for rank, of in json.loads((place.folder / "metrics/orthogonalize.json").read_text()).items()}
    folders = ("base", *(f"ablated/{names[rank]}" for rank in ("rank_1", "random")))
    shards = [[load_file(path) for path in (place.folder / "models" / folder).glob("model*.safetensors")] for folder in folders]
    return [next(shard[O_PROJ].double() for shard in one if O_PROJ in shard) for one in shards]


def test_each_variant_is_what_it_says(place):
    v, m = (place.tensors[name][1].double() for name in ("d", "m"))
    v, m = v / v.norm(), m / m.norm()
    w, plain, random = edited(place, "plain")
    assert (plain - (w - torch.outer(v, v @ w))).abs().max() < 1e-6
    _, columns, _ = edited(place, "column_norms")
    torch.testing.assert_close(columns, plain * w.norm(dim=0) / plain.norm(dim=0), rtol=1e-4, atol=1e-6)
    _, rows, random_rows = edited(place, "row_norms")
    for kept in (rows, random_rows):  # the control is edited alike
        torch.testing.assert_close(kept.norm(dim=1), w.norm(dim=1), rtol=1e-5, atol=1e-6)
    assert (random_rows - random).abs().max() > 1e-3 < (rows @ rows.T - columns @ columns.T).abs().max()
    _, harmless, random_harmless = edited(place, "harmless_kept")
    torch.testing.assert_close(m @ harmless, m @ w, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(m @ random_harmless, m @ w, rtol=1e-4, atol=1e-6)
    left = v - (v @ m) * m
    assert (left @ harmless).abs().max() < 1e-6 < 1e-3 < (m @ (w - plain)).abs().max()


def writers(folder):
    return {name: t.double() for path in folder.glob("model*.safetensors") for name, t in load_file(path).items() if "o_proj" in name}


@pytest.mark.parametrize(
    ("sweep", "name"),
    [
        ({"basis": "qr", "layers": [1, 2], "rank": None}, "qr_1-2"),
        ({"basis": "svd", "layers": [1], "rank": 2}, "svd_1_rank_2"),
        ({"basis": "per_layer", "layers": [1, 2], "rank": None}, "per_layer_1-2"),
    ],
)
@pytest.mark.parametrize("form", ["safetensors", "lora"])
def test_a_subspace_is_taken_out_of_the_weights(place, sweep, name, form):
    singular = torch.linalg.qr(torch.randn(3, 32, 10, generator=torch.Generator().manual_seed(5)))[0].mT.contiguous()
    tensors = load_file(place.folder / "models/directions.safetensors") | {"sequential-matched.singular": singular}
    save_file(tensors, place.folder / "models/directions.safetensors")
    place.write("metrics/select.json", json.dumps({"rank_1": {"name": f"sequential_{name}_alpha_150", "layer": 1, "alpha": 1.5}}))
    place.set("sweep", **sweep)
    place.set("orthogonalize", format=form)
    done = place.stage("orthogonalize")
    assert done.status == 0, done.said
    made = json.loads((place.folder / "metrics/orthogonalize.json").read_text())
    assert {rank: of["name"] for rank, of in made.items()} == {
        "rank_1": f"sequential_{name}_alpha_150",
        "random": f"random_{name}_alpha_150",
    }
    folder, before = place.folder / "models/ablated", writers(place.folder / "models/base")
    units = tensors["sequential-matched.unit"].double()
    if form == "lora":
        config = json.loads((folder / made["rank_1"]["name"] / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == (1 if sweep["basis"] == "per_layer" else 2)
        return
    for layer in (0, 1, 2):
        of = {"qr": units[[1, 2]], "svd": singular[1, :2].double(), "per_layer": units[[layer]] if layer else units[:0]}
        vectors, key = of[sweep["basis"]], f"model.layers.{layer}.self_attn.o_proj.weight"
        p = torch.linalg.pinv(vectors) @ vectors if len(vectors) else torch.zeros(32, 32).double()  # onto the span, by the pseudo-inverse
        w = before[key]
        assert (writers(folder / made["rank_1"]["name"])[key] - (w - 1.5 * p @ w)).abs().max() < 1e-5
        # The control takes out as many dimensions, and others.
        taken = w - writers(folder / made["random"]["name"])[key]
        assert int(torch.linalg.matrix_rank(taken, atol=1e-4)) == len(vectors)
        assert not len(vectors) or (p @ taken).norm() < 0.8 * taken.norm()


@pytest.mark.parametrize("variant", ["row_norms", "column_norms"])
def test_an_adapter_of_full_rank_is_refused_before_anything_is_read(place, variant):
    place.set("orthogonalize", variant=variant, format="lora")
    done = place.stage("prompts")
    assert done.status == 1 and "Traceback" not in done.said
    assert f"orthogonalize: variant {variant} changes matrices at full rank, which an adapter cannot hold" in " ".join(done.said.split())
