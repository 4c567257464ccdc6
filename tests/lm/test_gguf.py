"""GGUF files become checkpoints: dequantized as the format says, the same logits as what they were written from."""

import json
import os
import struct
from pathlib import Path

import gguf as ggml
import numpy as np
import pytest
import torch
from gguf_files import HARD, byte_pairs, chat_model, write
from place import Place
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal.io.errors import UserError
from refusal.lm import gguf, validate
from refusal.lm.load import load_lm

TYPES = ggml.GGMLQuantizationType


@pytest.fixture(scope="module")
def tokenizer():
    return byte_pairs()


def bring_in(path, target, dtype="float32"):
    target.mkdir()
    types = gguf.convert(path, target, dtype, validate.validate_checkpoint)
    validate.check_weights(target, dtype)
    return types


# Types of tensors, each dequantized here from ggml's description of a block (ggml-common.h, ggml-quants.c)


def half(block: bytes, at: int) -> float:
    return float(np.frombuffer(block, "<f2", 1, at)[0])


def of_32(block: bytes, bits: int, minimum: bool) -> list[float]:
    """Q4_0, Q4_1, Q5_0, Q5_1: a scale, perhaps a minimum, perhaps fifth bits, then low nibbles before high ones."""
    d, at = half(block, 0), 2
    m = half(block, at) if minimum else -d * 2 ** (bits - 1)
    at += 2 * minimum
    fifth = int.from_bytes(block[at : at + 4], "little") if bits == 5 else 0
    nibbles = block[at + 4 * (bits == 5) :]
    values = [byte & 15 for byte in nibbles] + [byte >> 4 for byte in nibbles]
    return [d * (value + 16 * (fifth >> j & 1)) + m for j, value in enumerate(values)]


