"""Edited checkpoints: equal to run-time ablation where they should be, byte for byte where nothing is edited."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PRE_NORM, tiny_direction, tiny_model
from transformers import AutoModelForCausalLM

from refusal.io.errors import UserError
from refusal.lm.architecture import SUPPORTED, architecture_of
from refusal.lm.checkpoint import Reader, read_shard
from refusal.method.interventions import ablation, intervene
from refusal.method.orthogonalize import Edit, orthogonalize

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
ALPHAS = (0.5, 1.0, 1.5)
V = tiny_direction()
BIASES = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


def save(folder: Path, model_type="qwen2", **options) -> Path:
    shard_size = options.pop("max_shard_size", "1GB")
    tiny_model(model_type, **options).save_pretrained(folder, max_shard_size=shard_size)
    return folder


def logits(folder: Path, **options) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()(IDS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def failure_of_identity(tmp_path, sites, model_type, options) -> dict[float, float]:
    """max |logits of the edited checkpoint - logits under run-time ablation|, by alpha."""
    base = save(tmp_path / "base", model_type, **options)
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    orthogonalize(base, [Edit(tmp_path / f"{alpha}", V, alpha) for alpha in ALPHAS])
    gaps = {}
    for alpha in ALPHAS:
        with intervene(model, ablation(V, alpha, sites)):
            runtime = model(IDS).logits
        assert (runtime - model(IDS).logits).abs().max() > 0.5  # not vacuous
        gaps[alpha] = (logits(tmp_path / f"{alpha}") - runtime).abs().max().item()
    return gaps


CASES = [(t, {}) for t in PRE_NORM] + [
    ("llama", BIASES),
    ("llama", {"tie_word_embeddings": True}),
    ("gemma", {"tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("model_type", "options"), CASES)
def test_checkpoint_equals_writes_ablation_at_every_alpha(tmp_path, model_type, options):
    gaps = failure_of_identity(tmp_path, "writes", model_type, options)
    assert max(gaps.values()) < 1e-4


@pytest.mark.parametrize(("model_type", "options"), CASES)
def test_checkpoint_equals_paper_ablation_at_one_only(tmp_path, model_type, options):
    gaps = failure_of_identity(tmp_path, "paper", model_type, options)
    assert gaps[1.0] < 1e-4
    assert gaps[0.5] > 0.05 and gaps[1.5] > 0.05


@pytest.mark.parametrize("model_type", sorted(set(SUPPORTED) - set(PRE_NORM)))
def test_a_norm_after_the_writer_breaks_the_identity(tmp_path, model_type):
    """Gemma 2 and 3: the post-norm rescales the projected output and scales its elements back towards v. The weights
    are orthogonal all the same, and the flag says what to expect. Measured on these models: 0.3 to 1.1 in logits
    whose standard deviation is 3."""
    gaps = failure_of_identity(tmp_path, "writes", model_type, {})
    assert architecture_of(json.loads((tmp_path / "base/config.json").read_text())).norm_after_writer
    assert min(gaps.values()) > 0.1
    (report,) = orthogonalize(tmp_path / "base", [Edit(tmp_path / "once_more", V, 1.0)])
    assert report.max_residual < 1e-6


def test_without_the_embedding_it_is_writes_less_the_embedding(tmp_path):
    base = save(tmp_path / "base")
    (report,) = orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0, include_embedding=False)])
    before, after = tensors(base), tensors(tmp_path / "cell")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.residuals) and report.n_edited == 6
    assert report.n_edited + report.n_copied == len(before) == len(after)
    assert report.bytes_written == sum(p.stat().st_size for p in (tmp_path / "cell").iterdir())


# The cast's rounding leaves about 0.2 eps / sqrt(d_model) of |W'| on v (2.8e-4 for bfloat16 here), and a few times that in
# a bias, which has one column alone.
@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-15), (torch.float32, 1e-7), (torch.float16, 1e-4), (torch.bfloat16, 8e-4)],
)
@pytest.mark.parametrize(("model_type", "options"), [("llama", BIASES), ("mixtral", {}), ("gemma2", {})])
def test_residual_is_at_rounding_after_the_cast(tmp_path, model_type, options, dtype, limit):
    base = save(tmp_path / "base", model_type, dtype=dtype, **options)
    edits = [Edit(tmp_path / f"{alpha}", V, alpha) for alpha in ALPHAS]
    reports = orthogonalize(base, edits)
    assert reports[1].max_residual < limit and reports[0].max_residual > 0.01
    assert all(report.max_deviation < 1.5 * limit for report in reports)
    architecture = architecture_of(json.loads((base / "config.json").read_text()))
    v, before = V.double() / V.double().norm(), tensors(base)
    for edit, report in zip(edits, reports, strict=True):
        for name, after in tensors(edit.target).items():  # the same measures, and the edit itself, in float64
            axis = architecture.writer_axis(name, include_embedding=True)
            if axis is None:
                continue
            w, w2 = before[name].double().movedim(axis, -1), after.double().movedim(axis, -1)
            assert after.dtype == dtype == before[name].dtype
            assert abs((w2 @ v).norm() / w2.norm() - report.residuals[name]) < 1e-7
            deviation = ((w2 @ v) - (1 - edit.alpha) * (w @ v)).norm() / w.norm()
            # In float32 and float64 it is made of the sums' own rounding.
            assert report.deviations[name] == pytest.approx(float(deviation), rel=0.01, abs=1e-7)
            exact = (w - edit.alpha * (w @ v)[..., None] * v).to(dtype).double()
            torch.testing.assert_close(w2, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if limit > 1e-15 else 1e-14)


def test_biases_of_writers_are_projected(tmp_path):
    base = save(tmp_path / "base", "llama", **BIASES)
    (report,) = orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    biases = [name for name in report.residuals if name.endswith(".bias")]
    assert sorted(biases) == sorted(f"model.layers.{i}.{m}.bias" for i in range(3) for m in ("mlp.down_proj", "self_attn.o_proj"))
    after = tensors(tmp_path / "cell")
    assert max(abs(after[name] @ V) for name in biases) < 1e-6
    assert min(abs(tensors(base)[name] @ V) for name in biases) > 1e-3


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_edited_split_or_fused(tmp_path, model_type, fused):
    tiny_model(model_type).save_pretrained(tmp_path / "base", save_original_format=not fused)
    (report,) = orthogonalize(tmp_path / "base", [Edit(tmp_path / "cell", V, 1.0)])
    layers = 3 if model_type == "mixtral" else 2  # layer 1 of the Qwen3-MoE is dense
    assert report.n_edited == 1 + 3 + layers * (1 if fused else 4) + (3 - layers)
    assert report.max_residual < 1e-7
    model = tiny_model(model_type)
    with intervene(model, ablation(V, 1.0, "writes")):
        assert (logits(tmp_path / "cell") - model(IDS).logits).abs().max() < 1e-4


@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_tied_embeddings_are_untied_where_edited(tmp_path, shard_size):
    base = save(tmp_path / "base", tie_word_embeddings=True, max_shard_size=shard_size)
    edits = [Edit(tmp_path / "with", V, 1.0), Edit(tmp_path / "without", V, 1.0, include_embedding=False)]
    orthogonalize(base, edits)
    before, untied, tied = (tensors(f) for f in (base, tmp_path / "with", tmp_path / "without"))
    embedding = "model.embed_tokens.weight"
    assert torch.equal(untied["lm_head.weight"], before[embedding])
    assert (untied[embedding] @ V).abs().max() < 1e-6
    assert "lm_head.weight" not in tied and torch.equal(tied[embedding], before[embedding])
    assert (tmp_path / "without/config.json").read_bytes() == (base / "config.json").read_bytes()
    config, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "with", base))
    assert config == original | {"tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    if shard_size != "1GB":
        index, old = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path / "with", base))
        assert index["weight_map"] == old["weight_map"] | {"lm_head.weight": old["weight_map"][embedding]}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in untied.values())
        assert index["metadata"]["total_parameters"] == sum(t.numel() for t in untied.values())


def test_untied_embedding_from_the_middle_of_a_file(tmp_path):
    base = save(tmp_path / "base", tie_word_embeddings=True)
    save_file(tensors(base) | {"a_first_one": torch.ones(5)}, base / "model.safetensors")
    assert read_shard(base, "model.safetensors").entries[0].name == "a_first_one"
    orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    assert torch.equal(tensors(tmp_path / "cell")["lm_head.weight"], tensors(base)["model.embed_tokens.weight"])


def test_tied_by_config_but_not_in_the_file(tmp_path):
    base = save(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    before = logits(base)
    orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    assert torch.equal(tensors(tmp_path / "cell")["lm_head.weight"], tensors(base)["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with intervene(model, ablation(V, 1.0, "writes")):
        assert (logits(tmp_path / "cell") - model(IDS).logits).abs().max() < 1e-4
    assert (logits(tmp_path / "cell") - before).abs().max() > 0.5


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"max_shard_size": "15KB"}])
def test_alpha_zero_gives_the_same_bytes(tmp_path, options):
    base = save(tmp_path / "base", **options)
    zero, one = orthogonalize(base, [Edit(tmp_path / "zero", V, 0.0), Edit(tmp_path / "one", V, 1.0)])
    for path in base.iterdir():
        assert (tmp_path / "zero" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "zero").iterdir())) == len(list(base.iterdir()))
    assert (zero.n_edited, zero.max_residual, zero.max_deviation) == (0, 0.0, 0.0) and one.n_edited == 7


def test_shards_index_order_metadata_and_other_files_are_kept(tmp_path):
    base = save(tmp_path / "base", max_shard_size="15KB", dtype=torch.bfloat16)
    assert len(list(base.glob("*.safetensors"))) > 2
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model", "qwen.tiktoken"):
        (base / name).write_bytes(os.urandom(50))
    for name in (
        "pytorch_model.bin",
        "model.pt",
        "training_args.pkl",
        "consolidated.safetensors",
        "pytorch_model.bin.index.json",
    ):
        (base / name).write_bytes(b"not to be copied")
    (base / "sub.json").mkdir()
    (report,) = orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    kept = {p.name for p in base.iterdir() if p.is_file() and b"not to be" not in p.read_bytes()}
    assert {p.name for p in (tmp_path / "cell").iterdir()} == kept
    for name in kept:
        if name.endswith(".safetensors"):
            ours, theirs = read_shard(tmp_path / "cell", name), read_shard(base, name)
            assert ours.header == theirs.header
            with safe_open(tmp_path / "cell" / name, "pt") as file:
                assert file.metadata() == {"format": "pt"}
        else:
            assert (tmp_path / "cell" / name).read_bytes() == (base / name).read_bytes()
    before, after = tensors(base), tensors(tmp_path / "cell")
    assert all(torch.equal(before[n], after[n]) == (n not in report.residuals) for n in before)
    assert logits(tmp_path / "cell").dtype == torch.bfloat16


def test_bytes_depend_on_the_cell_alone(tmp_path):
    base = save(tmp_path / "base", dtype=torch.bfloat16)
    orthogonalize(base, [Edit(tmp_path / "a", V, 1.0)])
    other = tiny_direction(seed=5)
    orthogonalize(base, [Edit(tmp_path / "b", other, 0.5), Edit(tmp_path / "c", V, 1.0), Edit(tmp_path / "d", other, 2.0)])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_tensors_larger_than_a_chunk_and_of_no_size(tmp_path, monkeypatch):
    base = save(tmp_path / "base", "mixtral")
    orthogonalize(base, [Edit(tmp_path / "whole", V, 0.7)])
    monkeypatch.setattr("refusal.method.orthogonalize._CHUNK", 1000)
    (report,) = orthogonalize(base, [Edit(tmp_path / "pieces", V, 0.7)])
    assert report.max_deviation < 1e-7
    for name, tensor in tensors(tmp_path / "whole").items():
        torch.testing.assert_close(tensors(tmp_path / "pieces")[name], tensor, rtol=1e-5, atol=1e-6)
    content = tensors(base) | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(7), "flags": torch.tensor([True])}
    save_file(content, base / "model.safetensors")
    orthogonalize(base, [Edit(tmp_path / "odd", V, 1.0)])
    assert {"empty", "scalar", "flags"} < set(tensors(tmp_path / "odd"))


def test_an_existing_target_is_replaced_only_by_a_whole_one(tmp_path):
    base = save(tmp_path / "base")
    orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    (tmp_path / "cell/left.txt").write_text("over")
    good = (tmp_path / "cell/model.safetensors").read_bytes()
    content = tensors(base)
    content["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(content, tmp_path / "nan.safetensors")
    shutil.copytree(base, tmp_path / "bad")
    (tmp_path / "nan.safetensors").rename(tmp_path / "bad/model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors: model\.layers\.2\.mlp\.down_proj\.weight .*NaN"):
        orthogonalize(tmp_path / "bad", [Edit(tmp_path / "cell", V, 1.0)])
    assert (tmp_path / "cell/model.safetensors").read_bytes() == good and (tmp_path / "cell/left.txt").exists()
    orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    assert not (tmp_path / "cell/left.txt").exists()
    assert (tmp_path / "cell/model.safetensors").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "base", "cell"]


def test_overflow_of_the_cast_is_refused(tmp_path):
    base = save(tmp_path / "base", dtype=torch.float16)
    content = tensors(base)
    content["model.layers.0.self_attn.o_proj.weight"][:] = 6e4 * V.sign()[:, None].half()
    save_file(content, base / "model.safetensors")
    with pytest.raises(UserError, match=r"o_proj\.weight"):
        orthogonalize(base, [Edit(tmp_path / "cell", V, -1.0)])


def test_hub_snapshots_links_are_read_and_others_are_not(tmp_path):
    base = save(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(base.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    orthogonalize(snapshot, [Edit(tmp_path / "cell", V, 1.0)])
    orthogonalize(base, [Edit(tmp_path / "same", V, 1.0)])
    for path in (tmp_path / "cell").iterdir():
        assert not path.is_symlink() and path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    (base / "tokenizer.json").symlink_to(secret)
    with pytest.raises(UserError, match=r"tokenizer\.json.*outside"):
        orthogonalize(base, [Edit(tmp_path / "leak", V, 1.0)])
    assert not (tmp_path / "leak").exists()


def rewrite_header(path: Path, change) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    fields = json.loads(raw[8 : 8 + length])
    change(fields)
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def offsets(name, begin, end):
    def change(fields):
        old = fields[name]["data_offsets"]
        fields[name]["data_offsets"] = [old[0] + begin, old[1] + end]

    return change


O_PROJ = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: p.unlink(), r"no model\.safetensors"),
        (lambda p: p.write_bytes(b""), r"model\.safetensors: .*cut short"),
        (lambda p: p.write_bytes(p.read_bytes()[:500]), r"model\.safetensors: .*cut short"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), r"model\.safetensors: tensor \S+ lies beyond"),
        (lambda p: p.write_bytes(p.read_bytes() + b"more"), r"4 bytes belong to no tensor"),
        (lambda p: p.write_bytes((10**15).to_bytes(8, "little") + p.read_bytes()[8:]), r"model\.safetensors"),
        (lambda p: p.write_bytes((9).to_bytes(8, "little") + b"not json!" + p.read_bytes()), r"not valid JSON"),
        (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), r"JSON object"),
        (lambda p: rewrite_header(p, offsets(O_PROJ, -8, -8)), r"overlaps"),
        (lambda p: rewrite_header(p, offsets(O_PROJ, 0, -8)), O_PROJ),
        (lambda p: rewrite_header(p, offsets(O_PROJ, 10**9, 10**9)), r"hole"),
        (lambda p: rewrite_header(p, lambda f: f[O_PROJ].update(data_offsets=[-4, 4])), O_PROJ),
        (lambda p: rewrite_header(p, lambda f: f[O_PROJ].update(data_offsets="no")), O_PROJ),
        (lambda p: rewrite_header(p, lambda f: f[O_PROJ].update(shape=[32, 33])), O_PROJ),
        (lambda p: rewrite_header(p, lambda f: f[O_PROJ].update(shape=[16, 64])), rf"{O_PROJ} is F32 \[16, 64\]"),
        (lambda p: rewrite_header(p, lambda f: f[O_PROJ].update(dtype="I32")), rf"{O_PROJ} is I32"),
        (lambda p: rewrite_header(p, lambda f: f.update(other=f.pop(O_PROJ))), rf"{O_PROJ} is missing"),
        (lambda p: p.with_name("config.json").unlink(), r"config\.json.*missing"),
        (lambda p: p.with_name("config.json").write_text("{"), r"config\.json.*JSON"),
        (lambda p: p.with_name("config.json").write_text('{"model_type": "bert"}'), r"'bert' is not supported"),
    ],
)
def test_broken_checkpoints_are_refused_with_nothing_written(tmp_path, break_it, words):
    base = save(tmp_path / "base")
    break_it(base / "model.safetensors")
    with pytest.raises(UserError, match=words):
        orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def remap(old, new):
    def change(base):
        path = base / "model.safetensors.index.json"
        fields = json.loads(path.read_text())
        fields["weight_map"] = {n: new(base, f) if old in n else f for n, f in fields["weight_map"].items()}
        path.write_text(json.dumps(fields))

    return change


def put_twice(base: Path) -> None:
    path = max(base.glob("*.safetensors"))
    save_file(load_file(path) | {O_PROJ: torch.zeros(32, 32)}, path)


def link_out(base: Path) -> None:
    shard = next(base.glob("*.safetensors"))
    shutil.move(shard, base.parent / "elsewhere")
    shard.symlink_to(base.parent / "elsewhere")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda base: next(base.glob("*.safetensors")).unlink(), "missing"),
        (remap(O_PROJ, lambda base, f: f"../{base.name}/{f}"), "outside"),
        (remap(O_PROJ, lambda base, f: str(base / f)), "outside"),
        (remap(O_PROJ, lambda base, f: "model-00009-of-00009.safetensors"), "missing"),
        (
            remap("embed_tokens", lambda base, f: max(base.glob("*.safetensors")).name),
            "in the index, is missing",
        ),
        (put_twice, "not where"),
        (remap(O_PROJ, lambda base, f: 3), "weight_map"),
        (link_out, "outside"),
        (lambda base: (base / "model.safetensors.index.json").write_text("{}"), "weight_map"),
    ],
)
def test_broken_indices_are_refused(tmp_path, break_it, words):
    base = save(tmp_path / "base", max_shard_size="15KB")
    break_it(base)
    with pytest.raises(UserError, match=words):
        orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0)])
    assert not (tmp_path / "cell").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda at: Edit(at / "cell", tiny_direction(16), 1.0), r"shape \[16\]"),
        (lambda at: Edit(at / "cell", V[None], 1.0), r"shape \[1, 32\]"),
        (lambda at: Edit(at / "cell", 2 * V, 1.0), "norm 2"),
        (lambda at: Edit(at / "cell", V * float("nan"), 1.0), "norm nan"),
        (lambda at: Edit(at / "cell", V, float("inf")), "alpha"),
        (lambda at: Edit(at / "base", V, 1.0), "overlaps"),
        (lambda at: Edit(at / "base/cell", V, 1.0), "overlaps"),
        (lambda at: Edit(at, V, 1.0), "overlaps"),
        (lambda at: Edit(at / "file", V, 1.0), "not a folder"),
        (lambda at: Edit(at / "home", V, 1.0), "not a checkpoint"),
    ],
)
def test_bad_edits_are_refused(tmp_path, edit, words):
    base = save(tmp_path / "base")
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("")
    with pytest.raises(UserError, match=words):
        orthogonalize(base, [edit(tmp_path)])
    with pytest.raises(UserError, match="same target"):
        orthogonalize(base, [Edit(tmp_path / "cell", V, 1.0), Edit(tmp_path / "x/../cell", V, 0.5)])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "file", "home"]


@pytest.mark.parametrize("tied", [False, True])
def test_several_cells_take_one_read(tmp_path, monkeypatch, tied):
    """Bytes taken from the shards: each tensor once, however many cells; a tied embedding once more, as unembedding."""
    base = save(tmp_path / "base", tie_word_embeddings=tied, max_shard_size="15KB")
    read, take = [], Reader.take
    monkeypatch.setattr(Reader, "take", lambda self, n: read.append(n) or take(self, n))
    sizes = [tensor.nbytes for tensor in tensors(base).values()]
    for n in (1, 5):
        read.clear()
        orthogonalize(base, [Edit(tmp_path / f"{n}_{i}", tiny_direction(seed=i), 1.0) for i in range(n)])
        assert sum(read) == sum(sizes) + (96 * 32 * 4 if tied else 0)
