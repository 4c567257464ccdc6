"""The noise of directions and the geometry of groups by a second, naive path, written anew from docs/geometry.md: loops in numpy.

Rows are {set of prompts: [n, d_model]}, what each prompt adds to a direction; sets of one name are of the same prompts.
"""

import math
from itertools import combinations

import numpy as np
import torch
from scipy.stats import t as student


def unit(x):
    return x / np.linalg.norm(x)


def estimate(rows):
    return sum(x.mean(0) for x in rows.values())


def halves(rows, n_splits, seed):
    """Mean cosine of two halves, the draws being the package's."""
    generator, cosines = torch.Generator().manual_seed(seed), []
    orders = {s: torch.rand(n_splits, len(x), generator=generator).argsort(dim=1).tolist() for s, x in rows.items()}
    for i in range(n_splits):
        parts = [(x[orders[s][i][: len(x) // 2]], x[orders[s][i][len(x) // 2 :]]) for s, x in rows.items()]
        one, other = (sum(part[side].mean(0) for part in parts) for side in (0, 1))
        cosines.append(unit(one) @ unit(other))
    return float(np.mean(cosines))


def product(a, b):
    """<a, b> over all pairs of different prompts."""
    total = 0.0
    for s, x in a.items():
        for t, y in b.items():
            table = x @ y.T
            total += table[~np.eye(len(x), dtype=bool)].mean() if s == t else table.mean()
    return total


def corrected(a, b):
    """(cosine, low, high) without noise, by leaving prompts out."""

    def ratio(x, y):
        squares = product(x, x), product(y, y)
        return product(x, y) / math.sqrt(squares[0] * squares[1]) if min(squares) > 0 else math.nan

    sizes, value, variance = {s: len(x) for s, x in (*a.items(), *b.items())}, ratio(a, b), 0.0
    for name, n in sizes.items():
        left = [ratio(*({s: np.delete(x, i, 0) if s == name else x for s, x in of.items()} for of in (a, b))) for i in range(n)]
        variance += (n - 1) / n * sum((x - np.mean(left)) ** 2 for x in left)
    # What products of two prompts' errors add, pair by pair.
    width = len(estimate(a))
    errors = [
        [
            (of[s][i] - of[s].mean(0)) / math.sqrt(n * (n - 1)) if s in of else np.zeros(width)
            for s, n in sizes.items()
            for i in range(n)
        ]
        for of in (a, b)
    ]
    across, first, second = product(a, b), product(a, a), product(b, b)
    scale, quadratic = 1 / math.sqrt(first * second), 0.0
    for (p, q), (r, s) in combinations(zip(*errors, strict=True), 2):
        quadratic += (scale * ((p @ s + r @ q) - across * (p @ r / first + q @ s / second))) ** 2
    half = student.ppf(0.975, min(sizes.values()) - 1) * math.sqrt(max(variance - quadratic, quadratic))
    return value, value - half, value + half


def noise(rows, seed):
    """What is told of one layer's direction."""
    half, squared = halves(rows, 100, seed), product(rows, rows)
    spread = sum(((x - x.mean(0)) ** 2).sum() / (len(x) - 1) for x in rows.values())
    return {
        "split_half_cosine": half,
        "reliability": 2 * half / (1 + half) if half > 0 else None,
        "n_for_reliability_90": 9 * spread / squared if squared > 0 else None,
    }


def without_noise(rows, reference):
    """And of its cosine with the reference's."""
    names = [f"cosine_to_sequential_corrected{of}" for of in ("", "_low", "_high")]
    return {name: x if math.isfinite(x) else None for name, x in zip(names, corrected(rows, reference), strict=True)}


def of_all(rows, shares):
    """The cosine with all prompts' direction, of which these are such shares of each set, that noise leaves."""
    noise_, noise_of_all = (
        sum(((x - x.mean(0)) ** 2).sum() / (len(x) - 1) / len(x) * part[s] for s, x in rows.items())
        for part in (dict.fromkeys(rows, 1), shares)
    )
    squared = estimate(rows) @ estimate(rows)
    return math.sqrt((squared - noise_ + noise_of_all) / squared)


def shape(points, groups):
    """Mean cosine of two groups' means, and participation ratio."""
    units = [
        unit(np.mean([x for x, g in zip(points, groups, strict=True) if g == name], axis=0)) for name in dict.fromkeys(groups)
    ]
    shares = np.linalg.eigvalsh(np.array(units).T @ np.array(units)) / len(units)
    return float(np.mean([u @ v for u, v in combinations(units, 2)])), float(1 / (shares**2).sum())


def geometry(rows, groups, n_resamples, seed, at_once=None):
    """Of groups of the first set, and of random ones as large; `at_once` draws come from the generator together."""
    (_, first), *others = rows.items()
    points = first + (estimate(dict(others)) if others else 0)
    generator, null, step = torch.Generator().manual_seed(seed), [], at_once or n_resamples
    for start in range(0, n_resamples, step):
        orders = torch.rand(min(step, n_resamples - start), len(points), generator=generator).argsort(dim=1).tolist()
        null += [shape(points, [groups[i] for i in order]) for order in orders]
    figures = {}
    for name, value, drawn in zip(("mean_cosine", "participation_ratio"), shape(points, groups), np.transpose(null), strict=True):
        limits = np.quantile(drawn, [0.025, 0.5, 0.975]).tolist()
        figures |= {name: value, **dict(zip((f"{name}_null{of}" for of in ("_low", "", "_high")), limits, strict=True))}
    return figures