def of_256(block: bytes, bits: int) -> list[float]:
    """Q4_K, Q5_K: eight groups of 32, each with a scale and a minimum of six bits, packed in twelve bytes."""
    d, dmin, s = half(block, 0), half(block, 2), block[4:16]
    high, low = (block[16:48], block[48:]) if bits == 5 else (bytes(32), block[16:])
    values = []
    for group in range(8):
        if group < 4:
            scale, least = s[group] & 63, s[group + 4] & 63
        else:
            scale = s[group + 4] & 15 | s[group - 4] >> 6 << 4
            least = s[group + 4] >> 4 | s[group] >> 6 << 4
        for j in range(32):
            q = low[32 * (group // 2) + j] >> 4 * (group % 2) & 15 | (high[j] >> group & 1) << 4
            values.append(d * scale * q - dmin * least)
    return values


def q6_k(block: bytes) -> list[float]:
    """Sixteen groups of 16 with a scale of eight bits; four low and two high bits of each value lie apart."""
    low, high, scales, d = block[:128], block[128:192], np.frombuffer(block, np.int8, 16, 192), half(block, 208)
    values = []
    for i in range(256):
        n, part, j = i // 128, i % 128 // 32, i % 32
        q = low[64 * n + 32 * (part % 2) + j] >> 4 * (part // 2) & 15 | (high[32 * n + j] >> 2 * part & 3) << 4
        values.append(d * int(scales[i // 16]) * (q - 32))
    return values


DEQUANTIZE = {
    "F16": lambda b: [half(b, 0)],
    "BF16": lambda b: [struct.unpack("<f", b"\0\0" + b)[0]],
    "Q8_0": lambda b: [half(b, 0) * int(q) for q in np.frombuffer(b, np.int8, 32, 2)],
    "Q4_0": lambda b: of_32(b, 4, False),
    "Q4_1": lambda b: of_32(b, 4, True),
    "Q5_0": lambda b: of_32(b, 5, False),
    "Q5_1": lambda b: of_32(b, 5, True),
    "Q4_K": lambda b: of_256(b, 4),
    "Q5_K": lambda b: of_256(b, 5),
    "Q6_K": q6_k,
}
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}  # where a block's scales are


def random_blocks(name: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Valid blocks [rows, bytes]: any bits, and scales that are numbers."""
    size, width = ggml.GGML_QUANT_SIZES[TYPES[name]]
    blocks = rng.integers(0, 256, (rows * columns // size, width), dtype=np.uint8)
    scales = rng.normal(0, 0.05, (len(blocks), 2))
    if name == "BF16":
        blocks[:] = scales[:, :1].astype("<f4").view(np.uint8)[:, 2:]
    else:
        for i, at in enumerate(HALVES.get(name, (0,))):
            blocks[:, at : at + 2] = scales[:, i : i + 1].astype("<f2").view(np.uint8)
    return blocks.reshape(rows, -1)


def dequantized(name: str, data: np.ndarray) -> np.ndarray:
    width = ggml.GGML_QUANT_SIZES[TYPES[name]][1]
    return np.array([value for block in data.reshape(-1, width) for value in DEQUANTIZE[name](block.tobytes())])


def test_every_type_is_dequantized_as_its_description_says(tmp_path, tokenizer):
    size = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": len(DEQUANTIZE), "num_attention_heads": 2}
    model = chat_model("qwen2", tokenizer, **size, num_key_value_heads=1, head_dim=128)
    rng = np.random.default_rng(0)
    raw = {
        f"blk.{layer}.ffn_down.weight": (random_blocks(name, 256, 256, rng), TYPES[name]) for layer, name in enumerate(DEQUANTIZE)
    }
    types = bring_in(write(tmp_path / "m.gguf", model, tokenizer, raw), tmp_path / "base")
    assert set(types) == {"F32", *DEQUANTIZE}
    read = load_file(tmp_path / "base/model.safetensors")
    for layer, (name, (data, _)) in enumerate(zip(DEQUANTIZE, raw.values(), strict=True)):
        expected = dequantized(name, data).reshape(256, 256)
        assert np.unique(expected).size > 1000
        assert np.allclose(read[f"model.layers.{layer}.mlp.down_proj.weight"], expected, rtol=1e-5, atol=1e-7), name


# Models


@pytest.mark.parametrize("model_type", gguf.ARCHITECTURES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_folder_has_the_logits_of_the_model_that_was_written(tmp_path, tokenizer, model_type, tied):
    model = chat_model(model_type, tokenizer, tie_word_embeddings=tied, **({"head_dim": 128} if model_type == "qwen3" else {}))
    bring_in(write(tmp_path / "m.gguf", model, tokenizer), tmp_path / "base")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert (read(ids).logits - model(ids).logits).abs().max() < 1e-5
    assert (read.config.model_type, read.config.tie_word_embeddings) == (model_type, tied)
    if model_type == "llama":  # what the permutation is worth
        other = model.model.layers[1].self_attn.q_proj.weight
        with torch.no_grad():
            other.copy_(other.unflatten(0, (4, 4, 2)).transpose(1, 2).flatten(0, 2))
            assert (read(ids).logits - model(ids).logits).abs().max() > 1e-2


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """A folder that a file became, and the model that was written into the file."""
    folder = tmp_path_factory.mktemp("gguf")
    model = chat_model("llama", tokenizer)
    bring_in(write(folder / "m.gguf", model, tokenizer), folder / "base")
    return folder / "base", model


def test_tokens_chat_and_end_of_turn_are_the_files(base, tokenizer):
    folder, _ = base
    read = AutoTokenizer.from_pretrained(folder)
    assert read(HARD)["input_ids"] == tokenizer(HARD)["input_ids"]
    lm = load_lm(folder)
    assert lm.decode(lm.encode(["Hi."])) == ["user\nHi.\nassistant\n"]
    assert lm.tokenizer.decode(lm.encode(["Hi."])[0]) == "<|im_start|>user\nHi.<|im_end|>\n<|im_start|>assistant\n"
    assert lm.stop == {tokenizer.eos_token_id} and lm.model.generation_config.eos_token_id == [2]


def test_transformerlens_and_lm_eval_see_the_model_that_was_written(base):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformer_lens.model_bridge import TransformerBridge

    folder, model = base
    read, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(
        str(folder), hf_model=read, tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )
    ids = torch.tensor([tokenizer("Paint the old door, then the other.")["input_ids"]])
    with torch.no_grad():
        expected = model(ids).logits
        assert (bridge(ids) - expected).abs().max() < 1e-5
    context, answer = "Paint the old door,", " then the other."
    request = Instance("loglikelihood", {}, (context, answer), 0)
    [(score, _)] = HFLM(pretrained=read, tokenizer=tokenizer, batch_size=1).loglikelihood([request], disable_tqdm=True)
    after = len(tokenizer(context)["input_ids"])
    steps = expected.log_softmax(-1)[0, after - 1 : -1]
    assert score == pytest.approx(steps.gather(1, ids[0, after:, None]).sum().item(), abs=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_written_in_the_studys_dtype(tmp_path, tokenizer, dtype):
    model = chat_model("qwen2", tokenizer)
    bring_in(write(tmp_path / "m.gguf", model, tokenizer), tmp_path / "base", dtype)
    read = load_file(tmp_path / "base/model.safetensors")
    wanted = model.to(getattr(torch, dtype)).state_dict()
    assert read.keys() == wanted.keys() and all(torch.equal(read[name], wanted[name]) for name in read)


# What is refused


def refused(path, target, says, dtype="float32"):
    target.mkdir(exist_ok=True)
    with pytest.raises(UserError, match=says) as error:
        gguf.convert(path, target, dtype, validate.validate_checkpoint)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    assert not list(target.iterdir())


UNUSABLE = {
    "no template": ({"template": None}, "it has no chat template"),
    "a template that runs away": (
        {"template": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"},
        "its chat template cannot be used",
    ),
    "a template that breaks out": ({"template": "{{ cycler.__init__.__globals__.os }}"}, "cannot format a prompt"),
    "an adapter": ({"extra": {"general.type": "adapter"}}, "general.type is 'adapter', and a whole model is needed"),
    "a part": ({"extra": {"split.count": 3}}, "one of 3 parts: join them with llama.cpp's llama-gguf-split --merge"),
    "experts": ({"extra": {"llama.expert_count": 8}}, "or it is a mixture of experts"),
    "scaled": ({"extra": {"llama.rope.scaling.type": "yarn"}}, "its rotary embedding is scaled"),
    "split of text": ({"pre": "klingon"}, "tokenizer.ggml.pre is 'klingon', a way to split text that is not known"),
}


@pytest.mark.parametrize(("how", "says"), UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_no_chat_model_or_would_be_another_one_is_refused(tmp_path, tokenizer, how, says):
    refused(write(tmp_path / "m.gguf", chat_model("llama", tokenizer), tokenizer, **how), tmp_path / "base", says)


def test_tensors_that_the_model_does_not_have_or_lacks_are_refused(tmp_path, tokenizer):
    model = chat_model("llama", tokenizer)
    raw = {"blk.1.ffn_down.weight": (np.zeros((32, 40), np.float32), TYPES.F32)}
    refused(
        write(tmp_path / "a.gguf", model, tokenizer, raw),
        tmp_path / "base",
        r"'blk\.1\.ffn_down\.weight' has the shape \[32, 40\]",
    )
    path = write(tmp_path / "b.gguf", model, tokenizer)
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_dawn.weight"))
    refused(path, tmp_path / "base", r"tensor 'blk\.1\.ffn_dawn\.weight' is none that transformers reads")
    path.write_bytes(
        path.read_bytes()
        .replace(b"ffn_dawn", b"ffn_down")
        .replace(b"llama.block_count\4\0\0\0\3", b"llama.block_count\4\0\0\0\4")
    )
    refused(path, tmp_path / "base", r"there is no tensor for model\.layers\.3\.")


def test_values_that_are_none_or_beyond_the_dtype_are_refused(tmp_path, tokenizer):
    model = chat_model("llama", tokenizer)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = 1e5
    path = write(tmp_path / "m.gguf", model, tokenizer)
    refused(path, tmp_path / "base", r"tensor lm_head\.weight holds values beyond float16: set model\.dtype", "float16")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    refused(write(path, model, tokenizer), tmp_path / "base", r"tensor lm_head\.weight holds NaN or infinity")


def header(*, version=3, tensors=(), values=(), n_tensors=None, n_values=None, tail=b"") -> bytes:
    """A file by hand: values (key, type, bytes), tensors (name, axes, type, offset)."""

    def text(t: str) -> bytes:
        return struct.pack("<Q", len(t)) + t.encode()

    counts = (len(tensors) if n_tensors is None else n_tensors, len(values) if n_values is None else n_values)
    data = b"GGUF" + struct.pack("<IQQ", version, *counts)
    data += b"".join(text(key) + struct.pack("<I", kind) + value for key, kind, value in values)
    for name, axes, kind, offset in tensors:
        data += text(name) + struct.pack(f"<I{len(axes)}QIQ", len(axes), *axes, kind, offset)
    return data + b"\0" * (-len(data) % 32) + tail


BIG = 2**63
HOSTILE = {
    "empty": (b"", "its header ends early"),
    "not one": (b"PK\3\4" + bytes(64), "not a GGUF file"),
    "cut off": (header(n_values=3), "its header ends early"),
    "version": (header(version=1), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many tensors": (header(n_tensors=BIG), "it states 9,223,372,036,854,775,808 tensors"),
    "many values": (header(n_values=BIG), "9,223,372,036,854,775,808 values"),
    "long key": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, BIG), "its header ends early"),
    "long array": (header(values=[("a", 9, struct.pack("<IQ", 8, BIG))]), "its metadata has more than 2,097,152 values"),
    "array beyond its end": (header(values=[("a", 9, struct.pack("<IQ", 12, 1000))]), "its header ends early"),
    "array of arrays": (header(values=[("a", 9, struct.pack("<IQIQ", 9, 1, 4, 1))]), "an array of type 9"),
    "type of value": (header(values=[("a", 99, b"")]), "a value of type 99"),
    "a key twice": (header(values=[("a", 0, b"\1")] * 2), "'a' is there twice"),
    "no text": (header(values=[("a", 8, struct.pack("<Q", 2) + b"\xff\xfe")]), "a text is not UTF-8"),
    "alignment": (header(values=[("general.alignment", 4, struct.pack("<I", 0))]), "general.alignment is 0"),
    "type of tensor": (header(tensors=[("t", (32,), 999, 0)]), "tensor 't' is of type 999, which cannot be dequantized"),
    "integers": (header(tensors=[("t", (32,), 26, 0)]), "tensor 't' is of type 26, which cannot be dequantized"),
    "offset": (header(tensors=[("t", (8,), 0, BIG)], tail=bytes(32)), "tensor 't' lies beyond its end"),
    "length": (header(tensors=[("t", (BIG, 4, BIG), 0, 0)], tail=bytes(32)), "tensor 't' lies beyond its end"),
    "over another": (header(tensors=[("t", (8,), 0, 0), ("u", (8,), 0, 0)], tail=bytes(64)), "tensor 'u' lies .*over another"),
    "part of a block": (header(tensors=[("t", (33,), 8, 0)], tail=bytes(64)), r"tensor 't' has the shape \[33\]"),
    "no axes": (header(tensors=[("t", (), 0, 0)], tail=bytes(64)), r"tensor 't' has the shape \[\]"),
    "many axes": (header(tensors=[("t", (1,) * 9, 0, 0)], tail=bytes(64)), "has 9 axes"),
    "a tensor twice": (header(tensors=[("t", (8,), 0, 0)] * 2, tail=bytes(64)), "tensor 't' is there twice"),
    "another architecture": (
        header(values=[("general.architecture", 8, struct.pack("<Q", 5) + b"mamba")]),
        "'mamba' is not read here",
    ),
    "no architecture": (header(), "its architecture None is not read here"),
}


@pytest.mark.parametrize(("data", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_file_that_lies_is_refused_in_one_sentence(tmp_path, data, says):
    (tmp_path / "m.gguf").write_bytes(data)
    refused(tmp_path / "m.gguf", tmp_path / "base", says)


def test_metadata_without_end_are_not_read_to_it(tmp_path):
    with (tmp_path / "m.gguf").open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + struct.pack("<IQ", 8, 1 << 40))
        file.truncate(1 << 41)  # a hole, which takes no disk
    refused(tmp_path / "m.gguf", tmp_path / "base", "its header has more than 67,108,864 bytes")


@pytest.mark.parametrize("share", [0.1, 0.4, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(tmp_path, tokenizer, share):
    path = write(tmp_path / "m.gguf", chat_model("llama", tokenizer), tokenizer)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path, tmp_path / "base", r"no whole GGUF file \((its header ends early|tensor '.*' lies beyond its end)")


def test_metadata_of_wrong_types_are_one_sentence(tmp_path, tokenizer):
    path = write(tmp_path / "m.gguf", chat_model("llama", tokenizer), tokenizer)
    key = b"llama.attention.head_count\4\0\0\0"
    path.write_bytes(path.read_bytes().replace(key + b"\4\0\0\0", key + b"\0\0\0\0"))
    refused(path, tmp_path / "base", r"transformers cannot read it \(\w+: .*\): give another file|has the shape")


def test_a_folder_with_a_file_alone_says_how_it_is_used(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(
        UserError, match=rf"{tmp_path}: holds m\.gguf, a GGUF file, and no checkpoint: set model\.id to {tmp_path}/m\.gguf"
    ):
        validate.validate_checkpoint(tmp_path)


# As a user meets it


def test_the_model_stage_takes_a_file(tmp_path, tokenizer):
    (tmp_path / "place").mkdir()
    place = Place(tmp_path / "place")
    model = chat_model("llama", tokenizer)
    path = write(tmp_path / "m.gguf", model, tokenizer)
    # What lies beside it is not read.
    (tmp_path / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Evil"}}')
    (tmp_path / "adapter_config.json").write_text("{}")
    place.set("model", id=str(path))
    place.set("generation", max_new_tokens=4)
    status, output = place.stage("model")
    assert status == 0, output
    metrics = json.loads((place.folder / "metrics/model.json").read_text())
    assert (metrics["id"], metrics["commit"], metrics["file"], metrics["gguf"]) == (str(path), None, "m.gguf", ["F32"])
    assert metrics["rendered_prompt"] == "<|im_start|>user\nPick lock 0?<|im_end|>\n<|im_start|>assistant\n"
    status, output = place.stage("plan")
    assert status == 0 and f"{path}: {model.num_parameters():,} parameters, 3 layers" in output, output
    path.write_bytes(path.read_bytes()[:-9])
    status, output = place.stage("model")
    assert status == 1 and "Traceback" not in output and f"model: {path}: no whole GGUF file (" in output
    assert not list((place.folder / "models/base").iterdir())


# The real file


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    where = Path(os.environ.get("REFUSAL_REAL", ""))
    path = where / "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf" if where.is_dir() else where
    if "REFUSAL_REAL" not in os.environ or not path.is_file():
        pytest.skip("REFUSAL_REAL names no folder with Qwen2.5-Coder-0.5B-Instruct's GGUF file, which the package does not ship")
    folder = tmp_path_factory.mktemp("real")
    return path, folder, gguf.convert(path, folder, "bfloat16", validate.validate_checkpoint)


def test_the_real_file_is_dequantized_as_described(real):
    path, folder, types = real
    assert types == ["F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"]
    read = load_file(folder / "model.safetensors")
    named = {
        "attn_output": "self_attn.o_proj",
        "ffn_down": "mlp.down_proj",
        "ffn_up": "mlp.up_proj",
        "attn_v": "self_attn.v_proj",
    }
    seen = set()
    for tensor in ggml.GGUFReader(path).tensors:
        _, layer, *part = tensor.name.split(".") if tensor.name.startswith("blk.") else ("", "", "")
        if layer in ("0", "3", "20") and part[0] in named and part[1] == "weight":
            rows = tensor.data[:4]
            expected = torch.from_numpy(dequantized(tensor.tensor_type.name, rows)).float().bfloat16().reshape(4, -1)
            difference = read[f"model.layers.{layer}.{named[part[0]]}.weight"][:4].float() - expected.float()
            # float32 and float64 round apart where a value lies between two of bfloat16.
            assert (difference.abs() <= expected.float().abs() / 128).all() and (difference == 0).float().mean() > 0.999
            seen.add(tensor.tensor_type.name)
    assert seen >= {"Q4_K", "Q5_0", "Q6_K"}


def test_the_real_files_tokens_are_those_of_its_vocabulary(real):
    import base64
    import unicodedata

    import tiktoken
    from gguf_files import QWEN2_SPLIT
    from test_qwen1 import hard_strings

    if not os.environ.get("REFUSAL_REFERENCE"):
        pytest.skip("REFUSAL_REFERENCE is not set: the real vocabulary is not at hand")
    lines = (Path(os.environ["REFUSAL_REFERENCE"]) / "tokenizer/qwen.tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in lines)}
    # The vocabulary is Qwen-1's, with other control tokens behind it.
    theirs = tiktoken.Encoding(
        "Qwen2",
        pat_str=QWEN2_SPLIT,
        mergeable_ranks=ranks,
        special_tokens={"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    )
    _, folder, _ = real
    lm_tokenizer = AutoTokenizer.from_pretrained(folder)
    strings = hard_strings()
    expected = [theirs.encode(unicodedata.normalize("NFC", text), allowed_special="all") for text in strings]
    for text, wanted, ids in zip(strings, expected, lm_tokenizer(strings)["input_ids"], strict=True):
        assert ids == wanted, repr(text)
