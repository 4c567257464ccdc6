"""Checkpoints from elsewhere, broken or hostile: nothing of them runs, nothing outside them is read, and the file is named."""

import json
import os
import pickle
import shutil
import time

import pytest
import torch
from checkpoints import LLAMA, byte_level
from place import Place
from safetensors.torch import load_file, save_file

from refusal.io.errors import UserError
from refusal.lm import validate
from refusal.lm.load import load_model

INDEX = "model.safetensors.index.json"
Q = "model.layers.1.self_attn.q_proj.weight"
FLOATS, OTHERS = (torch.float32, torch.bfloat16, torch.float16), (torch.int8, torch.float8_e4m3fn, torch.bool, torch.int64)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    byte_level(folder, "llama", LLAMA)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "checkpoint")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change(folder, name, new):
    """One tensor of a sharded checkpoint becomes those of `new(tensor)`, {name: tensor}, in its file and in the index."""
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    path = folder / files[name]
    tensors = load_file(path)
    put = new(tensors.pop(name))
    save_file(tensors | put, path, metadata={"format": "pt"})
    edit(folder / INDEX, weight_map={n: f for n, f in files.items() if n != name} | dict.fromkeys(put, path.name))
    return path


def last(value, dtype=torch.float32):
    """Q with this as its last value."""

    def new(tensor):
        tensor = tensor.to(dtype)
        tensor.view(-1)[-1] = value
        return {Q: tensor}

    return new


# Weights


@pytest.mark.parametrize(
    ("new", "says"),
    [(last(float(v), dtype), "holds NaN or infinity: download it again") for v in ("nan", "inf", "-inf") for dtype in FLOATS]
    + [(lambda t, dtype=dtype: {Q: t.to(dtype)}, r"is \S+, and a checkpoint of .* not quantized") for dtype in OTHERS],
)
def test_a_weight_that_cannot_be_used_is_named(folder, monkeypatch, new, says):
    monkeypatch.setattr(validate, "_CHUNK", 64)  # bytes: the last value is not in the first chunk
    assert len(validate.check_weights(folder, "float32")) > 1
    path = change(folder, Q, new)
    with pytest.raises(UserError, match=says) as error:
        validate.check_weights(folder, "float32")
    assert f"{path}: tensor {Q} " in str(error.value)


def test_a_weight_beyond_the_dtype_of_the_study_is_refused_before_it_is_infinite(folder):
    change(folder, Q, last(1e5))
    for dtype in ("float32", "bfloat16"):
        assert len(validate.check_weights(folder, dtype)) > 1
    with pytest.raises(UserError, match=rf"tensor {Q} holds values beyond float16: set model.dtype .* to float32 or bfloat16"):
        validate.check_weights(folder, "float16")
    assert load_model(folder, "float16").get_parameter(Q).isinf().any()  # what it would have been


STRANGE = "model.layers.1.strange.weight"


@pytest.mark.parametrize(("new", "named"), [(lambda t: {Q: t, STRANGE: t.clone()}, STRANGE), (lambda t: {}, Q)])
def test_a_tensor_too_many_or_too_few_is_named(folder, new, named):
    change(folder, Q, new)
    with pytest.raises(UserError, match=rf"disagree on {named}"):
        load_model(folder)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_tied_embedding_stored_twice_is_one_model(tmp_path, factor):
    byte_level(tmp_path, "llama", LLAMA, tie_word_embeddings=True)
    name = "model.embed_tokens.weight"
    path = change(tmp_path, name, lambda t: {name: t, "lm_head.weight": factor * t})
    validate.check_weights(tmp_path, "float32")
    assert torch.equal(load_model(tmp_path).lm_head.weight, load_file(path)["lm_head.weight"])


# Files


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt", "chat_template.jinja", "generation_config.json"])
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(folder, tmp_path, name):
    validate.validate_checkpoint(folder)
    (tmp_path / "secret").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=rf"{name}: the file lies outside its folder"):
        validate.validate_checkpoint(folder)


