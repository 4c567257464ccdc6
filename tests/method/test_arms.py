"""Arms of any rank against a naive greedy loop with hooks of its own."""

import json

import pytest
import torch
from refusal.method.arms import BASELINE_ARM, complete_arms, direction_arm, edit, fingerprint, per_layer_arm, subspace_arm
from tiny import tiny_direction, tiny_model

from refusal.analysis.subspaces import random_subspaces
from refusal.io.store import Store
from refusal.method.sweep import Cell, complete

PROMPTS = [[1, 7, 9, 30], [1, 8, 12], [1, 7, 9, 30, 31, 40], [1, 55, 9]]
REST = ((2,), 0, 6, 4)


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2").requires_grad_(False)


def naive(model, prompt, bases, alpha=1.0):
    """Greedy tokens with alpha times the span of bases[layer] taken out of each block's input; no cache, no batch."""

    def hook(basis):
        def change(_module, args, kwargs):
            x = args[0] if args else kwargs["hidden_states"]
            for b in basis:
                x = x - alpha * (x @ b)[..., None] * b
            return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

        return change

    handles = [
        block.register_forward_pre_hook(hook(bases[i].float()), with_kwargs=True)
        for i, block in enumerate(model.model.layers)
        if i in bases
    ]
    ids = list(prompt)
    try:
        with torch.no_grad():
            while len(ids) < len(prompt) + 6:
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == 2:
                    break
                ids.append(token)
    finally:
        for handle in handles:
            handle.remove()
    return ids[len(prompt) :]


def test_arms_of_every_sort_equal_the_naive_loop(model, tmp_path):
    unit = torch.stack([tiny_direction(seed=i) for i in range(3)])
    three, two = random_subspaces(32, 3, 1, 0)[0], random_subspaces(32, 2, 1, 0)[0]
    arms = [
        BASELINE_ARM,
        direction_arm("one", "single", unit[0], 1.0, 1),
        subspace_arm("three", "subspace", three),
        subspace_arm("two", "subspace", two, 0.5),
        direction_arm("one, half", "single", unit[0], 0.5, 1),
        per_layer_arm("each", "per_layer", unit, [1, 2], "resid_pre"),
        per_layer_arm("each, half", "per_layer", unit, [1, 2], "resid_pre", 0.5),
    ]
    bases = {
        "baseline": {},
        "one": dict.fromkeys(range(3), unit[:1]),
        "three": dict.fromkeys(range(3), three),
        "two": dict.fromkeys(range(3), two),
        "one, half": dict.fromkeys(range(3), unit[:1]),
        "each": {1: unit[1:2], 2: unit[2:3]},
        "each, half": {1: unit[1:2], 2: unit[2:3]},
    }
    found = complete_arms(model, "w", PROMPTS, arms, "resid_pre", *REST, Store(tmp_path / "s.sqlite"), "test")
    assert list(found) == list(bases)
    for name, by_layer in bases.items():
        alpha = 0.5 if name == "two" or "half" in name else 1.0
        assert found[name] == [naive(model, prompt, by_layer, alpha) for prompt in PROMPTS], name
    assert len({str(tokens) for tokens in found.values()}) == len(arms)  # each arm does something of its own


def test_a_subspace_of_rank_1_is_the_sweeps_cell(model, tmp_path):
    v = tiny_direction()
    store = Store(tmp_path / "s.sqlite")
    arm = subspace_arm("v", "subspace", v[None], 1.5)
    ours = complete_arms(model, "w", PROMPTS, [arm], "writes", *REST, store, "test")["v"]
    assert ours == complete(model, "w", PROMPTS, [Cell("c", None, 1.5, v)], "writes", *REST, store, "test")["c"]


def test_what_is_stored_is_found_again_and_nothing_else(model, tmp_path, monkeypatch):
    from refusal.method import sweep

    calls = []
    generate = sweep.generate
    monkeypatch.setattr(sweep, "generate", lambda *args, **more: calls.append(1) or generate(*args, **more))
    three = random_subspaces(32, 3, 2, 0)
    store = Store(tmp_path / "s.sqlite")

    def run(arm, sites="resid_pre"):
        n = len(calls)
        complete_arms(model, "w", PROMPTS, [arm], sites, *REST, store, "test")
        return len(calls) - n

    arm = subspace_arm("a", "subspace", three[0])
    assert run(arm) > 0 and run(arm) == 0
    assert run(arm, "writes") > 0
    for other in (
        subspace_arm("a", "subspace", three[1]),
        subspace_arm("a", "subspace", three[0], alpha=0.5),
        subspace_arm("a", "subspace", three[0][:2]),
        per_layer_arm("a", "per_layer", three[0], [0, 1, 2], "resid_pre"),
        per_layer_arm("a", "per_layer", three[0], [0, 1], "resid_pre"),
    ):
        assert run(other) > 0
    renamed = subspace_arm("b", "other", three[0])
    assert run(renamed) == 0


def test_a_fingerprint_tells_apart_all_that_does_something_else():
    v, other = tiny_direction(), tiny_direction(seed=1)
    three = random_subspaces(32, 3, 2, 0)
    arms = [
        BASELINE_ARM,
        direction_arm("a", "f", v),
        direction_arm("a", "f", other),
        direction_arm("a", "f", v, 0.5),
        direction_arm("a", "f", v, offset=torch.ones(3)),
        direction_arm("a", "f", v, offset=torch.tensor([1.0, 2.0, 3.0])),
        subspace_arm("a", "f", three[0]),
        subspace_arm("a", "f", three[1]),
        subspace_arm("a", "f", three[0][:2]),
        subspace_arm("a", "f", three[0], 0.5),
        per_layer_arm("a", "f", three[0], [1, 2], "resid_pre"),
        per_layer_arm("a", "f", three[1], [1, 2], "resid_pre"),
        per_layer_arm("a", "f", three[0], [0, 2], "resid_pre"),
        per_layer_arm("a", "f", three[0], [1, 2], "writes"),
        per_layer_arm("a", "f", three[0], [1, 2], "resid_pre", 0.5),
    ]
    marks = [json.dumps(fingerprint(arm, sites)) for arm in arms for sites in ("resid_pre", "paper", "writes")]
    assert len(set(marks)) == len(marks)
    alike = direction_arm("b", "other", v.clone(), 1.0, 2, fixed=True)  # by another name, and where it was found
    assert fingerprint(alike, "paper") == fingerprint(direction_arm("a", "f", v), "paper")


def test_an_edit_is_what_an_arm_does(model):
    three = random_subspaces(32, 3, 1, 0)[0]
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        plain = model(ids).logits
        for arm in (BASELINE_ARM, direction_arm("v", "single", three[0]), subspace_arm("s", "subspace", three)):
            with edit(arm, "paper")(model):
                changed = not torch.equal(model(ids).logits, plain)
            assert changed is (arm is not BASELINE_ARM)
    assert BASELINE_ARM.rank == 0 and subspace_arm("s", "f", three).rank == 3
