"""Estimators that stand a loud coordinate: against closed forms, scipy, and a direction that is known."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import t
from tiny import tiny_direction

from refusal.analysis.estimated import OF_MEANS, contrast_by, without_noise_of_means
from refusal.analysis.separation import contrast
from refusal.method.directions import cosine, difference_in_means
from refusal.method.robust_means import CENTRES, estimate, geometric_median, winsorized_mean

ROBUST = ("geometric_median", "winsorized", "normalised")


def drawn(seed, n=40, d=6, layers=3):
    generator = torch.Generator().manual_seed(seed)
    harmful, safe = (torch.randn(n, layers, d, generator=generator) + shift for shift in (1.0, 0.0))
    harmful[:, 0] = safe[:, 0] = torch.randn(d, generator=generator)  # the last template token
    return harmful, safe


@pytest.mark.parametrize("paired", [True, False])
def test_mean_is_bitwise_what_it_was(paired):
    harmful, safe = drawn(0)
    ours, plain = estimate(harmful, safe, "mean", paired), difference_in_means(harmful, safe)
    assert all(torch.equal(a, b) for a, b in zip(vars(ours).values(), vars(plain).values(), strict=True))
    sets = {"train.harmful": harmful, "train.safe": safe, "train.unrelated": safe.flip(0)}
    for pairing in ("matched", "shuffled", "unrelated"):
        one, other = contrast_by("mean", sets, pairing, 3), contrast(sets, pairing, 3)
        assert all(torch.equal(a, b) for a, b in zip(vars(one.directions).values(), vars(other.directions).values(), strict=True))


@pytest.mark.parametrize("estimator", ROBUST)
@pytest.mark.parametrize("paired", [True, False])
def test_what_a_layer_gives(estimator, paired):
    """Its vectors go together, and layer 0, where nothing differs, has none."""
    harmful, safe = drawn(1)
    found, plain = estimate(harmful, safe, estimator, paired), difference_in_means(harmful, safe)
    assert found.layers == [1, 2] and not found.unit[0].any()
    for layer in found.layers:
        torch.testing.assert_close(found.unit[layer], found.difference[layer] / found.difference[layer].norm())
        h, s = (x[:, layer].double().numpy() for x in (harmful, safe))
        if estimator == "normalised":
            rows = [(a - b) / np.linalg.norm(a - b) for a, b in zip(h, s, strict=True)]
            if not paired:
                rows = [a / np.linalg.norm(a) - b / np.linalg.norm(b) for a, b in zip(h, s, strict=True)]
            v = np.mean(rows, axis=0)
            assert found.unit[layer].numpy() == pytest.approx(v / np.linalg.norm(v))
            assert float(found.difference[layer].norm()) == pytest.approx(float(plain.difference[layer].norm()))
            assert torch.equal(found.safe_mean[layer], plain.safe_mean[layer])
        else:
            centres = [CENTRES[estimator](torch.from_numpy(x)).numpy() for x in (h, s)]
            assert found.difference[layer].numpy() == pytest.approx(centres[0] - centres[1])
            assert found.safe_mean[layer].numpy() == pytest.approx(centres[1])
            assert not torch.allclose(found.difference[layer], plain.difference[layer], atol=1e-4)


def test_a_pair_that_differs_by_rounding_counts_for_nothing():
    harmful, safe = drawn(2, layers=2)
    safe[0, 1] = harmful[0, 1] * (1 + 1e-7)
    found = estimate(harmful, safe, "normalised", paired=True).unit[1]
    torch.testing.assert_close(found, estimate(harmful[1:], safe[1:], "normalised", paired=True).unit[1])


def test_without_any_difference_nothing_is_defined():
    harmful, _ = drawn(3)
    for estimator in ROBUST:
        assert estimate(harmful, harmful, estimator, paired=True).layers == []


@pytest.mark.parametrize(("n", "d"), [(3, 2), (30, 2), (25, 5), (200, 20)])
def test_the_geometric_median_is_scipys_minimum(n, d):
    x = torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) ** 3
    points, found = x.numpy(), geometric_median(x)
    distance = lambda y: np.linalg.norm(points - y, axis=1).sum()  # noqa: E731
    best = minimize(distance, points.mean(0), method="BFGS", options={"gtol": 1e-9})
    assert distance(found.numpy()) <= best.fun * (1 + 1e-12)
    assert found.numpy() == pytest.approx(best.x, abs=1e-4)


@pytest.mark.parametrize(
    ("points", "median"),
    [
        ([[0, 0], [1, 2], [2, 4], [10, 20], [50, 100]], [2, 4]),  # on a line: the median
        ([[1, 0], [-1, 0], [0, 1], [0, -1]], [0, 0]),  # symmetric: the centre
        ([[1, 0], [-1, 0], [0, 3], [0, -3], [0, 0]], [0, 0]),  # and a point that lies there
        ([[0, 0], [3, 0], [0, 3], [1, 1]], [1, 1]),  # four points, one in the triangle of the others: that one
        ([[5, 5]] * 7 + [[100, -3], [2, 9]], [5, 5]),  # more than half of them in one place
        ([[4, 4]] * 3, [4, 4]),
        ([[1, 7]], [1, 7]),
        # Fermat's point of an equilateral triangle; the mean is there too.
        ([[0, 0], [1, 0], [0.5, 3**0.5 / 2]], [0.5, 3**0.5 / 6]),
    ],
)
def test_the_geometric_median_in_closed_form(points, median):
    assert geometric_median(torch.tensor(points, dtype=torch.float64)).numpy() == pytest.approx(np.array(median), abs=1e-7)


@pytest.mark.parametrize("landed", [0, 1, 2])
def test_the_iteration_leaves_a_point_that_it_lands_on(landed):
    """The mean, where it begins, is one of the points and is not the median."""
    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(landed)) ** 3
    x = torch.cat([x, x.mean(0, keepdim=True)])
    points, found = x.numpy(), geometric_median(x)
    best = minimize(lambda y: np.linalg.norm(points - y, axis=1).sum(), points[0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    assert found.numpy() == pytest.approx(best.x, abs=1e-5) and float((found - x[-1]).norm()) > 1e-3


def test_steps_without_end_are_an_error(monkeypatch):
    monkeypatch.setattr("refusal.method.robust_means.MOST_STEPS", 2)
    with pytest.raises(ArithmeticError, match="of 9 points is not found in 2 steps"):
        geometric_median(torch.randn(9, 3, generator=torch.Generator().manual_seed(0)) ** 3)


@pytest.mark.parametrize("d", [1, 2, 20, 33])
def test_winsorizing_cuts_each_prompt_at_its_own_quantile(d):
    """By sorting: the quantile of d magnitudes lies .95 (d - 1) of the way up, between two of them in proportion."""
    points = torch.randn(9, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d)) ** 3
    cut = []
    for row in points.tolist():
        ordered, at = sorted(map(abs, row)), 0.95 * (d - 1)
        low = int(at)
        most = ordered[low] + (at - low) * (ordered[min(low + 1, d - 1)] - ordered[low])
        cut.append([max(-most, min(most, value)) for value in row])
    assert winsorized_mean(points).numpy() == pytest.approx(np.mean(cut, axis=0), rel=1e-12)
    assert (d == 1) == np.allclose(cut, points)


def test_a_coordinate_that_is_loud_in_every_prompt_is_cut_in_every_prompt():
    x = torch.randn(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    x[:, 3] = 100.0
    assert float(winsorized_mean(x)[3]) <= 2 and float(geometric_median(x)[3]) == pytest.approx(100)


def cosines(noise, n_seeds=60, n=100, d=32):
    """By estimator the cosine to the truth, a study a seed: safe prompts at 0, harmful ones at 1.5 v, v of length 1."""
    v, found = tiny_direction(d).double(), {name: [] for name in ("mean", *ROBUST)}
    for seed in range(n_seeds):
        rng = np.random.default_rng(seed)
        harmful, safe = (torch.from_numpy(noise(rng, n, d))[:, None] for _ in range(2))
        for name, of in found.items():
            of.append(float(cosine(estimate(harmful + 1.5 * v, safe, name, paired=True).unit[0], v)))
    return {name: np.array(of) for name, of in found.items()}


def mean_difference(a, b):
    """Student's 95 % interval of the paired difference over seeds."""
    gap = a - b
    half = t.ppf(0.975, len(gap) - 1) * gap.std(ddof=1) / np.sqrt(len(gap))
    return gap.mean() - half, gap.mean() + half


