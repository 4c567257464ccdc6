"""Weights edited in memory against ablation at `writes`, and the algebra against a loop."""

import copy

import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.analysis.strength import PLACES, collapse_alpha, diverges_beyond, edited_weights, residual_gain
from refusal.method.interventions import ablation, intervene

IDS = torch.tensor([[1, 7, 9, 30, 31]])


WRITERS = [("qwen2", {}), ("llama", {"attention_bias": True, "mlp_bias": True}), ("mixtral", {}), ("qwen3_moe", {})]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
@pytest.mark.parametrize(("model_type", "options"), WRITERS)
def test_edited_weights_are_the_ablation_at_writes_and_are_put_back(model_type, options, alpha):
    """Of every shape of writer: a matrix, a bias, experts in one tensor."""
    model, v = tiny_model(model_type, tie_word_embeddings=False, **options), tiny_direction()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        plain = model(IDS).logits
        with intervene(model, ablation(v, alpha, "writes")):
            hooked = model(IDS).logits
        with edited_weights(model, v, alpha):
            edited = model(IDS).logits
        assert torch.allclose(edited, hooked, atol=1e-4) and not torch.allclose(edited, plain, atol=1e-2)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_tied_unembedding_stays():
    model, v = tiny_model("qwen2", tie_word_embeddings=True), tiny_direction()
    before = model.lm_head.weight.clone()
    with edited_weights(model, v, 1.0):
        assert torch.equal(model.lm_head.weight, before)
        assert float((v @ model.model.layers[0].mlp.down_proj.weight.detach()).abs().max()) < 1e-5


def test_a_copy_that_shares_the_weights_is_not_edited():
    model, v = tiny_model("qwen2"), tiny_direction()
    other = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    with torch.no_grad():
        plain = model(IDS).logits
        with edited_weights(model, v, 1.0):
            assert torch.equal(other(IDS).logits, plain) and not torch.allclose(model(IDS).logits, plain, atol=1e-2)


def test_weights_are_put_back_when_something_fails():
    model, v = tiny_model("qwen2"), tiny_direction()
    before = model.model.layers[1].mlp.down_proj.weight.clone()
    with pytest.raises(KeyError), edited_weights(model, v, 1.0):
        raise KeyError
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before)


@pytest.mark.parametrize("place", PLACES)
def test_what_is_left_of_the_oldest_write(place):
    """A model whose blocks write nothing: what reaches the last block along v is the embedding's, hit as often as it says."""
    model, v, alpha = tiny_model("qwen2", tie_word_embeddings=False), tiny_direction(), 1.5
    for block in model.model.layers:
        block.self_attn.o_proj.weight.data.zero_()
        block.mlp.down_proj.weight.data.zero_()
    seen = []
    with torch.no_grad():
        clean = model(IDS, output_hidden_states=True).hidden_states[0][0] @ v
        edit = edited_weights(model, v, alpha) if place == "weights" else intervene(model, ablation(v, alpha, place))
        with edit:
            # Last in line, behind the ablation's own hook.
            handle = model.model.layers[-1].input_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            model(IDS)
            handle.remove()
    assert torch.allclose(seen[0][0] @ v, residual_gain(3, place, alpha) * clean, atol=1e-5)


def test_cliff():
    curve = [{"alpha": a, "score": s} for a, s in ((0, 0.0), (0.5, 0.4), (1, 1.0), (2, 0.6), (2.5, 0.4), (3, 0.9))]
    assert collapse_alpha(curve) == 2.5
    assert collapse_alpha(curve[:4]) is None


@pytest.mark.parametrize("place", PLACES)
def test_where_it_diverges_depth_makes_it_worse(place):
    limit = diverges_beyond(place) or 2.0
    below, above = (
        abs(residual_gain(24, place, alpha)) / abs(residual_gain(8, place, alpha)) for alpha in (limit - 0.25, limit + 0.25)
    )
    assert (below < 1 < above) if diverges_beyond(place) else below == above == 1
