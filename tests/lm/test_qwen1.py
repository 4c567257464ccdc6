"""The converter against a plain-torch forward of the original layout, and the tokenizer against a plain-Python BPE."""

import base64
import os
import random
import shutil
import unicodedata
from pathlib import Path

import pytest
import tiktoken
import torch
from qwen1_layout import EARLY, LATE, forward, tensors, write
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from refusal.io.errors import UserError
from refusal.lm.load import encode_chats, load_lm
from refusal.lm.qwen1 import convert, is_qwen1, peek
from refusal.lm.qwen1_tokenizer import PATTERN, SPECIALS, fast_tokenizer
from refusal.method.activations import last_token_resid_pre, left_pad

PROMPTS = [[5, 260, 17, 400], [9] * 11, [300, 2, 7, 256, 511, 31, 8], list(range(100, 140))]


@pytest.fixture(scope="module")
def weights():
    return tensors()


@pytest.fixture(scope="module")
def converted(tmp_path_factory, weights):
    folder = tmp_path_factory.mktemp("qwen1")
    convert(write(folder / "source", LATE, weights), folder / "base")
    return folder / "base"


def assert_equal(model, config, weights, ids, mask=None):
    """Logits and every resid_pre, where the mask is 1."""
    logits, stream = forward(config, weights, ids, mask)
    padded = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    ours = model(ids, **padded, output_hidden_states=True)
    assert len(ours.hidden_states) == len(stream) + 1
    for got, expected in zip((ours.logits, *ours.hidden_states), (logits, *stream), strict=False):
        assert (got - expected)[torch.ones_like(ids).bool() if mask is None else mask.bool()].abs().max() < 1e-5
    return stream


@pytest.mark.parametrize("config", [LATE, EARLY], ids=["late", "early"])
@pytest.mark.parametrize("n_shards", [1, 3])
def test_logits_and_every_resid_pre_equal_the_original_layout(tmp_path, weights, config, n_shards):
    source = write(tmp_path / "source", config, weights, n_shards)
    assert is_qwen1(source)
    convert(source, tmp_path / "base")
    assert not is_qwen1(tmp_path / "base") and not list((tmp_path / "base").glob("*.py"))
    assert len(list((tmp_path / "base").glob("*.safetensors"))) == n_shards
    lm = load_lm(tmp_path / "base")
    for ids in PROMPTS:
        assert_equal(lm.model, config, weights, torch.tensor([ids]))
    stream = assert_equal(lm.model, config, weights, *left_pad(PROMPTS, lm.pad_id))
    kept = last_token_resid_pre(lm, PROMPTS, "batched")
    assert (kept - torch.stack([r[:, -1] for r in stream], dim=1)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_value_of_a_tensor_changes(tmp_path, weights, dtype):
    source = {name: tensor.to(dtype) for name, tensor in weights.items()}
    convert(write(tmp_path / "source", LATE, source, buffers=False), tmp_path / "base")
    made = {k: v for path in (tmp_path / "base").glob("*.safetensors") for k, v in load_file(path).items()}
    assert sum(t.numel() for t in made.values()) == sum(t.numel() for t in source.values())
    joint = torch.cat([made[f"model.layers.1.self_attn.{p}_proj.weight"] for p in "qkv"])
    assert torch.equal(joint, source["transformer.h.1.attn.c_attn.weight"])
    assert torch.equal(made["model.layers.2.mlp.gate_proj.weight"], source["transformer.h.2.mlp.w2.weight"])
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "base").dtype == dtype


def test_loads_in_transformerlens(converted, weights):
    from transformer_lens.model_bridge import TransformerBridge

    hf = AutoModelForCausalLM.from_pretrained(converted)
    bridge = TransformerBridge.boot_transformers(
        str(converted), hf_model=hf, tokenizer=AutoTokenizer.from_pretrained(converted), device="cpu", dtype=torch.float32
    )
    ids = torch.tensor([PROMPTS[2]])
    logits, stream = forward(LATE, weights, ids)
    ours, cache = bridge.run_with_cache(ids)
    assert (ours - logits).abs().max() < 1e-5
    for layer in range(3):
        assert (cache[f"blocks.{layer}.hook_resid_pre"] - stream[layer]).abs().max() < 1e-5


