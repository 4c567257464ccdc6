"""Where zero lies in closed form; AUROC against scikit-learn's; their intervals by simulation."""

import random

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from refusal.analysis.zero import auroc, origin_between_means, resampled_weights


def test_origin_between_means():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4000, generator=generator).double()
    topics = [i % 40 for i in range(4000)]
    for safe_mean, harmful_mean, expected in ((0, 80, 0.0), (-40, 40, 0.5), (-100, -20, 1.25), (10, 90, -0.125)):
        found = origin_between_means(noise[0] + harmful_mean, noise[1] + safe_mean, topics, 200, 0)
        assert found["zero"] == pytest.approx(expected, abs=0.01)
        assert found["zero_low"] <= found["zero"] <= found["zero_high"] and found["n"] == 4000
        assert found["safe_q50"] == pytest.approx(safe_mean, abs=0.1)
        assert found["harmful_q95"] == pytest.approx(harmful_mean + 1.645, abs=0.1)


def test_the_interval_of_zero_draws_whole_topics():
    """Topics with a level of their own, against a loop over topics and prompts with another generator."""
    rng, topics = np.random.default_rng(4), [i // 6 for i in range(180)]
    levels = rng.normal(0, 1, (2, 30))
    harmful, safe = (levels[side][topics] + 0.2 * rng.normal(size=180) + 4 * side for side in (1, 0))
    found = origin_between_means(torch.tensor(harmful), torch.tensor(safe) - 1, topics, 4000, 0)
    pick, resampled = random.Random(1), []
    for _ in range(4000):
        drawn = [6 * topic + i for topic in pick.choices(range(30), k=30) for i in range(6)]
        ours, theirs = harmful[drawn].mean(), safe[drawn].mean() - 1
        resampled.append(-theirs / (ours - theirs))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert [found["zero_low"], found["zero_high"]] == pytest.approx([low, high], abs=0.08 * (high - low))
    assert found["zero"] == pytest.approx((1 - safe.mean()) / (harmful.mean() - safe.mean() + 1))
    for name, values in (("harmful", harmful), ("safe", safe - 1)):
        assert found[f"{name}_mean"] == pytest.approx(values.mean())
        quantiles = [found[f"{name}_q{q}"] for q in ("05", "25", "50", "75", "95")]
        assert quantiles == pytest.approx(np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist())


def test_auroc_is_scikit_learns_ties_included():
    rng = np.random.default_rng(0)
    for shift in (0, 1, 3):
        harmful, safe = rng.integers(0, 6, 60) + shift, rng.integers(0, 6, 60)
        found = auroc(torch.tensor(harmful), torch.tensor(safe), range(60), 100, 0)
        assert found["auroc"] == pytest.approx(roc_auc_score([1] * 60 + [0] * 60, [*harmful, *safe]))
        assert found["auroc_low"] <= found["auroc"] <= found["auroc_high"]
    assert auroc(torch.ones(3) + 1, torch.ones(3), range(3), 10, 0)["separable"] is True
    assert auroc(torch.ones(3), torch.ones(3), range(3), 10, 0)["separable"] is False


def test_the_interval_of_auroc_is_that_of_pairs_counted_one_by_one():
    rng = np.random.default_rng(2)
    harmful, safe, topics = rng.integers(0, 9, 40) + 1, rng.integers(0, 9, 40), [i % 12 for i in range(40)]
    found = auroc(torch.tensor(harmful), torch.tensor(safe), topics, 50, 3)
    areas = []
    for weight in torch.cat(list(resampled_weights(topics, 50, 3))).tolist():
        rows = [(i, j) for i in range(40) for j in range(40) for _ in range(int(weight[i] * weight[j]))]
        areas.append(np.mean([(harmful[i] > safe[j]) + 0.5 * (harmful[i] == safe[j]) for i, j in rows]))
    assert [found["auroc_low"], found["auroc_high"]] == pytest.approx(np.quantile(areas, [0.025, 0.975]))


def test_auroc_of_many_prompts_holds_no_table_of_all_pairs():
    values = torch.arange(200_000).double()  # as a table, 320 GB
    found = auroc(values + 0.5, values, [0, 1] * 100_000, 5, 0)
    assert found["auroc"] == pytest.approx(0.5, abs=1e-5) and not found["separable"]


def test_the_interval_of_auroc_covers():
    rng, held, n_samples = np.random.default_rng(1), 0, 400
    truth = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for sample in range(n_samples):
        found = auroc(torch.tensor(rng.normal(1, 1, 100)), torch.tensor(rng.normal(0, 1, 100)), range(100), 300, sample)
        held += found["auroc_low"] <= truth <= found["auroc_high"]
    assert 0.915 < held / n_samples < 0.98
