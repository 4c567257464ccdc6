"""Out of memory halves a batch and changes no value. Memory is a limit on the rows of a forward, set by the test."""

import pytest
import torch
from tiny import tiny_direction, tiny_model
from transformers import DynamicCache

from refusal.analysis.harmless_kl import answer_log_probs
from refusal.io.errors import UserError
from refusal.lm import counts as tally
from refusal.lm import memory
from refusal.lm.load import load_model
from refusal.method.activations import last_token_resid_pre
from refusal.method.generate import generate
from refusal.method.interventions import Addition, ablation

PROMPTS = [[5 + i, 9, 30 + i][: 1 + i % 3] * (1 + i % 4) for i in range(7)]


@pytest.fixture(autouse=True)
def _nothing_learnt():
    memory._fits.clear()
    tally.SIZES.clear()


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2")


def narrow(monkeypatch, model, rows: int, step: int = 0, error=torch.OutOfMemoryError) -> list[int]:
    """From forward `step` on, more than `rows` rows don't fit; the sizes tried."""
    tried: list[int] = []
    forward = model.model.forward

    def limited(*args, **kwargs):
        n = len(kwargs["input_ids"])
        tried.append(n)
        if n > rows and len(tried) > step:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", limited)
    return tried


@pytest.mark.parametrize("method", ["batched", "batched_unmasked"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_activations(model, monkeypatch, capsys, method, error):
    whole = last_token_resid_pre(model, PROMPTS, method, 0)
    tried = narrow(monkeypatch, model, 2, error=error)
    assert (last_token_resid_pre(model, PROMPTS, method, 0) - whole).abs().max() < 1e-5
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1]
    tried.clear()
    last_token_resid_pre(model, PROMPTS, method, 0)
    assert max(tried) == 1  # what did not fit is not tried again
    assert "activations: out of memory with 7 rows at once, going on with 3" in capsys.readouterr().err


@pytest.mark.parametrize("step", [0, 1, 4])
def test_generation_with_a_direction_and_an_addition_a_row(model, monkeypatch, step):
    def run():
        edit = ablation(tiny_direction(rows=7), torch.tensor([1.0, 0.0, 1.5, 1.0, 0.5, 2.0, 1.0]), "resid_pre")
        return generate(model, PROMPTS, {7, 11, 40, 41}, 12, 0, edit, Addition(3 * tiny_direction(rows=7, seed=1), 1))

    whole = run()
    assert len({len(c) for c in whole}) > 1  # some end early, so rows leave before and after memory runs out
    narrow(monkeypatch, model, 3, step)
    assert run() == whole


def test_log_probabilities(model, monkeypatch):
    answers = [[3, 4], [5], [6, 7, 8], [9], [10, 11], [12], [13]]
    whole = answer_log_probs(model, PROMPTS, answers, 0)
    narrow(monkeypatch, model, 3)
    for ours, theirs in zip(answer_log_probs(model, PROMPTS, answers, 0), whole, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_one_row_that_does_not_fit_is_one_sentence(model, monkeypatch):
    narrow(monkeypatch, model, 0)
    with pytest.raises(UserError, match=r"memory runs out at a single row of generation: use bfloat16, or device: auto"):
        generate(model, PROMPTS, {7}, 3, 0)


def test_other_errors_pass(model, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(model.model, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        last_token_resid_pre(model, PROMPTS, "batched", 0)


def test_device_auto_gives_the_same_model(model, tmp_path):
    model.save_pretrained(tmp_path)
    auto = load_model(tmp_path, device="auto")
    ids = torch.tensor([PROMPTS[2]])
    assert torch.equal(auto(ids).logits, model(ids).logits)
    assert torch.equal(last_token_resid_pre(auto, PROMPTS, "batched", 0), last_token_resid_pre(model, PROMPTS, "batched", 0))


# --- batch_size: auto ------------------------------------------------------------------------------------------------------


def test_a_number_asked_for_is_taken(model):
    assert memory.rows_at_once(7, model, 1, "sweep") == 7 and "sweep.batch_size" not in tally.SIZES


def test_auto_fills_half_of_what_the_weights_leave_and_is_said_and_noted(model, monkeypatch, capsys):
    cache = DynamicCache()
    with torch.no_grad():
        model(torch.full((1, 64), 5), past_key_values=cache, use_cache=True)
    kept = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)) * memory.ROW // 64
    logits = 4 * 9 * model.config.vocab_size
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    found = {}
    for room in (10**7, 10**8, 10**12):
        monkeypatch.setattr(memory, "device_memory", lambda _, room=room: weights + 2 * room)
        found[room] = memory.rows_at_once("auto", model, 9, "sweep")
        assert found[room] * (kept + logits) <= room
        assert capsys.readouterr().err == f"sweep: batch_size auto is {found[room]} rows here\n"
        assert tally.SIZES["sweep.batch_size"] == found[room]
    assert 1 <= found[10**7] < found[10**8] < found[10**12] == memory.MOST
    assert all(rows & (rows - 1) == 0 for rows in found.values())


def test_weights_that_leave_no_room_are_one_sentence(model, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda _: 1000)
    with pytest.raises(UserError, match=r"params\.yaml: sweep\.batch_size: auto finds no room for a single row"):
        memory.rows_at_once("auto", model, 1, "sweep")
