"""Checkpoints become GGUF files: transformers' own reader, gguf's and llama.cpp find the cast weights and the same tokens in them."""

import json
import shutil
from itertools import islice
from pathlib import Path

import gguf as ggml
import numpy as np
import pytest
import torch
from checkpoints import word_level
from gguf_files import HARD, QWEN2_SPLIT, SPECIALS, TEMPLATE, byte_pairs, chat_model, tensors_of
from place import Place
from safetensors.torch import load_file, save_file
from tiny import tiny_direction
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from refusal.io.errors import UserError
from refusal.lm import gguf, validate
from refusal.lm.gguf_writer import check_writable, write_gguf
from refusal.lm.load import load_lm, weights_hash
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, orthogonalize

TEXTS = [*HARD, "'S 'll don't", ""]
# https://huggingface.co/unsloth/Llama-3.2-1B-Instruct/blob/main/tokenizer.json
LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
LEVEL = {"add_prefix_space": False, "use_regex": False}
SPLITS = {
    "qwen2": [pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated"), pre_tokenizers.ByteLevel(**LEVEL)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(**LEVEL)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


def tokenizer_of(split: str, n_merges: int = 200, **bpe: object) -> PreTrainedTokenizerFast:
    """A tokenizer trained on text split in one of these ways; Llama 3's puts a token in front and takes words whole."""
    core = Tokenizer(models.BPE(**({"ignore_merges": True} if split == "llama-bpe" else {}) | bpe))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Sequence(SPLITS[split]), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = len(SPECIALS) + 256 + n_merges
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(
        [*TEXTS, "How do I paint the door of the old house? The theory, then the other 12 1234 things"], trainer
    )
    begin = {}
    if split == "llama-bpe":
        begin = {"bos_token": SPECIALS[0]}
        pair = f"{SPECIALS[0]} $A {SPECIALS[0]} $B"
        core.post_processor = processors.TemplateProcessing(f"{SPECIALS[0]} $A", pair, [(SPECIALS[0], 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=TEMPLATE, **begin
    )


@pytest.fixture(scope="module")
def tokenizer():
    return byte_pairs()


def save(folder: Path, model, tokenizer) -> Path:
    """The checkpoint as a user has it, in shards."""
    model.save_pretrained(folder, max_shard_size="50KB")
    tokenizer.save_pretrained(folder)
    return folder


def cast(model, dtype: torch.dtype):
    """The model with its matrices rounded."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(parameter.to(dtype).float())
    return model


def rounded(w: np.ndarray, kind: str) -> np.ndarray:
    """The bits of the nearest number, of two the even one, without torch."""
    if kind == "F16":
        return w.astype(np.float16).view(np.uint16)
    bits = w.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def contents(path: Path) -> tuple[dict[str, object], dict[str, bytes]]:
    """A file's values, and the bytes of its tensors."""
    reader = ggml.GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return values, {tensor.name: tensor.data.tobytes() for tensor in reader.tensors}


# What a file holds


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_transformers_own_reader_finds_the_cast_model_and_its_tokenizer(tmp_path, tokenizer, model_type, tied, kind):
    model = chat_model(model_type, tokenizer, tie_word_embeddings=tied, rope_theta=5000.0, rms_norm_eps=1e-5)
    write_gguf(save(tmp_path / "base", model, tokenizer), tmp_path / "m.gguf", kind)
    (tmp_path / "alone").mkdir()
    file = {"gguf_file": shutil.move(tmp_path / "m.gguf", tmp_path / "alone/m.gguf").name}
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "alone", **file, dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before, expected = model(ids).logits, cast(model, {"F16": torch.float16, "BF16": torch.bfloat16}[kind])(ids).logits
        assert torch.equal(read(ids).logits, expected) and not torch.equal(before, expected)
    for name in ("tie_word_embeddings", "max_position_embeddings", "vocab_size", "rms_norm_eps"):
        assert getattr(read.config, name) == pytest.approx(getattr(model.config, name)), name
    assert read.config.rope_parameters["rope_theta"] == model.config.rope_parameters["rope_theta"] == 5000.0
    of_file = AutoTokenizer.from_pretrained(tmp_path / "alone", **file)
    assert of_file(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    assert (of_file.chat_template, of_file.eos_token, of_file.pad_token) == (TEMPLATE, "<|im_end|>", "<|endoftext|>")
    chat = {"conversation": [{"role": "user", "content": "How do I paint a door?"}], "add_generation_prompt": True}
    texts = []
    for lm, words in ((model, tokenizer), (read, of_file)):
        prompt = words.apply_chat_template(**chat, return_tensors="pt", return_dict=True)
        texts.append(words.decode(lm.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)[0]))
    assert texts[0] == texts[1] and len(texts[0]) > 60


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_each_tensor_has_the_bytes_of_the_nearest_numbers(tmp_path, tokenizer, model_type, kind):
    model = chat_model(model_type, tokenizer)
    reported = write_gguf(save(tmp_path / "base", model, tokenizer), tmp_path / "m.gguf", kind)
    reader, expected, field = ggml.GGUFReader(tmp_path / "m.gguf"), tensors_of(model), contents(tmp_path / "m.gguf")[0]
    assert {tensor.name for tensor in reader.tensors} == expected.keys() and len(reported) == len(expected)
    for tensor in reader.tensors:
        w = expected[tensor.name]
        assert tuple(reversed(tensor.shape.tolist())) == w.shape
        if w.ndim == 1:
            assert tensor.tensor_type.name == "F32" and np.array_equal(tensor.data, w), tensor.name
        else:
            assert tensor.tensor_type.name == kind
            assert np.array_equal(tensor.data.view(np.uint16).reshape(w.shape), rounded(w, kind)), tensor.name
    assert field["general.file_type"] == {"F16": 1, "BF16": 32}[kind] and field["general.architecture"] == model_type
    assert (field["general.type"], field["general.name"]) == ("model", "m")
    assert field["tokenizer.ggml.pre"] == "qwen2" and field["tokenizer.ggml.add_bos_token"] is False
    for name, w in model.state_dict().items():
        w = w.double().numpy()
        near = torch.from_numpy(w).to({"F16": torch.float16, "BF16": torch.bfloat16}[kind]).double().numpy() if w.ndim > 1 else w
        assert reported[name] == pytest.approx(np.linalg.norm(near - w) / np.linalg.norm(w), rel=1e-5), name
    assert (max(reported.values()) > 1e-4) and reported["model.norm.weight"] == 0


@pytest.mark.parametrize("split", SPLITS)
def test_text_is_split_and_ended_as_before_however_a_tokenizer_does_it(tmp_path, split):
    tokenizer = tokenizer_of(split)
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    model = chat_model("llama", tokenizer, vocab_size=len(tokenizer) + 5)  # rows without a token
    model.generation_config = GenerationConfig(eos_token_id=[2, 7, 9], pad_token_id=0)
    base = save(tmp_path / "base", model, tokenizer)
    write_gguf(base, tmp_path / "m.gguf", "F16")
    (tmp_path / "again").mkdir()
    gguf.convert(tmp_path / "m.gguf", tmp_path / "again", "float32", validate.validate_checkpoint)
    before, after = load_lm(base), load_lm(tmp_path / "again")
    texts = [*TEXTS, "e\u0301", "<think>a <think>", "<|im_start|>user\nHi.<|im_end|>\n"]
    for special in (False, True):
        ids = [lm.tokenizer(texts, add_special_tokens=special)["input_ids"] for lm in (before, after)]
        assert ids[0] == ids[1] and max(map(len, ids[0])) > 8
    assert before.stop == after.stop == {2, 7, 9} and before.tokenizer.bos_token == after.tokenizer.bos_token
    assert [before.tokenizer.decode(row) for row in ids[0]] == [after.tokenizer.decode(row) for row in ids[1]]
    fields, tensors = contents(tmp_path / "m.gguf")
    assert fields["tokenizer.ggml.pre"] == split
    types, n = fields["tokenizer.ggml.token_type"], len(tokenizer)
    assert types[:3] == [3, 3, 3] and set(types[3 : n - 1]) == {1} and types[n - 1 :] == [4, 5, 5, 5, 5, 5]
    write_gguf(tmp_path / "again", tmp_path / "more/m.gguf", "F16")
    assert contents(tmp_path / "more/m.gguf") == (fields, tensors)


# What is refused


def refused(base: Path, says: str, kind: str = "BF16", before: bool = True) -> None:
    """In one sentence, with nothing written, and `before` the work."""
    with pytest.raises(UserError, match=says) as error:
        write_gguf(base, base.parent / "out/m.gguf", kind)
    assert "\n" not in str(error.value)
    assert not [*(base.parent / "out").glob("*")] if (base.parent / "out").exists() else True
    if before:
        with pytest.raises(UserError, match=says):
            check_writable(base)
    else:
        check_writable(base)


OTHERS = {
    "scaled": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "its rotary embedding is of type linear, .*: set orthogonalize.format to safetensors in params.yaml",
    ),
    "biases": ("llama", {"attention_bias": True}, "it has biases that others of its architecture lack"),
    "window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "its attention has a sliding window"),
    "heads": ("llama", {"head_dim": 16}, "its heads are not as wide together as hidden_size"),
    "activation": ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
    "rows": ("qwen2", {"vocab_size": 280}, "its tokenizer has more tokens than the embedding has rows"),
    "architecture": ("qwen3", {}, "GGUF is written of llama and qwen2 alone, and this is qwen3: set orthogonalize.format"),
    "experts": ("mixtral", {}, "GGUF is written of llama and qwen2 alone, and this is mixtral"),
}


@pytest.mark.parametrize(("model_type", "how", "says"), OTHERS.values(), ids=OTHERS)
def test_models_that_a_file_could_not_say_are_refused_before_the_work(tmp_path, tokenizer, model_type, how, says):
    refused(save(tmp_path / "base", chat_model(model_type, tokenizer, **how), tokenizer), says)


def other_tokenizers():
    yield "words", None, "its tokenizer is none of byte pairs"
    odd = byte_pairs()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}{1,4}|\p{L}+|[^\p{L}]"), "isolated"), pre_tokenizers.ByteLevel(**LEVEL)]
    )
    yield "split", odd, "whose way to split text is that of Qwen2, Llama 3, SmolLM or GPT-2"
    lower = byte_pairs()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    yield "normalizer", lower, "its tokenizer is none of byte pairs"
    for name, token in (("blanks", AddedToken("<mask>", lstrip=True)), ("spelling", AddedToken("<｜end｜>", special=True))):
        added = byte_pairs()
        added.add_tokens([token])
        yield name, added, f"its tokenizer's added token '{token.content}' takes blanks"
    core = json.loads(tokenizer_of("qwen2").backend_tokenizer.to_str())
    core["model"] |= {"ignore_merges": True, "merges": core["model"]["merges"][:-5]}
    whole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(core)), eos_token="<|im_end|>", chat_template="x"
    )
    yield "whole words", whole, "its tokenizer has words that its merges don't make"
    around = byte_pairs()
    around.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    yield "around", around, "its tokenizer puts more around a text than where it begins and ends"


