"""A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) becomes a checkpoint, its weights dequantized.

transformers' reader does the work, with the `gguf` package. Neither expects a file that lies, so the header is read here first,
within bounds; and what that reader would pass over without a word (scaled rotary embeddings, tensors that it has no name for, an
unknown way to split text) is refused, since the model would be another one.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.progress import progress
from refusal.lm.checkpoint import SINGLE, Entry, data_of, header_bytes
from refusal.lm.load import DTYPES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

# `general.architecture` of the files that are read; every one is tested. Of Gemma's and Phi's, transformers passes over metadata
# that the model depends on (the scale of attention, its window).
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Of a header: Qwen2.5's has 6 MB, 455,259 values in its arrays, 291 tensors.
_MOST_BYTES, _MOST_VALUES, _MOST_TENSORS = 1 << 26, 1 << 21, 1 << 16
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_HARD = "Hello,  world's 12345 tests!\n\n\tnaïve 漢字 🙂 ½ x=1;  END "  # where splits of text differ


@dataclass(frozen=True)
class Header:
    """What a file says of itself: scalars and strings by key (arrays by their length), and each tensor's type and torch shape."""

    values: dict[str, Any]
    types: dict[str, GGMLQuantizationType]
    shapes: dict[str, tuple[int, ...]]


class _Cursor:
    """Reads numbers and strings one after another. Raises UserError where they do not lie within `data`."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.at, self.n_values = path, data, 0, 0

    def broken(self, what: str) -> UserError:
        return UserError(f"{self.path}: no whole GGUF file ({what}): download it again")

    def take(self, n_bytes: int) -> bytes:
        if n_bytes > len(self.data) - self.at:
            long = len(self.data) == _MOST_BYTES
            raise self.broken(f"its header has more than {_MOST_BYTES:,} bytes" if long else "its header ends early")
        self.at += n_bytes
        return self.data[self.at - n_bytes : self.at]

    def numbers(self, kinds: str) -> tuple:
        return struct.unpack("<" + kinds, self.take(struct.calcsize("<" + kinds)))

    def text(self) -> str:
        try:
            return self.take(self.numbers("Q")[0]).decode()
        except UnicodeDecodeError:
            raise self.broken("a text is not UTF-8") from None

    def value(self, kind: int) -> Any:
        """A scalar, a string, or an array's length."""
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind])[0]
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.broken(f"a value of type {kind}")
        element, n = self.numbers("IQ")
        self.n_values += n
        if self.n_values > _MOST_VALUES:
            raise self.broken(f"its metadata has more than {_MOST_VALUES:,} values")
        if element in _SCALARS:
            self.take(n * struct.calcsize(_SCALARS[element]))
        elif element == _STRING:
            for _ in range(n):
                self.take(self.numbers("Q")[0])
        else:
            raise self.broken(f"an array of type {element}")
        return n


