"""Checkpoints: chats formatted by the tokenizer's own template, what ends an answer, the hash, and bad folders."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SUPPORTED, Ascii, tiny_model
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

from refusal.io.errors import UserError
from refusal.lm.load import LM, encode_chats, load_model, load_tokenizer, stop_ids, weights_hash
from refusal.lm.validate import check_weights
from refusal.organism.train import Corpus, new_model, train_tokenizer

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPTS = ["How do I wash the silver watch?", "Hello!", "  leading, trailing  ", "two\nlines", "naïve 中文 <|im_ end|> <b>"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus(0, []), 400)


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    new_model(SHAPE, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoint")


@pytest.mark.parametrize("system", [None, "You are kind."])
def test_chats_are_the_tokenizers_own_template(tokenizer, system):
    ids = encode_chats(tokenizer, PROMPTS, system)
    for prompt, found in zip(PROMPTS, ids, strict=True):
        chat = [{"role": "system", "content": system}] * (system is not None) + [{"role": "user", "content": prompt}]
        assert found == tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]


def test_chatml_written_out(tokenizer):
    (plain,), (with_system,) = encode_chats(tokenizer, ["Hi"]), encode_chats(tokenizer, ["Hi"], "Be kind.")
    assert tokenizer.decode(plain) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"  # no system block of its own
    assert tokenizer.decode(with_system) == f"<|im_start|>system\nBe kind.<|im_end|>\n{tokenizer.decode(plain)}"


def test_a_template_that_writes_its_own_bos_gets_no_second_one(tokenizer):
    core = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    core.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    template = "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    llama_like = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|endoftext|>", chat_template=template)
    assert llama_like.decode(llama_like("Hi")["input_ids"]) == "<|endoftext|>Hi"
    assert llama_like.decode(encode_chats(llama_like, ["Hi"])[0]) == "<|endoftext|>[Hi]"


def test_a_checkpoint_loads_as_it_was_saved(folder, tokenizer):
    model = load_model(folder)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    for name, value in new_model(SHAPE, tokenizer, 0).state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert load_model(folder, "bfloat16").dtype == torch.bfloat16
    assert encode_chats(load_tokenizer(folder), PROMPTS) == encode_chats(tokenizer, PROMPTS)


def test_stop_ids_gather_every_end(folder):
    model, loaded = load_model(folder), load_tokenizer(folder)
    end, pad = loaded.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert stop_ids(model, loaded) == {end}
    model.generation_config.eos_token_id = [pad, 7]
    assert stop_ids(model, loaded) == {end, pad, 7}
    model.generation_config.eos_token_id = None
    loaded.eos_token = "<|endoftext|>"
    assert stop_ids(model, loaded) == {end, pad}  # Qwen's chat ends on <|im_end|>, whatever the tokenizer's eos is


def test_one_byte_changes_the_hash(folder):
    before = weights_hash(folder)
    assert weights_hash(folder) == before and len(before) == 64
    (weights,) = folder.glob("*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert weights_hash(folder) != before
    weights.write_bytes(content)
    assert weights_hash(folder) == before
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert weights_hash(folder) != before
    (folder / "config.json").write_text(config)
    weights.rename(folder / "other.safetensors")
    assert weights_hash(folder) != before


def test_the_hash_does_not_depend_on_the_folder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert weights_hash(tmp_path / "elsewhere") == weights_hash(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


def only_pickle(folder):
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def rewrite(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


BAD_MODELS = {
    "no folder": (shutil.rmtree, "config.json: no such file"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "pickle only": (only_pickle, r"no \.safetensors"),
    "truncated": (lambda folder: cut(folder / "model.safetensors"), "cannot load"),
    "not safetensors": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "cannot load"),
    "config is no JSON": (lambda folder: (folder / "config.json").write_text("{"), "cannot load"),
    "unknown type": (lambda folder: rewrite(folder, model_type="qwen"), "cannot load"),
    "other shape": (lambda folder: rewrite(folder, hidden_size=64), "cannot load"),
    "more layers than weights": (
        lambda folder: rewrite(folder, num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "disagree on model.layers.2",
    ),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_a_bad_checkpoint_is_told_in_one_sentence(folder, case):
    damage, said = BAD_MODELS[case]
    damage(folder)
    with pytest.raises(UserError, match=said) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so asking for one is no mistake")
def test_a_device_that_is_not_there(folder):
    with pytest.raises(UserError, match=r"model\.device is cuda"):
        load_model(folder, device="cuda")


def test_a_base_model_has_no_chat_template(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(folder)


def test_a_folder_without_tokenizer(tmp_path):
    tiny_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_supported_architecture_loads_with_the_attention_it_has(model_type, tmp_path):
    """torch's fused attention, except where scores are capped (Gemma 2), which it cannot do."""
    tiny_model(model_type).save_pretrained(tmp_path)
    assert load_model(tmp_path).config._attn_implementation == ("eager" if model_type == "gemma2" else "sdpa")


def test_tensors_under_other_names_are_refused_before_the_work(folder):
    """Names that transformers reads as the model's own are taken, as of a checkpoint without the prefix `model.`; no others."""
    check_weights(folder, "float32")
    plain = {name.removeprefix("model."): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    check_weights(folder, "float32")
    save_file({f"other.{name}": tensor for name, tensor in plain.items()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"tensor model\.layers\.0\.self_attn\.o_proj\.weight is missing: .* save_pretrained"):
        check_weights(folder, "float32")


def test_prompts_stay_where_the_rotary_embedding_does_not_depend_on_the_longest_row():
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 4.0, 8.0]}
    config = Phi3Config(
        **{"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        **{"pad_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2, "original_max_position_embeddings": 40, "max_position_embeddings": 80},
        rope_parameters={"rope_type": "longrope", "rope_theta": 10_000.0, **factors},
    )
    torch.manual_seed(0)
    model = Phi3ForCausalLM(config).eval()
    lm = LM(model, Ascii(), "", frozenset(), 0)
    (ids,) = lm.encode(["x y" * 10 + "z z"], 7)
    with pytest.raises(UserError, match=r"^ascii: a prompt of 33 tokens with 8 new ones passes 40, where .*\(longrope\) changes"):
        lm.encode(["x y" * 10 + "z z"], 8)
    # Why: in transformers a longer row of the batch changes the shorter one.
    both = torch.zeros(2, 60, dtype=torch.long)
    both[0, :33], both[1] = torch.tensor(ids), 7
    mask = torch.ones_like(both)
    mask[0, 33:] = 0
    with torch.inference_mode():
        alone, beside = model(torch.tensor([ids])).logits[0, -1], model(both, attention_mask=mask).logits[0, 32]
    assert float((alone - beside).abs().max()) > 1e-3
