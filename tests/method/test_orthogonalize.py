"""Edited checkpoints: equal to run-time ablation where they should be, byte for byte where nothing is edited."""

import json
import os
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import PRE_NORM, SUPPORTED, tiny_config, tiny_direction, tiny_model
from transformers import AutoModelForCausalLM

from perf.harness import Peak
from refusal.io.errors import UserError
from refusal.lm.architecture import architecture_of
from refusal.lm.checkpoint import read_shard
from refusal.lm.stream import norm_after_writer
from refusal.method.interventions import BASELINE, Intervention
from refusal.method.orthogonalize import Edit, orthogonalize

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
V = tiny_direction()
BIASES = {"attention_bias": True, "mlp_bias": True}
BASES = {k: torch.linalg.qr(tiny_direction(rows=k).double().T)[0].T for k in (1, 2, 4)}
EDITS = [*product(BASES, (0.5, 1.0, 1.5))]  # rank and alpha
EMBEDDING, O_PROJ = "model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight"


@pytest.fixture(autouse=True, scope="module")
def no_grad():
    with torch.no_grad():
        yield


def save(folder: Path, model_type="qwen2", max_shard_size="1GB", **options) -> Path:
    tiny_model(model_type, **options).save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


def edit(target: Path, basis=V, alpha=1.0, **options) -> Edit:
    return Edit(target, Intervention("edit", basis, alpha), **options)


def logits(folder: Path) -> torch.Tensor:
    return AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("model*.safetensors") for name, t in load_file(path).items()}


def gaps(base: Path, sites: str) -> list[float]:
    """max |logits of the edited checkpoint - logits under run-time ablation at `sites`|, for each of EDITS."""
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    edits = [edit(base.with_name(f"{k}_{alpha}"), BASES[k], alpha) for k, alpha in EDITS]
    if not edits[0].target.exists():
        orthogonalize(base, edits)
    apart = []
    for one in edits:
        with one.intervention.at(sites).on(model):
            runtime = model(IDS).logits
        assert (runtime - model(IDS).logits).abs().max() > 0.5  # not vacuous
        apart.append(float((logits(one.target) - runtime).abs().max()))
    return apart


@pytest.mark.parametrize(
    ("model_type", "options"),
    [(t, {}) for t in PRE_NORM]
    + [("llama", BIASES), ("llama", {"tie_word_embeddings": True}), ("gemma", {"tie_word_embeddings": False})],
)
def test_equals_writes_ablation_always_and_paper_ablation_at_alpha_one(tmp_path, model_type, options):
    base = save(tmp_path / "base", model_type, **options)
    assert max(gaps(base, "writes")) < 1e-4
    for (_, alpha), gap in zip(EDITS, gaps(base, "paper"), strict=True):
        assert gap < 1e-4 if alpha == 1 else gap > 0.05


OF_LAYER = tiny_direction(rows=3, seed=4)[:, None]
OF_LAYER[0] = 0  # whose writers stay as they are


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("model_type", PRE_NORM)
def test_a_basis_a_layer_is_what_writes_takes_out_there(tmp_path, model_type, alpha):
    base = save(tmp_path / "base", model_type)
    one = edit(tmp_path / "edited", OF_LAYER, alpha)
    (report,) = orthogonalize(base, [one])
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    with one.intervention.at("writes").on(model):
        runtime = model(IDS).logits
    assert (runtime - model(IDS).logits).abs().max() > 0.1
    assert float((logits(one.target) - runtime).abs().max()) < 1e-4
    before, after = tensors(base), tensors(one.target)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.residuals) and {name.split(".")[2] for name in changed} == {"1", "2"}
    assert set(before) == set(after)  # a tied embedding stays tied


@pytest.mark.parametrize("model_type", sorted(set(SUPPORTED) - set(PRE_NORM)))
def test_a_norm_after_the_writer_breaks_the_identity(tmp_path, model_type):
    """Gemma 2 and 3: the post-norm rescales the projected output and scales its elements back towards v. The weights
    are orthogonal all the same, and the flag says what to expect. Measured on these models: 0.3 to 1.1 in logits
    whose standard deviation is 3."""
    base = save(tmp_path / "base", model_type)
    assert min(gaps(base, "writes")) > 0.1
    assert norm_after_writer(tiny_config(model_type)) is True
    (report,) = orthogonalize(base, [edit(tmp_path / "once_more")])
    assert report.max_residual < 1e-6


