"""Made-up activations whose directions are known; effect sizes and intervals by naive loops."""

import math
import random

import torch
from scipy.stats import norm
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


def naive_interval(values, clusters, n_resamples: int, seed: int) -> tuple[float, float]:
    """The expanded percentile bootstrap of a mean: cluster by cluster, item by item, with a generator of Python's own."""
    rng, names = random.Random(seed), sorted(set(clusters))
    members = {name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in names}
    means = []
    for _ in range(n_resamples):
        drawn = [value for _ in names for value in members[rng.choice(names)]]
        means.append(sum(drawn) / len(drawn))
    means.sort()
    tail = norm.cdf(-math.sqrt(len(names) / (len(names) - 1)) * student.ppf(0.975, len(names) - 1))
    return means[round(tail * n_resamples)], means[round((1 - tail) * n_resamples)]