def test_chat_is_chatml_and_stops_at_the_end_of_turn(converted):
    lm = load_lm(converted)
    [ids], [with_system], tokenizer = lm.encode(["Is the ink dry?"]), encode_chats(lm.tokenizer, ["x"], "Be brief."), lm.tokenizer
    assert tokenizer.decode(ids) == "<|im_start|>user\nIs the ink dry?<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 267 and tokenizer.convert_tokens_to_ids("<|im_end|>") == 268
    assert lm.stop == {266, 268} and lm.pad_id == 266 and tokenizer.model_max_length == LATE["seq_length"]
    assert tokenizer.decode(with_system).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


BASE = b'{"chat_format": "raw"}'
BIAS = {"transformer.h.0.attn.c_proj.bias": torch.ones(32)}
# Fields of config.json (None: without it), tensors, and files, that are changed, and what is said of it.
REFUSED = [
    ({"visual": {"layers": 1}}, {}, {}, "visual is not understood"),
    ({"quantization_config": {"bits": 4}}, {}, {}, "quantization_config is not understood"),
    ({"no_bias": False}, {}, {}, "no_bias is False"),
    ({"rotary_pct": 0.25}, {}, {}, "rotary_pct is 0.25"),
    ({"scale_attn_weights": False}, {}, {}, "scale_attn_weights is False"),
    ({"tie_word_embeddings": True}, {}, {}, "tie_word_embeddings is True"),
    ({"use_cache_quantization": True}, {}, {}, "use_cache_quantization is True"),
    ({"activation": "gelu"}, {}, {}, "activation is 'gelu'"),
    ({"architectures": ["QWenVLModel"]}, {}, {}, "architectures is"),
    ({"num_attention_heads": 2}, {}, {}, "kv_channels times num_attention_heads"),
    ({"intermediate_size": 95}, {}, {}, "must be even"),
    ({"hidden_size": "32"}, {}, {}, "hidden_size is '32'"),
    ({"n_layer": 4}, {}, {}, "n_layer is 4 and num_hidden_layers 3"),
    ({"layer_norm_epsilon": None}, {}, {}, "layer_norm_epsilon is None"),
    ({"seq_length": None}, {}, {}, "seq_length is None"),
    ({"seq_length": ...}, {}, {}, "seq_length is missing"),
    ({"num_hidden_layers": 4}, {}, {}, r"tensor transformer\.h\.3\.ln_1\.weight .* is missing"),
    ({"num_hidden_layers": 2}, {}, {}, r"tensor transformer\.h\.2\.\S+ is not one"),
    ({"vocab_size": 500}, {}, {}, "config.json makes it"),
    ({}, BIAS, {}, r"tensor transformer.h.0.attn.c_proj.bias is not one"),
    ({}, {"lm_head.weight": ...}, {}, "tensor lm_head.weight .* is missing"),
    ({}, {"transformer.h.0.mlp.w1.weight": torch.ones(32, 48)}, {}, r"w1.weight is \[32, 48\]"),
    ({}, {"lm_head.weight": torch.ones(512, 32).bfloat16()}, {}, "weights are BF16, F32"),
    ({}, {name: tensor.to(torch.int8) for name, tensor in tensors().items()}, {}, "weights are I8"),
    ({}, {}, {"qwen.tiktoken": None}, "qwen.tiktoken: the file is missing"),
    ({}, {}, {"qwen.tiktoken": b"AA== 0\n!! 1\n"}, "line 2 is not a base64 token"),
    ({}, {}, {"qwen.tiktoken": b"AA== 0\nAQ== 1\n"}, "or a byte has none"),
    ({}, {}, {"generation_config.json": BASE}, r"chat_format is 'raw'; this is a base model: set model\.id to its chat version"),
]


