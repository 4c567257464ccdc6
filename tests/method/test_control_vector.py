"""Control vectors: the file read by gguf's own reader, a round trip, and that adding one is adding it where llama.cpp does."""

import gguf
import pytest
import torch
from gguf_files import finish
from tiny import tiny_model

from refusal.io.errors import UserError
from refusal.method.control_vector import read_control_vector, write_control_vector
from refusal.method.interventions import Addition, intervene
from refusal.report.published import compare, read_vectors

VECTORS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
VECTORS[3] = torch.nan


def test_the_file_is_what_llama_cpp_reads(tmp_path):
    write_control_vector(tmp_path / "a.gguf", VECTORS, "qwen2")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector" and fields["controlvector.model_hint"] == "qwen2"
    assert fields["controlvector.layer_count"] == 4  # of five layers
    assert [(t.name, t.tensor_type.name, t.data.shape) for t in reader.tensors] == [
        ("direction.1", "F32", (8,)),
        ("direction.3", "F32", (8,)),
    ]
    assert torch.equal(torch.tensor(reader.tensors[0].data), VECTORS[2].float())


def test_there_and_back(tmp_path):
    write_control_vector(tmp_path / "a.gguf", VECTORS, "qwen2")
    back = read_control_vector(tmp_path / "a.gguf")
    assert back.shape == VECTORS.shape and back[[0, 1, 3]].isnan().all()
    assert torch.equal(back[[2, 4]], VECTORS[[2, 4]].float())


def test_what_a_block_puts_out_is_what_enters_the_next(tmp_path):
    """Added behind block 1 by hand, as llama.cpp does with direction.1; and at resid_pre of the layer that it is read as."""
    model, ids = tiny_model("qwen2"), torch.tensor([[1, 7, 9, 30]])
    vectors = torch.zeros(3, model.config.hidden_size)
    vectors[2] = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    write_control_vector(tmp_path / "a.gguf", vectors, "qwen2")
    (tensor,) = gguf.GGUFReader(tmp_path / "a.gguf").tensors
    block = model.model.layers[int(tensor.name.removeprefix("direction."))]
    handle = block.register_forward_hook(lambda _module, _args, out: out + torch.tensor(tensor.data))
    theirs = model(ids).logits
    handle.remove()
    (layer,) = (~read_control_vector(tmp_path / "a.gguf").isnan().any(-1)).nonzero().flatten().tolist()
    with intervene(model, Addition(vectors[layer], layer)):
        assert torch.allclose(model(ids).logits, theirs, atol=1e-6)
    assert not torch.allclose(model(ids).logits, theirs, atol=1e-2)


def test_one_in_data_published_is_compared_with_ours(tmp_path):
    (tmp_path / "theirs").mkdir()
    write_control_vector(tmp_path / "theirs/a.gguf", VECTORS, "qwen2")
    ours = VECTORS.clone()
    ours[4] = torch.randn(8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (row,) = compare(*read_vectors(tmp_path / "theirs"), {"sequential-matched": ours})["files"].values()
    cosines = row["cosine"]["sequential-matched"]
    assert row["comparable"] and cosines[:2] == [None, None] and cosines[3] is None
    assert cosines[2] == pytest.approx(1) and abs(cosines[4]) < 0.9


def test_what_is_none_is_one_sentence(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(UserError, match=r"a\.gguf: "):
        read_control_vector(path)
    for architecture, names in (("llama", ["direction.1"]), ("controlvector", ["direction.0"]), ("controlvector", [])):
        writer = gguf.GGUFWriter(path, architecture)
        for name in names:
            writer.add_tensor(name, VECTORS[0].float().numpy())
        finish(writer)
        with pytest.raises(UserError, match="is no control vector"):
            read_control_vector(path)
