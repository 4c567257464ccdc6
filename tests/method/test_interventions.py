"""Interventions against TransformerLens's bridge, against a naive loop, and in batches and generation."""

import copy

import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.io.errors import UserError
from refusal.lm.architecture import SUPPORTED
from refusal.method.interventions import SITES, Ablation, Addition, ablation, intervene

IDS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
ALPHAS = (0.5, 1.0, 1.5)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    torch.set_num_threads(1)
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2")


@pytest.fixture(scope="module")
def bridge(model, tmp_path_factory):
    from transformer_lens.model_bridge import TransformerBridge

    folder = tmp_path_factory.mktemp("bridge")
    model.save_pretrained(folder)
    return TransformerBridge.boot_transformers(
        str(folder), hf_model=copy.deepcopy(model), device="cpu", dtype=torch.float32
    )


def oracle_hooks(v, alpha, sites, n_layers=3):
    """Independent: TransformerLens's names, einsum, one direction for all."""

    def hook(r, hook):
        return r - alpha * torch.einsum("bsd,d->bs", r, v)[..., None] * v

    names = {
        "resid_pre": ["hook_resid_pre"],
        "paper": ["hook_resid_pre", "hook_attn_out", "hook_mlp_out"],
        "writes": ["hook_attn_out", "hook_mlp_out"],
    }[sites]
    hooks = [(f"blocks.{layer}.{name}", hook) for layer in range(n_layers) for name in names]
    return hooks + ([("hook_embed", hook)] if sites == "writes" else [])


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sites", SITES)
def test_equals_transformer_lens(model, bridge, sites, alpha):
    v = tiny_direction()
    theirs = bridge.run_with_hooks(IDS, fwd_hooks=oracle_hooks(v, alpha, sites))
    with intervene(model, ablation(v, alpha, sites)):
        ours = model(IDS).logits
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - model(IDS).logits).abs().max() > 0.5  # the test is not vacuous


def naive_forward(model, ids, v, alpha, sites):
    """The model's forward written out with its own parts: a loop over blocks, no hooks."""

    def cut(r, at):
        here = at in {"resid_pre": ("pre",), "paper": ("pre", "write"), "writes": ("write", "embed")}[sites]
        return r - alpha * (r @ v)[..., None] * v if here else r

    core = model.model
    r = cut(core.embed_tokens(ids), "embed")
    positions = torch.arange(ids.shape[1])[None]
    rotary = core.rotary_emb(r, position_ids=positions)
    for block in core.layers:
        r = cut(r, "pre")
        attn = block.self_attn(hidden_states=block.input_layernorm(r), position_embeddings=rotary, attention_mask=None)
        r = r + cut(attn[0], "write")
        r = r + cut(block.mlp(block.post_attention_layernorm(r)), "write")
    return model.lm_head(core.norm(r))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("sites", SITES)
def test_equals_naive_loop(model, sites, alpha):
    v = tiny_direction(seed=1)
    with intervene(model, ablation(v, alpha, sites)):
        ours = model(IDS).logits
    assert (ours - naive_forward(model, IDS, v, alpha, sites)).abs().max() < 1e-5


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_rows_of_one_batch_equal_rows_alone(model_type, sites):
    model = tiny_model(model_type)
    directions, alphas = tiny_direction(rows=3), torch.tensor([0.5, 0.0, 1.5])
    with intervene(model, ablation(directions, alphas, sites)):
        together = model(IDS).logits
    for row in range(3):
        with intervene(model, ablation(directions[row], float(alphas[row]), sites)):
            alone = model(IDS[row : row + 1]).logits
        assert (together[row] - alone[0]).abs().max() < 2e-5
    plain = model(IDS).logits
    assert torch.equal(together[1], plain[1])  # alpha 0, beside rows that are ablated
    assert (together[0] - plain[0]).abs().max() > 0.1