# The cast's rounding leaves about 0.2 eps / sqrt(d_model) of |W'| on v (2.8e-4 for bfloat16 here), and a few times that in
# a bias, which has one column alone.
@pytest.mark.parametrize(
    ("dtype", "limit"), [(torch.float64, 1e-15), (torch.float32, 1e-7), (torch.float16, 1e-4), (torch.bfloat16, 8e-4)]
)
@pytest.mark.parametrize(
    ("model_type", "options", "n_edited"), [("llama", BIASES, 13), ("mixtral", {}, 16), ("gemma2", {}, 7)], ids=str
)
def test_each_tensor_is_edited_and_measured_to_rounding(tmp_path, model_type, options, n_edited, dtype, limit):
    base = save(tmp_path / "base", model_type, dtype=dtype, **options)
    edits = [edit(tmp_path / f"{k}_{alpha}", BASES[k], alpha) for k, alpha in EDITS]
    architecture, before = architecture_of(json.loads((base / "config.json").read_text())), tensors(base)
    for (k, alpha), one, report in zip(EDITS, edits, orthogonalize(base, edits), strict=True):
        assert (report.n_edited, report.n_copied) == (n_edited, len(before) - n_edited)
        assert report.max_deviation < 1.5 * limit * k**0.5 and (report.max_residual < limit * k**0.5) == (alpha == 1)
        b = BASES[k].T
        for name, after in tensors(one.target).items():  # the same measures, and the edit itself, in float64
            axis = architecture.writer_axis(name, include_embedding=True)
            source = before[EMBEDDING if name not in before else name]
            assert after.dtype == dtype == source.dtype and (axis is None) == (name not in report.residuals)
            if axis is None:
                assert torch.equal(after, source)
                continue
            w, w2 = source.double().movedim(axis, -1), after.double().movedim(axis, -1)
            assert abs((w2 @ b).norm() / w2.norm() - report.residuals[name]) < 1e-7
            deviation = ((w2 @ b) - (1 - alpha) * (w @ b)).norm() / w.norm()
            # In float32 and float64 it is made of the sums' own rounding.
            assert report.deviations[name] == pytest.approx(float(deviation), rel=0.01, abs=1e-7)
            exact = (w - alpha * w @ b @ b.T).to(dtype).double()
            torch.testing.assert_close(w2, exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6 if limit > 1e-15 else 1e-14)


def naive_norms(w: torch.Tensor, b: torch.Tensor, alpha: float, norms: str) -> torch.Tensor:
    """W [d_model, n] without its share of the columns of b, each row or column as long as before, in float64."""
    if norms == "columns":
        return torch.stack([(p := c - alpha * b @ (b.T @ c)) / p.norm() * c.norm() for c in w.T], 1)
    at_one = torch.stack([row / row.norm() for row in w])
    left = at_one - alpha * b @ (b.T @ at_one)
    return torch.stack([row / row.norm() * old.norm() for row, old in zip(left, w, strict=True)])


@pytest.mark.parametrize(("model_type", "options"), [("llama", BIASES), ("mixtral", {})], ids=str)
@pytest.mark.parametrize("norms", ["rows", "columns"])
def test_norms_that_are_kept(tmp_path, monkeypatch, norms, model_type, options):
    monkeypatch.setattr("refusal.method.orthogonalize._BLOCK", 96)  # a few columns at once
    base = tmp_path / "base"
    tiny_model(model_type, **options).save_pretrained(base, save_original_format=False)  # experts of a layer in one tensor
    edits = [edit(tmp_path / f"{k}_{alpha}", BASES[k], alpha, norms=norms) for k, alpha in EDITS]
    architecture, before = architecture_of(json.loads((base / "config.json").read_text())), tensors(base)
    for (k, alpha), one, report in zip(EDITS, edits, orthogonalize(base, edits), strict=True):
        b = BASES[k].T
        for name, after in tensors(one.target).items():
            source = before[EMBEDDING if name not in before else name]
            if (axis := architecture.writer_axis(name, include_embedding=True)) is None:
                assert torch.equal(after, source)
                continue
            w, w2 = source.double(), after.double()
            if axis == -1:
                w, w2 = (t.reshape(-1, len(b)).T for t in (w, w2))
            of_bias = source.ndim == 1 and norms == "rows"
            for old, new in zip(w.reshape(-1, *w.shape[-2:]), w2.reshape(-1, *w.shape[-2:]), strict=True):
                expected = old - alpha * b @ (b.T @ old) if of_bias else naive_norms(old, b, alpha, norms)
                torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6)
                dim = 0 if norms == "columns" else 1
                assert of_bias or torch.allclose(new.norm(dim=dim), old.norm(dim=dim), rtol=1e-6)
        # Nothing is written into the basis at alpha 1 where columns keep their lengths, and something where rows do.
        assert (report.max_residual < 1e-6) == (norms == "columns" and alpha == 1)