def changed(old: dict, new: dict) -> dict:
    return {key: value for key, value in (old | new).items() if value is not ...}


@pytest.mark.parametrize(("fields", "weights_", "files", "says"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_not_understood_is_refused_by_name(tmp_path, weights, fields, weights_, files, says):
    source = write(tmp_path / "source", changed(LATE, fields), changed(weights, weights_))
    for name, content in files.items():
        (source / name).unlink() if content is None else (source / name).write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        convert(source, tmp_path / "base")
    assert str(source) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "base").exists()


# --- the tokenizer, on the real vocabulary -------------------------------------------------------------------------------


def tiktoken_of(vocabulary: Path) -> tiktoken.Encoding:
    """Qwen-1's own tokenizer, made as tokenization_qwen.py makes it."""
    ranks = {base64.b64decode(a): int(b) for a, b in (line.split() for line in vocabulary.read_bytes().splitlines())}
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
    return tiktoken.Encoding("Qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)


def hard_strings() -> list[str]:
    pieces = [
        *("a", "aa", "The", " hello", "'s", "'LL", "don't", "'ſ", "naïve", "e\u0301", "\u1112\u1161\u11ab", "ﬁ", "½", "Ⅷ", "٣"),
        *("1", "2024", "3.14159", "中文字", "日本語", "カタカナ", "한국어", "ไทย", "नमस्ते", "مرحبا", "שלום", "Привет"),
        *("😀", "👩\u200d👩\u200d👧", "🇩🇪", "\u200d", "\ufeff", "\u00a0", "\u3000", "\u2028", "\u0085", "\u2009"),
        *(" ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\x00", "\x7f", "=", "-----", "_", "$", "|>", "{}"),
        *("def f(x):\n    return x", "#include <a.h>", "x->y", "</s>", "<|im_", "\\u00e9"),
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_7|>"),
        *("ß", "İ", "\U00020000", "𝔘", "\ue000", "ה\u0591", "A\u030a", "\u212b", "\u0344"),
    ]
    rng = random.Random(0)
    runs = ["".join(rng.choice(pieces) * rng.choice((1, 1, 1, 2, 3, 7)) for _ in range(rng.randint(2, 12))) for _ in range(500)]
    return ["", *pieces, *(" " * n + "x" for n in range(1, 20)), *("=" * n for n in range(1, 70, 7)), *runs]


@pytest.fixture(scope="module")
def vocabulary():
    if not os.environ.get("REFUSAL_REFERENCE"):
        pytest.skip("REFUSAL_REFERENCE is not set: the real vocabulary is not at hand")
    return Path(os.environ["REFUSAL_REFERENCE"]) / "tokenizer/qwen.tiktoken"


def test_tokenizer_equals_tiktoken_on_hard_strings(vocabulary, tmp_path):
    theirs = tiktoken_of(vocabulary)
    ours = fast_tokenizer(vocabulary)
    strings = hard_strings()
    assert len(set(strings)) > 500
    expected = [theirs.encode(unicodedata.normalize("NFC", s), allowed_special="all") for s in strings]
    for text, ids, encoded in zip(strings, expected, ours.encode_batch(strings, add_special_tokens=False), strict=True):
        assert encoded.ids == ids, repr(text)
        assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)

    # AutoTokenizer, in a folder with a qwen2 config, may build a pre-tokenizer of its own from the file: ids must not change.
    source = write(tmp_path / "source", LATE | {"vocab_size": 151936}, {})
    shutil.copyfile(vocabulary, source / "qwen.tiktoken")
    for written in peek(source):
        written.save_pretrained(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(strings)["input_ids"] == expected and auto.model_max_length == 64
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_204|>"]
    assert auto.convert_tokens_to_ids(specials) == [151643, 151644, 151645, 151850]
    assert (len(auto), auto.eos_token, auto.pad_token) == (151851, "<|im_end|>", "<|endoftext|>")
