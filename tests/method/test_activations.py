"""Activations against TransformerLens's bridge, transformers' own hidden states, and each other."""

import copy
import itertools

import pytest
import torch
from tiny import tiny_model

from refusal.lm.architecture import SUPPORTED
from refusal.method.activations import Prefix, batches, last_token_resid_pre, left_pad

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
    assert sorted(i for batch in plan for i in batch) == list(range(9)) and max(map(len, plan)) <= size
    flat = [i for batch in plan for i in batch]
    if method == "batched":  # by length: least padding
        assert [lengths[i] for i in flat] == sorted(lengths)
    else:  # in the order given: `batched_unmasked` is padded as the write-up's batches were
        assert flat == list(range(9)) and all(len(batch) == size for batch in plan[:-1])


@pytest.mark.parametrize("size", [2, 4, 100])
@pytest.mark.parametrize("spread", [1, 7, 60])
def test_batches_are_cut_where_the_least_is_computed(size, spread):
    """Against all ways to cut ten prompts in order of length, one by one."""
    lengths = torch.randint(1, 1 + spread, (10,), generator=torch.Generator().manual_seed(spread)).tolist()
    ordered, costs = sorted(lengths), []
    for cuts in itertools.product([False, True], repeat=9):
        ends = [i + 1 for i in range(9) if cuts[i]] + [10]
        starts = [0, *ends[:-1]]
        if max(e - s for s, e in zip(starts, ends, strict=True)) <= size:
            costs.append(sum((e - s) * ordered[e - 1] + 32 for s, e in zip(starts, ends, strict=True)))
    plan = batches(lengths, "batched", size)
    assert sum(len(batch) * max(lengths[i] for i in batch) + 32 for batch in plan) == min(costs)


def beginning_alike(n_shared=6, lengths=LENGTHS, seed=0):
    return [list(range(50, 50 + n_shared)) + ids for ids in random_prompts(lengths, seed)]


def counted(model):
    """What runs from here on: the ids of each forward, and the blocks that run in it."""
    forwards, blocks = [], []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(kwargs["input_ids"]), with_kwargs=True)
    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, layer=layer: blocks.append(layer), with_kwargs=True)
    return forwards, blocks


def test_what_is_computed_is_counted():
    """The shared beginning once, then what differs, padded to the longest: no last block, and no logits."""
    model, prompts = tiny_model("qwen2"), beginning_alike()
    model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits are computed"))
    forwards, blocks = counted(model)
    last_token_resid_pre(model, prompts, "batched", 0)
    assert [tuple(ids.shape) for ids in forwards] == [(1, 6), (6, 12)] and blocks == [0, 1] * 2
    forwards.clear(), blocks.clear()
    last_token_resid_pre(model, prompts, "sequential", 0)
    assert [tuple(ids.shape) for ids in forwards] == [(1, 6 + n) for n in LENGTHS] and blocks == [0, 1] * 6


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize("window", [4, 9])
def test_a_shared_beginning_changes_nothing(model_type, window):
    # One window is shorter than the beginning, the other ends within what follows it.
    model = tiny_model(model_type, **({"sliding_window": window} if model_type in {"gemma2", "gemma3_text", "mistral"} else {}))
    prompts, scale = beginning_alike(), 0.0
    found, expected = last_token_resid_pre(model, prompts, "batched", 0), hidden_states(model, prompts)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-5 * scale
    assert (hidden_states(model, random_prompts()) - expected).abs().max() > 1e-2 * scale  # it does matter


def test_a_shared_beginning_equals_transformer_lens(tmp_path):
    from transformer_lens.model_bridge import TransformerBridge

    model, prompts = tiny_model("qwen2"), beginning_alike()
    model.save_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=copy.deepcopy(model), device="cpu", dtype=torch.float32)
    for row, ids in zip(last_token_resid_pre(model, prompts, "batched", 0), prompts, strict=True):
        _, cache = bridge.run_with_cache(torch.tensor([ids]))
        for layer in range(3):
            assert (row[layer] - cache[f"blocks.{layer}.hook_resid_pre"][0, -1]).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ([[5, 6, 7, 8], [5, 6, 9]], [5, 6]),
        ([[5, 6, 7], [5, 6], [5, 6, 7, 8]], [5]),  # one token of each is left over
        ([[5, 6], [5, 6]], [5]),
        ([[5, 6], [7, 6]], []),
        ([[5]] * 3, []),
        ([[5, 6, 7]], []),
    ],
)
def test_prefix(prompts, expected):
    model = tiny_model("qwen2")
    prefix = Prefix(model, prompts)
    assert prefix.ids == expected and (prefix.cache(3) is None) == (not expected)
    found = last_token_resid_pre(model, prompts, "batched", 0, prefix)
    assert (found - hidden_states(model, prompts)).abs().max() < 1e-5


def test_a_prompt_that_does_not_begin_with_the_prefix_is_an_error():
    model = tiny_model("qwen2")
    prefix = Prefix(model, [[5, 6, 7], [5, 6, 8]])
    for prompt in ([5, 7, 8], [5, 6]):
        with pytest.raises(ValueError, match="does not begin with the prefix"):
            last_token_resid_pre(model, [[5, 6, 9], prompt], "batched", 0, prefix)


def test_positions_go_on_after_the_shared_beginning():
    """Rotary embeddings only see differences, so no logit would tell: what the model computes with is looked at."""
    model, given = tiny_model("qwen2"), []
    model.model.rotary_emb.register_forward_pre_hook(lambda _, args: given.append(args[1].tolist()))
    last_token_resid_pre(model, beginning_alike(), "batched", 0)
    assert given == [[list(range(6))], [list(range(6, 18))]]
