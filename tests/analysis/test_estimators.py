"""Estimators against analytic discriminants, and the optimised direction against the ablation it is to be used in."""

import pytest
import torch
from tiny import tiny_direction, tiny_lm
from torch import nn

from refusal.analysis.estimators import _Learned, first_token, first_token_loss, lda, logistic, optimised
from refusal.io.params import Optimised
from refusal.io.store import Store
from refusal.method.directions import cosine
from refusal.method.interventions import SITES, Intervention

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


@pytest.fixture
def lm():
    lm = tiny_lm()
    lm.model.requires_grad_(False)
    return lm


def run(lm, tmp_path, steps=3, batch_size=4, seed=0, harmful=HARMFUL, safe=SAFE, sites="resid_pre"):
    settings = Optimised(steps=steps, batch_size=batch_size)
    return optimised(lm, harmful, safe, sites, settings, seed, Store(tmp_path / "s.sqlite"))


@torch.no_grad()
def loss_of(lm, vector, sites="resid_pre"):
    return float(first_token_loss(lm, _Learned(nn.Parameter(vector), sites), HARMFUL, SAFE, first_token(lm, SAFE)))


@pytest.mark.parametrize("sites", SITES)
def test_the_learned_ablation_is_the_ablation(lm, sites):
    v, total = tiny_direction(), 0.0
    with torch.no_grad():
        for prompts in (HARMFUL, SAFE):  # one prompt at a time, by the study's own hooks
            for i, prompt in enumerate(prompts):
                with Intervention("v", v, 1.0, sites).on(lm.model):
                    q = lm.model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
                p = lm.model(torch.tensor([SAFE[i]])).logits[0, -1].log_softmax(-1)
                total += float((p.exp() * (p - q)).sum())
    assert loss_of(lm, 3 * v, sites) == pytest.approx(total / (2 * len(PAIRS)), rel=1e-4) and total > 1


def test_the_steps_are_adams_along_the_mean_gradient_of_the_pairs_drawn(lm, tmp_path):
    """Adam by its formulas (Kingma and Ba 2015), the rate falling to zero in a line, one prompt a forward; the loss is the mean
    of the last ten, each that before its step."""
    model, n_steps, n_pairs = lm.model, 12, 9
    unit, loss = run(lm, tmp_path, n_steps, n_pairs, 5)
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


CHANGES = (
    {},
    {"lm": tiny_lm(weights="other", seed=1)},
    {"lm": tiny_lm(dtype=torch.bfloat16)},
    {"harmful": HARMFUL[::-1]},
    {"safe": SAFE[::-1]},
    {"sites": "writes"},
    {"steps": 4},
    {"batch_size": 5},
    {"seed": 1},
)


def test_one_store_keeps_apart_all_that_changes_a_direction(lm, tmp_path):
    """Another start, step or model gives another direction, though the store holds the first; what it holds is computed once."""
    given, calls = {"lm": lm, "tmp_path": tmp_path}, []
    learned = [run(**given | change) for change in CHANGES]
    assert len({(loss, *unit.tolist()) for unit, loss in learned}) == len(CHANGES)
    lm.model.register_forward_pre_hook(lambda *_: calls.append(1))
    (unit, loss), (again, same) = learned[0], run(**given)
    assert torch.equal(again, unit) and same == loss and not calls
    assert all(p.grad is None for p in lm.model.parameters())


def test_what_is_learned_has_a_lower_loss_than_random_directions(lm, tmp_path):
    unit, _ = run(lm, tmp_path, 40, 12)
    assert float(unit.norm()) == pytest.approx(1, abs=1e-6)
    assert loss_of(lm, unit.float()) < min(loss_of(lm, v) for v in tiny_direction(rows=20))


def test_several_threads_learn_the_same_direction(lm, tmp_path, threads):
    found = []
    for n in (1, 2):
        threads(n)
        (tmp_path / str(n)).mkdir()
        found.append(run(lm, tmp_path / str(n), 3, 12))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-6) and found[0][1] == pytest.approx(found[1][1], rel=1e-5)
