"""How well directions separate harmful from safe prompts, how far they agree, and what paired differences have in common."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from refusal.analysis.reliability import Rows, ceiling
from refusal.method.activations_file import Activations
from refusal.method.directions import (
    Directions,
    as_json,
    cohens_d,
    cosine,
    cross_layer_cosine,
    difference_in_means,
    project,
)
from refusal.stats import cluster_indices, resampled_counts, resampled_sums

N_SINGULAR_VALUES = 10
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Contrast:
    """One method x pairing: train activations of harmful and safe prompts, `paired` row by row or not, and their directions."""

    harmful: Activations
    safe: Activations
    directions: Directions
    paired: bool
    order: Int[Tensor, " n"] | None = None  # of the safe prompts, where they were shuffled

    def rows(self, layer: int) -> Rows:
        """What each prompt adds to a layer's direction; pairs as they were before they were shuffled, which no mean can tell."""
        harmful, safe = self.harmful[:, layer].double(), self.safe[:, layer].double()
        if not self.paired:
            return {"harmful": harmful, "unrelated": -safe}
        return {"harmful": harmful - (safe if self.order is None else safe[self.order.argsort()])}


def contrast(activations: Mapping[str, Activations], pairing: str, seed: int) -> Contrast:
    """The contrast of one method's train activations under a pairing; `shuffled` permutes the safe prompts."""
    harmful, safe = activations["train.harmful"], activations["train.unrelated" if pairing == "unrelated" else "train.safe"]
    order = None
    if pairing == "shuffled":
        order = torch.randperm(len(safe), generator=torch.Generator().manual_seed(seed))
        safe = safe[order]
    return Contrast(harmful, safe, difference_in_means(harmful, safe), pairing != "unrelated", order)


def halves(activations: Mapping[str, Activations], split: str) -> tuple[Activations, Activations]:
    """Harmful and safe prompts of a split: the halves of its pairs, or where it has none the harmful and the unrelated ones."""
    safe = f"{split}.safe" if f"{split}.safe" in activations else f"{split}.unrelated"
    return activations[f"{split}.harmful"], activations[safe]


def harmless_sets(activations: Mapping[str, Activations]) -> tuple[Activations, Activations]:
    """Two sets of harmless train prompts: unrelated ones and the safe halves of pairs, or every other one of the unrelated."""
    unrelated = activations["train.unrelated"]
    if "train.safe" in activations:
        return unrelated, activations["train.safe"]
    every_other = torch.arange(len(unrelated)) % 2 == 0
    return unrelated[every_other], unrelated[~every_other]


def cosine_to_all(of: Contrast, everything: Contrast) -> list[float | None] | None:
    """By layer the cosine with the direction of all train prompts (prompts.keep); None where these are all."""
    if (len(of.harmful), len(of.safe)) == (len(everything.harmful), len(everything.safe)):
        return None
    return as_json(cosine(of.directions.unit, everything.directions.unit))


def describe(
    of: Contrast,
    activations: Mapping[str, Activations],
    val_topics: Sequence[Hashable],
    reference: Directions,
    n_resamples: int,
    n_sign_flips: int,
    seed: int,
) -> dict[str, Any]:
    """All that metrics/directions.json says of one contrast; lists are by layer, null where the direction is undefined.

    activations: of the same method, for its val prompts. val_topics: of the harmful ones, then of the safe ones.
    """
    directions = of.directions
    metrics = {
        "n_harmful": len(of.harmful),
        "n_safe": len(of.safe),
        "n_val": len(activations["val.harmful"]),
        "layers": directions.layers,
        **_separation(of, activations, val_topics, n_resamples, seed),
        **_agreement(of, reference, n_resamples, seed),
        "norm": as_json(directions.difference.norm(dim=-1).where(directions.defined, torch.nan)),
        "cross_layer_cosine": as_json(cross_layer_cosine(directions.unit)),
    }
    return metrics | (_pairs(of, n_sign_flips, seed) if of.paired else {})