@pytest.mark.parametrize(("tokenizer", "says"), [c[1:] for c in other_tokenizers()], ids=[c[0] for c in other_tokenizers()])
def test_tokenizers_that_a_file_could_not_say_are_refused_before_the_work(tmp_path, tokenizer, says):
    if tokenizer is None:
        word_level(tmp_path / "base", TEMPLATE, weights=True)
    else:
        save(tmp_path / "base", chat_model("llama", tokenizer), tokenizer)
    refused(tmp_path / "base", says)


def test_tensors_that_others_do_not_have_are_refused_before_the_work(tmp_path, tokenizer):
    chat_model("qwen2", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    path = tmp_path / "base/model.safetensors"
    tensors = load_file(path)
    for change, says in (
        ({"model.layers.0.mlp.down_proj.bias": torch.zeros(32)}, "mlp.down_proj.bias is none of its architecture"),
        ({"model.norm.weight": torch.zeros(31)}, r"model.norm.weight is F32 \[31\]"),
        ({"model.norm.weight": torch.zeros(32, dtype=torch.int32)}, r"model.norm.weight is I32 \[32\]"),
    ):
        save_file(tensors | change, path, {"format": "pt"})
        refused(tmp_path / "base", says)
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}, path, {"format": "pt"})
    assert write_gguf(tmp_path / "base", tmp_path / "m.gguf", "F16").keys() == tensors.keys()
    save_file({name: t for name, t in tensors.items() if "layers.2.mlp.up_proj" not in name}, path, {"format": "pt"})
    refused(tmp_path / "base", r"tensor model\.layers\.2\.mlp\.up_proj\.weight is missing")


