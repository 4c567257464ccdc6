"""How much of a direction is noise of its prompts: split halves, cosines without that noise, and what random groups give.

A direction estimated from n prompts is d + e, e being what these prompts happen to add: E|d + e|^2 = |d|^2 + N / n, where N is
the trace of the covariance of what one prompt adds. In many dimensions errors of disjoint prompts are nearly at right angles, so
that two estimates of one direction have a cosine of about r = |d|^2 / (|d|^2 + N / n), the reliability, and estimates of two
directions sqrt(r_a r_b) times theirs: that is the noise ceiling of a cosine. Source: Spearman 1904, "The Proof and Measurement of
Association between Two Things", American Journal of Psychology 15, for correlations.
"""

import math
from collections.abc import Hashable, Mapping, Sequence

import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from refusal.stats import AT_ONCE, cluster_indices

N_SPLITS = 100  # a mean over so many hardly moves with the seed
RELIABLE = 0.9

# What each prompt adds to a direction at one layer, by set of prompts: the direction is the sum of the sets' means. Pairs are one
# set, of differences; prompts that are no pairs are two, the safe ones with a minus. Sets of one name in two directions are of
# the same prompts, row by row.
Rows = Mapping[str, Float[Tensor, "n d_model"]]


def direction(rows: Rows) -> Float[Tensor, " d_model"]:
    """The sum of the sets' means."""
    return torch.stack([x.double().mean(0) for x in rows.values()]).sum(0)


def split_half_cosine(rows: Rows, n_splits: int, seed: int) -> float:
    """Mean cosine of the directions of random halves of the prompts, disjoint in every set; NaN for fewer than 2 prompts.

    It is the reliability of half as many prompts: `step_up` by 2 gives that of all.
    """
    if min(map(len, rows.values())) < 2:
        return math.nan
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.zeros(2, n_splits, next(iter(rows.values())).shape[1], dtype=torch.float64)
    for x in (x.double() for x in rows.values()):
        n, half = len(x), len(x) // 2
        drawn = torch.rand(n_splits, n, generator=generator).argsort(dim=1)[:, :half]
        sums = torch.zeros(n_splits, n, dtype=torch.float64).scatter_(1, drawn, 1.0) @ x
        one, other = one + sums / half, other + (x.sum(0) - sums) / (n - half)
    return float(torch.cosine_similarity(one, other, dim=-1).mean())


def step_up(reliability: float, times: float) -> float:
    """The reliability of k times the prompts: k r / (1 + (k - 1) r). With r = s / (s + N / n) that is s / (s + N / (k n)).

    Source: Spearman 1910 and Brown 1910, British Journal of Psychology 3.
    """
    return times * reliability / (1 + (times - 1) * reliability)


def ceiling(one: float | None, other: float | None) -> float | None:
    """The cosine that noise leaves two estimates of one direction, of these reliabilities: sqrt(r_a r_b). None where one is."""
    return math.sqrt(one * other) if one is not None and other is not None else None


def true_product(a: Rows, b: Rows) -> float:
    """Unbiased estimate of <d_a, d_b>: that of the estimates, less what their errors share, tr Cov(a, b) / n over common sets.

    Of a direction with itself it is |d|^2, which comes out negative about as often as not where there is none. It is what the
    product of a from one half of the prompts with b from the other comes to, over all ways to halve them.
    """
    return float(direction(a) @ direction(b)) - sum(_shared(a, b).values())


def _shared(a: Rows, b: Rows) -> dict[str, float]:
    """tr Cov(a, b) / n of each set that both have."""
    return {s: float((_centred(a[s]) * _centred(b[s])).sum()) / (len(a[s]) * (len(a[s]) - 1)) for s in a.keys() & b.keys()}


def _centred(x: Tensor) -> Tensor:
    return x.double() - x.double().mean(0)


