"""The sweep's arms say the same and compute as many tokens as their closed forms say."""

from io import StringIO

import pytest
import torch
from rich.console import Console
from tiny import tiny_direction, tiny_model

from perf import sweep
from refusal.method import activations
from refusal.method.interventions import Intervention

N_NEW = 6
GENERATOR = torch.Generator().manual_seed(0)
PROMPTS = [[9, 4, 31, *torch.randint(3, 96, (2 + i % 4,), generator=GENERATOR).tolist()] for i in range(11)]


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2", eos_token_id=None)


@pytest.fixture
def computed(model):
    """Tokens of each forward."""
    tokens = []
    hook = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield tokens
    hook.remove()


def test_all_arms_find_the_same_tokens(model):
    directions, gaps = tiny_direction(rows=2), []
    by_cell = [sweep.generate8(model, PROMPTS, v, N_NEW, gaps) for v in directions]
    assert by_cell[0] != by_cell[1] != sweep.generate8(model, PROMPTS, torch.zeros(32), N_NEW)
    assert [sweep.recompute(model, PROMPTS, v, N_NEW) for v in directions] == by_cell
    assert sweep.ours(model, PROMPTS, directions, N_NEW, 4) == [*by_cell[0], *by_cell[1]]
    assert sweep.compare(sweep.ours(model, PROMPTS, directions[:1], N_NEW, 4), by_cell[0], gaps[: len(PROMPTS)]) == (1.0, 0)
    said = Console(file=StringIO(), width=200)
    assert sweep.beside(said, model, PROMPTS, N_NEW)["gpu_ratio_to_generate8"] > 0
    assert "the same tokens in 1.0000 of rows" in said.file.getvalue()
    for cell, v in enumerate(directions):
        with Intervention("cell", v, 1.0, "paper").on(model):
            for row, prompt in enumerate(PROMPTS):
                logits = model(torch.tensor([prompt + by_cell[cell][row]])).logits[0, len(prompt) - 1 : -1]
                two = logits.topk(2).values
                assert torch.allclose(two[:, 0] - two[:, 1], torch.tensor(gaps[cell * len(PROMPTS) + row]), atol=1e-4)


def test_rows_are_compared_up_to_a_near_tie():
    reference, clear, near = [[1, 2, 3], [4, 5, 6]], [1.0, 1.0, 1.0], [1.0, 1e-5, 1.0]
    assert sweep.compare([[1, 2, 3], [4, 5, 6]], reference, [clear, clear]) == (1.0, 0)
    assert sweep.compare([[1, 2, 3], [4, 5, 7]], reference, [clear, clear]) == (0.5, 0)
    assert sweep.compare([[1, 9, 9], [4, 5, 6]], reference, [near, clear]) == (1.0, 1)
    assert sweep.compare([[9, 2, 3], [4, 5, 6]], reference, [near, near]) == (0.5, 2)
    assert sweep.compare([[1, 2], [4, 5, 6]], reference, [clear, clear]) == (0.5, 0)


def test_tokens_computed_are_the_closed_forms(model, computed, monkeypatch):
    monkeypatch.setattr(activations, "_FORWARD", 0)  # without padding
    sweep.ours(model, PROMPTS, tiny_direction(rows=1), N_NEW, 4)
    assert sum(computed) == sweep.tokens_needed(model, PROMPTS, N_NEW)
    computed.clear()
    sweep.recompute(model, PROMPTS, tiny_direction(), N_NEW)
    assert sum(computed) == sweep.tokens_recomputed(PROMPTS, N_NEW) and len(computed) == N_NEW * len(PROMPTS)


def test_growth_is_in_rows_and_new_tokens(model, computed, monkeypatch):
    monkeypatch.setattr(sweep.workload, "prompts", lambda n: PROMPTS[:n])
    for n_cells, n_new in ((1, 2), (2, 2), (4, 2), (1, 8)):
        computed.clear()
        runs = sweep.growth(model, 4, n_cells, n_new, 4)()
        assert [len(run) for run in runs] == [n_new] * 4 * n_cells
        assert max(computed) <= 4 * max(map(len, PROMPTS)) and computed.count(4) >= n_cells * n_new
