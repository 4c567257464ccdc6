"""An edit as the folder of an ordinary checkpoint: the bits that loading it otherwise gives, the same bytes each time, nothing left."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf_files import byte_pairs, chat_model
from safetensors.torch import load_file, save_file
from tiny import tiny_direction, tiny_model

from refusal.io.errors import UserError
from refusal.lm.edited import as_checkpoint, with_weights
from refusal.lm.load import load_lm, load_model, weights_hash
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, orthogonalize

ONE = Intervention("edit", tiny_direction(rows=1).double(), 0.75)


def state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in load_model(folder).state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("include_embedding", [True, False])
@pytest.mark.parametrize(("options", "size"), [({}, "1GB"), ({"tie_word_embeddings": True}, "50KB"), ({"dtype": torch.bfloat16}, "1GB")])
def test_an_adapter_merged_is_what_it_loads_to(tmp_path, options, size, include_embedding):
    tiny_model("llama", **options).save_pretrained(tmp_path / "base", max_shard_size=size)
    orthogonalize(tmp_path / "base", [Edit(tmp_path / "lora", ONE, include_embedding, "lora")])
    hashes = set()
    for _ in range(2):
        with as_checkpoint(tmp_path / "lora", tmp_path / "base", tmp_path / "scratch") as (folder, kind):
            assert kind == "adapter" and folder.is_relative_to(tmp_path / "scratch")
            assert equal(state(folder), state(tmp_path / "lora")) and not equal(state(folder), state(tmp_path / "base"))
            hashes.add(weights_hash(folder))
            assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is ("tie_word_embeddings" in options and not include_embedding)
        assert not any((tmp_path / "scratch").iterdir())
    assert len(hashes) == 1


def test_an_adapter_of_others_is_merged_as_peft_does(tmp_path):
    """lora_alpha / r is no 1, and its base is a name that leads nowhere here."""
    from peft import PeftModel

    tiny_model("llama").save_pretrained(tmp_path / "base")
    orthogonalize(tmp_path / "base", [Edit(tmp_path / "lora", ONE, False, "lora")])
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text()) | {"lora_alpha": 3, "base_model_name_or_path": "lab/chat"}
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    merged = PeftModel.from_pretrained(load_model(tmp_path / "base"), str(tmp_path / "lora")).merge_and_unload().state_dict()
    with as_checkpoint(tmp_path / "lora", tmp_path / "base", tmp_path) as (folder, _):
        found = state(folder)
    assert all(torch.allclose(found[name], merged[name], atol=1e-5) for name in merged)
    assert (found["model.layers.1.mlp.down_proj.weight"] - state(tmp_path / "base")["model.layers.1.mlp.down_proj.weight"]).abs().max() > 0.1


def test_a_gguf_file_and_a_folder(tmp_path):
    tokenizer = byte_pairs()
    chat_model("qwen2", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    orthogonalize(tmp_path / "base", [Edit(tmp_path / "edited", ONE, True, "gguf-f16")])
    (file,) = (tmp_path / "edited").glob("*.gguf")
    with as_checkpoint(file, tmp_path / "base", tmp_path / "scratch") as (folder, kind):
        whole = state(tmp_path / "edited")
        assert kind == "gguf" and all(torch.allclose(t, whole[n], atol=2e-3) for n, t in state(folder).items())
    assert not any((tmp_path / "scratch").iterdir())
    with as_checkpoint(tmp_path / "edited", tmp_path / "base", tmp_path / "none") as found:
        assert found == (tmp_path / "edited", "checkpoint") and not (tmp_path / "none").exists()
    lm = load_lm(tmp_path / "base")
    edited = with_weights(lm, tmp_path / "edited", "float32", "cpu")
    # The same key of the store as that of the checkpoint loaded by itself; its words and where it stops are the base's.
    assert edited.identity == load_lm(tmp_path / "edited").identity != lm.identity
    assert edited.tokenizer is lm.tokenizer and edited.stop == load_lm(tmp_path / "edited").stop


def test_what_is_no_edit_of_the_base_is_one_sentence_that_names_what_was_given(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "other")
    orthogonalize(tmp_path / "base", [Edit(tmp_path / "lora", ONE, True, "lora")])
    shutil.copytree(tmp_path / "lora", tmp_path / "wrong")
    tensors = load_file(tmp_path / "lora/adapter_model.safetensors")
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in tensors.items()}, tmp_path / "wrong/adapter_model.safetensors")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF")
    for name, said in {
        "none": "none: no such folder or .gguf file",
        "other": "other: its n_layers is 2, and that of .*base is 3: give the base that the edit was made of",
        "wrong": "wrong/adapter_model.safetensors: .*layers.7.* does not fit .*base",
        "cut.gguf": "cut.gguf: no whole GGUF file",
    }.items():
        with pytest.raises(UserError, match=said) as error, as_checkpoint(tmp_path / name, tmp_path / "base", tmp_path / "scratch"):
            pass
        assert ".edited-" not in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"lora: broken in it"), as_checkpoint(tmp_path / "lora", tmp_path / "base", tmp_path) as (folder, _):
        raise UserError(f"{folder}: broken in it")
