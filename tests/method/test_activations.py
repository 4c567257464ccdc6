"""Activations against TransformerLens's bridge, transformers' own hidden states, and each other; and what becomes of whole sets:
where rows go, what is stored, what memory holds."""

import copy
import gc
import itertools
import re
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import SUPPORTED, tiny_lm, tiny_prompts

from refusal.io.errors import UserError
from refusal.io.prompts import prompt_sets
from refusal.io.store import Store
from refusal.lm.stream import stream_of
from refusal.method import activations
from refusal.method.activations import Prefix, activations_file, batches, collect, last_token_resid_pre, left_pad

METHODS = ("sequential", "batched", "batched_unmasked")
LENGTHS = (7, 3, 12, 7, 1, 9)
# The token that pads is in some of them too.
PROMPTS = [[0 if i % 5 == 2 else token for i, token in enumerate(ids)] for ids in tiny_prompts(LENGTHS)]
ALIKE = [[*range(50, 56), *ids] for ids in PROMPTS]  # six tokens that all begin with


def hidden_states(lm, prompts, n=1):
    """[batch, n_layers, d_model]: what transformers says goes into each layer, a prompt at a time; the mean of its last n tokens."""
    with torch.no_grad():
        runs = [lm.model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in prompts]
    return torch.stack([torch.stack([sum(layer[0, -k] for k in range(1, n + 1)) / n for layer in run[:-1]]) for run in runs])


