"""Activations against TransformerLens's bridge, transformers' own hidden states, and each other."""

import copy

import pytest
import torch
from tiny import tiny_model

from refusal.activations import batches, last_token_resid_pre, left_pad
from refusal.anatomy import SUPPORTED

METHODS = ("sequential", "batched", "batched_unmasked")
LENGTHS = (7, 3, 12, 7, 1, 9)


def random_prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = random_prompts()


def hidden_states(model, prompts):
    """[batch, n_layers, d_model]: what transformers says goes into each layer, a prompt at a time."""
    with torch.no_grad():
        runs = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in prompts]
    return torch.stack([torch.stack([layer[0, -1] for layer in run[:-1]]) for run in runs])


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_sequential_equals_hidden_states(model_type):
    model = tiny_model(model_type)
    assert torch.equal(last_token_resid_pre(model, PROMPTS, "sequential", 0), hidden_states(model, PROMPTS))


@pytest.mark.parametrize("method", ["sequential", "batched"])
def test_equals_transformer_lens(method, tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model), device="cpu", dtype=torch.float32)
    ours = last_token_resid_pre(model, PROMPTS, method, 0)
    for row, ids in zip(ours, PROMPTS, strict=True):
        _, cache = bridge.run_with_cache(torch.tensor([ids]))
        for layer in range(3):
            assert (row[layer] - cache[f"blocks.{layer}.hook_resid_pre"][0, -1]).abs().max() < 1e-5


def test_unmasked_equals_the_bridge_with_padding_attended_to(tmp_path):
    """The write-up's batched code: the bridge on left-padded ids, with no attention mask."""
    from transformer_lens.model_bridge import TransformerBridge

    model = tiny_model("qwen2")
    model.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model), device="cpu", dtype=torch.float32)
    width = max(map(len, PROMPTS))
    _, cache = bridge.run_with_cache(torch.tensor([[0] * (width - len(ids)) + ids for ids in PROMPTS]))
    theirs = torch.stack([cache[f"blocks.{layer}.hook_resid_pre"][:, -1] for layer in range(3)], 1)
    assert (last_token_resid_pre(model, PROMPTS, "batched_unmasked", 0) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_batched_equals_sequential_and_unmasked_does_not(model_type):
    # Windows shorter than the longest prompt, where the architecture has them.
    model = tiny_model(model_type, **({"sliding_window": 4} if model_type in {"gemma2", "gemma3_text", "mistral"} else {}))
    sequential, batched, unmasked = (last_token_resid_pre(model, PROMPTS, method, 0) for method in METHODS)
    assert (batched - sequential).abs().max() < 1e-5 * sequential.abs().max()
    apart = (unmasked - sequential).abs().amax((1, 2))
    longest = LENGTHS.index(max(LENGTHS))
    assert apart[longest] < 1e-5 * sequential.abs().max()  # nothing was padded there
    # A long prompt's last token may not see its padding through windows; a short one's does.
    assert all(apart[i] > 1e-3 * sequential.abs().max() for i in range(len(LENGTHS)) if LENGTHS[i] < 4)


def test_equal_lengths_leave_nothing_to_mask():
    model, prompts = tiny_model("qwen2"), random_prompts((6, 6, 6))
    runs = [last_token_resid_pre(model, prompts, method, 0) for method in METHODS]
    assert torch.allclose(runs[1], runs[0], atol=1e-5) and torch.allclose(runs[2], runs[0], atol=1e-5)


def test_the_models_dtype_is_kept_and_no_hook_stays():
    model = tiny_model("llama", dtype=torch.bfloat16)
    found = last_token_resid_pre(model, PROMPTS[:2], "batched", 0)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 3, 32) and not found.requires_grad
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_hooks_are_gone_after_a_failure():
    model = tiny_model("qwen2")
    with pytest.raises(IndexError):
        last_token_resid_pre(model, [[5, 6, 999]], "sequential", 0)  # no such token
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_left_pad():
    ids, mask = left_pad([[5, 6], [7, 8, 9], [4]], 1)
    assert ids.tolist() == [[1, 5, 6], [7, 8, 9], [1, 1, 4]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]


def test_a_pad_token_inside_a_prompt_is_a_token():
    model, prompts = tiny_model("qwen2"), [[0, 5, 0, 7], [3, 4, 5, 6, 7, 8]]
    sequential, batched = (last_token_resid_pre(model, prompts, method, 0) for method in METHODS[:2])
    assert (batched - sequential).abs().max() < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_cover_each_prompt_once(method, size):
    lengths = [9, 3, 7, 3, 12, 5, 9, 3, 1]
    plan = batches(lengths, method, size)
    assert sorted(i for batch in plan for i in batch) == list(range(9))
    assert all(len(batch) == size for batch in plan[:-1]) and 0 < len(plan[-1]) <= size
    flat = [i for batch in plan for i in batch]
    if method == "batched":  # by length: least padding
        assert [lengths[i] for i in flat] == sorted(lengths)
    else:  # in the order given: `batched_unmasked` is padded as the write-up's batches were
        assert flat == list(range(9))


def test_positions_count_from_each_prompts_own_first_token():
    """Rotary embeddings only see differences, so no logit would tell: what the model is handed is looked at."""
    model, given = tiny_model("qwen2"), {}
    model.model.register_forward_pre_hook(lambda module, args, kwargs: given.update(kwargs), with_kwargs=True)
    last_token_resid_pre(model, PROMPTS, "batched", 0)
    for mask, positions, ids in zip(given["attention_mask"], given["position_ids"], PROMPTS, strict=True):
        assert positions[mask == 1].tolist() == list(range(len(ids)))