@pytest.mark.parametrize("norms", ["rows", "columns"])
def test_norms_that_are_kept_break_the_identity(tmp_path, norms):
    base = save(tmp_path / "base")
    orthogonalize(base, [edit(tmp_path / "plain"), edit(tmp_path / "kept", norms=norms)])
    with Intervention("v", V, 1.0, "writes").on(AutoModelForCausalLM.from_pretrained(base).eval()) as model:
        ablated = model(IDS).logits
    assert (logits(tmp_path / "plain") - ablated).abs().max() < 1e-5 < 1e-3 < (logits(tmp_path / "kept") - ablated).abs().max()
    with pytest.raises(UserError, match=f"edit: {norms} that keep their norms are no edit of low rank"):
        orthogonalize(base, [edit(tmp_path / "edit", norms=norms, format="lora")])


def test_a_row_and_a_column_of_zeros_stay_zero(tmp_path):
    base = save(tmp_path / "base")
    weights = load_file(base / "model.safetensors")
    weights[O_PROJ][3], weights[O_PROJ][:, 5] = 0, 0
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    for norms in ("rows", "columns"):
        orthogonalize(base, [edit(tmp_path / norms, norms=norms)])
    rows, columns = (tensors(tmp_path / norms)[O_PROJ] for norms in ("rows", "columns"))
    assert not rows[3].any() and not rows[:, 5].any() and not columns[:, 5].any() and columns[3].any()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_experts_are_edited_split_or_fused(tmp_path, model_type, fused):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "base", save_original_format=not fused)
    (report,) = orthogonalize(tmp_path / "base", [edit(tmp_path / "edited")])
    layers = 3 if model_type == "mixtral" else 2  # layer 1 of the Qwen3-MoE is dense
    assert report.n_edited == 1 + 3 + layers * (1 if fused else 4) + (3 - layers)
    assert report.max_residual < 1e-7
    with Intervention("v", V, 1.0, "writes").on(model):
        assert (logits(tmp_path / "edited") - model(IDS).logits).abs().max() < 1e-4


def test_without_the_embedding_it_is_writes_less_the_embedding(tmp_path):
    base = save(tmp_path / "base")
    (report,) = orthogonalize(base, [edit(tmp_path / "edited", include_embedding=False)])
    before, after = tensors(base), tensors(tmp_path / "edited")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(report.residuals) and report.n_edited == 6 and EMBEDDING not in changed
    assert report.n_edited + report.n_copied == len(before) == len(after)


@pytest.mark.parametrize("shard_size", ["1GB", "15KB"])
def test_tied_embeddings_are_untied_where_edited(tmp_path, shard_size):
    base = save(tmp_path / "base", tie_word_embeddings=True, max_shard_size=shard_size)
    if shard_size == "1GB":  # the embedding in the middle of a file
        save_file(tensors(base) | {"a_first_one": torch.ones(5)}, base / "model.safetensors")
        assert read_shard(base, "model.safetensors").entries[0].name == "a_first_one"
    orthogonalize(base, [edit(tmp_path / "with"), edit(tmp_path / "without", include_embedding=False)])
    before, untied, tied = (tensors(f) for f in (base, tmp_path / "with", tmp_path / "without"))
    assert torch.equal(untied["lm_head.weight"], before[EMBEDDING])
    assert (untied[EMBEDDING] @ V).abs().max() < 1e-6
    assert "lm_head.weight" not in tied and torch.equal(tied[EMBEDDING], before[EMBEDDING])
    assert (tmp_path / "without/config.json").read_bytes() == (base / "config.json").read_bytes()
    config, original = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "with", base))
    assert config == original | {"tie_word_embeddings": False}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "with")
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    if shard_size != "1GB":
        index, old = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (tmp_path / "with", base))
        assert index["weight_map"] == old["weight_map"] | {"lm_head.weight": old["weight_map"][EMBEDDING]}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in untied.values())
        assert index["metadata"]["total_parameters"] == sum(t.numel() for t in untied.values())