def test_values_beyond_float16_and_nan_are_refused_and_nothing_is_left(tmp_path, tokenizer):
    model = chat_model("llama", tokenizer)
    with torch.no_grad():
        model.lm_head.weight[5, 3] = 70_000.0
    base = save(tmp_path / "base", model, tokenizer)
    says = r"^m\.gguf: tensor lm_head\.weight holds values beyond float16: set orthogonalize.format to gguf-bf16 in params.yaml$"
    refused(base, says, "F16", before=False)
    write_gguf(base, tmp_path / "other.gguf", "BF16")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    refused(save(base, model, tokenizer), r"tensor model\.norm\.weight holds NaN or infinity", before=False)


def test_a_file_that_is_there_is_left_alone(tmp_path, tokenizer):
    base = save(tmp_path / "base", chat_model("llama", tokenizer), tokenizer)
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(UserError, match=r"m\.gguf: the file exists: remove it"):
        write_gguf(base, tmp_path / "m.gguf", "F16")
    assert (tmp_path / "m.gguf").read_text() == "mine"


# Edited checkpoints


def edit(target: Path, of_edit: str, alpha: float = 1.0, include_embedding: bool = True) -> Edit:
    return Edit(target, Intervention(target.name, tiny_direction()[None], alpha, "weights"), include_embedding, of_edit)


