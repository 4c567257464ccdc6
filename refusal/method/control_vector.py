"""Directions as llama.cpp's control vectors: GGUF, one float32 vector a layer.

llama.cpp adds `direction.<i>` to what block i puts out, which is what enters block i + 1 (`resid_pre` i + 1). It takes no
layer 0, so that `resid_pre` 0 and 1 have no place in the file. Source: common_control_vector_load_one in common/common.cpp, and
tools/cvector-generator, of ggml-org/llama.cpp.
"""

import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io.errors import UserError
from refusal.lm.gguf import read_header

ARCHITECTURE = "controlvector"


def write_control_vector(path: Path, vectors: Float[Tensor, "n_layers d_model"], model_type: str) -> None:
    """Write one vector a layer, to be added at `resid_pre`, but for layers 0 and 1 and what is zero or NaN.

    model_type: config.json's, which llama.cpp shows as a hint. Subtract by a negative `--control-vector-scaled`.
    """
    from gguf import GGUFWriter

    writer = GGUFWriter(path, ARCHITECTURE)
    writer.add_string(f"{ARCHITECTURE}.model_hint", model_type)
    writer.add_int32(f"{ARCHITECTURE}.layer_count", len(vectors) - 1)
    for layer in range(2, len(vectors)):
        vector = vectors[layer].float()
        if vector.isfinite().all() and vector.any():
            writer.add_tensor(f"direction.{layer - 1}", vector.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_control_vector(path: Path) -> Float[Tensor, "n_layers d_model"]:
    """The vectors of a control vector's file by layer of `resid_pre`, NaN where it has none.

    What is added to the last block's output enters no block, and is left out. Raises UserError for another file.
    """
    from gguf import GGUFReader

    header = read_header(path)  # a file from elsewhere may lie
    is_one = header.values.get("general.architecture") == ARCHITECTURE and header.shapes
    if not is_one or not all(re.fullmatch(r"direction\.[1-9]\d{0,3}", name) for name in header.shapes):
        raise UserError(f"{path}: is no control vector: its architecture is {ARCHITECTURE}, its tensors direction.1 and so on")
    (shape, *others), kinds = {*header.shapes.values()}, {kind.name for kind in header.types.values()}
    if others or len(shape) != 1 or kinds != {"F32"}:
        raise UserError(f"{path}: the vectors of a control vector are float32 and of one length")
    rows = {int(t.name.partition(".")[2]): torch.tensor(t.data) for t in GGUFReader(path).tensors}
    count = header.values.get(f"{ARCHITECTURE}.layer_count")
    n_layers = max(max(rows), count if isinstance(count, int) and count < 10_000 else 0) + 1
    vectors = torch.full((n_layers, *shape), torch.nan)
    for i, row in rows.items():
        if i + 1 < n_layers:
            vectors[i + 1] = row
    return vectors