def test_tied_by_config_but_not_in_the_file(tmp_path):
    base = save(tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": True}
    (base / "config.json").write_text(json.dumps(config))
    before, model = logits(base), AutoModelForCausalLM.from_pretrained(base).eval()
    orthogonalize(base, [edit(tmp_path / "edited")])
    assert torch.equal(tensors(tmp_path / "edited")["lm_head.weight"], tensors(base)["lm_head.weight"])
    with Intervention("v", V, 1.0, "writes").on(model):
        assert (logits(tmp_path / "edited") - model(IDS).logits).abs().max() < 1e-4
    assert (logits(tmp_path / "edited") - before).abs().max() > 0.5


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"max_shard_size": "15KB"}])
def test_alpha_zero_gives_the_same_bytes(tmp_path, options):
    base = save(tmp_path / "base", **options)
    zero, one = orthogonalize(base, [edit(tmp_path / "zero", alpha=0.0), edit(tmp_path / "one")])
    for path in base.iterdir():
        assert (tmp_path / "zero" / path.name).read_bytes() == path.read_bytes()
    assert len(list((tmp_path / "zero").iterdir())) == len(list(base.iterdir()))
    assert (zero.n_edited, zero.max_residual, zero.max_deviation) == (0, 0.0, 0.0) and one.n_edited == 7


def test_shards_index_order_metadata_and_other_files_are_kept(tmp_path):
    base = save(tmp_path / "base", max_shard_size="15KB", dtype=torch.bfloat16)
    for path in base.glob("*.safetensors"):
        save_file(load_file(path), path, metadata={"format": "pt", "licence": "none"})
    assert len(list(base.glob("*.safetensors"))) > 2
    kept = ("tokenizer.json", "chat_template.jinja", "merges.txt", "tokenizer.model", "qwen.tiktoken")
    for name in kept:
        (base / name).write_bytes(os.urandom(50))
    expected = {path.name for path in base.iterdir()}
    for name in ("pytorch_model.bin", "model.pt", "args.pkl", "consolidated.safetensors", "pytorch_model.bin.index.json"):
        (base / name).write_bytes(b"not to be copied")
    (base / "sub.json").mkdir()
    (report,) = orthogonalize(base, [edit(tmp_path / "edited")])
    assert {path.name for path in (tmp_path / "edited").iterdir()} == expected
    for name in expected:
        if name.endswith(".safetensors"):
            ours, theirs = read_shard(tmp_path / "edited", name), read_shard(base, name)
            assert ours.entries == theirs.entries
            with safe_open(tmp_path / "edited" / name, "pt") as file:
                assert file.metadata() == {"format": "pt", "licence": "none"}
        else:
            assert (tmp_path / "edited" / name).read_bytes() == (base / name).read_bytes()
    before, after = tensors(base), tensors(tmp_path / "edited")
    assert all(torch.equal(before[n], after[n]) == (n not in report.residuals) for n in before)
    assert logits(tmp_path / "edited").dtype == torch.bfloat16


def test_blocks_and_other_edits_change_nothing_and_odd_tensors_are_kept(tmp_path, monkeypatch):
    base = save(tmp_path / "base", "mixtral")
    orthogonalize(base, [edit(tmp_path / "alone", BASES[2], 0.7)])
    orthogonalize(base, [edit(tmp_path / "other", BASES[1]), edit(tmp_path / "beside", BASES[2], 0.7)])
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "beside" / name).read_bytes()
    monkeypatch.setattr("refusal.method.orthogonalize._BLOCK", 200)
    content = {"empty": torch.zeros(0, 3), "scalar": torch.tensor(7), "flags": torch.tensor([True]), **tensors(base)}
    save_file(content, base / "model.safetensors")
    (report,) = orthogonalize(base, [edit(tmp_path / "blocks", BASES[2], 0.7)])
    assert report.max_deviation < 1e-7
    whole, blocks = tensors(tmp_path / "alone"), tensors(tmp_path / "blocks")
    for name, tensor in content.items():
        torch.testing.assert_close(blocks[name], whole.get(name, tensor), rtol=1e-5, atol=1e-6)