def n_for_reliability(rows: Rows, reliability: float = RELIABLE) -> float:
    """How many pairs, or prompts of each set, have this reliability: N / |d|^2 r / (1 - r), N being summed over the sets.

    Infinite where the estimate of |d|^2 is not positive; NaN for fewer than 2 prompts.
    """
    if min(map(len, rows.values())) < 2:
        return math.nan
    shares = _shared(rows, rows)
    noise, signal = sum(len(rows[s]) * share for s, share in shares.items()), true_product(rows, rows)
    return noise / signal * reliability / (1 - reliability) if signal > 0 else math.inf


def subset_cosine(rows: Rows, sizes: Mapping[str, int]) -> float:
    """The cosine of this direction with that of all prompts that noise alone leaves, if these were drawn from sets of such sizes.

    Prompts in both share their noise, so that all noise of the larger is shared: the root of |d + e_all|^2 / |d + e|^2. It is 0
    where noise has more than the whole length.
    """
    squared, shares = float(direction(rows).square().sum()), _shared(rows, rows)
    return math.sqrt(max(0.0, 1 - sum(share * (1 - len(rows[s]) / sizes[s]) for s, share in shares.items()) / squared))


def corrected_cosine(a: Rows, b: Rows) -> tuple[float, float, float]:
    """The cosine of two directions without the noise of their prompts, and its jackknife 95 % interval (cosine, low, high).

    <d_a, d_b> / (|d_a| |d_b|), each by `true_product`. Of directions that have no prompts in common that is cos / sqrt(r_a r_b);
    where they have, the noise in common, which raises the cosine, is taken off it first. It may exceed 1, as an estimate of 1
    must that is not below it on average. NaN where a direction is not told from noise, a set has fewer than 3 prompts, or one of
    both directions has other prompts in each; limits that are not finite where one prompt less would do that. Prompts are left
    out one by one, pairs whole, from both directions at once. Coverage by simulation: docs/geometry.md.
    """
    sizes = {name: len(x) for name, x in (*a.items(), *b.items())}
    if min(sizes.values()) < 3 or any(len(a[name]) != len(b[name]) for name in a.keys() & b.keys()):
        return math.nan, math.nan, math.nan
    (u, p), (v, q) = (_errors(rows, sizes) for rows in (a, b))
    n = torch.tensor([n for n in sizes.values() for _ in range(n)], dtype=torch.float64)
    parts = [_products(*four, n, [*sizes.values()]) for four in ((u, v, p, q), (u, u, p, p), (v, v, q, q))]
    whole, left_out = (torch.stack(some) for some in zip(*parts, strict=True))
    if bool((whole[1:] <= 0).any()):
        return math.nan, math.nan, math.nan
    cosine, without = float(_ratio(whole)), _ratio(left_out).split([*sizes.values()])
    jackknife = sum(float((x - x.mean()).square().sum()) * (len(x) - 1) / len(x) for x in without)
    # Leaving out counts twice the variance that is quadratic in the errors (Efron and Stein 1981): once is taken off.
    scale = (n * (n - 1)).sqrt()[:, None]
    quadratic = _quadratic_variance(p / scale, q / scale, whole)
    half = float(stdtrit(min(sizes.values()) - 1, 0.975)) * math.sqrt(max(jackknife - quadratic, quadratic))
    return cosine, cosine - half, cosine + half


def _errors(rows: Rows, sizes: Mapping[str, int]) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "prompts d_model"]]:
    """The direction, and how far each prompt of all these sets is from its set's mean: 0 in sets that the direction lacks."""
    u = direction(rows)
    return u, torch.cat(
        [_centred(rows[s]) if s in rows else torch.zeros(n, len(u), dtype=torch.float64) for s, n in sizes.items()]
    )


