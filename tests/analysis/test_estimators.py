"""Estimators against analytic discriminants, and the optimised direction against the ablation it is to be used in."""

import math

import pytest
import torch
from tiny import tiny_direction, tiny_model
from torch import nn

from refusal.analysis import estimators
from refusal.analysis.estimators import _Learned, first_token, first_token_loss, lda, logistic, optimised
from refusal.io.store import Store
from refusal.method.directions import cosine
from refusal.method.interventions import SITES, ablation, intervene

PAIRS = [([5, 6, 7, 20 + i], [5, 8 + i % 3, 20 + i]) for i in range(12)]
HARMFUL, SAFE = [h for h, _ in PAIRS], [s for _, s in PAIRS]


def sets(n, d=8, seed=0):
    """Two Gaussians of one covariance: the best discriminant is C^-1 (difference of means), far from the difference."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d, d, dtype=torch.float64, generator=generator) + 0.3 * torch.eye(d)
    delta = torch.randn(d, dtype=torch.float64, generator=generator)
    harmful, safe = (torch.randn(n, d, dtype=torch.float64, generator=generator) @ mix.T for _ in range(2))
    best = torch.linalg.solve(mix @ mix.T, delta)
    delta = delta / float((delta @ best) ** 0.5)  # so that the classes lie 1 standard deviation apart
    return harmful + delta + 5, safe + 5, delta, best / best.norm()


@pytest.mark.parametrize("estimate", [logistic, lda])
def test_discriminants_find_the_analytic_one_and_not_the_difference(estimate):
    harmful, safe, delta, best = sets(20_000)
    found = estimate(harmful, safe)
    assert float(found.norm()) == pytest.approx(1)
    assert float(cosine(found, best)) > 0.99 > 0.9 > abs(float(cosine(found, delta)))


@pytest.mark.parametrize("estimate", [logistic, lda])
def test_discriminants_of_few_prompts_and_idle_coordinates_are_finite(estimate):
    harmful, safe, _, _ = sets(6, 40)
    harmful[:, 3] = safe[:, 3] = 7.0
    found = estimate(harmful.float(), safe.float())
    assert found.isfinite().all() and float(found.norm()) == pytest.approx(1)
    assert abs(float(found[3])) < 1e-6


@pytest.mark.parametrize("sites", SITES)
def test_the_learned_ablation_is_the_ablation(sites):
    model, v = tiny_model("qwen2").requires_grad_(False), tiny_direction()
    with torch.no_grad():
        wanted = first_token(model, SAFE, 0)
        ours = first_token_loss(model, _Learned(nn.Parameter(3 * v), sites), HARMFUL, SAFE, wanted, 0)
        total = 0.0
        for prompts in (HARMFUL, SAFE):  # one prompt at a time, by the study's own hooks
            for i, prompt in enumerate(prompts):
                with intervene(model, ablation(v, 1.0, sites)):
                    q = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
                p = model(torch.tensor([SAFE[i]])).logits[0, -1].log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
    assert float(ours) == pytest.approx(total / (2 * len(PAIRS)), rel=1e-4)
    assert float(ours) > 0.01


def test_the_gradient_is_the_finite_difference():
    model, v = tiny_model("qwen2").double().requires_grad_(False), tiny_direction(seed=3).double()
    along = tiny_direction(seed=4).double()
    with torch.no_grad():
        wanted = first_token(model, SAFE, 0)

    def loss(vector):
        return first_token_loss(model, _Learned(vector, "resid_pre"), HARMFUL, SAFE, wanted, 0)

    parameter = nn.Parameter(v.clone())
    loss(parameter).backward()
    with torch.no_grad():
        # Logits are compared in float32, so the step must not be too small.
        slope = (loss(nn.Parameter(v + 1e-2 * along)) - loss(nn.Parameter(v - 1e-2 * along))) / 2e-2
    assert float(parameter.grad @ along) == pytest.approx(float(slope), rel=0.02)


def test_the_steps_are_adams_along_the_mean_gradient_of_the_pairs_drawn(tmp_path):
    """Adam by its formulas (Kingma and Ba 2015), the rate falling to zero in a line, one prompt a forward; the loss is the mean
    of the last ten, each that before its step."""
    model, n_steps, n_pairs = tiny_model("qwen2").requires_grad_(False), 12, 9
    unit, loss = optimised(model, "w", HARMFUL, SAFE, "resid_pre", 0, n_steps, n_pairs, 5, Store(tmp_path / "s.sqlite"))
    wanted = [model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1) for prompt in SAFE]
    generator = torch.Generator().manual_seed(5)  # the same draws: a start, and with replacement the pairs of each step
    vector = torch.randn(32, generator=generator)
    vector, first, second, losses = vector / vector.norm(), torch.zeros(32), torch.zeros(32), []
    for step in range(1, n_steps + 1):
        chosen = torch.randint(0, len(PAIRS), (n_pairs,), generator=generator).tolist()
        vector.requires_grad_(True)
        v, divergences = vector / vector.norm(), []
        hooks = [
            block.register_forward_pre_hook(lambda _, args, v=v: (args[0] - (args[0] @ v)[..., None] * v, *args[1:]))
            for block in model.model.layers
        ]
        for i in chosen:
            for prompt in (HARMFUL[i], SAFE[i]):
                after = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
                divergences.append((wanted[i].exp() * (wanted[i] - after)).sum())  # from the safe half of the same pair
        for hook in hooks:
            hook.remove()
        total = torch.stack(divergences).mean()
        losses.append(total.item())
        (slope,) = torch.autograd.grad(total, vector)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        rate = 0.05 * (1 - (step - 1) / n_steps)
        change = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        vector = vector.detach() - rate * change
        vector /= vector.norm()
    assert loss == pytest.approx(sum(losses[-10:]) / 10, rel=1e-4) and loss > 0.01
    assert torch.allclose(unit.float(), vector, atol=1e-4)


def test_one_store_keeps_apart_all_that_changes_a_direction(tmp_path):
    """Another start, step or model gives another direction, though the store holds the first."""
    model, other, half = (
        tiny_model("qwen2", **how).requires_grad_(False) for how in ({}, {"seed": 1}, {"dtype": torch.bfloat16})
    )
    store = Store(tmp_path / "s.sqlite")

    def run(**change):
        given = {"model": model, "weights": "w", "harmful": HARMFUL, "safe": SAFE, "sites": "resid_pre", "pad_id": 0}
        return optimised(**given | {"steps": 3, "batch_size": 4, "seed": 0, "store": store} | change)

    changes = (
        {},
        {"model": other, "weights": "other"},
        {"model": half},
        {"harmful": HARMFUL[::-1]},
        {"safe": SAFE[::-1]},
        {"sites": "writes"},
        {"steps": 4},
        {"batch_size": 5},
        {"seed": 1},
    )
    found = [run(**change) for change in changes]
    assert len({(loss, *unit.tolist()) for unit, loss in found}) == len(changes)


def test_optimising_finds_a_lower_loss_once_and_the_store_keeps_it(tmp_path, monkeypatch):
    model = tiny_model("qwen2").requires_grad_(False)
    calls = []
    forward = estimators.first_token
    monkeypatch.setattr(estimators, "first_token", lambda *args: calls.append(1) or forward(*args))

    def run(seed=0, steps=40):
        return optimised(model, "weights", HARMFUL, SAFE, "resid_pre", 0, steps, 12, seed, Store(tmp_path / "s.sqlite"))

    found, loss = run()
    assert float(found.norm()) == pytest.approx(1, abs=1e-6) and math.isfinite(loss)
    with torch.no_grad():
        wanted = first_token(model, SAFE, 0)
        losses = [
            float(first_token_loss(model, _Learned(nn.Parameter(v), "resid_pre"), HARMFUL, SAFE, wanted, 0))
            for v in [found.float(), *tiny_direction(rows=20)]
        ]
    assert losses[0] < min(losses[1:])
    n = len(calls)
    again, same = run()
    assert len(calls) == n and torch.equal(again, found) and same == loss
    run(seed=1, steps=2)
    assert len(calls) > n
    assert all(p.grad is None for p in model.parameters())
