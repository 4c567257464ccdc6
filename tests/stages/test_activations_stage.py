"""The stage `activations` takes its settings from params.yaml."""

import torch
from checkpoints import LLAMA, byte_level
from place import PAIRS, Place
from safetensors.torch import load_file

from refusal.lm.load import load_lm
from refusal.method.activations import last_token_resid_pre


def test_methods_and_positions_are_those_of_params(tmp_path):
    place = Place(tmp_path)
    rows = [row | {"id": f"{split} {row['id']}", "split": split} for split in ("train", "val") for row in PAIRS]
    for name in ("pairs", "unrelated"):
        place.write_rows(f"data/prompts/{name}.jsonl", rows)
    byte_level(tmp_path / "models/base", "llama", LLAMA)
    place.set("activations", methods=["sequential", "batched"], n_positions=3, batch_size=2)
    done = place.stage("activations")
    assert done.status == 0, done.said
    lm = load_lm(tmp_path / "models/base")
    expected = last_token_resid_pre(lm, lm.encode([row["harmful"] for row in PAIRS]), "sequential", n_positions=3)
    found = {path.stem: load_file(path) for path in (tmp_path / "data/activations").iterdir()}
    assert found.keys() == {"sequential", "batched"}
    for sets in found.values():
        torch.testing.assert_close(sets["val.harmful"], expected, rtol=1e-5, atol=1e-5)
    place.set("activations", n_positions=10_000)
    done = place.stage("activations")
    assert done.status == 1 and "params.yaml: activations.n_positions: a prompt has " in done.said
