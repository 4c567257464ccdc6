"""Activations of whole sets: where they go, what is stored, what memory holds."""

import gc

import pytest
import torch
from refusal.method.collection import collect, prompt_sets
from safetensors.torch import load_file, save
from tiny import tiny_model

from refusal.io.store import Store
from refusal.lm.checkpoint import Writer
from refusal.method import collection
from refusal.method.activations import Prefix, last_token_resid_pre

METHODS = ("sequential", "batched", "batched_unmasked")


def sets(n=11):
    generator = torch.Generator().manual_seed(0)
    draw = lambda k: torch.randint(3, 90, (k,), generator=generator).tolist()  # noqa: E731
    head = [91, 92, 93, 94]
    return {
        name: [head + draw(1 + (3 * i) % 7) for i in range(n + k)]
        for k, name in enumerate(("train.safe", "train.harmful", "val.safe"))
    }


def run(model, where, method, given, batch_size=4, file="out.safetensors"):
    collect(model, "hash", given, method, 0, batch_size, Store(where / "store.sqlite"), where / file)
    return load_file(where / file)


def test_a_set_holds_one_side_of_one_split():
    pairs = [{"split": split, "harmful": f"h{i}", "safe": f"s{i}"} for i, split in enumerate(("val", "train", "test", "train"))]
    unrelated = [{"split": split, "safe": f"u{i}"} for i, split in enumerate(("train", "test", "val", "val"))]
    found = prompt_sets(pairs, unrelated, ("train", "val"))
    assert list(found.items()) == [
        ("train.harmful", ["h1", "h3"]),
        ("train.safe", ["s1", "s3"]),
        ("train.unrelated", ["u0"]),
        ("val.harmful", ["h0"]),
        ("val.safe", ["s0"]),
        ("val.unrelated", ["u2", "u3"]),
    ]
    assert prompt_sets(pairs, [], ("test",)) == {"test.harmful": ["h2"], "test.safe": ["s2"], "test.unrelated": []}


@pytest.mark.parametrize("method", METHODS)
def test_each_row_is_its_prompts(tmp_path, method):
    model, given = tiny_model("qwen2"), sets()
    found = run(model, tmp_path, method, given)
    assert set(found) == set(given)
    for name, prompts in given.items():
        if method == "batched_unmasked":  # padded within batches of four, in the order given
            parts = [last_token_resid_pre(model, prompts[i : i + 4], method, 0) for i in range(0, len(prompts), 4)]
            assert torch.equal(found[name], torch.cat(parts))
        else:
            assert (found[name] - last_token_resid_pre(model, prompts, "sequential", 0)).abs().max() < 1e-5
    assert (tmp_path / "out.safetensors").read_bytes() == save(found)  # as safetensors itself would write it


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_ends_in_the_same_bytes_and_repeats_no_forward(tmp_path, method, monkeypatch):
    model, given = tiny_model("qwen2"), sets()
    run(model, tmp_path, method, given)
    whole = (tmp_path / "out.safetensors").read_bytes()

    forwards: list[torch.Size] = []
    model.model.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(kwargs["input_ids"].shape), with_kwargs=True)
    again = tmp_path / "again"
    again.mkdir()
    put, n = Store.put, 0

    def failing(self, key, value):
        nonlocal n
        n += 1
        if n == 4:
            raise KeyboardInterrupt
        put(self, key, value)

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        run(model, again, method, given)
    assert sorted(p.name for p in again.iterdir() if "sqlite" not in p.name) == []
    monkeypatch.undo()
    run(model, again, method, given)
    assert (again / "out.safetensors").read_bytes() == whole
    total = len(forwards)
    run(model, again, method, given, file="third.safetensors")
    assert len(forwards) == total  # all is stored
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    run(model, fresh, method, given)
    # The batch that was cut off runs once more, and so does the beginning that all share; three batches do not.
    once_more = (4 if method == "sequential" else 1) + (1 if method == "batched" else 0)
    assert total == len(forwards) - total + once_more


def test_one_store_keeps_apart_all_that_changes_a_value(tmp_path, monkeypatch):
    computed = []
    monkeypatch.setattr(collection, "last_token_resid_pre", lambda *args: computed.append(args) or last_token_resid_pre(*args))
    model, given, store = tiny_model("qwen2"), sets(), Store(tmp_path / "store.sqlite")
    other, half = tiny_model("qwen2", seed=1), tiny_model("qwen2", dtype=torch.bfloat16)

    def new(model=model, weights="hash", method="sequential", pad=0, given=given, batch_size=4):
        """What is found, and how many batches were computed for it."""
        n = len(computed)
        collect(model, weights, given, method, pad, batch_size, store, tmp_path / "out.safetensors")
        return load_file(tmp_path / "out.safetensors"), len(computed) - n

    for change in (
        {},
        {"model": other, "weights": "other"},
        {"model": half},
        {"method": "batched"},
        {"method": "batched_unmasked"},
        {"method": "batched_unmasked", "pad": 5},
    ):
        found, n = new(**change)
        assert n > 0 and new(**change)[1] == 0, change
        for name, prompts in given.items():  # as without a store
            of, method = change.get("model", model), change.get("method", "sequential")
            parts = [prompts[i : i + 4] for i in range(0, len(prompts), 4)] if method == "batched_unmasked" else [prompts]
            wanted = torch.cat([last_token_resid_pre(of, part, method, change.get("pad", 0)) for part in parts])
            assert torch.allclose(found[name], wanted, atol=1e-5), (change, name)
    # The same prompts one by one behind a shorter beginning, since another set begins with something else.
    alone = {"given": {"train.safe": given["train.safe"]}, "method": "batched", "batch_size": 1}
    assert new(**alone)[1] > 0 and new(**alone)[1] == 0
    assert new(**alone | {"given": alone["given"] | {"val.safe": [[3, 4]]}})[1] == len(given["train.safe"]) + 1


def test_the_shared_beginning_is_computed_once_for_all_sets(tmp_path):
    model, given, shapes = tiny_model("qwen2"), sets(), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    run(model, tmp_path, "batched", given)
    assert Prefix(model, [p for prompts in given.values() for p in prompts]).ids == [91, 92, 93, 94]
    assert shapes[0] == (1, 4) and sum(rows for rows, _ in shapes[1:]) == sum(map(len, given.values()))
    needed = sum(len(p) - 4 for prompts in given.values() for p in prompts)
    assert needed <= sum(rows * width for rows, width in shapes[1:]) < 2 * needed


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_the_prompts(tmp_path, method, monkeypatch):
    """Bytes of all tensors that are alive whenever rows are written: one batch, whatever the number of prompts."""
    held: list[int] = []

    class Watched(Writer):
        def put(self, name, rows, values):
            gc.collect()
            held.append(sum(t.nbytes for t in gc.get_objects() if type(t) is torch.Tensor and t.dtype == torch.float32))
            super().put(name, rows, values)

    monkeypatch.setattr(collection, "Writer", Watched)
    model, peaks = tiny_model("qwen2"), []
    gc.freeze()  # what is there already is not looked through again
    for n in (8, 128):
        held.clear()
        folder = tmp_path / str(n)
        folder.mkdir()
        run(model, folder, method, sets(n), batch_size=8)
        peaks.append(max(held))
    gc.unfreeze()
    row = 3 * 32 * 4
    assert peaks[1] <= peaks[0] + 8 * row