def test_one_loud_coordinate_of_heavy_tailed_noise_spoils_the_mean_alone():
    """Student's t of 1.1 degrees of freedom, 5 times as large, in one coordinate; 60 seeds of 100 pairs."""

    def loud(rng, n, d):
        x = rng.normal(size=(n, d))
        x[:, 7] = 5 * rng.standard_t(1.1, size=n)
        return x

    found = cosines(loud)
    print({name: round(of.mean(), 3) for name, of in found.items()})
    for name in ROBUST:
        assert mean_difference(found[name], found["mean"])[0] > 0.1, name


def test_on_gaussian_noise_they_lose_little():
    found = cosines(lambda rng, n, d: rng.normal(size=(n, d)))
    print({name: round(of.mean(), 4) for name, of in found.items()})
    assert found["mean"].mean() > 0.85
    for name in ROBUST:
        low, high = mean_difference(found[name], found["mean"])
        assert low > -0.01 and high < 0.003, (name, low, high)


def test_what_is_known_of_means_alone_is_null_for_another_estimator():
    metrics = {name: [None, 0.5] for name in OF_MEANS} | {"separation": [None, 2.0], "n_harmful": 3}
    assert without_noise_of_means(metrics, "mean") == metrics
    other = without_noise_of_means(metrics, "winsorized")
    assert other == metrics | {name: [None, None] for name in OF_MEANS}