def test_memory_holds_at_most_two_of_the_largest_tensors(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "vocab_size": 30_000, "head_dim": 256}
    base = save(tmp_path / "base", "llama", dtype=torch.bfloat16, tie_word_embeddings=True, **sizes)
    largest = 2 * sizes["hidden_size"] * sizes["vocab_size"] / 1e6
    assert sum(path.stat().st_size for path in base.iterdir()) / 1e6 > 1.5 * largest
    v = tiny_direction(sizes["hidden_size"])
    orthogonalize(base, [edit(tmp_path / "warm", v)])
    with Peak() as peak:
        orthogonalize(base, [edit(tmp_path / name, v) for name in ("a", "b", "c")])
    assert peak.mb < 2 * largest, peak.mb


def test_an_existing_target_is_replaced_only_by_a_whole_one(tmp_path):
    base = save(tmp_path / "base")
    orthogonalize(base, [edit(tmp_path / "edited")])
    (tmp_path / "edited/left.txt").write_text("over")
    good = (tmp_path / "edited/model.safetensors").read_bytes()
    shutil.copytree(base, tmp_path / "bad")
    content = tensors(base)
    content["model.layers.2.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(content, tmp_path / "bad/model.safetensors")
    nan = r"model\.safetensors: model\.layers\.2\.mlp\.down_proj\.weight .*NaN"
    refused(tmp_path / "bad", nan, edit(tmp_path / "new"), edit(tmp_path / "edited"))
    assert (tmp_path / "edited/model.safetensors").read_bytes() == good and (tmp_path / "edited/left.txt").exists()
    orthogonalize(base, [edit(tmp_path / "edited")])
    assert not (tmp_path / "edited/left.txt").exists()
    assert (tmp_path / "edited/model.safetensors").read_bytes() == good
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad", "base", "edited"]


def test_overflow_of_the_cast_is_refused(tmp_path):
    base = save(tmp_path / "base", dtype=torch.float16)
    content = tensors(base)
    content["model.layers.0.self_attn.o_proj.weight"][:] = 6e4 * V.sign()[:, None].half()
    save_file(content, base / "model.safetensors")
    refused(base, r"o_proj\.weight .* the edit overflows F16", edit(tmp_path / "edited", alpha=-1.0))


def test_hub_snapshots_links_are_read_and_others_are_not(tmp_path):
    base = save(tmp_path / "plain")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/0123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for i, path in enumerate(base.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    orthogonalize(snapshot, [edit(tmp_path / "edited")])
    orthogonalize(base, [edit(tmp_path / "same")])
    for path in (tmp_path / "edited").iterdir():
        assert not path.is_symlink() and path.read_bytes() == (tmp_path / "same" / path.name).read_bytes()
    (tmp_path / "secret.json").write_text("{}")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    refused(base, r"tokenizer\.json.*outside", edit(tmp_path / "leak"))


def refused(base: Path, said: str, *edits: Edit) -> None:
    """The edits are refused in one sentence, with nothing written."""
    before = sorted(path.name for path in base.parent.iterdir())
    with pytest.raises(UserError, match=said) as error:
        orthogonalize(base, edits or [edit(base.with_name("edited"))])
    assert "\n" not in str(error.value) and sorted(path.name for path in base.parent.iterdir()) == before


def header(**fields):
    """Damage: the header's `fields` of O_PROJ are these, or what they make of the old ones."""

    def rewrite(path: Path) -> None:
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8:end])
        for name, value in fields.items():
            entries[O_PROJ][name] = value(entries[O_PROJ][name]) if callable(value) else value
        text = json.dumps(entries).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])

    return rewrite


