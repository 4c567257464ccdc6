"""Interventions against TransformerLens's bridge, a naive loop and edited weights, alone, in batches and in generation."""

import copy
import json

import pytest
import torch
from tiny import SUPPORTED, tiny_direction, tiny_model

from refusal.analysis.subspaces import random_subspaces
from refusal.io.errors import UserError
from refusal.lm.stream import stream_of
from refusal.method.bridge import fwd_hooks
from refusal.method.interventions import BASELINE, SITES, Ablation, Addition, Intervention, edited_weights, intervene

IDS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(0))
ALPHAS = (0.5, 1.0, 1.5)


@pytest.fixture(autouse=True, scope="module")
def no_grad():
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
    return TransformerBridge.boot_transformers(str(folder), hf_model=copy.deepcopy(model), device="cpu", dtype=torch.float32)


def one(basis, alpha=1.0, sites="resid_pre", offset=None):
    return Intervention("x", basis, alpha, sites, offset)


def logits(model, *interventions, ids=IDS):
    """Of a batch whose row i is under intervention i, or all rows under the only one."""
    with intervene(model, Ablation(interventions)):
        return model(ids).logits


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
def test_equals_transformer_lens_and_the_naive_loop(model, bridge, sites, alpha):
    v = tiny_direction()
    ours = logits(model, one(v, alpha, sites))
    assert (ours - bridge.run_with_hooks(IDS, fwd_hooks=oracle_hooks(v, alpha, sites))).abs().max() < 1e-5
    assert (ours - naive_forward(model, IDS, v, alpha, sites)).abs().max() < 1e-5
    with one(v, alpha, sites).on(model):
        assert torch.equal(model(IDS).logits, ours)
    assert (ours - model(IDS).logits).abs().max() > 0.5  # the test is not vacuous


@pytest.mark.parametrize("sites", SITES)
def test_hooks_for_transformer_lens_do_the_same(model, bridge, sites):
    """A direction, a subspace, a basis a layer, and an offset where one may be; and they would show if left out."""
    subspace = torch.linalg.qr(tiny_direction(rows=2).double().T)[0].T
    own = torch.stack([subspace[:1], torch.zeros(1, subspace.shape[1]), subspace[1:]])
    some = [one(tiny_direction(), 1.5, sites), one(subspace, 0.75, sites), one(own, 1.0, sites)]
    if sites == "resid_pre":
        some.append(one(tiny_direction(), 1.0, sites, torch.tensor([[0.5], [-2.0], [1.0]])))
    plain = bridge(IDS)
    for intervention in some:
        theirs = bridge.run_with_hooks(IDS, fwd_hooks=fwd_hooks(intervention, 3))
        assert (logits(model, intervention) - theirs).abs().max() < 1e-5 < (plain - theirs).abs().max()
    with pytest.raises(UserError, match="has no hooks"):
        fwd_hooks(one(tiny_direction(), 1.0, "weights"), 3)


@pytest.mark.parametrize("sites", SITES)
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_rows_of_one_batch_equal_rows_alone(model_type, sites):
    model = tiny_model(model_type)
    rows = [one(v, alpha, sites) for v, alpha in zip(tiny_direction(rows=3), (0.5, 0.0, 1.5), strict=True)]
    together, plain = logits(model, *rows), model(IDS).logits
    for i, row in enumerate(rows):
        assert (together[i] - logits(model, row, ids=IDS[i : i + 1])[0]).abs().max() < 2e-5
    assert torch.equal(together[1], plain[1])  # alpha 0, in a batch with rows that are ablated
    assert torch.equal(logits(model, rows[0], BASELINE, rows[2])[1], plain[1])
    assert (together[0] - plain[0]).abs().max() > 0.1


@pytest.mark.parametrize("sites", SITES)
def test_a_subspace_is_its_directions_one_after_another_and_ranks_share_a_batch(model, sites):
    basis = random_subspaces(32, 2, 1, 0)[0].float()
    together, alone = logits(model, one(basis, sites=sites)), logits(model, one(basis[0], sites=sites))
    with intervene(model, Ablation([one(basis[0], sites=sites)]), Ablation([one(basis[1], sites=sites)])):
        assert (model(IDS).logits - together).abs().max() < 1e-5
    mixed = logits(model, one(basis, sites=sites), one(basis[0], sites=sites), one(basis, sites=sites))
    assert (mixed - together)[[0, 2]].abs().max() < 1e-5
    assert (mixed - alone)[1].abs().max() < 1e-5 < 1e-2 < (alone - together)[1].abs().max()


