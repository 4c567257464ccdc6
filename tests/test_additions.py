"""Where the difference is added, against a naive loop without a cache, and against the study's own addition."""

import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.additions import WHERE, added
from refusal.generation import generate
from refusal.interventions import Addition
from refusal.store import Store

PROMPTS = [[1, 7, 9, 30], [1, 8, 12], [1, 7, 9, 30, 31, 40], [1, 55, 9]]
LAYER, N = 1, 6


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2").requires_grad_(False)


def naive(model, prompt, vector, where):
    """Greedy tokens with the vector added at the chosen positions; the whole text is computed again for every token."""
    ids = list(prompt)

    def hook(_module, args, kwargs):
        x = (args[0] if args else kwargs["hidden_states"]).clone()
        at = {"prefill": range(len(prompt)), "last": [len(prompt) - 1], "all": range(x.shape[1])}[where]
        x[:, list(at)] += vector
        return ((x, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": x})

    handle = model.model.layers[LAYER].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            while len(ids) < len(prompt) + N:
                token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
                if token == 2:
                    break
                ids.append(token)
    finally:
        handle.remove()
    return ids[len(prompt) :]


def test_every_place_equals_the_naive_loop(model, tmp_path):
    vector, store, seen = 4 * tiny_direction(), Store(tmp_path / "s.sqlite"), []
    for where in WHERE:
        found = added(model, "w", PROMPTS, vector, LAYER, where, {2}, 0, N, 3, store)
        assert found == [naive(model, prompt, vector, where) for prompt in PROMPTS], where
        seen.append(found)
    assert len({str(tokens) for tokens in seen}) == 3


def test_prefill_is_the_studys_addition(model, tmp_path):
    vector = 4 * tiny_direction()
    ours = added(model, "w", PROMPTS, vector, LAYER, "prefill", {2}, 0, N, 4, Store(tmp_path / "s.sqlite"))
    assert ours == generate(model, PROMPTS, {2}, N, 0, addition=Addition(vector, LAYER))
