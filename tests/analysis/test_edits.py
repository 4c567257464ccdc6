"""Edits of known truth come back from the weights: direction, rank, alpha, norms; and what is no edit is said as that."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gguf_files import byte_pairs, chat_model
from safetensors.torch import load_file, save_file
from tiny import SUPPORTED, tiny_direction, tiny_model
from torch import Tensor

from refusal.analysis import edits
from refusal.analysis.rounding import Grid, grid_of
from refusal.io.errors import UserError
from refusal.lm.architecture import architecture_of
from refusal.lm.weights import open_weights
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, Report, orthogonalize

BASES = {k: torch.linalg.qr(tiny_direction(rows=k).double().T)[0].T for k in (1, 2, 3)}
EDITS = [(1, 1.0), (1, 0.5), (2, 1.5), (3, 0.3)]  # rank and alpha
LOW = [torch.float32, torch.bfloat16, torch.float16]
Change = Callable[[str, Tensor, int | None], Tensor]


def save(folder: Path, model_type: str = "llama", **options) -> Path:
    tiny_model(model_type, **{"intermediate_size": 64} | options).save_pretrained(folder)
    return folder


def changed(base: Path, change: Change) -> Path:
    """A copy of the checkpoint with change(name, W, its axis that writes) for each tensor."""
    target = Path(shutil.copytree(base, base.with_name("changed")))
    architecture, tensors = architecture_of(json.loads((base / "config.json").read_text())), load_file(base / "model.safetensors")
    after = {name: change(name, w, architecture.writer_axis(name, True)).contiguous() for name, w in tensors.items()}
    save_file(after, target / "model.safetensors", {"format": "pt"})
    return target


def found(base: Path, edited: Path) -> edits.Difference:
    with open_weights(base) as ours, open_weights(edited, base) as theirs:
        return edits.compare(ours, theirs)


def writers(change: Callable[[Tensor], Tensor]) -> Change:
    """A change of each matrix [d_model, n] that writes, computed in float64 and cast back."""

    def of(_: str, w: Tensor, axis: int | None) -> Tensor:
        if axis is None:
            return w
        return change(w.double().movedim(axis, 0)).movedim(0, axis).to(w.dtype)

    return of


def without(v: Tensor, alpha: float = 1.0) -> Callable[[Tensor], Tensor]:
    return lambda w: w - alpha * v.T @ (v @ w)


def noise(size: float, seed: int = 0) -> Change:
    generator = torch.Generator().manual_seed(seed)
    return lambda _, w, __: (w.double() + size * w.double().std() * torch.randn(w.shape, generator=generator)).to(w.dtype)


def check(difference: edits.Difference, truth: Tensor, alpha: float, names: set[str], within: float = 1e-3) -> None:
    """The bounds that docs/edits.md states."""
    assert difference.kind == "edit" and difference.rank == len(truth) and difference.by_layer is None, difference.how
    assert difference.basis is not None
    cosines = torch.linalg.svdvals(difference.basis @ truth.T)  # of the angles between two subspaces
    assert len(cosines) == len(truth) and float(cosines.min()) >= 0.9999
    edited = difference.of("edited")
    assert {one.name for one in edited} == names
    assert all(abs(one.alpha - alpha) < within for one in edited)


# Recovered


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_direction_rank_and_alpha_of_every_architecture_and_dtype(tmp_path, model_type, dtype):
    base = save(tmp_path / "base", model_type, dtype=dtype)
    targets = [Edit(tmp_path / f"{k}_{alpha}", Intervention("edit", BASES[k], alpha)) for k, alpha in EDITS]
    for (k, alpha), one, report in zip(EDITS, targets, orthogonalize(base, targets), strict=True):
        difference = found(base, one.target)
        check(difference, BASES[k], alpha, set(report.residuals))
        assert difference.embedding == "edited" and difference.alone == {"base": [], "edited": []}
        assert all(t.rank == k and t.norms is None for t in difference.of("edited"))


@pytest.mark.parametrize(
    ("options", "include_embedding"),
    [({"tie_word_embeddings": True}, True), ({}, False), ({"attention_bias": True, "mlp_bias": True}, True)],
)
def test_tied_embeddings_biases_and_an_embedding_that_is_left(tmp_path, options, include_embedding):
    base, one = save(tmp_path / "base", **options), Intervention("edit", BASES[1], 1.0)
    (report,) = orthogonalize(base, [Edit(tmp_path / "edited", one, include_embedding)])
    difference = found(base, tmp_path / "edited")
    check(difference, BASES[1], 1.0, set(report.residuals))
    assert difference.embedding == ("edited" if include_embedding else "same")
    assert difference.untied == ("tie_word_embeddings" in options)
    assert found(base, base).kind == "identical" and found(base, base).rank is None


@pytest.mark.parametrize("rank", [1, 3])
def test_an_adapter(tmp_path, rank):
    base, one = save(tmp_path / "base"), Intervention("edit", BASES[rank], 0.7)
    (report,) = orthogonalize(base, [Edit(tmp_path / "lora", one, format="lora")])
    check(found(base, tmp_path / "lora"), BASES[rank], 0.7, set(report.residuals))
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    # PEFT scales B A by lora_alpha / r, or by lora_alpha / sqrt(r).
    for scale, fields in ((0.5, {"lora_alpha": rank / 2}), (rank**0.5, {"use_rslora": True})):
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config | fields))
        difference = found(base, tmp_path / "lora")
        assert all(abs(t.alpha - 0.7 * scale) < 1e-3 for t in difference.of("edited")) and difference.rank == rank


@pytest.mark.parametrize("form", ["gguf-f16", "gguf-bf16"])
def test_a_gguf_file(tmp_path, form):
    tokenizer = byte_pairs()
    chat_model("qwen2", tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    one = Edit(tmp_path / "edited", Intervention("edit", BASES[2], 1.0), format=form)
    reports: list[Report] = orthogonalize(tmp_path / "base", [one])
    difference = found(tmp_path / "base", tmp_path / "edited/edited.gguf")
    check(difference, BASES[2], 1.0, set(reports[0].residuals))
    assert {t.grid for t in difference.of("rounded")} == {{"gguf-f16": "float16", "gguf-bf16": "bfloat16"}[form]}
    assert found(tmp_path / "edited", tmp_path / "edited/edited.gguf").kind == "requantized"


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_direction_of_its_own_in_each_layer(tmp_path, dtype):
    base = save(tmp_path / "base", dtype=dtype)
    truth = [tiny_direction(seed=layer).double()[None] for layer in range(3)]

    def change(name: str, w: Tensor, axis: int | None) -> Tensor:
        if axis is None or "layers" not in name:
            return w
        return writers(without(truth[int(name.split(".")[2])], 0.8))(name, w, axis)

    difference = found(base, changed(base, change))
    assert difference.kind == "edit" and difference.basis is None and difference.rank == 1 and difference.embedding == "same"
    assert all(abs(float(difference.by_layer[layer] @ truth[layer][0])) > 0.9999 for layer in range(3))
    assert len(difference.of("edited")) == 6 and all(abs(t.alpha - 0.8) < 1e-3 for t in difference.of("edited"))
    cosines = difference.cosines(torch.cat([truth[0], truth[2], torch.full((1, 32), torch.nan)]))
    assert cosines[0] == pytest.approx(1, abs=1e-4) and cosines[1] < 0.9 and cosines[2] is None


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("norms", ["whole", "columns", "rows", "rows of length 1"])
@pytest.mark.parametrize(("k", "alpha"), [(1, 1.0), (2, 0.7)])
def test_norms_that_were_set_back_are_undone_first(tmp_path, norms, k, alpha, dtype):
    """Of the matrix, of what each input writes, of each component of the stream; or the rows are cut to length 1 before."""
    base = save(tmp_path / "base", dtype=dtype)
    axes = {"whole": (0, 1), "columns": 0}.get(norms, 1)

    def change(w: Tensor) -> Tensor:
        unit = w.norm(dim=1, keepdim=True) if norms == "rows of length 1" else 1.0
        after = unit * without(BASES[k], alpha)(w / unit)
        return after * w.norm(dim=axes, keepdim=True) / after.norm(dim=axes, keepdim=True)

    difference = found(base, changed(base, writers(change)))
    names = {f"model.layers.{i}.{at}.weight" for i in range(3) for at in ("self_attn.o_proj", "mlp.down_proj")}
    check(difference, BASES[k], alpha, names | {"model.embed_tokens.weight"})
    assert {t.norms for t in difference.of("edited")} == {norms}


@pytest.mark.parametrize(("norms", "said"), [("rows", "rows of length 1"), ("columns", "columns")])
def test_the_norms_that_our_own_edits_keep_come_back(tmp_path, norms, said):
    base = save(tmp_path / "base", dtype=torch.bfloat16)
    (report,) = orthogonalize(base, [Edit(tmp_path / "edited", Intervention("edit", BASES[2], 0.7), norms=norms)])
    difference = found(base, tmp_path / "edited")
    check(difference, BASES[2], 0.7, set(report.residuals))
    assert {t.norms for t in difference.of("edited")} == {said}


def test_matrices_larger_than_their_sketch(tmp_path):
    """d_model 256: more dimensions than the sketch has. alpha is compared with its definition, <v, D w> over <v, W w> for any w."""
    base = save(tmp_path / "base", hidden_size=256, intermediate_size=320, dtype=torch.bfloat16)
    v = torch.linalg.qr(torch.randn(256, 4, generator=torch.Generator().manual_seed(3)).double())[0].T
    orthogonalize(base, [Edit(tmp_path / "edited", Intervention("edit", v, 0.25))])
    difference = found(base, tmp_path / "edited")
    assert difference.rank == 4 and float(torch.linalg.svdvals(difference.basis @ v.T).min()) > 0.9999
    before, after = (load_file(f / "model.safetensors") for f in (base, tmp_path / "edited"))
    for one in difference.of("edited"):
        w, w2 = (t[one.name].double() if one.layer is not None else t[one.name].double().T for t in (before, after))
        naive = sum(float((v @ (w - w2))[i, j] * (v @ w)[i, j]) for i in range(4) for j in range(20))
        assert one.alpha == pytest.approx(naive / float(((v @ w)[:, :20] ** 2).sum()), abs=5e-3)
        values = torch.linalg.svdvals(w - w2)
        assert one.singular_values == pytest.approx(values[:8].tolist(), rel=0.02) and values[4] < one.edge < values[3]
        assert one.relative == pytest.approx(float((w - w2).norm() / w.norm()), rel=1e-4)
        assert one.largest == pytest.approx(float((w - w2).abs().max()), rel=1e-6)


def test_a_small_alpha_is_partly_lost_in_bfloat16(tmp_path):
    """Values that move by less than half a step stay: docs/edits.md states what is left. Not so in float32."""
    v = torch.nn.functional.normalize(torch.randn(1, 512, generator=torch.Generator().manual_seed(0)).double())
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 1, "vocab_size": 1024}
    read = {}
    for dtype, alphas in ((torch.bfloat16, (0.1, 0.05, 0.01)), (torch.float32, (0.001,))):
        base = save(tmp_path / str(dtype), dtype=dtype, **sizes)
        targets = [Edit(tmp_path / f"{alpha}", Intervention("edit", v, alpha)) for alpha in alphas]
        orthogonalize(base, targets)
        read |= {alpha: found(base, one.target) for alpha, one in zip(alphas, targets, strict=True)}
    assert read[0.01].kind == "full rank" and read[0.01].rank is None
    for alpha, cosine, least in ((0.1, 0.997, 0.095), (0.05, 0.988, 0.04), (0.001, 0.9999, 0.000999)):
        assert read[alpha].kind == "edit" and read[alpha].rank == 1 and float((read[alpha].basis @ v.T).abs()) > cosine
        assert all(least < one.alpha < alpha * 1.001 for one in read[alpha].of("edited"))


# Told apart


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", [0.1, 0.01, 0.001])
def test_a_small_change_of_full_rank_is_no_edit(tmp_path, size, dtype):
    base = save(tmp_path / "base", dtype=dtype)
    difference = found(base, changed(base, noise(size)))
    assert difference.kind == "full rank" and "training" in difference.how
    assert difference.rank is None and difference.basis is None and difference.by_layer is None
    assert all(t.alpha is None and t.rank is None for t in difference.tensors)


def test_an_edit_that_was_trained_on_is_none(tmp_path):
    base = save(tmp_path / "base")
    difference = found(base, changed(changed(base, writers(without(BASES[1]))).rename(tmp_path / "edited"), noise(0.01)))
    assert difference.kind == "full rank" and difference.rank is None


def test_a_trained_adapter_is_of_low_rank_and_no_edit(tmp_path):
    base, generator = save(tmp_path / "base"), torch.Generator().manual_seed(0)

    def change(_: str, w: Tensor, __: int | None) -> Tensor:
        if w.ndim == 1:
            return w
        return w + 0.05 * torch.randn(len(w), 2, generator=generator) @ torch.randn(2, w.shape[1], generator=generator)

    difference = found(base, changed(base, change))
    assert difference.kind == "low rank" and "adapter" in difference.how and difference.basis is None
    assert {t.rank for t in difference.of("low rank")} == {2} and difference.of("changed")


def test_an_edit_beside_other_changes_is_both(tmp_path):
    base = save(tmp_path / "base")

    def change(name: str, w: Tensor, axis: int | None) -> Tensor:
        return w + 0.1 if name == "model.norm.weight" else writers(without(BASES[1]))(name, w, axis)

    difference = found(base, changed(base, change))
    assert difference.kind == "edit and more" and [t.name for t in difference.of("changed")] == ["model.norm.weight"]
    assert difference.rank == 1 and all(abs(t.alpha - 1) < 1e-3 for t in difference.of("edited"))
    (tmp_path / "changed").rename(tmp_path / "first")
    norm = changed(base, lambda name, w, _: w + 0.1 if name == "model.norm.weight" else w)
    assert found(base, norm).kind == "changed" and found(base, norm).rank is None


def blocks(size: int | None) -> Change:
    """Rounded as llama.cpp's Q8_0: the largest of a block is 127 steps, and the step is kept in float16."""

    def of(_: str, w: Tensor, __: int | None) -> Tensor:
        if w.ndim == 1:
            return w
        block = w.double().unflatten(-1, (-1, size or w.shape[-1]))
        step = block.abs().amax(-1, keepdim=True) / 127
        return ((block / step).round() * step.half().double()).flatten(-2).to(w.dtype)

    return of


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("size", [32, None])
def test_8_bit_blocks_are_a_requantization_and_an_edit_is_seen_through_them(tmp_path, size, dtype):
    base = save(tmp_path / "base", dtype=dtype)
    difference = found(base, changed(base, blocks(size)))
    assert difference.kind == "requantized" and "8-bit blocks" in difference.how and difference.rank is None
    assert {t.grid for t in difference.of("rounded")} == {f"8-bit blocks of {n}" for n in ((32,) if size else (32, 64))}
    shutil.rmtree(tmp_path / "changed")
    edited = changed(base, writers(without(BASES[1]))).rename(tmp_path / "edited")
    difference = found(base, changed(edited, blocks(size)))
    names = {t.name for t in difference.of("edited")}
    check(difference, BASES[1], 1.0, names, within=2e-3)  # the step is 1/254 of the block's largest
    assert len(names) == 7 and difference.of("rounded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_cast_to_bfloat16_is_a_requantization_and_an_edit_is_seen_through_it(tmp_path, dtype):
    base = save(tmp_path / "base", dtype=dtype)
    cast = changed(base, lambda _, w, __: w.bfloat16()).rename(tmp_path / "cast")
    kept = changed(base, lambda _, w, __: w.bfloat16().to(w.dtype)).rename(tmp_path / "kept")  # in the wider dtype
    for folder in (cast, kept):
        difference = found(base, folder)
        assert difference.kind == "requantized" and {t.grid for t in difference.of("rounded")} == {"bfloat16"}
    assert found(cast, kept).kind == "identical"
    edited = changed(base, lambda name, w, axis: writers(without(BASES[2]))(name, w.double(), axis).bfloat16())
    check(found(base, edited), BASES[2], 1.0, {t.name for t in found(base, edited).of("edited")})


# What rounding is


@pytest.mark.parametrize("dtype", [*LOW, torch.float64], ids=str)
def test_a_step_is_the_distance_to_the_next_number(dtype):
    w = torch.cat([torch.randn(50, generator=torch.Generator().manual_seed(0)) * 10.0**e for e in range(-4, 4)]).to(dtype)
    w = torch.cat([w, torch.tensor([0.0, 1.0, -2.0, 0.75], dtype=dtype), torch.tensor([torch.finfo(dtype).tiny], dtype=dtype)])
    beyond = torch.nextafter(w.abs(), torch.tensor(torch.inf, dtype=dtype)).double() - w.abs().double()
    assert torch.equal(Grid(dtype).step(w).double(), beyond)


def test_the_coarsest_grid_is_found():
    w = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    assert [str(grid_of(x)) for x in (w, w.half().float(), w.bfloat16().float(), w.bfloat16())] == [
        "float32",
        "float16",
        "bfloat16",
        "bfloat16",
    ]
    assert str(grid_of(blocks(32)("", w, None))) == "8-bit blocks of 32"


# Bad input


def test_what_cannot_be_compared_is_said_in_a_sentence(tmp_path):
    base = save(tmp_path / "base")
    with pytest.raises(UserError, match=r"no such folder"):
        found(base, tmp_path / "nothing")
    with pytest.raises(UserError, match=r"model_type is qwen2, and that of .*base is llama"):
        found(base, save(tmp_path / "other", "qwen2"))
    with pytest.raises(UserError, match=r"mlp\..*weight is torch.float32 \[.*two unquantized checkpoints of one model"):
        found(base, save(tmp_path / "wider", intermediate_size=96))
    with pytest.raises(UserError, match=r"model.norm.weight.*NaN or infinity"):
        found(base, changed(base, lambda name, w, _: w * torch.nan if name == "model.norm.weight" else w))
    difference = found(base, base)
    assert difference.cosines(torch.ones(3, 5)) == [None] * 3
    orthogonalize(base, [Edit(tmp_path / "edited", Intervention("edit", BASES[1], 1.0))])
    with pytest.raises(UserError, match=r"directions have 5 components, and d_model is 32"):
        found(base, tmp_path / "edited").cosines(torch.ones(3, 5))
    orthogonalize(base, [Edit(tmp_path / "lora", Intervention("edit", BASES[1], 1.0), format="lora")])
    with pytest.raises(UserError, match=r"lora: is an adapter, which is no base"):
        found(tmp_path / "lora", base)
    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    for fields, said in (
        ({"use_dora": True}, "use_dora is set"),
        ({"r": None}, "r is None"),
        ({"lora_alpha": "a"}, "lora_alpha 'a'"),
    ):
        (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(UserError, match=rf"adapter_config.json: .*{said}.*merge the adapter"):
            found(base, tmp_path / "lora")
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"does not fit .*fewer"):
        found(save(tmp_path / "fewer", num_hidden_layers=2), tmp_path / "lora")
    (tmp_path / "lora/adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot be read"):
        found(base, tmp_path / "lora")


def test_a_dimension_that_is_no_edit_is_none_however_large_the_rounding_beside_it(tmp_path):
    """In bfloat16 one writer's difference has a singular value above rounding, and it is not along v^T W."""
    base, generator = save(tmp_path / "base"), torch.Generator().manual_seed(0)

    def change(name: str, w: Tensor, _: int | None) -> Tensor:
        if name != "model.layers.1.self_attn.o_proj.weight":
            return w.bfloat16()
        along = torch.outer(*(torch.nn.functional.normalize(torch.randn(n, generator=generator), dim=0) for n in w.shape))
        return (w + 0.022 * along).bfloat16()

    difference = found(base, changed(base, change))
    (one,) = [t for t in difference.tensors if t.name == "model.layers.1.self_attn.o_proj.weight"]
    assert one.rank == 1 and one.kind == difference.kind == "low rank" and difference.basis is None