@pytest.mark.parametrize("model_type", SUPPORTED)
@pytest.mark.parametrize(("prompts", "window"), [(PROMPTS, 4), (ALIKE, 4), (ALIKE, 9)])
def test_sequential_and_batched_equal_hidden_states_and_unmasked_does_not(model_type, prompts, window):
    """Windows, where the architecture has them, are shorter than the longest prompt; one ends within the shared beginning, one
    after it."""
    lm = tiny_lm(model_type, **({"sliding_window": window} if model_type in {"gemma2", "gemma3_text", "mistral"} else {}))
    sequential, batched, unmasked = (last_token_resid_pre(lm, prompts, method) for method in METHODS)
    expected = hidden_states(lm, prompts)
    limit = 1e-5 * expected.abs().max()
    assert torch.equal(sequential, expected) and (batched - expected).abs().max() < limit
    apart, lengths = (unmasked - expected).abs().amax((1, 2)), [*map(len, prompts)]
    assert apart[lengths.index(max(lengths))] < limit  # nothing was padded there
    # A long prompt's last token may not see its padding through windows; a short one's does.
    assert all(apart[i] > 100 * limit for i in range(len(prompts)) if lengths[i] < 4)
    if prompts is ALIKE:  # what they begin with does matter
        assert (hidden_states(lm, PROMPTS) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("n", [1, 2, 6])
def test_means_over_the_last_tokens(n):
    """Six tokens are what the shortest prompt has, besides which the batch has a beginning in common."""
    lm, prompts = tiny_lm(), [[*ALIKE[0][:5], 9], *([*ids, 60, 61, 62] for ids in ALIKE)]
    expected = hidden_states(lm, prompts, n)
    for method in METHODS[:2]:
        assert (last_token_resid_pre(lm, prompts, method, n_positions=n) - expected).abs().max() < 1e-5 * expected.abs().max()
    of_one_length = [prompts[1], [token + 1 for token in prompts[1]]]  # nothing is padded
    unmasked = last_token_resid_pre(lm, of_one_length, "batched_unmasked", n_positions=n)
    assert (unmasked - hidden_states(lm, of_one_length, n)).abs().max() < 1e-5 * expected.abs().max()
    assert n == 1 or (expected - hidden_states(lm, prompts)).abs().max() > 1e-2 * expected.abs().max()


def test_a_prompt_of_fewer_tokens_than_are_averaged_is_named(tmp_path):
    lm, given = tiny_lm(), {"train.harmful": [[5, 6, 7, 8]], "train.safe": [[5, 6, 7]]}
    for n, said in ((4, "params.yaml: activations.n_positions: a prompt has 3 tokens: set 3 or less"), (3, None)):
        with pytest.raises(UserError, match=re.escape(said)) if said else nullcontext():
            collect(lm, given, "batched", 2, Store(tmp_path / "s.sqlite"), tmp_path / "out.safetensors", n)
    found = load_file(tmp_path / "out.safetensors")
    for name, prompts in given.items():
        torch.testing.assert_close(found[name], hidden_states(lm, prompts, 3), rtol=1e-5, atol=1e-6)
    # Another number of tokens is another value: the store gives none of the first.
    collect(lm, given, "batched", 2, Store(tmp_path / "s.sqlite"), tmp_path / "one.safetensors")
    one = load_file(tmp_path / "one.safetensors")["train.safe"]
    torch.testing.assert_close(one, hidden_states(lm, [[5, 6, 7]]), rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def bridged(tmp_path_factory):
    """A model and TransformerLens's bridge to it."""
    from transformer_lens.model_bridge import TransformerBridge

    lm, folder = tiny_lm(), str(tmp_path_factory.mktemp("bridge"))
    lm.model.save_pretrained(folder)
    theirs = copy.deepcopy(lm.model)
    return lm, TransformerBridge.boot_transformers(folder, hf_model=theirs, device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("prompts", [PROMPTS, ALIKE])
@pytest.mark.parametrize("method", METHODS)
def test_equals_transformer_lens(bridged, method, prompts):
    """The write-up's batched code is the bridge on left-padded ids, with no attention mask; the others, on a prompt alone."""
    lm, bridge = bridged
    groups = [[ids] for ids in prompts]
    if method == "batched_unmasked":
        width = max(map(len, prompts))
        groups = [[[0] * (width - len(ids)) + ids for ids in prompts]]
    caches = [bridge.run_with_cache(torch.tensor(group))[1] for group in groups]
    theirs = torch.cat([torch.stack([cache[f"blocks.{i}.hook_resid_pre"][:, -1] for i in range(3)], 1) for cache in caches])
    assert (last_token_resid_pre(lm, prompts, method) - theirs).abs().max() < 1e-5


def test_the_models_dtype_is_kept_and_no_hook_stays_after_a_failure_either():
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    rows = last_token_resid_pre(lm, PROMPTS[:2], "batched")
    assert rows.dtype == torch.bfloat16 and rows.shape == (2, 3, 32) and not rows.requires_grad
    with pytest.raises(IndexError):
        last_token_resid_pre(lm, [[5, 6, 999]], "sequential")  # no such token
    assert not any(block._forward_pre_hooks for block in lm.model.model.layers)


def test_left_pad():
    ids, mask = left_pad([[5, 6], [7, 8, 9], [4]], 1)
    assert ids.tolist() == [[1, 5, 6], [7, 8, 9], [1, 1, 4]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("method", ["sequential", "batched_unmasked"])
@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_in_the_order_given(method, size):
    plan = batches([9, 3, 7, 3, 12, 5, 9, 3, 1], method, size)  # the write-up's batches are padded so
    assert [i for batch in plan for i in batch] == [*range(9)]
    assert all(len(batch) == size for batch in plan[:-1]) and len(plan[-1]) <= size


@pytest.mark.parametrize("size", [1, 2, 4, 100])
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
    assert sorted(i for batch in plan for i in batch) == [*range(10)] and max(map(len, plan)) <= size
    assert sum(len(batch) * max(lengths[i] for i in batch) + 32 for batch in plan) == min(costs)


def watched(model):
    """What runs from here on: the shape of each forward's ids, and the blocks that run in it."""
    shapes, blocks = [], []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    for layer, block in enumerate(model.model.layers):
        block.self_attn.register_forward_pre_hook(lambda *_, layer=layer: blocks.append(layer), with_kwargs=True)
    return shapes, blocks


def test_what_is_computed_is_counted():
    """The shared beginning once, then what differs, padded to the longest: no last block, and no logits."""
    lm, positions = tiny_lm(), []
    stream_of(lm.model)  # looks at two tokens, once a model
    lm.model.lm_head.register_forward_pre_hook(lambda *_: pytest.fail("logits are computed"))
    # Rotary embeddings see differences alone, so no activation would tell whether positions go on after the beginning.
    lm.model.model.rotary_emb.register_forward_pre_hook(lambda _, args: positions.append(args[1].tolist()))
    shapes, blocks = watched(lm.model)
    last_token_resid_pre(lm, ALIKE, "batched")
    assert shapes == [(1, 6), (6, 12)] and blocks == [0, 1] * 2
    assert positions == [[list(range(6))], [list(range(6, 18))]]
    shapes.clear(), blocks.clear()
    last_token_resid_pre(lm, ALIKE, "sequential")
    assert shapes == [(1, 6 + n) for n in LENGTHS] and blocks == [0, 1] * 6


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
    lm = tiny_lm()
    prefix = Prefix(lm.model, prompts)
    assert prefix.ids == expected and (prefix.cache(3) is None) == (not expected)
    assert (last_token_resid_pre(lm, prompts, "batched", prefix) - hidden_states(lm, prompts)).abs().max() < 1e-5


@pytest.mark.parametrize("prompt", [[5, 7, 8], [5, 6]])
def test_a_prompt_that_does_not_begin_with_the_prefix_is_an_error(prompt):
    lm = tiny_lm()
    with pytest.raises(ValueError, match="does not begin with the prefix"):
        last_token_resid_pre(lm, [[5, 6, 9], prompt], "batched", Prefix(lm.model, [[5, 6, 7], [5, 6, 8]]))


def sets(n=11):
    """Three sets of unlike numbers of prompts, which all begin alike."""
    lengths = [1 + (3 * i) % 7 for i in range(n + 2)]
    names = ("train.safe", "train.harmful", "val.safe")
    return {
        name: [[91, 92, 93, 94, *(1 + t % 90 for t in ids)] for ids in tiny_prompts(lengths[: n + k], k)]
        for k, name in enumerate(names)
    }


def written(lm, where, method, given, batch_size=4, file="out.safetensors"):
    """What is in the file that `collect` writes."""
    where.mkdir(exist_ok=True)
    collect(lm, given, method, batch_size, Store(where / "store.sqlite"), where / file)
    return load_file(where / file)


def test_a_set_holds_one_side_of_one_split():
    pairs = [{"split": split, "harmful": f"h{i}", "safe": f"s{i}"} for i, split in enumerate(("val", "train", "test", "train"))]
    unrelated = [{"split": split, "safe": f"u{i}"} for i, split in enumerate(("train", "test", "val", "val"))]
    assert list(prompt_sets(pairs, unrelated, ("train", "val")).items()) == [
        ("train.harmful", ["h1", "h3"]),
        ("train.safe", ["s1", "s3"]),
        ("train.unrelated", ["u0"]),
        ("val.harmful", ["h0"]),
        ("val.safe", ["s0"]),
        ("val.unrelated", ["u2", "u3"]),
    ]
    assert prompt_sets(pairs, [], ("test",)) == {"test.harmful": ["h2"], "test.safe": ["s2"], "test.unrelated": []}
    alone = [row | {"safe": None} for row in pairs]
    assert prompt_sets(alone, unrelated, ("val",)) == {"val.harmful": ["h0"], "val.unrelated": ["u2", "u3"]}


def one_by_one(lm, given, method):
    """Of each set, what `last_token_resid_pre` gives of its prompts, by fours where the neighbours matter."""
    size = 4 if method == "batched_unmasked" else 1
    of = "batched_unmasked" if method == "batched_unmasked" else "sequential"
    return {
        name: torch.cat([last_token_resid_pre(lm, prompts[i : i + size], of) for i in range(0, len(prompts), size)])
        for name, prompts in given.items()
    }


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_in_the_same_bytes_and_repeats_no_forward(tmp_path, method, monkeypatch):
    lm, given = tiny_lm(), sets()
    rows = written(lm, tmp_path / "whole", method, given)
    assert set(rows) == set(given)
    for name, expected in one_by_one(lm, given, method).items():
        assert torch.allclose(rows[name], expected, atol=1e-5)
    whole = (tmp_path / "whole/out.safetensors").read_bytes()
    assert whole == save(rows)  # as safetensors itself would write it

    forwards, _ = watched(lm.model)
    again, put, n = tmp_path / "again", Store.put, itertools.count(1)

    def failing(self, key, value):
        if next(n) == 4:
            raise KeyboardInterrupt
        put(self, key, value)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Store, "put", failing)
        written(lm, again, method, given)
    assert [path for path in again.iterdir() if "sqlite" not in path.name] == []
    written(lm, again, method, given)
    assert (again / "out.safetensors").read_bytes() == whole
    total = len(forwards)
    written(lm, again, method, given, file="third.safetensors")
    assert len(forwards) == total  # all is stored
    written(lm, tmp_path / "fresh", method, given)
    # The batch that was cut off runs once more, and so does the beginning that all share; three batches do not.
    once_more = (4 if method == "sequential" else 1) + (1 if method == "batched" else 0)
    assert total == len(forwards) - total + once_more


def test_one_store_keeps_apart_all_that_changes_a_value(tmp_path, monkeypatch):
    computed, given, lm, put = [], sets(), tiny_lm(), Store.put
    monkeypatch.setattr(Store, "put", lambda *args: computed.append(1) or put(*args))

    def new(lm=lm, method="sequential", given=given, batch_size=4):
        """What is written, and how many batches were computed for it."""
        n = len(computed)
        return written(lm, tmp_path, method, given, batch_size), len(computed) - n

    for change in (
        {},
        {"lm": tiny_lm(weights="other", seed=1)},
        {"lm": tiny_lm(dtype=torch.bfloat16)},
        {"method": "batched"},
        {"method": "batched_unmasked"},
        {"lm": replace(lm, pad_id=5), "method": "batched_unmasked"},
    ):
        rows, n = new(**change)
        assert n > 0 and new(**change)[1] == 0, change
        for name, expected in one_by_one(change.get("lm", lm), given, change.get("method")).items():  # as without a store
            assert torch.allclose(rows[name], expected, atol=1e-5), (change, name)
    # The same prompts one by one behind a shorter beginning, since another set begins with something else.
    alone = {"given": {"train.safe": given["train.safe"]}, "method": "batched", "batch_size": 1}
    assert new(**alone)[1] > 0 and new(**alone)[1] == 0
    assert new(**alone | {"given": alone["given"] | {"val.safe": [[3, 4]]}})[1] == len(given["train.safe"]) + 1


def test_the_shared_beginning_is_computed_once_for_all_sets(tmp_path):
    lm, given = tiny_lm(), sets()
    shapes, _ = watched(lm.model)
    written(lm, tmp_path, "batched", given)
    assert Prefix(lm.model, [p for prompts in given.values() for p in prompts]).ids == [91, 92, 93, 94]
    assert shapes[0] == (1, 4) and sum(rows for rows, _ in shapes[1:]) == sum(map(len, given.values()))
    needed = sum(len(p) - 4 for prompts in given.values() for p in prompts)
    assert needed <= sum(rows * width for rows, width in shapes[1:]) < 2 * needed


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_prompts(tmp_path, method, monkeypatch):
    """Bytes of all tensors that are alive whenever rows are written: one batch, whatever the number of prompts."""
    held, peaks, lm = [], [], tiny_lm()

    @contextmanager
    def weighed(*args):
        with activations_file(*args) as put:

            def weigh(*rows):
                gc.collect()
                held.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float32))
                put(*rows)

            yield weigh

    monkeypatch.setattr(activations, "activations_file", weighed)
    gc.freeze()  # what is there already is not looked through again
    for n in (8, 128):
        held.clear()
        written(lm, tmp_path / str(n), method, sets(n), batch_size=8)
        peaks.append(max(held))
    gc.unfreeze()
    row = 3 * 32 * 4
    assert peaks[1] <= peaks[0] + 8 * row
