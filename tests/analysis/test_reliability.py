"""Reliability of directions against closed forms, naive loops over splits and prompts, and Gaussians of known cosine."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from pipeline import naive_geometry as naive
from scipy.stats import binom
from synthetic import gaussian

from refusal.analysis.reliability import (
    corrected_cosine,
    direction,
    group_geometry,
    n_for_reliability,
    split_half_cosine,
    step_up,
    true_product,
)

D = 64


def signal(cosine: float, d_model: int = D) -> tuple[torch.Tensor, torch.Tensor]:
    """Two unit vectors of this cosine."""
    axes = torch.eye(d_model, dtype=torch.float64)
    return axes[0], cosine * axes[0] + math.sqrt(1 - cosine**2) * axes[1]


def draw(cosine: float, reliability: float, n: int, share: str, generator: torch.Generator, d_model: int = D):
    """Rows of two directions of this cosine, estimated with this reliability, that have all, half or no prompts in common."""
    scale = math.sqrt((1 - reliability) / reliability * n / d_model / 2)  # of each of two sets
    noise = [scale * torch.randn(n, d_model, generator=generator, dtype=torch.float64) for _ in range(4)]
    (a, b), (harmful, safe, other, fourth) = signal(cosine, d_model), noise
    if share == "pairs":  # the same pairs by two methods: errors with a correlation of .8
        return {"harmful": a + harmful - safe}, {"harmful": b + 0.8 * (harmful - safe) + 0.6 * (other - fourth)}
    if share == "half":  # pairs, and their harmful halves with other safe prompts
        return {"harmful": a + harmful - safe}, {"harmful": b + harmful, "unrelated": -other}
    return {"harmful": a + harmful, "unrelated": -safe}, {"other": b + other, "fourth": -fourth}


def arrays(rows):
    return {name: x.double().numpy() for name, x in rows.items()}


@pytest.mark.parametrize("sizes", [(12, 12), (9, 14)])
def test_split_half_cosine_is_that_of_naive_halves(sizes):
    rows = {"harmful": gaussian(sizes[0], 6) + 1, "unrelated": -gaussian(sizes[1], 6, seed=1)}
    assert split_half_cosine(rows, 30, 4) == pytest.approx(naive.halves(arrays(rows), 30, 4))
    assert split_half_cosine(rows, 30, 5) != split_half_cosine(rows, 30, 4)


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("n", "reliability"), [(10, 0.6), (40, 0.9), (200, 0.5)])
def test_split_halves_stepped_up_are_the_reliability_that_the_draws_were_made_with(n, reliability, paired):
    """|d|^2 / (|d|^2 + N / n) in 4,000 dimensions, where errors are at right angles; so is the product without noise, over all."""
    a, b = draw(0, reliability, n, "half", torch.Generator().manual_seed(n), d_model=4000)
    rows = a if paired else b
    half = split_half_cosine(rows, 100, 0)
    # Half the prompts, twice the noise: r_half = s / (s + 2 N / n).
    assert half == pytest.approx(reliability / (2 - reliability), abs=0.03)
    assert step_up(half, 2) == pytest.approx(reliability, abs=0.03)
    assert true_product(rows, rows) / float(direction(rows).square().sum()) == pytest.approx(reliability, abs=0.03)
    assert n_for_reliability(rows) == pytest.approx(9 * n * (1 - reliability) / reliability, rel=0.12)
    assert n_for_reliability(rows, reliability) == pytest.approx(n, rel=0.12)


def test_step_up_follows_the_noise_of_more_prompts():
    for signal_, noise, times in ((1.0, 3.0, 2), (2.0, 0.5, 7), (1.0, 4.0, 0.25)):
        assert step_up(signal_ / (signal_ + noise), times) == pytest.approx(signal_ / (signal_ + noise / times))


def without(rows, left_out):
    return rows[[i for i in range(len(rows)) if i not in left_out]]


def test_true_product_is_the_mean_over_all_ways_to_halve_the_prompts():
    a = {"harmful": gaussian(6, 5).double() + 0.5}
    b = {"harmful": gaussian(6, 5, seed=1).double() + a["harmful"], "unrelated": gaussian(4, 5, seed=2).double()}
    products = []
    for chosen in combinations(range(6), 3):
        on_the_rest = without(b["harmful"], chosen).mean(0) + b["unrelated"].mean(0)
        products.append(float(a["harmful"][[*chosen]].mean(0) @ on_the_rest))
    assert true_product(a, b) == true_product(b, a) == pytest.approx(np.mean(products))
    halves = [
        float((one[[*i]].mean(0) + other[[*j]].mean(0)) @ (without(one, i).mean(0) + without(other, j).mean(0)))
        for one, other in [b.values()]
        for i in combinations(range(6), 3)
        for j in combinations(range(4), 2)
    ]
    assert true_product(b, b) == pytest.approx(np.mean(halves))


@pytest.mark.parametrize("share", ["pairs", "half", "none"])
def test_corrected_cosine_is_that_of_pairs_of_prompts_and_its_jackknife_a_loop(share):
    a, b = draw(0.6, 0.8, 12, share, torch.Generator().manual_seed(2), d_model=9)
    value, low, high = corrected_cosine(a, b)
    assert (value, low, high) == pytest.approx(naive.corrected(arrays(a), arrays(b)), rel=1e-5)
    if share == "none":  # Spearman's correction for attenuation
        reliability = [true_product(x, x) / float(direction(x) @ direction(x)) for x in (a, b)]
        observed = float(torch.cosine_similarity(direction(a), direction(b), dim=0))
        assert value == pytest.approx(observed / math.sqrt(math.prod(reliability)))


@pytest.mark.parametrize("share", ["pairs", "half", "none"])
@pytest.mark.parametrize(("cosine", "reliability", "n"), [(0.0, 0.5, 40), (0.5, 0.8, 80), (0.9, 0.9, 40)])
def test_the_corrected_cosine_is_unbiased_and_its_interval_covers(share, cosine, reliability, n):
    """Of Gaussians of known cosine. Bounds: what coverage of .93 to .98 gives in all but one of 10,000 such tests."""
    generator, draws = torch.Generator().manual_seed(1), 150
    found = [corrected_cosine(*draw(cosine, reliability, n, share, generator)) for _ in range(draws)]
    covered = sum(low <= cosine <= high for _, low, high in found)
    assert binom.ppf(1e-4, draws, 0.93) <= covered <= binom.ppf(1 - 1e-4, draws, 0.98)
    values = np.array([value for value, _, _ in found])
    assert abs(values.mean() - cosine) < 4 * values.std() / math.sqrt(draws) + 0.05 * (1 - reliability)


def test_without_the_correction_shared_noise_and_noise_alone_mislead():
    """The cosine as it is: too high of directions at right angles that share prompts, too low of one direction measured twice."""
    generator = torch.Generator().manual_seed(3)
    plain = lambda a, b: float(torch.cosine_similarity(direction(a), direction(b), dim=0))  # noqa: E731
    shared = [draw(0.0, 0.5, 40, "pairs", generator) for _ in range(60)]
    assert np.mean([plain(a, b) for a, b in shared]) > 0.3 > 0.15 > abs(np.mean([corrected_cosine(a, b)[0] for a, b in shared]))
    apart = [draw(1.0, 0.8, 40, "none", generator) for _ in range(60)]
    assert np.mean([plain(a, b) for a, b in apart]) == pytest.approx(0.8, abs=0.03)  # the ceiling, sqrt(r r)
    assert np.mean([corrected_cosine(a, b)[0] for a, b in apart]) == pytest.approx(1.0, abs=0.03)


def test_what_cannot_be_told_is_no_number():
    rows, around_zero = {"harmful": gaussian(8, 5) + 3}, {"other": torch.cat([torch.eye(5), -torch.eye(5)])}
    assert corrected_cosine(rows, rows) == pytest.approx((1, 1, 1)) and n_for_reliability(around_zero) == math.inf
    assert all(map(math.isnan, corrected_cosine(rows, around_zero)))
    assert all(map(math.isnan, corrected_cosine(rows, {"other": gaussian(2, 5) + 3})))
    one = {"harmful": torch.ones(1, 5)}
    assert math.isnan(split_half_cosine(one, 3, 0)) and math.isnan(n_for_reliability(one))
    assert all(map(math.isnan, corrected_cosine(one, one)))


@pytest.mark.parametrize("d_model", [7, 50])  # fewer dimensions than prompts, and more
@pytest.mark.parametrize("at_once", [2**22, 200])
def test_group_geometry_is_a_loop_over_groups_and_draws(monkeypatch, d_model, at_once):
    monkeypatch.setattr("refusal.analysis.reliability.AT_ONCE", at_once)
    rows = {"harmful": gaussian(24, d_model) + 0.3, "unrelated": -gaussian(9, d_model, seed=1)}
    groups = [*"aabbbcccca" * 2, *"abcc"]
    expected = naive.geometry(arrays(rows), groups, 25, 3, max(1, at_once // 72))
    assert group_geometry(rows, groups, 25, 3) == pytest.approx(expected)


def test_group_geometry_of_known_shapes():
    """A frame of right angles, a line, and one direction for all groups, which random groups cannot be told from."""
    names = [group for group in "abcd" for _ in range(30)]
    frame = torch.eye(4).repeat_interleave(30, 0) @ torch.eye(4, 200) + 1e-3 * gaussian(120, 200)
    found = group_geometry({"harmful": frame}, names, 50, 0)
    assert found["mean_cosine"] == pytest.approx(0, abs=1e-3) and found["participation_ratio"] == pytest.approx(4, abs=1e-3)
    assert found["mean_cosine_null_low"] > 0.75 and found["participation_ratio_null_high"] < 1.6
    inside, expected = 0, 1 / 1.5  # cosine of two means of 30: |d|^2 / (|d|^2 + N / 30), N / 30 = 1/2
    for seed in range(40):
        same = gaussian(120, 400, seed=seed) * math.sqrt(15 / 400) + torch.eye(1, 400)
        found = group_geometry({"harmful": same}, names, 100, seed)
        inside += found["mean_cosine_null_low"] <= found["mean_cosine"] <= found["mean_cosine_null_high"]
    assert found["mean_cosine_null"] == pytest.approx(expected, abs=0.04)
    assert binom.ppf(1e-4, 40, 0.95) <= inside
