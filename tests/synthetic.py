"""Made-up activations whose directions are known; effect sizes and intervals by naive loops."""

import math

import numpy as np
import torch
from scipy.stats import t as student


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers, the same for every dtype to rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def activations(n: int = 40, n_val: int = 24, n_layers: int = 4, d_model: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
    """Layer 0 alike for all prompts; from layer 1 on harmful prompts lie off in a direction of the layer's own."""
    offset = gaussian(n_layers, d_model, seed=seed + 100)
    sets = {}
    for i, (split, size) in enumerate((("train", n), ("val", n_val))):
        for j, (name, shift) in enumerate((("harmful", offset), ("safe", 0), ("unrelated", 0.3))):
            sets[f"{split}.{name}"] = gaussian(size, n_layers, d_model, seed=seed + 10 * i + j) + shift
            sets[f"{split}.{name}"][:, 0] = 3.0
    return sets


def naive_d(a: list[float], b: list[float]) -> float:
    """Cohen's d of two lists of numbers."""
    mean = lambda x: sum(x) / len(x)  # noqa: E731
    squares = sum((x - mean(a)) ** 2 for x in a) + sum((x - mean(b)) ** 2 for x in b)
    return (mean(a) - mean(b)) / math.sqrt(squares / (len(a) + len(b) - 2))


def naive_icc(arms) -> list[float]:
    """The intraclass correlations of arms of (values, clusters), from sums of squares item by item."""
    parts = []
    for values, clusters in arms:
        groups = [[v for v, c in zip(values, clusters, strict=True) if c == name] for name in sorted(set(clusters))]
        n, k, mean = len(values), len(groups), sum(values) / len(values)
        if not 1 < k < n:
            parts.append((0.0, 0.0))
            continue
        between = sum((sum(g) / len(g) - mean) ** 2 for g in groups for _ in g) / (k - 1)
        within = sum((v - sum(g) / len(g)) ** 2 for g in groups for v in g) / (n - k)
        m0 = (n - sum(len(g) ** 2 for g in groups) / n) / (k - 1)
        parts.append((between - within, between + (m0 - 1) * within))
    above, below = (sum(part[i] for part in parts) for i in (0, 1))
    pooled = above / below if below else 0.0
    if sum(part[1] > 0 for part in parts) < 2:
        pooled = max(pooled, 0.5)
    return [min(1.0, max(0.0, pooled, a / b if b else 0.0)) for a, b in parts]


def naive_rate(values, clusters, icc: float) -> list[float]:
    """A rate with its limits: the roots of (p - limit)^2 = t^2 limit (1 - limit) / n, n being n / deff."""
    names, n = sorted(set(clusters)), len(values)
    m = sum(list(clusters).count(c) for c in clusters) / n  # of the cluster of an item, on average
    effective, p = n / (1 + (m - 1) * icc), sum(values) / n
    # One cluster says nothing of how clusters differ.
    return [p, *naive_wilson(p, effective, student.ppf(0.975, len(names) - 1))] if len(names) > 1 else [p, 0.0, 1.0]


def naive_wilson(p: float, n: float, quantile: float = 1.959964) -> list[float]:
    share = quantile**2 / n
    return sorted(np.clip(np.roots([1 + share, -2 * p - share, p * p]).real, 0, 1))


def naive_difference(ours, theirs, clusters, icc: float) -> list[float]:
    """Newcombe's hybrid of both rates' limits with their corrected correlation."""
    one, other = (naive_rate(values, clusters, icc) for values in (ours, theirs))
    n, m = len(ours), sum(list(clusters).count(c) for c in clusters) / len(ours)
    shared = sum((a - one[0]) * (b - other[0]) for a, b in zip(ours, theirs, strict=True)) / n
    spread = math.sqrt(sum((a - one[0]) ** 2 for a in ours) * sum((b - other[0]) ** 2 for b in theirs)) / n
    if shared > 0:
        shared = max(0.0, shared - (1 + (m - 1) * icc) / (2 * n))
    return naive_hybrid(one, other, shared / spread if spread else 0.0)


def naive_hybrid(one, other, r: float = 0.0) -> list[float]:
    """The difference of two rates (value, low, high) with Newcombe's limits, r being their correlation."""
    (p, p_low, p_high), (q, q_low, q_high) = one, other
    down, up = (p - p_low, q_high - q), (p_high - p, q - q_low)
    return [p - q, *(p - q + side * math.sqrt(a * a - 2 * r * a * b + b * b) for side, (a, b) in ((-1, down), (1, up)))]
