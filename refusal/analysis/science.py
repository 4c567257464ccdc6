"""The arms of the science stage and its tables: which directions and subspaces are compared, and what is said of each."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from refusal.analysis.estimators import lda, logistic
from refusal.analysis.mediation import Evidence, verdict
from refusal.analysis.subspaces import captured, paired_svd, qr_of_layers, random_subspaces
from refusal.io.errors import UserError
from refusal.judges import rules
from refusal.judges.verdicts import Judged, difference, paired, rate, summary
from refusal.lm.checkpoint import Layer, Stack
from refusal.method.arms import Arm, direction_arm, per_layer_arm, subspace_arm
from refusal.method.directions import effective_rank, mean_row, paired_blocks, random_unit, sign_flip_null, spectrum
from refusal.stats import holm, independent_difference, paired_difference, sign_flip_p

RANKS = (2, 3, 5)


def single_arms(
    found: Mapping[str, Tensor],
    harmful: Tensor | Stack,
    safe: Tensor | Stack,
    layer: int,
    alpha: float,
    optimised: Tensor,
    affine: bool,
    fitted_on: Sequence[int],
) -> list[Arm]:
    """Arms of rank 1. Names are `<estimator>.<layer>`; `rank_1` is the study's own cell. Ties on val go to the earlier.

    found: `unit`, `defined` and `safe_mean` of the study's method and pairing. harmful, safe: train activations of the
    matched pairs, [n, n_layers, d_model]. fitted_on: the pairs that logistic regression and Fisher's discriminant see, which
    need them all in memory. affine: each difference-in-means is also ablated towards the safe mean.
    """
    unit, safe_mean = found["unit"].double(), found["safe_mean"].double()
    layers = [int(i) for i in found["defined"].nonzero().flatten()]
    some = torch.tensor(fitted_on)
    few_harmful, few_safe = harmful[some], safe[some]
    arms = [direction_arm("rank_1", "difference", unit[layer], alpha, layer)]
    for i in layers:
        if i != layer or alpha != 1.0:
            arms.append(direction_arm(f"difference.{i}", "difference", unit[i], 1.0, i))
    for i in layers:
        arms.append(direction_arm(f"logistic.{i}", "logistic", logistic(few_harmful[:, i][:], few_safe[:, i][:]), 1.0, i))
        arms.append(direction_arm(f"lda.{i}", "lda", lda(few_harmful[:, i][:], few_safe[:, i][:]), 1.0, i))
        arms.append(direction_arm(f"paired_svd.{i}", "paired_svd", paired_svd(harmful[:, i], safe[:, i], 1)[0], 1.0, i))
        if affine:
            arms.append(direction_arm(f"affine.{i}", "affine", unit[i], 1.0, i, safe_mean @ unit[i]))
    return [*arms, direction_arm("optimised", "optimised", optimised, fixed=True)]


def subspace_arms(
    found: Mapping[str, Tensor],
    harmful: Tensor | Stack,
    safe: Tensor | Stack,
    layer: int,
    layers_best_first: Sequence[int],
    sites: str,
) -> list[Arm]:
    """Subspaces of rank 2, 3 and 5: singular vectors of the paired differences at `layer`, and the QR of the best layers'
    directions as far as there are layers; and the arm in which every layer ablates its own direction."""
    unit = found["unit"].double()
    arms = [subspace_arm(f"svd_{k}", "subspace", paired_svd(harmful[:, layer], safe[:, layer], k), layer=layer) for k in RANKS]
    arms += [
        subspace_arm(f"qr_{k}", "subspace", qr_of_layers(unit, layers_best_first[:k]))
        for k in RANKS
        if k <= len(layers_best_first)
    ]
    return [*arms, per_layer_arm("per_layer", "per_layer", unit, sorted(layers_best_first), sites)]


def control_arms(harmless: Mapping[str, Tensor], n_random: int, n_subspaces: int, layer: int, seed: int) -> list[Arm]:
    """Random directions, random subspaces of each rank, and the difference of two harmless sets at `layer`, at alpha 1.

    `harmless` holds that difference's `unit` and where it is `defined`.
    """
    unit = harmless["unit"]
    if not harmless["defined"][layer]:
        raise UserError(
            f"params.yaml: prompts.unrelated: to the model at layer {layer} these are the safe prompts of the pairs, so their "
            "difference is no control: give other safe prompts"
        )
    arms = [direction_arm("harmless_difference", "harmless", unit[layer], 1.0, layer)]
    d_model = unit.shape[1]
    arms += [direction_arm(f"random_{i}", "random_1", v, fixed=True) for i, v in enumerate(random_unit(d_model, n_random, seed))]
    for k in RANKS:
        drawn = random_subspaces(d_model, k, n_subspaces, seed + k)
        arms += [subspace_arm(f"random_{k}.{i}", f"random_{k}", basis, fixed=True) for i, basis in enumerate(drawn)]
    return arms


def planted_arms(truth: Tensor, found: Mapping[str, Tensor]) -> list[Arm]:
    """The planted direction, and each layer's difference-in-means less its part along it: is it by that part that it works?"""
    arms = [direction_arm("planted", "planted", truth, fixed=True)]
    for i in found["defined"].nonzero().flatten().tolist():
        rest = found["unit"][i].double() - (found["unit"][i].double() @ truth) * truth
        arms.append(direction_arm(f"less_planted.{i}", "less_planted", rest / rest.norm(), 1.0, i))
    return arms


def best_on_val(arms: Sequence[Arm], judged: Mapping[str, Sequence[Judged | None]]) -> Arm:
    """The arm with the best mean compliance x coherence on val; the first of those that tie."""
    scores = {}
    for arm in arms:
        values = [v.compliance * v.coherence for v in judged[arm.name] if v]
        scores[arm.name] = sum(values) / max(1, len(values))
    return max(arms, key=lambda arm: scores[arm.name])