def _separation(
    of: Contrast, activations: Mapping[str, Activations], topics: Sequence[Hashable], n_resamples: int, seed: int
) -> dict[str, Any]:
    """Cohen's d of val prompts (the pairs, where there are any) on the direction fitted on train; intervals over topic phrases.

    separation_in_sample: on the prompts that the direction was fitted on, as the write-up scored it.
    """
    unit, layers = of.directions.unit, of.directions.layers
    harmful, safe = (project(some, unit) for some in halves(activations, "val"))
    d = cohens_d(harmful, safe)
    low, high = (limit.where(d.isfinite(), torch.nan) for limit in separation_interval(harmful, safe, topics, n_resamples, seed))
    scored = {layer: float(d[layer]) for layer in layers if bool(d[layer].isfinite())}
    return {
        "peak_layer": max(scored, key=lambda layer: scored[layer], default=None),
        "peak_separation": max(scored.values(), default=None),
        "separation_first": scored.get(layers[0]) if layers else None,
        "separation_last_half_min": min((value for layer, value in scored.items() if layer >= len(unit) / 2), default=None),
        "separation": as_json(d),
        "separation_low": as_json(low),
        "separation_high": as_json(high),
        "separation_in_sample": as_json(cohens_d(project(of.harmful, unit), project(of.safe, unit))),
    }


def separation_interval(
    harmful: Float[Tensor, "n n_layers"],
    safe: Float[Tensor, "m n_layers"],
    topics: Sequence[Hashable],
    n_resamples: int,
    seed: int,
) -> tuple[Float[Tensor, " n_layers"], Float[Tensor, " n_layers"]]:
    """Percentile bootstrap 95 % interval of Cohen's d over topic phrases, from the moments of each resample.

    topics: of the harmful prompts, then of the safe ones; the halves of a pair, which have one topic, come together.
    """
    # Centred on the whole sample first: a difference of large squares would lose the digits that matter.
    h, s = harmful - harmful.mean(0), safe - safe.mean(0)
    columns = torch.block_diag(*(torch.cat([torch.ones(len(x), 1, dtype=x.dtype), x, x.square()], dim=1) for x in (h, s)))
    sums = torch.from_numpy(resampled_sums(columns.numpy(), topics, n_resamples, seed))
    n, h, h_squares, m, s, s_squares = sums.split([1, *[harmful.shape[1]] * 2, 1, *[harmful.shape[1]] * 2], dim=1)
    variance = (h_squares - h.square() / n + s_squares - s.square() / m) / (n + m - 2)
    d = (harmful.mean(0) - safe.mean(0) + (h - s * (n / m)) / n) / variance.sqrt()
    d[~d.isfinite()] = torch.nan  # a resample without spread has no effect size
    return d.nanquantile(0.025, dim=0), d.nanquantile(0.975, dim=0)


def _agreement(of: Contrast, reference: Directions, n_resamples: int, seed: int) -> dict[str, Any]:
    """Cosines with the reference's directions, and of directions of resampled prompts with those of all prompts."""
    unit, to_reference = of.directions.unit, cosine(of.directions.unit, reference.unit)
    resampled = torch.full((n_resamples, len(unit)), torch.nan, dtype=torch.float64)
    for i in of.directions.layers:
        resampled[:, i] = cosine(bootstrap_unit(of.harmful[:, i], of.safe[:, i], n_resamples, seed, of.paired), unit[i])
    return {
        "cosine_to_sequential_min": min((float(value) for value in to_reference if bool(value.isfinite())), default=None),
        "cosine_to_sequential": as_json(to_reference),
        "bootstrap_cosine_low": as_json(resampled.quantile(0.025, dim=0)),
        "bootstrap_cosine_median": as_json(resampled.quantile(0.5, dim=0)),
    }