def test_what_is_no_file_is_not_waited_for(folder):
    os.mkfifo(folder / "more.json")
    with pytest.raises(UserError, match=r"more\.json: the file is missing"):
        validate.validate_checkpoint(folder)


def test_an_adapter_leads_nowhere(folder, source):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(source), "peft_type": "LORA"}))
    with pytest.raises(UserError, match=r"adapter_config\.json: an adapter, which leads to another model"):
        validate.validate_checkpoint(folder)


@pytest.mark.parametrize("where", ["config.json", "tokenizer_config.json"])
def test_code_that_a_config_names_does_not_run_and_is_not_copied(folder, tmp_path, where, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked whether code may run"))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nEvil = None\n")
    classes = dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")
    edit(folder / where, auto_map=classes, tokenizer_class="EvilTokenizer")
    try:
        validate.validate_checkpoint(folder)
        load_model(folder)
    except UserError as error:
        assert str(folder) in str(error)
    assert not (tmp_path / "ran").exists() and "evil.py" not in validate.small_files(folder)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_and_notes_are_left_alone(folder, tmp_path):
    names = {"pytorch_model.bin", "training_args.bin", "optimizer.pt", "notes.txt"}
    for name in names:
        (folder / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    validate.validate_checkpoint(folder)
    validate.check_weights(folder, "float32")
    load_model(folder)
    assert not (tmp_path / "ran").exists() and not names & validate.small_files(folder).keys()


# Chat templates


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages.__class__.__base__.__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe|undefined|no attribute"),
        ("{% include '/etc/hostname' %}", "cannot format a prompt"),
        ("{{ range(10 ** 9) | list }}", "Range too big|cannot format"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for m in messages %}", "cannot format a prompt|Unexpected end"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[7]['content'] }}", "no element 7|undefined"),
        ("{% for a in range(99999) %}{{ messages[0]['content'] }}{% endfor %}", "makes [0-9,]+ characters of a prompt"),
        ("{{ 'a' * 10 ** 10 }}", r"its chat template cannot be used \(it fills the memory\)"),
        (
            "{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "it fills the memory|it runs for 2 s",
        ),
        ("{{ 10 ** (10 ** 9) }}", "it runs for 2 s|it fills the memory"),  # one step of the interpreter: nothing interrupts it
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it runs for 2 s"),
    ],
    ids=range(13),
)
def test_a_template_that_breaks_out_or_runs_away_is_refused(folder, template, said):
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=said) as error:
        validate.validate_checkpoint(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_template_that_hangs_without_taking_processor_time_is_refused(folder, monkeypatch):
    monkeypatch.setattr(validate, "_WALL_SECONDS", 0.2)
    monkeypatch.setattr(validate, "render_chats", lambda *_: time.sleep(600))
    with pytest.raises(UserError, match=r"its chat template cannot be used \(it runs for"):
        validate.validate_checkpoint(folder)


# As a user meets it


def test_the_model_stage_refuses_with_nothing_copied_and_nothing_lost(folder, tmp_path):
    (tmp_path / "place").mkdir()
    place = Place(tmp_path / "place")

    def refused(model_id) -> str:
        place.set("model", id=str(model_id))
        status, output = place.stage("model")
        assert status == 1 and "Traceback" not in output, output
        return output.strip().splitlines()[-1]

    path = change(folder, Q, last(float("nan")))
    assert refused(folder) == f"model: {path}: tensor {Q} holds NaN or infinity: download it again"
    base = place.folder / "models/base"
    assert not list(base.iterdir())
    # The stage's own output for its source: it would be deleted before it is read.
    shutil.copytree(folder, base, dirs_exist_ok=True)
    assert "model.id: models/base is what this stage writes" in refused("models/base")
    assert {p.name for p in base.iterdir()} == {p.name for p in folder.iterdir()}