def read_header(path: Path) -> Header:
    """The header of a file whose tensors all lie within it, one after another, of types that can be dequantized.

    Raises UserError for any other.
    """
    with path.open("rb") as file:
        cursor = _Cursor(path, file.read(_MOST_BYTES))
    if cursor.take(4) != b"GGUF":
        raise UserError(f"{path}: not a GGUF file: give one, or the folder of a checkpoint")
    version, n_tensors, n_values = cursor.numbers("IQQ")
    if version not in (2, 3):
        raise cursor.broken(f"version {version}, or of a big-endian machine")
    if n_tensors > _MOST_TENSORS or n_values > _MOST_TENSORS:
        raise cursor.broken(f"it states {n_tensors:,} tensors and {n_values:,} values")
    values: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.text()
        if key in values:
            raise cursor.broken(f"{key!r} is there twice")
        values[key] = cursor.value(cursor.numbers("I")[0])
    types, shapes, spans = {}, {}, []
    for _ in range(n_tensors):
        name, n_axes = cursor.text(), cursor.numbers("I")[0]
        if name in types or n_axes > 4:
            raise cursor.broken(f"tensor {name!r} is there twice, or has {n_axes} axes")
        axes, (kind, offset) = cursor.numbers(f"{n_axes}Q"), cursor.numbers("IQ")
        types[name], shapes[name] = _dequantizable(path, name, kind), tuple(reversed(axes))
        block, n_bytes = GGML_QUANT_SIZES[types[name]]
        if not axes or 0 in axes or axes[0] % block:
            raise cursor.broken(f"tensor {name!r} has the shape {list(axes)}")
        spans.append((offset, offset + math.prod(axes) // block * n_bytes, name))
    alignment = values.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.broken(f"general.alignment is {alignment!r}")
    room, end = path.stat().st_size - (cursor.at + -cursor.at % alignment), 0
    for begin, after, name in sorted(spans):
        if begin < end or after > room:
            raise cursor.broken(f"tensor {name!r} lies beyond its end, or over another")
        end = after
    return Header(values, types, shapes)


def _dequantizable(path: Path, name: str, kind: int) -> GGMLQuantizationType:
    try:
        of_file = GGMLQuantizationType(kind)
        dequantize(np.zeros((1, GGML_QUANT_SIZES[of_file][1]), np.uint8), of_file)
    except (ValueError, KeyError, NotImplementedError):
        raise UserError(
            f"{path}: tensor {name!r} is of type {kind}, which cannot be dequantized: give a file of another quantization"
        ) from None
    return of_file


def _check_usable(path: Path, header: Header) -> None:
    """Refuse what is no chat model of an architecture that is read here as the file means it."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    values = header.values
    kind, parts = values.get("general.architecture"), values.get("split.count", 1)
    says = None
    if values.get("general.type", "model") != "model":
        says = f"general.type is {values['general.type']!r}, and a whole model is needed"
    elif kind not in ARCHITECTURES:
        says = f"its architecture {kind!r} is not read here (only {', '.join(ARCHITECTURES)}): give a checkpoint of safetensors"
    elif parts not in (0, 1):
        says = f"one of {parts} parts: join them with llama.cpp's llama-gguf-split --merge"
    elif not isinstance(values.get("tokenizer.chat_template"), str):
        says = "it has no chat template: a base model, or a file made without; give that of the chat model"
    elif values.get(f"{kind}.rope.scaling.type", "none") != "none" or values.get(f"{kind}.expert_count"):
        says = "its rotary embedding is scaled, or it is a mixture of experts: not read here; give a checkpoint of safetensors"
    elif type(layers := values.get(f"{kind}.block_count")) is not int or layers > len(header.types):
        says = f"{kind}.block_count is {layers!r}, for {len(header.types)} tensors: download it again"
    elif (tokenizer := values.get("tokenizer.ggml.model")) != "gpt2":
        says = (
            f"tokenizer.ggml.model is {tokenizer!r}, and byte-level ones ('gpt2') are read here: give a checkpoint of safetensors"
        )
    elif (split := values.get("tokenizer.ggml.pre")) not in (*GGUF_PRE_TOKENIZER_SPLITS, "gpt-2", "smollm"):
        says = f"tokenizer.ggml.pre is {split!r}, a way to split text that is not known: give a checkpoint of safetensors"
    if says:
        raise UserError(f"{path}: {says}")


@contextmanager
def _alone(path: Path) -> Iterator[Path]:
    """A folder with the file in it and nothing that may lie beside it, for transformers, whose errors become one sentence."""
    with TemporaryDirectory() as folder:
        (Path(folder) / path.name).symlink_to(path.resolve())
        try:
            yield Path(folder)
        except UserError:
            raise
        except Exception as error:  # any value of the file meets code that assumes another
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{path}: transformers cannot read it ({type(error).__name__}: {why}): give another file") from None


def peek(path: Path, target: Path, dtype: str, look: Callable[[Path], object]) -> tuple[Header, PreTrainedConfig]:
    """Write configuration and tokenizer of the checkpoint into the folder `target`, which `look` then sees.

    Raises UserError for a file that is refused, or what `look` refuses, naming the file.
    """
    header = read_header(path)
    _check_usable(path, header)
    with _alone(path) as folder:
        config = _write_small_files(path, folder, header, target, dtype)
    try:
        look(target)
    except UserError as error:
        raise UserError(str(error).replace(str(target), str(path))) from None
    return header, config


def convert(path: Path, target: Path, dtype: str, look: Callable[[Path], object]) -> list[str]:
    """Write a safetensors checkpoint in `dtype` into the folder `target`; the types that the file's tensors were of.

    `look` sees configuration and tokenizer before any weight is read. What is refused leaves the folder empty. At most twice the
    weights in float32 are in memory.
    """
    try:
        header, config = peek(path, target, dtype, look)
        with _alone(path) as folder:
            tensors = _read_weights(path, folder, config, dtype)
        _write_weights(path, target, tensors, dtype)
    except UserError:
        for written in target.iterdir():
            written.unlink()
        raise
    return sorted({kind.name for kind in header.types.values()})


def _write_small_files(path: Path, alone: Path, header: Header, target: Path, dtype: str) -> PreTrainedConfig:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    values = header.values
    with progress(2, f"read {path.name}", "part") as bar:
        config = AutoConfig.from_pretrained(alone, gguf_file=path.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        _check_tensors(path, header, model, config)
        bar.update()
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
        if values.get("tokenizer.ggml.pre") == "smollm":  # as llama.cpp splits it; transformers knows no such name
            from tokenizers import pre_tokenizers as split

            tokenizer.backend_tokenizer.pre_tokenizer = split.Sequence(
                [split.Digits(individual_digits=True), split.ByteLevel(add_prefix_space=False)]
            )
        bar.update()
    config.architectures, config.dtype = [type(model).__name__], DTYPES[dtype]
    keys = [f"tokenizer.ggml.{which}_token_id" for which in ("eos", "eot", "eom")]
    ends = [values[key] for key in keys if key in values]
    begin, pad = (values.get(f"tokenizer.ggml.{which}_token_id") for which in ("bos", "padding"))
    config.save_pretrained(target)
    tokenizer.save_pretrained(target)
    GenerationConfig(bos_token_id=begin, eos_token_id=ends, pad_token_id=pad).save_pretrained(target)
    _check_tokenizer(path, tokenizer, target)
    return config


def _check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Refuse a tokenizer that is another one once it has been saved."""
    saved = load_tokenizer(target)
    if saved(_HARD)["input_ids"] != tokenizer(_HARD)["input_ids"]:
        raise UserError(f"{path}: its tokenizer cannot be saved as transformers has it: give a checkpoint of safetensors")


def _check_tensors(path: Path, header: Header, model: torch.nn.Module, config: PreTrainedConfig) -> None:
    """Refuse a file without one tensor for each of the model's, of its shape, or with one that the reader would pass over."""
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    processor = TENSOR_PROCESSORS.get(header.values["general.architecture"], TensorProcessor)(config=config.to_dict())
    name_of = get_gguf_hf_weights_map(model, processor)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        wanted.pop("lm_head.weight", None)
    for name, shape in header.shapes.items():
        if name_of.get(name) not in wanted:
            raise UserError(f"{path}: tensor {name!r} is none that transformers reads: give a checkpoint of safetensors")
        if wanted.pop(name_of[name]) != shape:
            raise UserError(
                f"{path}: tensor {name!r} has the shape {list(shape)}, which its metadata contradict: download it again"
            )
    if wanted:
        raise UserError(f"{path}: there is no tensor for {min(wanted)}: download it again")


def _read_weights(path: Path, alone: Path, config: PreTrainedConfig, dtype: str) -> dict[str, Tensor]:
    """The model's tensors by their names in a checkpoint; float32 where `dtype` is float16, whose range may be too small."""
    from transformers import AutoModelForCausalLM

    wide = torch.float32 if dtype == "float16" else DTYPES[dtype]
    model: Any = AutoModelForCausalLM.from_pretrained(alone, config=config, gguf_file=path.name, dtype=wide)
    tensors = dict(model.state_dict())
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def _write_weights(path: Path, target: Path, tensors: dict[str, Tensor], dtype: str) -> None:
    """Write them one after another, so that there is no second copy in memory."""
    width, code = DTYPES[dtype].itemsize, {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    entries = [Entry(name, code, tuple(t.shape), t.numel() * width) for name, t in sorted(tensors.items())]
    with (
        (target / SINGLE).open("wb") as out,
        progress(sum(entry.n_bytes for entry in entries), f"write {target.name}", "B") as bar,
    ):
        out.write(header_bytes(entries, {"format": "pt"}))
        for entry in entries:
            tensor = tensors.pop(entry.name)
            cast = tensor.to(DTYPES[dtype])
            if not cast.isfinite().all():
                says = "NaN or infinity: download it again"
                if tensor.isfinite().all():
                    says = f"values beyond {dtype}: set model.dtype in params.yaml to float32 or bfloat16"
                raise UserError(f"{path}: tensor {entry.name} holds {says}")
            out.write(data_of(cast))
            bar.update(entry.n_bytes)
