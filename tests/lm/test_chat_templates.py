"""Tokenizers and templates of other people's checkpoints: what they lack, what they refuse, and what day it is."""

import pytest
from checkpoints import word_level

from refusal.io.errors import UserError
from refusal.lm.load import encode_chats, load_tokenizer, render_chats

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
    with pytest.raises(UserError, match=r"has 4 tokens with 37 to generate, .* lower generation\.max_new_tokens"):
        encode_chats(tokenizer, ["a b"], max_new_tokens=37)
