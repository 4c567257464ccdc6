"""The safetensors format as it is written row by row; reading is tested through `test_orthogonalize.py`."""

import pytest
import torch
from safetensors.torch import save

from refusal.io.errors import UserError
from refusal.lm.checkpoint import Writer

TENSORS = {
    "b": torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(0)),
    "a": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)),
    "wide": torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)),
    "narrow": torch.randn(3, 3, generator=torch.Generator().manual_seed(3)).bfloat16(),
    "none": torch.empty(0, 7),
    "a longer näme": torch.randn(1, 1, generator=torch.Generator().manual_seed(4)),
}


def shapes(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def test_rows_in_any_order_give_the_bytes_of_the_reference_implementation(tmp_path):
    with Writer(tmp_path / "out.safetensors", shapes(TENSORS)) as out:
        for name, tensor in TENSORS.items():
            order = list(range(len(tensor)))[::-1]
            for rows in (order[: len(order) // 2], order[len(order) // 2 :]):
                out.put(name, rows, tensor[rows])
        assert not (tmp_path / "out.safetensors").exists()
    assert (tmp_path / "out.safetensors").read_bytes() == save(TENSORS)
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path, tensors = tmp_path / "out.safetensors", {"a": TENSORS["a"]}
    path.write_bytes(b"before")
    with pytest.raises(UserError, match="1 rows of a were not written"), Writer(path, shapes(tensors)) as out:
        out.put("a", [0, 2], tensors["a"][[0, 2]])
    with pytest.raises(KeyboardInterrupt), Writer(path, shapes(tensors)) as out:
        out.put("a", [0, 1, 2], tensors["a"])
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


@pytest.mark.parametrize(
    ("row", "values"),
    [
        (0, torch.zeros(2, 4)),
        (0, torch.zeros(1, 3)),
        (0, torch.zeros(1, 4, dtype=torch.float64)),
        (3, torch.zeros(1, 4)),
        (-1, torch.zeros(1, 4)),
    ],
)
def test_rows_of_another_shape_or_dtype_or_place_are_an_error(tmp_path, row, values):
    with pytest.raises(ValueError, match="were expected"), Writer(tmp_path / "out.safetensors", shapes(TENSORS)) as out:
        out.put("a", [row], values)