@pytest.mark.parametrize("include_embedding", [False, True])
def test_an_edited_checkpoint_is_the_same_with_its_file_in_the_folder(tmp_path, tokenizer, include_embedding):
    base = save(tmp_path / "base", chat_model("qwen2", tokenizer, tie_word_embeddings=True), tokenizer)
    edits = [edit(tmp_path / name / "a", name, include_embedding=include_embedding) for name in ("safetensors", "gguf-bf16")]
    plain, report = orthogonalize(base, edits)
    files = {path.name: path.read_bytes() for path in (tmp_path / "safetensors/a").iterdir()}
    found = {path.name: path.read_bytes() for path in (tmp_path / "gguf-bf16/a").iterdir()}
    assert found.pop("a.gguf") and found == files and not list(tmp_path.rglob("*.partial"))
    assert plain.casts == {} and report.casts.keys() == {
        name for name, _ in AutoModelForCausalLM.from_pretrained(edits[0].target).named_parameters()
    }
    assert 1e-4 < max(report.casts.values()) < 2**-8 and plain.residuals == report.residuals
    assert weights_hash(edits[0].target) == weights_hash(edits[1].target)
    lm = load_lm(edits[1].target)
    read = AutoModelForCausalLM.from_pretrained(edits[1].target, gguf_file="a.gguf", dtype=torch.float32)
    assert read.config.tie_word_embeddings is not include_embedding
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        assert torch.equal(read(ids).logits, cast(lm.model, torch.bfloat16)(ids).logits)
    left = tiny_direction() @ read.model.layers[1].mlp.down_proj.weight
    assert left.norm() < 2**-8 * read.model.layers[1].mlp.down_proj.weight.norm()


def test_what_cannot_be_written_is_said_before_any_checkpoint_is(tmp_path, tokenizer):
    base = save(tmp_path / "base", chat_model("qwen3", tokenizer), tokenizer)
    with pytest.raises(UserError, match="GGUF is written of llama and qwen2 alone"):
        orthogonalize(base, [edit(tmp_path / "a", "safetensors"), edit(tmp_path / "b", "gguf-f16")])
    model = chat_model("llama", tokenizer)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(UserError, match=r"^b\.gguf: tensor model\.layers\.2\.mlp\.up_proj\.weight holds values beyond float16"):
        orthogonalize(save(tmp_path / "wide", model, tokenizer), [edit(tmp_path / "b", "gguf-f16")])
    assert {path.name for path in tmp_path.iterdir()} == {"base", "wide"}