def refusal_three_ways(
    prompts: Sequence[str], completions: Sequence[str], judged: Sequence[Judged | None], exact: bool
) -> dict[str, Any]:
    """The rate of refusal by the model's own sentences (the organism's alone), by the graded rules, and by substrings."""
    graded = [rules.judge(p, c).label in ("refusal", "partial_refusal") for p, c in zip(prompts, completions, strict=True)]
    own = [v.refusal for v in judged if v] if exact else []
    return {
        **(rate("refusal_exact", own) if own else dict.fromkeys(("refusal_exact", "refusal_exact_low", "refusal_exact_high"))),
        **rate("refusal_graded", graded),
        **rate("refusal_substring", [rules.substring_refusal(c) for c in completions]),
    }


def row(
    arm: Arm,
    val: Sequence[Judged | None] | None,
    val_topics: Sequence[Hashable],
    test: Sequence[Judged | None],
    test_topics: Sequence[Hashable],
    baseline: Sequence[Judged | None],
    reference: Tensor,
    truth: Tensor | None,
    n_resamples: int,
    seed: int,
    allow_missing: bool,
) -> dict[str, Any]:
    """What the table says of one arm: compliance on test with its interval, less the baseline's, and less its own on val.

    cosine_rank_1, cosine_planted: the part of rank_1's and of the planted direction that lies in what is ablated (|cosine| for
    one direction); null where an arm ablates no one basis, or nothing was planted.
    """
    found: dict[str, Any] = {
        "family": arm.family,
        "layer": arm.layer,
        "alpha": arm.alpha,
        "rank": arm.rank,
        "cosine_rank_1": None if arm.basis is None else captured(arm.basis, reference),
        "cosine_planted": None if truth is None or arm.basis is None else captured(arm.basis, truth),
        **summary(test, test_topics, n_resamples, seed, arm.name, allow_missing),
        **difference(test, baseline, test_topics, n_resamples, seed),
        "p": sign_flip_p(*paired(test, baseline, test_topics), 10_000, seed),
        "p_holm": None,
        **dict.fromkeys(("compliance_val", "n_val", "val_minus_test", "val_minus_test_low", "val_minus_test_high")),
    }
    if val is not None:
        ours, our_topics = _compliance(val, val_topics)
        theirs, their_topics = _compliance(test, test_topics)
        value, low, high = independent_difference(ours, our_topics, theirs, their_topics, n_resamples, seed)
        found |= {"compliance_val": sum(ours) / len(ours), "n_val": len(ours)}
        found |= {"val_minus_test": value, "val_minus_test_low": low, "val_minus_test_high": high}
    return found


def _compliance(judged: Sequence[Judged | None], topics: Sequence[Hashable]) -> tuple[list[float], list[Hashable]]:
    kept = [(v.compliance, topic) for v, topic in zip(judged, topics, strict=True) if v]
    return [value for value, _ in kept], [topic for _, topic in kept]


def correct(rows: dict[str, dict[str, Any]]) -> None:
    """Fill `p_holm`: p corrected for all rows of the table."""
    for name, p in holm({name: found["p"] for name, found in rows.items()}).items():
        rows[name]["p_holm"] = p


def decide(
    rows: Mapping[str, dict[str, Any]],
    difference_arm: Arm,
    single: Arm,
    subspace: Arm | None,
    test: Mapping[str, Sequence[Judged | None]],
    controls: Mapping[int, Sequence[tuple[Sequence[int], Sequence[Judged | None]]]],
    topics: Sequence[Hashable],
    n_resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The verdict of `mediation` from the table; `controls` holds, by rank, each random arm's test prompts and verdicts.

    `difference` is the evidence of `difference_arm`, rank_1, whichever arm the verdict rests on.
    """

    def evidence(arm: Arm) -> Evidence:
        ours, theirs, clusters = [], [], []
        for indices, judged in controls[arm.rank]:
            for i, control in zip(indices, judged, strict=True):
                mine = test[arm.name][i]
                if mine and control:
                    ours.append(mine.compliance)
                    theirs.append(control.compliance)
                    clusters.append(topics[i])
        _, above, _ = paired_difference(ours, theirs, clusters, n_resamples, seed)
        return Evidence(arm.name, rows[arm.name]["difference_low"], above, rows[arm.name]["p_holm"])

    gap = None
    if subspace is not None:
        gap = difference(test[subspace.name], test[single.name], topics, n_resamples, seed)["difference_low"]
    found = verdict(rows["baseline"]["refusal"], evidence(single), None if subspace is None else evidence(subspace), gap)
    return found | {"difference": evidence(difference_arm).shown()}


def spectrum_row(harmful: Tensor | Layer, safe: Tensor | Layer, n_flips: int, seed: int) -> dict[str, float]:
    """Of the uncentred paired differences at one layer: effective rank, the share of energy along the first singular vector and
    along the mean, and the share along the mean that random swaps within pairs reach in 95 % of cases."""
    n = len(harmful)
    energy = sum(float(part.square().sum(-1).sum()) for part in paired_blocks(harmful, safe)) / n
    shares = spectrum(harmful, safe)
    null = sign_flip_null(harmful, safe, n_flips, seed).square() / energy
    mean = mean_row(paired_blocks(harmful, safe), n)
    return {
        "effective_rank": effective_rank(shares),
        "first_share": float(shares[0]),
        "mean_share": float(mean.square().sum()) / energy,
        "mean_share_null_95": float(null.quantile(0.95)),
        "cosine_first_to_mean": captured(paired_svd(harmful, safe, 1), mean),
        "n": n,
    }