def inputs_of_blocks(model):
    """What goes into each block's first norm from here on, behind any hook on the block."""
    seen = []
    handles = [b.input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in model.model.layers]
    return seen, handles


def test_affine_sends_the_component_to_its_offset(model):
    v, offset = tiny_direction(), torch.tensor([0.3, -1.0, 2.0])[:, None]
    with intervene(model, Ablation([one(v, offset=offset)])):
        seen, handles = inputs_of_blocks(model)
        model(IDS)
    for handle in handles:
        handle.remove()
    for r, target in zip(seen, offset, strict=True):
        torch.testing.assert_close(r @ v, target.expand(3, 9), rtol=1e-5, atol=1e-5)
    rows = [one(v, 0.5, offset=o) for o in (offset, -offset, torch.zeros(3, 1))]
    together = logits(model, *rows)
    for i, row in enumerate(rows):
        assert (logits(model, row, ids=IDS[i : i + 1])[0] - together[i]).abs().max() < 1e-5


@pytest.mark.parametrize("sites", ["resid_pre", "writes"])
def test_a_basis_a_layer_acts_in_its_layer_alone(model, sites):
    directions = tiny_direction(rows=3)
    own = torch.stack([directions[0], directions[1], torch.zeros(32)])[:, None]
    with intervene(model, Ablation([one(own, sites=sites)])):
        seen, handles = inputs_of_blocks(model)
        whole = model(IDS).logits
    for handle in handles:
        handle.remove()
    if sites == "resid_pre":
        components = torch.stack(seen) @ directions.T  # [layer, batch, seq, direction]
        assert components[0, ..., 0].abs().max() < 1e-5 > components[1, ..., 1].abs().max()
        assert components[2, ..., 2].abs().max() > 0.1 < components[0, ..., 1].abs().max()
    else:  # the embedding's output belongs to no layer
        assert torch.equal(seen[0], model.model.embed_tokens(IDS))
    rows = [one(own, alpha, sites) for alpha in (1.0, 0.5, 0.0)]
    together = logits(model, *rows)
    assert (together[0] - whole[0]).abs().max() < 2e-5 and torch.equal(together[2], model(IDS).logits[2])
    assert (together[1] - whole[1]).abs().max() > 1e-2


