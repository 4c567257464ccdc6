"""A checkpoint becomes a GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) in F16 or BF16, for llama.cpp.

What llama.cpp's own converter does (convert_hf_to_gguf.py of https://github.com/ggml-org/llama.cpp) is done here for two
architectures: matrices are cast, norms and biases are float32, and the rows of Llama's queries and keys are put in the order that
llama.cpp rotates them in. What a file could not say as the checkpoint means it is refused. Two differences are left: llama.cpp
doesn't bring text into NFC, and takes some tokens for an answer's end by their text alone (`<|endoftext|>`, say).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFType,
    GGUFWriter,
    LlamaFileType,
    TokenType,
    get_tensor_name_map,
)
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.files import sync
from refusal.io.progress import progress
from refusal.lm.checkpoint import DTYPES, Entry, Shard, data_of, read_json, read_shards

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ARCHITECTURES = {"llama": MODEL_ARCH.LLAMA, "qwen2": MODEL_ARCH.QWEN2}  # by `model_type`; each is tested
FORMATS = {"gguf-f16": "F16", "gguf-bf16": "BF16"}  # what `orthogonalize.format` calls the types
_FILE_TYPES = {"F16": LlamaFileType.MOSTLY_F16, "BF16": LlamaFileType.MOSTLY_BF16}  # of matrices; vectors are F32
_BUFFER = ".rotary_emb.inv_freq"  # in old checkpoints of Llama, and read by nothing
_CHUNK = 1 << 22  # elements that are cast together


@dataclass(frozen=True)
class _Source:
    """A checkpoint that can be written. split: llama.cpp's name of how text is split. stops: what ends an answer, eos first."""

    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    shards: list[Shard]
    merges: list[str]
    split: str
    stops: list[int]


def check_writable(folder: Path) -> None:
    """Raises UserError, in one sentence, for a checkpoint that `write_gguf` would refuse for anything but a tensor's values."""
    _read(folder)


def write_gguf(folder: Path, path: Path, kind: str) -> dict[str, float]:
    """Write the safetensors checkpoint `folder` to the file `path`, its matrices as `kind`, F16 or BF16; |W_gguf - W| / |W|
    (Frobenius) of each tensor, by its name in the checkpoint.

    The file appears whole or not at all. Memory holds some megabytes of a tensor, of Llama one matrix of queries too, and the
    tokenizer, with Qwen2.5's 152,000 tokens half a gigabyte.

    Raises UserError where `path` exists, for another architecture than Llama's and Qwen2's, one with scaled rotary embeddings,
    biases or tensors that it doesn't usually have, a tokenizer that isn't byte-level or splits text in a way that isn't known,
    NaN or infinity, and values beyond F16.
    """
    if path.exists():
        raise UserError(f"{path}: the file exists: remove it, or give another name")
    source = _read(folder)
    names = get_tensor_name_map(ARCHITECTURES[source.config.model_type], source.config.num_hidden_layers)
    writer, plan = GGUFWriter(None, source.config.model_type), []
    _add_model(writer, source.config, path.stem, kind)
    _add_tokenizer(writer, source)
    for shard in source.shards:
        for entry in shard.entries:
            of_file = kind if len(entry.shape) > 1 else "F32"
            n_bytes = math.prod(entry.shape) * DTYPES[of_file].itemsize
            name = names.get_name(entry.name, try_suffixes=(".weight", ".bias"))
            assert name is not None, entry.name
            # numpy has no bfloat16: the type is said by its name in GGUF, and any other width than a byte's will do.
            writer.add_tensor_info(name, entry.shape, np.dtype(np.float32), n_bytes, GGMLQuantizationType[of_file])
            plan.append((shard, entry, DTYPES[of_file]))
    with _whole(path) as partial:
        writer.write_header_to_file(partial)
        try:
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            return _write_tensors(writer, path, source.config, plan)
        finally:
            writer.close()