NOT_WHOLE = r"model\.safetensors: no whole safetensors file \(.*"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: p.unlink(), r"no model\.safetensors"),
        (lambda p: p.write_bytes(b""), NOT_WHOLE + "header too small"),
        (lambda p: p.write_bytes(p.read_bytes()[:500]), NOT_WHOLE + "header length"),
        (lambda p: p.write_bytes(p.read_bytes()[:-10]), NOT_WHOLE + "not fully covered"),
        (lambda p: p.write_bytes(p.read_bytes() + b"more"), NOT_WHOLE + "not fully covered"),
        (lambda p: p.write_bytes((10**15).to_bytes(8, "little") + p.read_bytes()[8:]), NOT_WHOLE + "too large"),
        (lambda p: p.write_bytes((9).to_bytes(8, "little") + b"not json!" + p.read_bytes()), NOT_WHOLE + "JSON"),
        (lambda p: p.write_bytes((2).to_bytes(8, "little") + b"[]"), NOT_WHOLE + "JSON"),
        (header(data_offsets=lambda at: [at[0] - 8, at[1] - 8]), NOT_WHOLE + "offset"),  # overlaps the tensor before it
        (header(data_offsets=lambda at: [at[0], at[1] - 8]), NOT_WHOLE + "offset"),  # too short for its shape
        (header(data_offsets=lambda at: [at[0] + 10**9, at[1] + 10**9]), NOT_WHOLE + "offset"),  # behind the end
        (header(data_offsets=[-4, 4]), NOT_WHOLE + "-4"),
        (header(data_offsets="no"), NOT_WHOLE + "no"),
        (header(shape=[32, 33]), NOT_WHOLE + "shape"),
        (header(shape=[16, 64]), rf"{O_PROJ} is F32 \[16, 64\]"),
        (header(dtype="I32"), rf"{O_PROJ} is I32"),
        (lambda p: save_file({n: t for n, t in load_file(p).items() if n != O_PROJ}, p), rf"{O_PROJ} is missing"),
        (lambda p: p.with_name("config.json").unlink(), r"config\.json.*missing"),
        (lambda p: p.with_name("config.json").write_text("{"), r"config\.json.*JSON"),
        (lambda p: p.with_name("config.json").write_text('{"model_type": "bert"}'), r"bert: no list of 12 decoder blocks"),
    ],
)
def test_broken_checkpoints_are_refused(tmp_path, damage, said):
    base = save(tmp_path / "base")
    damage(base / "model.safetensors")
    refused(base, said)


def remap(part, file):
    """Damage: the index has the tensors whose name holds `part` in another file."""

    def change(base: Path) -> None:
        path = base / "model.safetensors.index.json"
        fields = json.loads(path.read_text())
        fields["weight_map"] = {n: file(base, f) if part in n else f for n, f in fields["weight_map"].items()}
        path.write_text(json.dumps(fields))

    return change


def store_twice(base: Path) -> None:
    path = max(base.glob("*.safetensors"))
    save_file(load_file(path) | {O_PROJ: torch.zeros(32, 32)}, path)


def link_out(base: Path) -> None:
    shard = next(base.glob("*.safetensors"))
    shutil.move(shard, base.parent / "elsewhere")
    shard.symlink_to(base.parent / "elsewhere")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda base: next(base.glob("*.safetensors")).unlink(), "missing"),
        (remap(O_PROJ, lambda base, f: f"../{base.name}/{f}"), "outside"),
        (remap(O_PROJ, lambda base, f: str(base / f)), "outside"),
        (remap(O_PROJ, lambda base, f: "model-00009-of-00009.safetensors"), "missing"),
        (remap("embed_tokens", lambda base, f: max(base.glob("*.safetensors")).name), f"{EMBEDDING}, in the index, is missing"),
        (remap(O_PROJ, lambda base, f: 3), "weight_map"),
        (lambda base: (base / "model.safetensors.index.json").write_text("{}"), "weight_map"),
        (store_twice, f"{O_PROJ} is not where"),
        (link_out, "outside"),
    ],
)
def test_broken_indices_are_refused(tmp_path, damage, said):
    base = save(tmp_path / "base", max_shard_size="15KB")
    damage(base)
    refused(base, said)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (lambda at: edit(at / "edited", tiny_direction(16)), r"the basis is \[1, 16\]"),
        (lambda at: edit(at / "edited", torch.stack([V[None]] * 2)), "the basis is for 2 layers, and the model has 3"),
        (lambda at: Edit(at / "edited", BASELINE), "the baseline has none"),
        (lambda at: edit(at / "edited", alpha=float("inf")), "alpha"),
        (lambda at: edit(at / "base"), "overlaps"),
        (lambda at: edit(at / "base/edited"), "overlaps"),
        (lambda at: edit(at), "overlaps"),
        (lambda at: edit(at / "file"), "not a folder"),
        (lambda at: edit(at / "home"), "not a checkpoint"),
    ],
)
def test_bad_edits_are_refused(tmp_path, bad, said):
    base = save(tmp_path / "base")
    (tmp_path / "file").write_text("")
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").write_text("")
    refused(base, said, edit(tmp_path / "good"), bad(tmp_path))
    refused(base, "same target", edit(tmp_path / "edited"), edit(tmp_path / "x/../edited", alpha=0.5))
