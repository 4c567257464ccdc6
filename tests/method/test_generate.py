"""Greedy generation against transformers' own, and batches of interventions against each row alone, with no cache."""

from dataclasses import replace

import pytest
import torch
from tiny import SUPPORTED, tiny_direction, tiny_lm, tiny_model

from refusal.io.errors import UserError
from refusal.method import activations
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import POSITIONS, Ablation, Addition, Intervention, intervene
from refusal.method.kv_cache import SlotCache

LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
UNTIED = {"tie_word_embeddings": False}  # tied, Gemma says the last token again for ever
OVERRIDES = {
    "mistral": {"sliding_window": 4},
    "mixtral": {"sliding_window": 4},
    "phi3": {"sliding_window": 4},
    "gemma": UNTIED,
    "gemma2": {"sliding_window": 4, "layer_types": LAYERS, **UNTIED},
    "gemma3_text": {"sliding_window": 4, "layer_types": LAYERS, **UNTIED},
    "qwen3": {"use_sliding_window": True, "sliding_window": 5, "layer_types": LAYERS},
}
MODELS = {name: OVERRIDES.get(name, {}) for name in SUPPORTED}
LENGTHS = (7, 3, 12, 7, 1, 9, 5, 2)
N_NEW = 14


def random_prompts(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = random_prompts()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return tiny_model(request.param, **MODELS[request.param])


def cut(v, alpha=1.0, sites="resid_pre"):
    return Intervention("cut", v, alpha, sites)


def rows_of(directions, alphas, sites="resid_pre"):
    """An intervention a row."""
    return [cut(v, float(alpha), sites) for v, alpha in zip(directions, alphas, strict=True)]


def complete(model, prompts, stop=(), n=N_NEW, interventions=(), slots=256, pad_id=0, **more):
    return generate(replace(tiny_lm(model, stop=stop), pad_id=pad_id), prompts, Decoding(n, slots), interventions, **more)


@torch.no_grad()
def naive(model, ids, n_new=N_NEW, intervention=None, addition=None):
    """One prompt, no cache, no stop: the whole text anew for each token; an addition acts at the prompt, its end or all."""
    tokens = []

    def add(_module, args, kwargs):
        r = (args[0] if args else kwargs["hidden_states"]).clone()
        at = {"prompt": slice(len(ids)), "last_prompt_token": slice(len(ids) - 1, len(ids)), "all": slice(None)}
        r[:, at[addition.positions]] += addition.vector
        return ((r, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": r})

    for _ in range(n_new):
        handle = addition and model.model.layers[addition.layer].register_forward_pre_hook(add, with_kwargs=True)
        with intervene(model, *([] if intervention is None else [Ablation([intervention])])):
            logits = model(torch.tensor([ids + tokens]), use_cache=False).logits[0, -1]
        if handle:
            handle.remove()
        tokens.append(int(logits.argmax()))
    return tokens


def until(runs, stop):
    """Each run up to its first stop token."""
    return [run[: next((i for i, token in enumerate(run) if token in stop), len(run))] for run in runs]


def chosen_stops(model, runs):
    """Two tokens that end some rows early, some late and some not at all."""
    counts = {}
    for run in runs:
        for token in set(run[1:]):
            counts[token] = counts.get(token, 0) + 1
    some = sorted((token for token in counts if counts[token] < len(runs) - 1), key=lambda token: -counts[token])
    return set(some[:2])


def test_equals_transformers_greedy(model):
    free = [naive(model, ids) for ids in PROMPTS]
    stop = chosen_stops(model, free)
    ours = complete(model, PROMPTS, stop)
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
    rows = rows_of(tiny_direction(rows=len(PROMPTS)), (0.0, 0.5, 1.0, 1.5, 1.0, 0.75, 0.0, 1.25), sites)
    alone = [naive(model, ids, intervention=row) for ids, row in zip(PROMPTS, rows, strict=True)]
    stop = chosen_stops(model, alone)
    alone = until(alone, stop)
    assert len({len(run) for run in alone}) > 2
    assert complete(model, PROMPTS, stop, interventions=rows) == alone
    plain = complete(model, PROMPTS, stop)
    changed = [a != b for a, b in zip(alone, plain, strict=True)]
    assert [changed[i] for i in (0, 6)] == [False, False] and sum(changed) >= 4  # alpha 0 does nothing, the others do


@pytest.mark.parametrize("positions", POSITIONS)
def test_addition_acts_where_it_is_said_to(model, positions):
    addition = Addition(4 * tiny_direction(seed=3), 1, positions)
    for prompts, slots in ((PROMPTS, 256), (ENTERING, 4)):
        wanted = [naive(model, ids, addition=addition) for ids in prompts]
        assert complete(model, prompts, slots=slots, addition=addition) == wanted
        for other in POSITIONS:
            elsewhere = complete(model, prompts, addition=replace(addition, positions=other))
            assert (elsewhere == wanted) is (other == positions)
        changed = sum(a != b for a, b in zip(wanted, complete(model, prompts), strict=True))
        assert changed >= (1 if positions == "last_prompt_token" else 4)  # at one token it does less
        with intervene(model, addition):  # at every position, decoding included
            everywhere = complete(model, prompts)
        assert (everywhere == wanted) is (positions == "all")


def test_addition_with_ablation_and_rows_that_end(model):
    v, vector = tiny_direction(seed=4), 4 * tiny_direction(seed=3)
    vector -= (vector @ v) * v  # orthogonal, so that it does not matter which of the two acts first
    addition = Addition(vector, 2)
    free = [naive(model, ids, intervention=cut(v), addition=addition) for ids in PROMPTS]
    stop = chosen_stops(model, free)
    wanted = until(free, stop)
    assert len({len(run) for run in wanted}) > 2
    assert complete(model, PROMPTS, stop, interventions=[cut(v)], addition=addition) == wanted


def test_a_row_does_not_depend_on_its_neighbours(model):
    together = complete(model, PROMPTS, {5, 17})
    assert together == [complete(model, [ids], {5, 17})[0] for ids in PROMPTS]
    assert together == complete(model, PROMPTS, {5, 17}, pad_id=77)  # nor on which token pads
    assert together[::-1] == complete(model, PROMPTS[::-1], {5, 17})


SHARED = [3, 70, 41, 8, 55]
ENTERING = [[*SHARED, *tail] for tail in random_prompts((4, 1, 9, 4, 6, 1, 2, 6, 12, 4, 3), seed=1)]
CELL = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1]


@pytest.fixture
def moves(monkeypatch):
    """The calls that move rows and the window of columns."""
    called = []
    for name in ("move_rows", "move_window"):
        method = getattr(SlotCache, name)

        def spy(self, *args, name=name, method=method):
            called.append(name)
            method(self, *args)

        monkeypatch.setattr(SlotCache, name, spy)
    return called


def test_rows_enter_as_others_leave(model, monkeypatch, moves):
    """Two or four slots for eleven rows of three interventions, and an addition: every row as if alone and without a cache."""
    vector = 3 * tiny_direction(seed=7)
    directions = torch.nn.functional.normalize(
        torch.stack([v - (v @ vector) * vector / 9 for v in tiny_direction(rows=3)]), dim=-1
    )
    cuts, addition = rows_of(directions, (0.0, 1.0, 1.5)), Addition(vector, 1)  # orthogonal: either may act first
    free = [naive(model, ids, intervention=cuts[c], addition=addition) for ids, c in zip(ENTERING, CELL, strict=True)]
    stop = chosen_stops(model, free)
    wanted = until(free, stop)
    assert len({len(run) for run in wanted}) > 2
    for forward, slots in ((0, 2), (99, 4)):  # rows of one length a prefill; all padded to the longest
        monkeypatch.setattr(activations, "_FORWARD", forward)
        assert complete(model, ENTERING, stop, N_NEW, cuts, slots, rows=CELL, addition=addition) == wanted
    assert "move_rows" in moves
    # The first row to enter ends early and few others do: from then on slots are never empty together, and columns run out.
    first = free[min(range(len(ENTERING)), key=lambda i: len(ENTERING[i]))]
    rare = min(first[1:6], key=lambda token: sum(token in run for run in free))
    assert complete(model, ENTERING, {rare}, N_NEW, cuts, 2, rows=CELL, addition=addition) == until(free, {rare})
    assert "move_window" in moves


@pytest.mark.parametrize("sites", ["paper", "writes"])
def test_interventions_share_slots_at_other_sites(model, sites):
    cuts, prompts, rows = rows_of(tiny_direction(rows=3), (0.5, 1.0, 1.5), sites), ENTERING[:7], CELL[:7]
    wanted = [naive(model, ids, intervention=cuts[c]) for ids, c in zip(prompts, rows, strict=True)]
    assert complete(model, prompts, interventions=cuts, slots=4, rows=rows) == wanted


@pytest.mark.parametrize("model", ["qwen2", "mistral"], indirect=True)
def test_a_row_that_diverges_is_refused_and_not_written_as_text(model):
    """An ablation far beyond alpha 2 diverges to NaN, which argmax would take for the likeliest token."""
    cuts, prompts = [cut(tiny_direction()), cut(tiny_direction(), 1e38)], sorted(ENTERING, key=len)
    with cuts[1].on(model):
        assert model(torch.tensor([prompts[0]])).logits.isnan().all()
    assert len(complete(model, prompts[:2], interventions=cuts, rows=[0, 0], slots=2)) == 2
    for slots in (1, 2):
        with pytest.raises(UserError, match=r"model\.dtype: the model computes NaN or infinity in float32"):
            complete(model, prompts[:2], interventions=cuts, rows=[0, 1], slots=slots)


@pytest.fixture
def counted(model):
    """Tokens of each forward, and logits of each."""
    tokens, logits = [], []
    handles = [
        model.model.register_forward_pre_hook(
            lambda _m, _a, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
        ),
        model.lm_head.register_forward_hook(lambda _m, _a, out: logits.append(out[..., 0].numel())),
    ]
    yield tokens, logits
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("model", ["qwen2", "gemma3_text"], indirect=True)
def test_counts_are_the_closed_form(model, counted, monkeypatch):
    """With slots for 4 of 8 rows, and prompts in two groups of equal length that fill them."""
    monkeypatch.setattr(activations, "_FORWARD", 0)
    tokens, logits = counted
    prompts = [[*SHARED, *tail] for tail in random_prompts((3, 6, 6, 3, 3, 6, 3, 6), seed=2)]
    complete(model, prompts, interventions=rows_of(tiny_direction(rows=2), (1, 1), "paper"), rows=[0, 1] * 4, slots=4)
    decoded = [4] * (2 * N_NEW)
    # The common beginning once a cell; the rest of each prompt but its last token; each new token once.
    assert sorted(tokens) == sorted([2 * 5, 4 * 2, 4 * 5, *decoded])
    assert logits == decoded  # of one position of each row, and none at prefill
    for counts in counted:
        counts.clear()
    complete(model, prompts)
    assert sum(logits) == 8 * N_NEW and len(tokens) == 1 + 2 + N_NEW and sum(tokens) == 5 + 4 * 2 + 4 * 5 + 8 * N_NEW


@pytest.mark.parametrize("model", ["qwen2"], indirect=True)
def test_ended_rows_are_not_computed(model, counted):
    tokens, logits = counted
    free = [naive(model, ids) for ids in PROMPTS]
    stop = chosen_stops(model, free)
    tokens.clear(), logits.clear()
    ours = complete(model, PROMPTS, stop)
    # A row that ends by a stop token has computed it too.
    assert sum(logits) == sum(min(len(run) + 1, N_NEW) for run in ours) < len(PROMPTS) * N_NEW
    assert logits == sorted(logits, reverse=True)


def test_limits(model):
    assert complete(model, []) == [] and complete(model, PROMPTS, n=0) == [[]] * len(PROMPTS)
    assert complete(model, PROMPTS, range(96)) == [[]] * len(PROMPTS)  # everything stops
    assert [len(run) for run in complete(model, PROMPTS, n=1)] == [1] * len(PROMPTS)
    assert [run[:4] for run in complete(model, PROMPTS, n=9)] == complete(model, PROMPTS, n=4)


@pytest.mark.parametrize("slots", [3, 256])
def test_progress_is_told_step_by_step_and_ends_in_all(model, slots):
    told = []
    completions = complete(model, PROMPTS, slots=slots, progress=told.append)
    assert told == sorted(told) and told[-1] == N_NEW * len(PROMPTS) == sum(map(len, completions))
    assert max(b - a for a, b in zip([0, *told], told, strict=False)) <= slots  # a token of each live row
    stop, told = [completions[0][1]], []
    complete(model, PROMPTS, stop, slots=slots, progress=told.append)
    assert told == sorted(told) and told[-1] == N_NEW * len(PROMPTS)