def _write_tensors(
    writer: GGUFWriter, path: Path, config: PreTrainedConfig, plan: list[tuple[Shard, Entry, torch.dtype]]
) -> dict[str, float]:
    """The tensors' bytes, after all that says what they are."""
    differences = {}
    [out] = writer.fout or []
    writer.write_padding(out, out.tell())
    with progress(sum(entry.n_bytes for _, entry, _ in plan), f"write {path.name}", "B") as bar:
        for shard, entry, dtype in plan:
            squares, begin = torch.zeros(2, dtype=torch.float64), out.tell()
            for rows in _rows(config, entry, shard.tensor(entry.name)):
                out.write(data_of(_cast(path, entry, rows, dtype, squares)))
                bar.update(rows.nbytes)
            writer.write_padding(out, out.tell() - begin)
            off, size = squares.sqrt().tolist()
            differences[entry.name] = off / (size or 1)
    return differences


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` once all is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.rename(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def _rows(config: PreTrainedConfig, entry: Entry, tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's rows, some at a time, in the order of the file."""
    if config.model_type == "llama" and (heads := _heads(config, entry.name)) is not None:
        # Row j of a head's first half is rotated together with row j of its second; llama.cpp has them side by side.
        tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
    yield from tensor.split(max(1, _CHUNK // max(1, tensor[0].numel())))


def _heads(config: PreTrainedConfig, name: str) -> int | None:
    """How many heads the rows of a matrix of queries or keys belong to; None for any other tensor."""
    if name.endswith("q_proj.weight"):
        return config.num_attention_heads
    return config.num_key_value_heads if name.endswith("k_proj.weight") else None


def _cast(path: Path, entry: Entry, rows: Tensor, dtype: torch.dtype, squares: Tensor) -> Tensor:
    """The rows in `dtype`; squares: the sums of (cast - W)^2 and W^2, added to."""
    cast = rows.to(dtype)
    if not cast.isfinite().all():
        other, says = "gguf-bf16" if dtype == torch.float16 else "safetensors", "NaN or infinity: fix the checkpoint"
        if rows.isfinite().all():
            says = f"values beyond {str(dtype)[6:]}: set orthogonalize.format to {other} in params.yaml"
        raise UserError(f"{path.name}: tensor {entry.name} holds {says}")
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    for i, part in enumerate((cast - wide, wide)):
        squares[i] += torch.linalg.vector_norm(part, dtype=torch.promote_types(part.dtype, torch.float64)) ** 2
    return cast


def _read(folder: Path) -> _Source:
    """The checkpoint, all but its tensors' values. Raises UserError for what a file could not say."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    from refusal.lm.load import load_tokenizer, stop_ids

    kind = read_json(folder, "config.json").get("model_type")
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{folder}: GGUF is written of {' and '.join(ARCHITECTURES)} alone, and this is {kind}: "
            "set orthogonalize.format to safetensors in params.yaml"
        )
    tokenizer = load_tokenizer(folder)
    shards = [
        replace(shard, entries=tuple(entry for entry in shard.entries if not entry.name.endswith(_BUFFER)))
        for shard in read_shards(folder)
    ]
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    stops = stop_ids(model, tokenizer)
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    split = _split(core)
    says = _unlike(config) or _other_tensors(model, shards) or _other_tokens(config, tokenizer, core, split, len(stops))
    if says:
        raise UserError(f"{folder}: {says}, which is not written as GGUF: set orthogonalize.format to safetensors in params.yaml")
    assert split is not None
    first = tokenizer.eos_token_id
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["model"]["merges"]]
    return _Source(config, tokenizer, shards, merges, split, sorted(stops, key=lambda i: (i != first, i)))


def _unlike(config: PreTrainedConfig) -> str | None:
    """What makes it another model than what llama.cpp, or transformers, would read of the file."""
    rope = config.rope_parameters
    if rope.get("rope_type", "default") != "default" or rope.keys() - {"rope_type", "rope_theta"}:
        return f"its rotary embedding is of type {rope.get('rope_type')}"
    if getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False):
        return "it has biases that others of its architecture lack"
    if getattr(config, "use_sliding_window", False):
        return "its attention has a sliding window"
    of_head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if of_head * config.num_attention_heads != config.hidden_size:
        return "its heads are not as wide together as hidden_size"
    return None if config.hidden_act == "silu" else f"its activation is {config.hidden_act}"


def _other_tensors(model: PreTrainedModel, shards: list[Shard]) -> str | None:
    """A tensor that the model has and the files lack, the other way round, or of another shape."""
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {entry.name: entry for shard in shards for entry in shard.entries}
    if model.config.tie_word_embeddings and "lm_head.weight" not in found:  # where it is there, transformers uses it
        wanted.pop("lm_head.weight")
    if names := sorted(wanted.keys() ^ found.keys()):
        return f"tensor {names[0]} is {'missing' if names[0] in wanted else 'none of its architecture'}"
    for name, entry in found.items():
        if entry.shape != wanted[name] or entry.dtype not in DTYPES:
            return f"tensor {name} is {entry.dtype} {list(entry.shape)}"
    return None


def _split(core: dict[str, Any]) -> str | None:
    """llama.cpp's name of the way that a tokenizer (tokenizer.json's content) splits text; None where it has none here."""
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    named = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("qwen2", "llama-bpe")}
    steps = core["pre_tokenizer"] or {}
    match steps.get("pretokenizers", [steps]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return named.get(regex)
    return None


def _other_tokens(
    config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, core: dict[str, Any], split: str | None, n_stops: int
) -> str | None:
    """What of a tokenizer has no place in a file."""
    from tokenizers import pre_tokenizers

    alphabet, model = set(pre_tokenizers.ByteLevel.alphabet()), core["model"]
    added = list(tokenizer.added_tokens_decoder.values())
    if model["type"] != "BPE" or split is None or core["normalizer"] not in (None, {"type": "NFC"}):
        return "its tokenizer is none of byte pairs whose way to split text is that of Qwen2, Llama 3, SmolLM or GPT-2"
    if odd := [t.content for t in added if not set(t.content) <= alphabet or t.lstrip or t.rstrip or t.single_word]:
        return f"its tokenizer's added token {odd[0]!r} takes blanks or only words, or has a blank or characters beyond ASCII"
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        return "its tokenizer has more tokens than the embedding has rows"
    # llama.cpp takes a word of the vocabulary whole, whatever the merges make of it, where text is split as Llama 3's is.
    if model.get("ignore_merges", False) != (split == "llama-bpe") and not _merges_make_all(core, {t.content for t in added}):
        return "its tokenizer has words that its merges don't make"
    plain, whole = (tokenizer("a b", add_special_tokens=special)["input_ids"] for special in (False, True))
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    if whole not in (plain, begin + plain, plain + end, begin + plain + end):
        return "its tokenizer puts more around a text than where it begins and ends"
    return "more than three tokens end its answers" if n_stops > 3 else None


def _merges_make_all(core: dict[str, Any], added: set[str]) -> bool:
    """Whether the merges make each word of the vocabulary one token."""
    from tokenizers import Tokenizer

    pairs: Any = Tokenizer.from_str(json.dumps(core | {"model": core["model"] | {"ignore_merges": False}})).model
    words = (word for word, i in core["model"]["vocab"].items() if word not in added and word != _unused(i))
    return all(len(pairs.tokenize(word)) == 1 for word in words)


def _unused(i: int) -> str:
    """What a row of the embedding without a token is called in files."""
    return f"[PAD{i}]"


def _add_model(writer: GGUFWriter, config: PreTrainedConfig, name: str, kind: str) -> None:
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_file_type(_FILE_TYPES[kind])
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)


def _add_tokenizer(writer: GGUFWriter, source: _Source) -> None:
    from refusal.lm.load import ONE_DAY

    tokenizer, added = source.tokenizer, source.tokenizer.added_tokens_decoder
    token_of = {i: token for token, i in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for i in range(source.config.vocab_size):
        tokens.append(token_of.get(i, _unused(i)))
        if i in added:
            types.append(TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.UNUSED if tokens[i] == _unused(i) else TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")  # byte-level pairs, whoever's
    writer.add_tokenizer_pre(source.split)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(source.merges)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    for add, i in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_unk_token_id, tokenizer.unk_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
        *zip((writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id), source.stops, strict=False),
    ):
        if i is not None:
            add(i)
    writer.add_chat_template(tokenizer.get_chat_template().removeprefix(ONE_DAY))