def _products(
    u: Float[Tensor, " d_model"],
    v: Float[Tensor, " d_model"],
    p: Float[Tensor, "prompts d_model"],
    q: Float[Tensor, "prompts d_model"],
    n: Float[Tensor, " prompts"],
    sizes: list[int],
) -> tuple[Float[Tensor, ""], Float[Tensor, " prompts"]]:
    """`true_product`, and that without each prompt, of directions u and v with errors p and q; n: how many each one's set has."""
    both = (p * q).sum(-1)
    sums = torch.cat([x.sum().expand(len(x)) for x in both.split(sizes)])  # of each one's set
    shared = (both / (n * (n - 1))).sum()
    here = sums / (n * (n - 1)), (sums - both * n / (n - 1)) / ((n - 1) * (n - 2))  # of its set with it, and without
    without = u @ v - (p @ v + q @ u) / (n - 1) + both / (n - 1).square()
    return u @ v - shared, without - (shared - here[0] + here[1])


def _ratio(products: Float[Tensor, "3 *prompts"]) -> Float[Tensor, "*prompts"]:
    """<a, b> / (|a| |b|) from <a, b>, |a|^2 and |b|^2; not finite where one of these two is not positive."""
    return products[0] / products[1:].clamp(min=0).sqrt().prod(0)


def _quadratic_variance(
    p: Float[Tensor, "prompts d_model"], q: Float[Tensor, "prompts d_model"], whole: Float[Tensor, "3"]
) -> float:
    """The variance that products of two prompts' errors give the ratio, which is taken as linear in its three products."""
    p, q = p.float(), q.float()  # a variance needs no more digits, and what follows takes the time
    product, a_square, b_square = whole.tolist()
    scale = 1 / math.sqrt(a_square * b_square)
    half, of_a, of_b = scale / 2, -product * scale / (2 * a_square), -product * scale / (2 * b_square)
    of_two = torch.cat([p, q], dim=1) @ torch.cat([of_a * p + half * q, half * p + of_b * q], dim=1).T
    return 2 * float(of_two.fill_diagonal_(0).double().square().sum())


def group_geometry(rows: Rows, groups: Sequence[Hashable], n_resamples: int, seed: int) -> dict[str, float]:
    """Mean cosine of the groups' directions two by two and their participation ratio, beside those of random groups as large.

    groups: of the prompts of the first set, at least two; the other sets, which all groups share, keep their mean. The
    participation ratio of k unit vectors' second moment is k^2 / sum of their squared cosines: 1 for a line, k for a right-angled
    frame. `_null`, `_null_low`, `_null_high`: the median and middle 95 % where the prompts are dealt out to the groups at random.
    """
    (_, first), *others = rows.items()
    fixed = direction(dict(others)) if others else torch.zeros(first.shape[1], dtype=torch.float64)
    points = first.double() + fixed
    if len(points) < points.shape[1]:  # the same inner products in fewer dimensions
        points = torch.linalg.qr(points.T, mode="r").R.T
    group_of = torch.from_numpy(cluster_indices(groups))
    weights = torch.nn.functional.one_hot(group_of).double().T
    weights /= weights.sum(1, keepdim=True)
    observed = _shape(weights[None] @ points)
    generator, drawn = torch.Generator().manual_seed(seed), []
    at_once = max(1, AT_ONCE // weights.numel())
    for start in range(0, n_resamples, at_once):
        order = torch.rand(min(at_once, n_resamples - start), len(points), generator=generator).argsort(dim=1)
        drawn.append(_shape(weights[:, order].transpose(0, 1) @ points))
    null = torch.cat(drawn, dim=1)
    figures: dict[str, float] = {}
    for name, value, by_chance in zip(("mean_cosine", "participation_ratio"), observed, null, strict=True):
        low, median, high = by_chance.quantile(torch.tensor([0.025, 0.5, 0.975], dtype=torch.float64)).tolist()
        figures |= {name: float(value), f"{name}_null_low": low, f"{name}_null": median, f"{name}_null_high": high}
    return figures


def _shape(directions: Float[Tensor, "draw group d_model"]) -> Float[Tensor, "2 draw"]:
    """Mean cosine of two groups, and participation ratio, of each draw."""
    unit, k = torch.nn.functional.normalize(directions, dim=-1), directions.shape[1]
    cosines = unit @ unit.transpose(1, 2)
    return torch.stack([(cosines.sum((1, 2)) - k) / (k * (k - 1)), k**2 / cosines.square().sum((1, 2))])
