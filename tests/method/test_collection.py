"""Activations of whole sets: where they go, what is stored, what memory holds."""

import gc

import pytest
import torch
from safetensors.torch import load_file, save
from tiny import tiny_model

from refusal.io.store import Store
from refusal.lm.checkpoint import Writer
from refusal.method import collection
from refusal.method.activations import Prefix, last_token_resid_pre
from refusal.method.collection import collect

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
