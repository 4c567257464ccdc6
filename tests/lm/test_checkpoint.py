"""The writer's half of the safetensors format; what is read, and refused, is tested in `test_orthogonalize.py`."""

import torch
from safetensors.torch import save, save_file

from refusal.lm.checkpoint import data_of, header_bytes, read_shard


def test_header_and_data_are_the_bytes_of_the_reference_implementation(tmp_path):
    tensors = {
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "a": torch.randn(3, 4),
        "a longer näme": torch.randn(1, 1),
        "b": torch.randn(5, 2, 3),
        "none": torch.empty(0, 7),
        "bfloat16": torch.randn(3, 3).bfloat16(),
        "flag": torch.tensor(True),
        "tiny": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    shard = read_shard(tmp_path, "a.safetensors")
    data = b"".join(bytes(data_of(tensor)) for _, tensor in shard.tensors())
    assert header_bytes(shard.entries, shard.metadata) + data == (tmp_path / "a.safetensors").read_bytes()
    assert header_bytes(shard.entries, {}) + data == save(tensors)
    assert bytes(data_of(tensors["a"].T)) == bytes(data_of(tensors["a"].T.contiguous())) != bytes(data_of(tensors["a"]))
    for entry, tensor in shard.tensors():
        assert tensor.equal(tensors[entry.name]) and tensor.equal(shard.tensor(entry.name))
        assert (entry.shape, entry.n_bytes) == (tuple(tensor.shape), tensor.nbytes)