@pytest.mark.parametrize("sites", SITES)
def test_basis_of_rank_two(model, sites):
    basis = torch.linalg.qr(torch.randn(32, 2, generator=torch.Generator().manual_seed(0)))[0].T
    with intervene(model, Ablation(basis[None], torch.ones(1), sites)):
        together = model(IDS).logits
    with intervene(model, ablation(basis[0], 1.0, sites), ablation(basis[1], 1.0, sites)):
        one_by_one = model(IDS).logits
    smaller = torch.stack([basis[0], torch.zeros(32)])
    with intervene(model, Ablation(torch.stack([basis, smaller, basis]), torch.ones(1), sites)):
        per_row = model(IDS).logits
    with intervene(model, ablation(basis[0], 1.0, sites)):
        of_one = model(IDS).logits
    assert (together - one_by_one).abs().max() < 1e-5
    assert (together - per_row)[[0, 2]].abs().max() < 1e-5
    assert (of_one - per_row)[1].abs().max() < 1e-5 < 1e-2 < (of_one - together)[1].abs().max()


def test_affine_sends_the_component_to_its_offset(model):
    v, offset = tiny_direction(), torch.tensor([0.3, -1.0, 2.0])
    seen = []
    with intervene(model, ablation(v, 1.0, "resid_pre", offset)):
        for block in model.model.layers:
            seen.append(block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0] @ v)))
        model(IDS)
    handles, components = seen[:3], seen[3:]
    for handle in handles:
        handle.remove()
    for component, target in zip(components, offset, strict=True):
        torch.testing.assert_close(component, target.expand(3, 9), rtol=1e-5, atol=1e-5)
    rows = torch.stack([offset, -offset, torch.zeros(3)])
    with intervene(model, ablation(v, 0.5, "resid_pre", rows)):
        together = model(IDS).logits
    for row in range(3):
        with intervene(model, ablation(v, 0.5, "resid_pre", rows[row])):
            assert (model(IDS[row : row + 1]).logits[0] - together[row]).abs().max() < 1e-5


def test_an_arm_with_a_direction_a_layer(model):
    directions = tiny_direction(rows=3)
    arms = [Ablation(directions[i][None, None], torch.ones(1), "resid_pre", layers=[i]) for i in range(3)]
    seen = []
    with intervene(model, *arms):
        handles = [
            block.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            for block in model.model.layers
        ]
        model(IDS)
    for handle in handles:
        handle.remove()
    components = torch.stack(seen) @ directions.T  # [layer, batch, seq, direction]
    for layer in range(3):
        assert components[layer, ..., layer].abs().max() < 1e-5
        assert components[layer].abs().max() > 0.1


@pytest.mark.parametrize("sites", SITES)
def test_generation_with_a_cache_meets_every_new_token(model, sites):
    """Cached greedy decoding under hooks equals recomputing the whole sequence under hooks at every step."""
    intervention = ablation(tiny_direction(rows=3), torch.tensor([1.0, 1.5, 0.0]), sites)
    with intervene(model, intervention):
        cached = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        ids = IDS
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(cached[2], plain[2]) and not torch.equal(cached, plain)


def test_rows_leave_and_enter_while_hooks_live(model):
    directions, alphas = tiny_direction(rows=3), torch.tensor([0.5, 1.0, 1.5])
    cut, add = ablation(directions, alphas, "paper"), Addition(3 * tiny_direction(seed=7, rows=3), 1)
    everyone = ablation(tiny_direction(seed=9), 0.5, "resid_pre")  # one for all: selection leaves it alone
    with intervene(model, cut, add, everyone):
        full = model(IDS).logits
        for intervention in (cut, add, everyone):
            intervention.select(torch.tensor([2, 0]))
        assert (model(IDS[[2, 0]]).logits - full[[2, 0]]).abs().max() < 2e-5
        for intervention in (cut, add, everyone):
            intervention.select(torch.tensor([1]))
        assert (model(IDS[:1]).logits - full[:1]).abs().max() < 2e-5
    cut = ablation(directions, alphas, "paper")
    with intervene(model, cut):
        full = model(IDS).logits
        cut.assign(torch.tensor([1, 1, 0, 2]))  # rows of the table, in any order and number
        many = model(IDS[[1, 1, 0, 2]]).logits
        cut.select(torch.tensor([3]))
        assert (model(IDS[2:]).logits - full[2:]).abs().max() < 2e-5
    assert (many - full[[1, 1, 0, 2]]).abs().max() < 2e-5