def test_the_stage_writes_files_that_the_model_stage_takes(tmp_path, tokenizer):
    (tmp_path / "place").mkdir()
    place = Place(tmp_path / "place")
    save(place.folder / "models/base", chat_model("qwen2", tokenizer), tokenizer)
    unit = torch.stack([tiny_direction(seed=seed) for seed in range(3)]).double()
    parts = {"unit": unit, "difference": unit, "defined": torch.ones(3, dtype=torch.bool), "safe_mean": unit}
    save_file(
        {f"sequential-matched.{name}": t.contiguous().clone() for name, t in parts.items()},
        place.folder / "models/directions.safetensors",
    )
    cell = {"name": "sequential_layer_1_alpha_100", "layer": 1, "alpha": 1.0}
    place.write("metrics/select.json", json.dumps({"rank_1": cell}))
    place.set("orthogonalize", format="gguf-bf16")
    place.set("sweep", method="sequential", pairing="matched")
    status, said = place.stage("orthogonalize")
    assert status == 0, said
    metrics = json.loads((place.folder / "metrics/orthogonalize.json").read_text())
    for rank, name in (("rank_1", cell["name"]), ("random", "random_layer_1_alpha_100")):
        assert metrics[rank]["gguf"] == f"{name}.gguf" and 1e-4 < metrics[rank]["max_cast"] < 2**-8
        assert (place.folder / "models/ablated" / name / f"{name}.gguf").is_file()
    file = place.folder / f"models/ablated/{cell['name']}/{cell['name']}.gguf"
    shutil.copyfile(file, tmp_path / "edited.gguf")
    edited = load_lm(file.parent).model
    place.set("model", id=str(tmp_path / "edited.gguf"))
    place.set("generation", max_new_tokens=4)
    status, said = place.stage("model")
    assert status == 0, said
    assert json.loads((place.folder / "metrics/model.json").read_text())["gguf"] == ["BF16", "F32"]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        again = load_lm(place.folder / "models/base").model(ids).logits
        assert torch.equal(again, cast(edited, torch.bfloat16)(ids).logits)
    place.set("orthogonalize", format="gguf-q4")
    status, said = place.stage("orthogonalize")
    assert status == 1 and "orthogonalize.format" in said and "Traceback" not in said


# llama.cpp itself


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize(
    ("model_type", "split"), [("qwen2", "qwen2"), ("llama", "llama-bpe"), ("llama", "smollm"), ("llama", "gpt-2")]
)
def test_llama_cpp_has_the_same_tokens_logits_and_greedy_text(tmp_path, model_type, split, kind):
    llama_cpp = pytest.importorskip(
        "llama_cpp", reason="llama-cpp-python is not installed: it is compiled for minutes, so not pinned"
    )
    tokenizer = tokenizer_of(split)
    model = chat_model(model_type, tokenizer)
    lm = load_lm(save(tmp_path / "base", model, tokenizer))
    write_gguf(tmp_path / "base", tmp_path / "m.gguf", kind)
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    for text in TEXTS[:-1]:
        ids = theirs.tokenize(text.encode(), add_bos=True, special=True)  # as the file says, whatever the keyword is called
        assert ids == lm.tokenizer(text)["input_ids"], text
    assert theirs.metadata["tokenizer.chat_template"] == TEMPLATE
    cast(model, {"F16": torch.float16, "BF16": torch.bfloat16}[kind])
    n_same = 0
    for prompt in ("How do I paint a door?", "the theory", "Name 12 things.", "the other house", "What then?", "Why?"):
        [ids] = lm.encode([prompt])
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        with torch.no_grad():
            greedy = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": [*lm.stop], "pad_token_id": 0}
            made = model.generate(torch.tensor([ids]), **greedy)
            ours = model(made).logits[0].numpy()
        theirs.reset()
        theirs.eval(made[0].tolist())
        # llama.cpp rounds what it multiplies by a matrix to the matrix's type. Two tokens within that are a tie.
        limit = {"F16": 4e-3, "BF16": 3e-2}[kind] * np.abs(ours).max()
        assert np.abs(np.array(theirs.eval_logits) - ours).max() < limit
        second, first = np.sort(ours[len(ids) - 1 : -1])[:, -2:].T
        decided = [*(first - second > 2 * limit), False].index(False)
        new = list(islice(theirs.generate(ids, temp=0.0), decided))
        assert new == made[0, len(ids) :].tolist()[:decided]
        assert tokenizer.decode(new) == theirs.detokenize(new, special=True).decode(errors="replace")
        n_same += decided
    assert n_same >= {"F16": 40, "BF16": 1}[kind]  # a random model is seldom decided by more than bfloat16 rounds
