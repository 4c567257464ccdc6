"""Reading published directions of both layouts, and refusing what is none of them."""

import math
import os
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import save_file
from synthetic import gaussian

from refusal.io.errors import UserError
from refusal.report.published import compare, read_vectors


def test_the_write_ups_dictionary_and_the_papers_positions(tmp_path):
    by_layer, positions = gaussian(4, 8), gaussian(3, 4, 8, seed=1, dtype=torch.float64)
    by_layer[0] = math.nan
    torch.save(dict(enumerate(by_layer)), tmp_path / "rv_dict.pt")
    (tmp_path / "paper").mkdir()
    torch.save(positions, tmp_path / "paper/mean_diffs.pt")
    torch.save({layer: torch.tensor(0.5 * layer) for layer in range(4)}, tmp_path / "cohens_d.pt")
    save_file({"unit": by_layer[1:]}, tmp_path / "ours.safetensors")
    (tmp_path / "notes.json").write_text("{}")

    directions, figures = read_vectors(tmp_path)
    of_paper = [f"paper/mean_diffs.pt:position_{i}" for i in (-3, -2, -1)]
    assert list(directions) == ["ours.safetensors:unit", *of_paper, "rv_dict.pt"]
    assert torch.equal(directions[of_paper[-1]], positions[-1])

    comparison = compare(directions, figures, {"sequential-matched": 2 * by_layer})
    assert comparison["figures"] == {"cohens_d.pt": [0, 0.5, 1.0, 1.5]}
    row = comparison["files"]["rv_dict.pt"]
    assert row["comparable"] and row["cosine"]["sequential-matched"] == [None, *[pytest.approx(1)] * 3]
    for layer, value in enumerate(comparison["files"][of_paper[1]]["cosine"]["sequential-matched"]):
        a, b = by_layer[layer].double().tolist(), positions[1, layer].tolist()
        naive = sum(x * y for x, y in zip(a, b, strict=True)) / math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
        assert value is None if layer == 0 else value == pytest.approx(naive)
    other = comparison["files"]["ours.safetensors:unit"]
    assert not other["comparable"] and other["cosine"] == {} and "[4, 8]: another model" in other["note"]
    of_one_shape = [*of_paper, "rv_dict.pt"]
    assert set(comparison["between"]) == {f"{a} {b}" for i, a in enumerate(of_one_shape) for b in of_one_shape[i + 1 :]}


def test_a_single_direction_is_compared_with_every_layer(tmp_path):
    ours, v = gaussian(4, 8), gaussian(8, seed=1, dtype=torch.float64)
    torch.save(v, tmp_path / "direction.pt")
    numpy.save(tmp_path / "direction.npy", v.numpy())
    torch.save(gaussian(4096), tmp_path / "of_another_model.pt")
    torch.save(torch.arange(4.0), tmp_path / "cohens_d.pt")
    comparison = compare(*read_vectors(tmp_path), {"sequential-matched": ours})
    assert set(comparison["figures"]) == {"cohens_d.pt"}
    for name in ("direction.pt", "direction.npy"):
        row = comparison["files"][name]
        assert row["comparable"] and (row["n_layers"], row["d_model"]) == (None, 8)
        naive = [float(u.double() @ v / u.double().norm() / v.norm()) for u in ours]
        assert row["cosine"]["sequential-matched"] == pytest.approx(naive)
    other = comparison["files"]["of_another_model.pt"]
    assert not other["comparable"] and other["d_model"] == 4096 and "another model" in other["note"]


def test_a_gguf_file_that_is_no_control_vector_is_named(tmp_path):
    (tmp_path / "vector.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match=r"vector\.gguf: "):
        read_vectors(tmp_path)


def test_of_another_study_the_unit_vectors_are_read(tmp_path):
    tensors = {"a-b.unit": gaussian(2, 3), "a-b.difference": gaussian(2, 3, seed=1), "a-b.defined": torch.tensor([False, True])}
    save_file(tensors, tmp_path / "directions.safetensors")
    assert list(read_vectors(tmp_path)[0]) == ["directions.safetensors:a-b.unit"]


def test_an_empty_folder_compares_nothing(tmp_path):
    (tmp_path / "README").write_text("nothing yet")
    assert compare(*read_vectors(tmp_path), {"a": gaussian(2, 3)}) == {"files": {}, "between": {}, "figures": {}}


class Evil:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Evil(), "cannot be read as tensors alone"),
        ({"a": 1}, "holds neither a tensor"),
        ({0: torch.ones(3), 1: torch.ones(4)}, "cannot be read as tensors alone"),
        (torch.ones(2, 2, 2, 2), "has shape [2, 2, 2, 2]"),
        (torch.ones(2, 3, dtype=torch.long), "dtype torch.int64"),
        (b"\xff" * 40, "cannot be read as tensors alone"),
    ],
)
def test_what_is_no_direction_is_refused_by_name(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        Path("bad.safetensors").write_bytes(content)
    else:
        torch.save(content, "bad.pt")
    with pytest.raises(UserError, match=r"bad\.(pt|safetensors)") as caught:
        read_vectors(tmp_path)
    assert says in str(caught.value) and not Path("ran").exists()