def _pairs(of: Contrast, n_sign_flips: int, seed: int) -> dict[str, list]:
    """The spectrum of the paired differences, its effective rank, and the length of a mean difference that chance alone gives."""
    columns: dict[str, list] = {
        name: [None] * len(of.directions.unit) for name in ("spectrum", "effective_rank", "sign_flip_null_95")
    }
    for i in of.directions.layers:
        harmful, safe = of.harmful[:, i], of.safe[:, i]
        shares = spectrum(harmful, safe)
        columns["spectrum"][i], columns["effective_rank"][i] = shares[:N_SINGULAR_VALUES].tolist(), effective_rank(shares)
        columns["sign_flip_null_95"][i] = float(sign_flip_null(harmful, safe, n_sign_flips, seed).quantile(0.95))
    return columns


def spectrum(harmful: Float[Tensor, "n_pairs d_model"], safe: Float[Tensor, "n_pairs d_model"]) -> Float[Tensor, " rank"]:
    """Share of the uncentred second moment of the paired differences along each singular vector, largest first.

    Unlike the mean difference this sees which safe prompt goes with which harmful one.
    """
    energy = torch.linalg.svdvals(harmful.double() - safe.double()).square()
    return energy / energy.sum()


def effective_rank(shares: Float[Tensor, " rank"]) -> float:
    """Participation ratio 1 / sum(share^2): 1 for a line, the dimension for a ball."""
    return float(1 / shares.square().sum())


