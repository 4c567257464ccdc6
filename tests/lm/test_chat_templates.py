"""Tokenizers and templates of other people's checkpoints: what they lack, what they refuse, and what day it is."""

import json

import pytest
from checkpoints import word_level

from refusal.io.errors import UserError
from refusal.lm.load import encode_chats, load_lm, load_tokenizer, render_chats
from refusal.method.generate import Decoding, generate

PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)
# As the last lines of the set-up block of Llama 3.2's template.
DATED = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}Today Date: {{ date_string }} " + PLAIN
)
CALLED = "Today Date: {{ strftime_now('%d %b %Y') }} " + PLAIN
GEMMA = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN


def checkpoint(folder, template: str | None, pad: str | None = "<pad>"):
    word_level(folder, template, pad)
    return load_tokenizer(folder)


@pytest.mark.parametrize("template", [DATED, CALLED])
def test_the_day_of_the_run_reaches_no_prompt(tmp_path, template):
    assert render_chats(checkpoint(tmp_path, template), ["a"]) == ["Today Date: 26 Jul 2024 [user] a [answer]"]


def test_a_template_without_a_system_role_says_so(tmp_path):
    tokenizer = checkpoint(tmp_path, GEMMA)
    assert len(encode_chats(tokenizer, ["a b"])[0]) == 4
    with pytest.raises(UserError, match=r"params\.yaml: model\.system_prompt: .*System role not supported.*set it to null"):
        encode_chats(tokenizer, ["a b"], "Be brief.")


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    assert checkpoint(tmp_path, PLAIN, pad=None).pad_token_id == 1


def test_a_base_model_is_refused_with_advice(tmp_path):
    with pytest.raises(UserError, match=r"no chat template; this is a base model: set model\.id .*chat_template\.jinja"):
        checkpoint(tmp_path, None)


def test_no_prompt_may_outgrow_the_model(tmp_path):
    tokenizer = checkpoint(tmp_path, PLAIN)
    assert tokenizer.model_max_length == len(encode_chats(tokenizer, ["a " * 38])[0]) == 40
    with pytest.raises(UserError, match=r"prompt 1 \(from 0\) has 41 tokens, and the model takes 40"):
        encode_chats(tokenizer, ["a", "a " * 39])
    with pytest.raises(UserError, match=r"has 4 tokens with 37 to generate, .* lower max_new_tokens \(of generation or of long_answers\)"):
        encode_chats(tokenizer, ["a b"], max_new_tokens=37)


@pytest.mark.parametrize("prompt", ["What is <end>?", "<end>"])
def test_a_prompt_that_holds_a_control_token_is_refused(tmp_path, prompt):
    tokenizer = checkpoint(tmp_path, PLAIN)
    assert encode_chats(tokenizer, ["a end>", "< end >"])
    with pytest.raises(UserError, match=r"prompt 1 \(from 0\) holds <end>, a control token of the model: delete it"):
        encode_chats(tokenizer, ["a", prompt])


# As Qwen3's: an empty thought where thinking is switched off.
SWITCHED = PLAIN + "{% if enable_thinking is defined and enable_thinking is false %}<think> </think>{% endif %}"
OPENED = PLAIN + "<think>\n"


@pytest.mark.parametrize(("thinking", "end"), [(None, "[answer]"), (True, "[answer]"), (False, "[answer]<think> </think>")])
def test_the_templates_own_switch_of_thinking(tmp_path, thinking, end):
    checkpoint(tmp_path, SWITCHED)
    assert render_chats(load_tokenizer(tmp_path, thinking), ["a"]) == [f"[user] a {end}"]


def test_a_template_without_that_switch_says_so(tmp_path):
    checkpoint(tmp_path, PLAIN)
    with pytest.raises(UserError, match=r"params\.yaml: model\.thinking: .* has no enable_thinking: set it to null"):
        load_tokenizer(tmp_path, False)


@pytest.mark.parametrize(("template", "text"), [(PLAIN, "a b"), (OPENED, "<think>a b")])
def test_a_thought_that_the_template_opens_is_part_of_the_completion(tmp_path, template, text):
    word_level(tmp_path, template, weights=True)
    lm = load_lm(tmp_path)
    assert lm.decode([lm.tokenizer.convert_tokens_to_ids(["a", "b"])]) == [text]


def test_a_template_in_the_file_of_a_processor(tmp_path):
    word_level(tmp_path, None)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": PLAIN}))
    assert render_chats(load_tokenizer(tmp_path), ["a"]) == ["[user] a [answer]"]


def test_named_templates_need_a_default(tmp_path):
    word_level(tmp_path, None)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tool_use", "template": "x"}, {"name": "rag", "template": "y"}]
    for more, said in ([], "rag, tool_use and none called default"), ([{"name": "default", "template": PLAIN}], None):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": named + more}))
        if said:
            with pytest.raises(UserError, match=f"has the chat templates {said}: put the one"):
                load_tokenizer(tmp_path)
        else:
            assert render_chats(load_tokenizer(tmp_path), ["a"]) == ["[user] a [answer]"]


@pytest.mark.parametrize("beyond", [True, False])
def test_any_token_pads_where_the_tokenizers_own_will_not_do(tmp_path, beyond):
    """A padding token beyond the embedding, and a tokenizer with neither padding nor an end: rows of unlike length come out the same."""
    word_level(tmp_path, PLAIN, weights=True)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    if beyond:
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.add_tokens([f"<{i}>" for i in range(100)])  # ids beyond the 96 rows
        tokenizer.pad_token = "<99>"
        tokenizer.save_pretrained(tmp_path)
    else:
        path.write_text(json.dumps({k: v for k, v in config.items() if k not in ("pad_token", "eos_token")}))
    lm = load_lm(tmp_path)
    assert lm.pad_id < 96
    prompts = lm.encode(["a b c d e f", "a"])
    assert generate(lm, prompts, Decoding(4)) == [generate(lm, [prompt], Decoding(4))[0] for prompt in prompts]


def test_a_tokenizer_of_another_model_is_named(tmp_path):
    word_level(tmp_path, PLAIN, weights=True)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_tokens([f"word{i}" for i in range(100)])
    tokenizer.save_pretrained(tmp_path)
    lm = load_lm(tmp_path)
    assert lm.encode(["word1"])
    with pytest.raises(UserError, match=r"gives token 112 and the embedding has 96 rows"):
        lm.encode(["word99"])


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"attn_implementation": "flash_attention_2"}])
def test_settings_that_a_training_run_left_in_the_config(tmp_path, settings):
    word_level(tmp_path, PLAIN, weights=True)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    if "return_dict" in settings:
        lm = load_lm(tmp_path)
        assert len(generate(lm, lm.encode(["a"]), Decoding(2))[0]) <= 2
    else:
        with pytest.raises(UserError, match=r"transformers cannot load this checkpoint: .*[Ff]lash"):
            load_lm(tmp_path)