@pytest.mark.parametrize("sites", SITES)
def test_generation_with_a_cache_meets_every_new_token(model, sites):
    """Cached greedy decoding under hooks equals recomputing the whole sequence under hooks at every step."""
    rows = [one(v, alpha, sites) for v, alpha in zip(tiny_direction(rows=3), (1.0, 1.5, 0.0), strict=True)]
    with intervene(model, Ablation(rows)):
        cached = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
        ids = IDS
        for _ in range(8):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, ids)
    plain = model.generate(IDS, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(cached[2], plain[2]) and not torch.equal(cached, plain)


def test_rows_are_assigned_while_hooks_live(model):
    ablation = Ablation([one(v, alpha, "paper") for v, alpha in zip(tiny_direction(rows=3), ALPHAS, strict=True)])
    with intervene(model, ablation):
        full = model(IDS).logits
        for rows in ([1, 1, 0, 2], [2], [2, 0]):  # of the table as constructed, in any order and number
            ablation.assign(torch.tensor(rows))
            assert (model(IDS[rows]).logits - full[rows]).abs().max() < 2e-5


def test_addition_shifts_one_layer_at_every_position(model):
    vector, (seen, handles) = 2 * tiny_direction(), inputs_of_blocks(model)
    for handle in handles:
        handle.remove()
    plain = model(IDS, output_hidden_states=True).hidden_states
    with intervene(model, Addition(vector, 1)):
        seen, handles = inputs_of_blocks(model)
        shifted = model(IDS, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(seen[1], plain[1] + vector)
    assert torch.equal(shifted[0], plain[0]) and not torch.allclose(shifted[2], plain[2])
    vectors = torch.stack([vector, torch.zeros(32), -vector])
    with intervene(model, Addition(vectors, 1)):
        rows = model(IDS, output_hidden_states=True).hidden_states[2]
    assert torch.allclose(rows[0], shifted[2][0], atol=1e-5) and torch.allclose(rows[1], plain[2][1], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_computes_in_float32_and_casts_once(dtype):
    r = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    v = tiny_direction(rows=2)
    out = Ablation([one(v[0], 1.0, "paper"), one(v[1], 0.0, "paper")]).apply(r, 0)
    exact = r.float() - torch.tensor([1.0, 0.0])[:, None, None] * (r.float() * v[:, None]).sum(-1, True) * v[:, None]
    assert out.dtype == dtype
    torch.testing.assert_close(out, exact.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(out[1], r[1])
    assert Ablation([one(v[0].double(), 1.0, "paper")]).apply(r.double(), 0).dtype == torch.float64
    model = tiny_model("qwen2", dtype=dtype)
    with intervene(model, Addition(v[0], 1)):
        seen, handles = inputs_of_blocks(model)
        plain = model(IDS, output_hidden_states=True).hidden_states[1]
    assert seen[1].dtype == dtype and torch.equal(seen[1], (plain.float() + v[0]).to(dtype))
    for handle in handles:
        handle.remove()
    assert logits(model, one(v[0], 1.0, "paper")).isfinite().all()


def test_hooks_are_gone_after_errors_too(model):
    def count():
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    before = count()
    with pytest.raises(ZeroDivisionError), one(tiny_direction(), 1.0, "paper").on(model):
        assert count() == before + 9
        raise ZeroDivisionError
    assert count() == before
    ablation = Ablation([one(tiny_direction(), 1.0, "paper")])
    with pytest.raises(UserError), intervene(model, ablation, Addition(torch.ones(32), 3)):
        pass
    assert count() == before


def test_blocks_called_by_keyword():
    class Block(torch.nn.Module):
        def forward(self, hidden_states):
            return (hidden_states, "kept")

    v, r, small = tiny_direction(), torch.randn(1, 4, 32), tiny_model("qwen2")
    stream_of(small)
    small.model.layers = torch.nn.ModuleList(Block() for _ in range(3))
    with one(v).on(small):
        out, kept = small.model.layers[0](hidden_states=r)
        assert torch.equal(out, small.model.layers[0](r)[0])
    assert (out @ v).abs().max() < 1e-6 and kept == "kept"


WRITERS = [("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("mixtral", {}), ("qwen3_moe", {})]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(("model_type", "options"), WRITERS)
def test_edited_weights_are_the_ablation_at_writes_and_are_put_back(model_type, options, rank, alpha):
    """Of every shape of writer: a matrix, a bias, experts in one tensor."""
    model = tiny_model(model_type, tie_word_embeddings=False, **options)
    basis = random_subspaces(32, rank, 1, 0)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain, hooked = model(IDS).logits, logits(model, one(basis, alpha, "writes"))
    with one(basis, alpha, "weights").on(model):
        edited = model(IDS).logits
    assert torch.allclose(edited, hooked, atol=1e-4) and not torch.allclose(edited, plain, atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_edited_weights_leave_a_tied_unembedding_and_a_copy_alone_and_are_put_back_after_an_error():
    model, v = tiny_model("qwen2", tie_word_embeddings=True), tiny_direction()
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    plain, head, down = model(IDS).logits, model.lm_head.weight.clone(), model.model.layers[1].mlp.down_proj
    before = down.weight.clone()
    with pytest.raises(KeyError), edited_weights(model, one(v, 1.0, "weights")):
        assert torch.equal(model.lm_head.weight, head) and torch.equal(other(IDS).logits, plain)
        assert float((v @ down.weight).abs().max()) < 1e-5 and not torch.allclose(model(IDS).logits, plain, atol=1e-2)
        raise KeyError
    assert torch.equal(down.weight, before)


def test_edit_is_the_equation_and_gives_the_component():
    generator = torch.Generator().manual_seed(0)
    basis, w = random_subspaces(32, 2, 1, 0)[0], torch.randn(4, 32, 7, dtype=torch.float64, generator=generator)
    edited, component = one(basis, 0.75).edit(w)
    for i in range(4):
        assert torch.allclose(edited[i], w[i] - 0.75 * basis.T @ basis @ w[i]) and torch.allclose(component[i], basis @ w[i])
    columns = torch.cat([one(basis, 0.75).edit(w[0][:, part])[0] for part in (slice(3), slice(3, 7))], 1)
    assert torch.allclose(columns, edited[0])
    half = one(basis).edit(w[0].bfloat16())[0]
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), one(basis).edit(w[0])[0], atol=0.05)


def test_a_fingerprint_tells_apart_all_that_does_something_else():
    v, other, three = tiny_direction(), tiny_direction(seed=1), random_subspaces(32, 3, 2, 0)
    own = torch.stack([three[0, :1], three[1, :1], three[1, :1]])  # a basis a layer
    bases = [(v, 1.0), (other, 1.0), (v, 0.5), (three[0], 1.0), (three[1], 1.0), (three[0][:2], 1.0), (three[0], 0.5)]
    bases += [(own, 1.0), (own.flip(0), 1.0), (own * torch.tensor([1.0, 1, 0])[:, None, None], 1.0), (own, 0.5)]
    some = [one(basis, alpha, sites) for basis, alpha in bases for sites in (*SITES, "weights")]
    some += [one(v, offset=offset) for offset in (torch.ones(3, 1), torch.tensor([1.0, 2.0, 3.0])[:, None])]
    marks = [json.dumps(intervention.fingerprint()) for intervention in (BASELINE, *some)]
    assert len(set(marks)) == len(marks)
    alike = Intervention("b", v.clone()[None], 1.0, "paper", None, 2, "family", True)  # another name and origin
    assert alike.fingerprint() == one(v, 1.0, "paper").fingerprint()
    added = [Addition(v, 1), Addition(other, 1), Addition(v, 2), Addition(v, 1, "all")]
    assert len({json.dumps(a.fingerprint()) for a in added}) == 4


def test_rank_and_the_baseline(model):
    assert [i.rank for i in (BASELINE, one(tiny_direction()), one(random_subspaces(32, 3, 1, 0)[0]))] == [0, 1, 3]
    with BASELINE.on(model):
        assert not any(block._forward_pre_hooks for block in model.model.layers)
    assert one(tiny_direction(), 0.5).at("writes").fingerprint() == one(tiny_direction(), 0.5, "writes").fingerprint()
    r = torch.randn(2, 3, 32)
    assert torch.equal(Ablation([BASELINE, one(tiny_direction(), 1.0, "paper")]).apply(r, 0)[0], r[0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: one(tiny_direction(), 1.0, "everywhere"), "sites"),
        (lambda: one(2 * tiny_direction(), 1.0, "paper"), "unit"),
        (lambda: one(torch.full((32,), float("nan")), 1.0, "paper"), "unit"),
        (lambda: one(torch.zeros(32), 1.0, "paper"), "unit"),
        (lambda: one(tiny_direction().expand(2, 32), 1.0, "paper"), "orthonormal"),
        (lambda: one(tiny_direction(rows=3).expand(2, 3, 32)), "orthonormal"),
        (lambda: one(tiny_direction(), 1.0, "writes", torch.zeros(3, 1)), "resid_pre"),
        (lambda: one(tiny_direction(), 1.0, "resid_pre", torch.zeros(3, 2)), "offset"),
        (lambda: one(torch.ones(1, 1, 1, 32)), "d_model"),
        (lambda: Ablation([one(tiny_direction()), one(tiny_direction(), sites="paper")]), "same sites"),
        (lambda: Ablation([one(tiny_direction(), sites="weights")]), "at run time"),
        (lambda: Ablation([BASELINE]), "at least one"),
        (lambda: Addition(torch.ones(1, 1, 32), 0), "d_model"),
    ],
)
def test_bad_arguments_are_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    "intervention",
    [
        Ablation([one(tiny_direction(16), 1.0, "paper")]),
        Ablation([one(tiny_direction(), offset=torch.zeros(2, 1))]),
        Ablation([one(tiny_direction(rows=2)[:, None])]),
        Addition(torch.ones(16), 0),
        Addition(torch.ones(32), -1),
    ],
)
def test_a_direction_offset_or_layer_of_another_model_is_refused(model, intervention):
    with pytest.raises(UserError), intervene(model, intervention):
        pass