def test_addition_shifts_one_layer_at_every_position(model):
    vector, seen = 2 * tiny_direction(), []
    plain = model(IDS, output_hidden_states=True).hidden_states
    with intervene(model, Addition(vector, 1)):
        handle = model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
        shifted = model(IDS, output_hidden_states=True).hidden_states
    handle.remove()
    torch.testing.assert_close(seen[0], plain[1] + vector)
    assert torch.equal(shifted[0], plain[0]) and not torch.allclose(shifted[2], plain[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32_and_casts_once(dtype):
    r = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    v = tiny_direction(rows=2)
    out = ablation(v, torch.tensor([1.0, 0.0]), "paper").apply(r, 0)
    exact = r.float() - torch.tensor([1.0, 0.0])[:, None, None] * (r.float() * v[:, None]).sum(-1, True) * v[:, None]
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(out[1], r[1])
    added = Addition(v[0], 0).apply(r)
    assert added.dtype == dtype and torch.equal(added, (r.float() + v[0]).to(dtype))
    assert ablation(v[0].double(), 1.0, "paper").apply(r.double(), 0).dtype == torch.float64
    model = tiny_model("qwen2", dtype=dtype)
    with intervene(model, ablation(v[0], 1.0, "paper")):
        assert model(IDS).logits.isfinite().all()


def test_hooks_are_gone_after_errors_too(model):
    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = count()
    with pytest.raises(ZeroDivisionError), intervene(model, ablation(tiny_direction(), 1.0, "paper")):
        assert count() == before + 9
        raise ZeroDivisionError
    assert count() == before
    with (
        pytest.raises(UserError),
        intervene(model, ablation(tiny_direction(), 1.0, "paper"), Addition(torch.ones(32), 3)),
    ):
        pass
    assert count() == before


def test_blocks_called_by_keyword(model):
    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            return (hidden_states, "kept")

    class Model(torch.nn.Module):
        config = model.config

        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.layers = torch.nn.ModuleList(Block() for _ in range(3))

    v, r, small = tiny_direction(), torch.randn(1, 4, 32), Model()
    with intervene(small, ablation(v, 1.0, "resid_pre")):
        out, kept = small.model.layers[0](hidden_states=r)
        assert torch.equal(out, small.model.layers[0](r)[0])
    assert (out @ v).abs().max() < 1e-6 and kept == "kept"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ablation(tiny_direction(), 1.0, "everywhere"), "sites"),
        (lambda: ablation(2 * tiny_direction(), 1.0, "paper"), "unit"),
        (lambda: ablation(torch.full((32,), float("nan")), 1.0, "paper"), "unit"),
        (lambda: ablation(torch.zeros(32), 1.0, "paper"), "unit"),
        (lambda: Ablation(tiny_direction().expand(1, 2, 32), torch.ones(1), "paper"), "orthonormal"),
        (lambda: ablation(tiny_direction(), 1.0, "writes", torch.zeros(3)), "resid_pre"),
        (lambda: ablation(tiny_direction(rows=3), torch.ones(2), "paper"), "rows"),
        (lambda: Ablation(torch.ones(32), torch.ones(1), "paper"), "d_model"),
        (lambda: Addition(torch.ones(1, 1, 32), 0), "d_model"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_a_direction_or_offset_of_another_model_is_refused(model):
    for intervention in (
        ablation(tiny_direction(16), 1.0, "paper"),
        ablation(tiny_direction(), 1.0, "resid_pre", torch.zeros(2)),
        Addition(torch.ones(16), 0),
        Addition(torch.ones(32), -1),
    ):
        with pytest.raises(UserError), intervene(model, intervention):
            pass


def test_baseline_rows_may_have_no_direction():
    r = torch.randn(2, 3, 32)
    v = torch.stack([torch.zeros(32), tiny_direction()])
    assert torch.equal(ablation(v, torch.tensor([0.0, 1.0]), "paper").apply(r, 0)[0], r[0])
