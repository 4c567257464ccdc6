"""Greedy generation against transformers' own, and batches of interventions against each row alone, with no cache."""

import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.generation import generate
from refusal.interventions import Addition, ablation, intervene

MODELS = {
    "qwen2": {},
    "llama": {},
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, "tie_word_embeddings": False},  # tied, it says the last token again for ever
    "qwen3": {},
}
LENGTHS = (7, 3, 12, 7, 1, 9, 5, 2)
N_NEW = 14


def random_prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = random_prompts()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny_model(request.param, **MODELS[request.param])


@torch.no_grad()
def naive(model, ids, stop, n_new=N_NEW, edit=None, vector=None, layer=None):
    """One prompt, no cache: the whole text anew for each token; the vector is added at prompt positions only."""
    tokens = []

    def add(_module, args, kwargs):
        r = (args[0] if args else kwargs["hidden_states"]).clone()
        r[:, : len(ids)] += vector
        return ((r, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": r})

    for _ in range(n_new):
        handle = None if vector is None else model.model.layers[layer].register_forward_pre_hook(add, with_kwargs=True)
        with intervene(model, *([] if edit is None else [ablation(*edit)])):
            logits = model(torch.tensor([ids + tokens]), use_cache=False).logits[0, -1]
        if handle:
            handle.remove()
        token = int(logits.argmax())
        if token in stop:
            break
        tokens.append(token)
    return tokens


def chosen_stops(model, runs):
    """Two tokens that end some rows early, some late and some not at all."""
    counts = {}
    for run in runs:
        for token in set(run[1:]):
            counts[token] = counts.get(token, 0) + 1
    some = sorted((token for token in counts if counts[token] < len(runs) - 1), key=lambda token: -counts[token])
    return set(some[:2])


def test_equals_transformers_greedy(model):
    free = [naive(model, ids, ()) for ids in PROMPTS]
    stop = chosen_stops(model, free)
    ours = generate(model, PROMPTS, stop, N_NEW, 0)
    assert len({len(run) for run in ours}) > 2  # rows ended at several places
    for ids, run in zip(PROMPTS, ours, strict=True):
        theirs = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=N_NEW,
            eos_token_id=sorted(stop),
            pad_token_id=0,
        )[0, len(ids) :].tolist()
        assert run == [token for token in theirs if token not in stop]
    width = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (width - len(ids)) + ids for ids in PROMPTS])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in PROMPTS])
    together = model.generate(
        padded, attention_mask=mask, do_sample=False, max_new_tokens=N_NEW, eos_token_id=sorted(stop), pad_token_id=0
    )[:, width:].tolist()
    for run, theirs in zip(ours, together, strict=True):
        assert run == theirs[: len(run)] and (len(run) == N_NEW or theirs[len(run)] in stop)


@pytest.mark.parametrize("sites", ["resid_pre", "paper", "writes"])
def test_rows_of_different_interventions_share_a_batch(model, sites):
    directions = tiny_direction(rows=len(PROMPTS))
    alphas = torch.tensor([0.0, 0.5, 1.0, 1.5, 1.0, 0.75, 0.0, 1.25])
    alone = [
        naive(model, ids, (), edit=(v, float(alpha), sites)) for ids, v, alpha in zip(PROMPTS, directions, alphas, strict=True)
    ]
    stop = chosen_stops(model, alone)
    alone = [
        naive(model, ids, stop, edit=(v, float(alpha), sites)) for ids, v, alpha in zip(PROMPTS, directions, alphas, strict=True)
    ]
    assert len({len(run) for run in alone}) > 2
    assert generate(model, PROMPTS, stop, N_NEW, 0, ablation=ablation(directions, alphas, sites)) == alone
    plain = generate(model, PROMPTS, stop, N_NEW, 0)
    changed = [a != b for a, b in zip(alone, plain, strict=True)]
    assert [changed[i] for i in (0, 6)] == [False, False] and sum(changed) >= 4  # alpha 0 does nothing, the others do


def test_addition_acts_on_the_prompt_alone(model):
    vector = 4 * tiny_direction(seed=3)
    wanted = [naive(model, ids, (), vector=vector, layer=1) for ids in PROMPTS]
    assert generate(model, PROMPTS, (), N_NEW, 0, addition=Addition(vector, 1)) == wanted
    assert sum(a != b for a, b in zip(wanted, generate(model, PROMPTS, (), N_NEW, 0), strict=True)) >= 4
    with intervene(model, Addition(vector, 1)):  # at every position, decoding included: another thing
        everywhere = generate(model, PROMPTS, (), N_NEW, 0)
    assert everywhere != wanted


def test_addition_with_ablation_and_rows_that_end(model):
    v, vector = tiny_direction(seed=4), 4 * tiny_direction(seed=3)
    vector -= (vector @ v) * v  # orthogonal, so that it does not matter which of the two acts first
    how = {"edit": (v, 1.0, "resid_pre"), "vector": vector, "layer": 2}
    stop = chosen_stops(model, [naive(model, ids, (), **how) for ids in PROMPTS])
    wanted = [naive(model, ids, stop, **how) for ids in PROMPTS]
    assert len({len(run) for run in wanted}) > 2
    assert (
        generate(model, PROMPTS, stop, N_NEW, 0, ablation=ablation(v, 1.0, "resid_pre"), addition=Addition(vector, 2)) == wanted
    )


def test_a_row_does_not_depend_on_its_neighbours(model):
    together = generate(model, PROMPTS, {5, 17}, N_NEW, 0)
    assert together == [generate(model, [ids], {5, 17}, N_NEW, 0)[0] for ids in PROMPTS]
    assert together == generate(model, PROMPTS, {5, 17}, N_NEW, 77)  # nor on which token pads
    assert together[::-1] == generate(model, PROMPTS[::-1], {5, 17}, N_NEW, 0)


def test_limits(model):
    assert generate(model, PROMPTS, range(96), N_NEW, 0) == [[]] * len(PROMPTS)  # everything stops
    assert [len(run) for run in generate(model, PROMPTS, (), 1, 0)] == [1] * len(PROMPTS)
    longer, shorter = generate(model, PROMPTS, (), 9, 0), generate(model, PROMPTS, (), 4, 0)
    assert [run[:4] for run in longer] == shorter