def sign_flip_null(
    harmful: Float[Tensor, "n_pairs d_model"], safe: Float[Tensor, "n_pairs d_model"], n_flips: int, seed: int
) -> Float[Tensor, " n_flips"]:
    """Length of the mean difference when each pair's harmful and safe halves are swapped at random.

    Swapping leaves the uncentred spectrum as it is and destroys a common direction: the null of "the pairs agree".
    """
    flips = torch.randint(0, 2, (n_flips, len(harmful)), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1
    return (flips @ (harmful.double() - safe.double()) / len(harmful)).norm(dim=-1)


def bootstrap_unit(
    harmful: Float[Tensor, "n_harmful d_model"],
    safe: Float[Tensor, "n_safe d_model"],
    n_resamples: int,
    seed: int,
    paired: bool,
    size: int | None = None,
) -> Float[Tensor, "n_resamples d_model"]:
    """One layer's directions of resampled prompts: whole pairs when `paired`, else the two sets one by one.

    `size` prompts a side are drawn with replacement, by default as many as there are. A resample is a vector of weights, so all
    of them are one matrix product a set.
    """
    generator = torch.Generator().manual_seed(seed)

    def means(rows: Tensor) -> Tensor:
        drawn = torch.randint(0, len(rows), (n_resamples, size or len(rows)), generator=generator)
        weights = torch.zeros(n_resamples, len(rows), dtype=torch.float64)
        weights.scatter_add_(1, drawn, torch.ones((), dtype=torch.float64).expand_as(drawn))
        return weights @ rows / drawn.shape[1]

    difference = means(harmful.double() - safe.double()) if paired else means(harmful.double()) - means(safe.double())
    return difference / difference.norm(dim=-1, keepdim=True)


def origin_between_means(
    harmful: Float[Tensor, " n"], safe: Float[Tensor, " m"], topics: Sequence[Hashable], n_resamples: int, seed: int
) -> dict[str, Any]:
    """Of projections on one direction: quantiles of both sets, and `zero`, 0 at the safe mean and 1 at the harmful mean.

    Linear ablation sends every prompt to zero. If zero is among the safe prompts, ablated harmful prompts look safe; if it is
    among the harmful ones, ablation makes the model take everything for harmful. `zero` carries a percentile bootstrap
    95 % interval over topic phrases. topics: as `separation_interval` has them.
    """
    harmful, safe = harmful.double(), safe.double()
    columns = torch.block_diag(*(torch.stack([x, torch.ones_like(x)], dim=1) for x in (harmful, safe)))
    h, n, s, m = torch.from_numpy(resampled_sums(columns.numpy(), topics, n_resamples, seed)).T
    s = s * (n / m)
    resampled = -s / (h - s)
    levels = torch.tensor(QUANTILES, dtype=torch.float64)
    return {
        "zero": float(-safe.mean() / (harmful.mean() - safe.mean())),
        "zero_low": float(resampled.nanquantile(0.025)),  # a resample may hold none of one kind
        "zero_high": float(resampled.nanquantile(0.975)),
        **{f"harmful_q{100 * q:02.0f}": float(v) for q, v in zip(QUANTILES, harmful.quantile(levels), strict=True)},
        **{f"safe_q{100 * q:02.0f}": float(v) for q, v in zip(QUANTILES, safe.quantile(levels), strict=True)},
        "harmful_mean": float(harmful.mean()),
        "safe_mean": float(safe.mean()),
        "n": len(harmful),
    }


def auroc(
    harmful: Float[Tensor, " n"], safe: Float[Tensor, " m"], topics: Sequence[Hashable], n_resamples: int, seed: int
) -> dict[str, Any]:
    """Area under the ROC curve of the projection as a detector of harmful prompts, ties counted half (Mann and Whitney).

    With a percentile bootstrap 95 % interval over topic phrases (`topics` as `separation_interval` has them). At the edge, where
    the two sets do not overlap, the interval has no width: `separable` says so. Not scikit-learn's, which takes 4 ms a resample.
    """
    # Safe prompts in order of projection: how many lie below a harmful one is a difference of running sums, so that no table of
    # all pairs is held. Sums are of whole numbers and halves, exact in any order.
    ordered, order = safe.double().sort()
    below, up_to = (torch.searchsorted(ordered, harmful.double().contiguous(), right=right) for right in (False, True))

    def area(weights: Float[Tensor, "resample n_plus_m"]) -> Float[Tensor, " resample"]:
        of_harmful, of_safe = weights.tensor_split([len(harmful)], dim=1)
        running = pad(of_safe[:, order].cumsum(1), (1, 0))
        return ((running[:, below] + running[:, up_to]) / 2 * of_harmful).sum(1) / (of_harmful.sum(1) * of_safe.sum(1))

    topic_of = cluster_indices(topics)
    drawn = resampled_counts(topic_of, n_resamples, seed)
    resampled = torch.cat([area(torch.from_numpy(counts[:, topic_of]).double()) for counts in drawn])
    return {
        "auroc": float(area(torch.ones(1, len(topics), dtype=torch.float64))),
        "auroc_low": float(resampled.nanquantile(0.025)),
        "auroc_high": float(resampled.nanquantile(0.975)),
        "separable": bool(harmful.min() > safe.max()),
        "n": len(harmful),
    }


def plot_rows(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of each plot's file from `describe`d contrasts by `<method>-<pairing>`."""
    rows: dict[str, list] = {"separation": [], "cosine_to_sequential": [], "cross_layer_cosine": [], "spectrum": []}
    for name, m in metrics.items():
        method, pairing = name.split("-")
        for layer in m["layers"]:
            place = {"arm": name, "method": method, "pairing": pairing, "layer": layer}
            values = {
                "separation": m["separation"][layer],
                "low": m["separation_low"][layer],
                "high": m["separation_high"][layer],
                "in_sample": m["separation_in_sample"][layer],
            }
            rows["separation"].append(place | values)
            if (value := m["cosine_to_sequential"][layer]) is not None:
                beside = {"bootstrap_low": m["bootstrap_cosine_low"][layer], "ceiling": m["cosine_to_sequential_ceiling"][layer]}
                rows["cosine_to_sequential"].append(place | {"cosine": value} | beside)
            for other in m["layers"]:
                beside = {"ceiling": ceiling(m["reliability"][layer], m["reliability"][other])}
                rows["cross_layer_cosine"].append(
                    place | {"other_layer": other, "cosine": m["cross_layer_cosine"][layer][other]} | beside
                )
            shares = m["spectrum"][layer] if "spectrum" in m else []
            rows["spectrum"] += [place | {"component": i, "share": share} for i, share in enumerate(shares, 1)]
    return rows
