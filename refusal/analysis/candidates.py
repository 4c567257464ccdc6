"""Which interventions are compared in the search for what refusal runs through, and their controls."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.analysis.estimators import lda, logistic
from refusal.analysis.separation import halves
from refusal.analysis.study import Study
from refusal.analysis.subspaces import paired_svd, random_subspaces
from refusal.io.errors import UserError
from refusal.method.activations_file import Activations
from refusal.method.directions import random_unit
from refusal.method.interventions import Intervention
from refusal.method.subspaces import qr_of_layers
from refusal.stats import subsample_indices

RANKS = (2, 3, 5)
AT_LEAST = 3  # random directions, of each way to ablate one


def fitted_on(study: Study) -> tuple[list[int], list[int]]:
    """The harmful and the safe train prompts that logistic regression and Fisher's discriminant see, which need them in memory.

    Of pairs both halves.
    """
    harmful, safe = (subsample_indices(len(some), study.params.science.n_fit, study.seed) for some in _train(study))
    return harmful, safe


def layers_of(study: Study) -> list[int]:
    """The layers at which estimators are compared: those of `science.layers` whose direction is defined, all where it is null."""
    chosen = study.params.science.layers
    return [layer for layer in study.layers if chosen is None or layer in chosen]


def ranks_of(study: Study) -> list[int]:
    """The ranks above 1 of which random subspaces are drawn: RANKS, and that of what is selected."""
    return sorted({*RANKS, study.span.rank} - {1})


def single_directions(study: Study, optimised: Float[Tensor, " d_model"] | None) -> list[Intervention]:
    """Interventions of rank 1. Names are `<estimator>.<layer>`; `rank_1` is the selected one, where that is of one direction and
    not among `subspaces`. Ties on val go to the earlier.

    `unrelated` is the difference-in-means with unrelated safe prompts, where the study's own is with matched ones.
    At `resid_pre` each difference-in-means is also ablated towards the safe mean (`affine`). Where prompts are no pairs there is
    no `paired_svd`, and no `optimised` where none is given.
    """
    unit, safe_mean = study.directions["unit"].double(), study.directions["safe_mean"].double()
    harmful, safe = _train(study)
    sites = study.sites
    few_harmful, few_safe = (some[torch.tensor(which)] for some, which in zip((harmful, safe), fitted_on(study), strict=True))

    def one(family: str, layer: int, v: Tensor, offset: Tensor | None = None) -> Intervention:
        return Intervention(f"{family}.{layer}", v, 1.0, sites, offset, layer, family)

    single, alpha = study.span.basis == "single", study.rank_1["alpha"]
    candidates = [Intervention("rank_1", unit[study.layer], alpha, sites, None, study.layer, "difference")] if single else []
    candidates += [one("difference", i, unit[i]) for i in layers_of(study) if i != study.layer or alpha != 1.0 or not single]
    for i in layers_of(study):
        if study.unrelated_unit is not None:
            candidates.append(one("unrelated", i, study.unrelated_unit[i].double()))
        candidates.append(one("logistic", i, logistic(few_harmful[:, i][:], few_safe[:, i][:])))
        candidates.append(one("lda", i, lda(few_harmful[:, i][:], few_safe[:, i][:])))
        if study.paired:
            candidates.append(one("paired_svd", i, paired_svd(harmful[:, i], safe[:, i], 1)[0]))
        if sites == "resid_pre":
            candidates.append(one("affine", i, unit[i], (safe_mean @ unit[i])[:, None]))
    if optimised is not None:
        candidates.append(Intervention("optimised", optimised, 1.0, sites, family="optimised", direction_independent=True))
    return candidates


def subspaces(study: Study, layers_best_first: Sequence[int]) -> list[Intervention]:
    """`rank_1` where that is one; subspaces of rank 2, 3 and 5: singular vectors of the paired differences (where prompts are
    pairs) at the selected layer, and the QR of the best layers' directions as far as there are layers; and every layer's own
    direction ablated there."""
    unit, layer, sites = study.directions["unit"].double(), study.layer, study.sites
    harmful, safe = (some[:, layer] for some in _train(study))
    svd = [
        Intervention(f"svd_{k}", paired_svd(harmful, safe, k), 1.0, sites, None, layer, "subspace") for k in RANKS if study.paired
    ]
    ranks = [k for k in RANKS if k <= len(layers_best_first)]
    qr = [Intervention(f"qr_{k}", qr_of_layers(unit, layers_best_first[:k]), 1.0, sites, family="subspace") for k in ranks]
    own = torch.zeros(len(unit), 1, unit.shape[1], dtype=unit.dtype)
    own[list(layers_best_first), 0] = unit[list(layers_best_first)]
    several = [*svd, *qr, Intervention("per_layer", own, 1.0, sites, family="per_layer")]
    if study.span.basis == "single":
        return several
    family = "per_layer" if study.span.basis == "per_layer" else "subspace"
    return [Intervention("rank_1", study.basis, study.rank_1["alpha"], sites, None, layer, family), *several]


def control_of(one: Intervention) -> str:
    """The family of `controls` that an intervention is compared with: random ones of its rank, or one a layer as it has."""
    return "random_per_layer" if one.per_layer else f"random_{one.rank}"


def controls(study: Study) -> list[Intervention]:
    """The difference of two harmless sets at the selected layer, random directions, random subspaces of each rank; and random
    directions ablated as `affine` and `per_layer` are, AT_LEAST of each."""
    unit, layer, s = study.harmless_difference["unit"], study.layer, study.params.science
    if not study.harmless_difference["defined"][layer]:
        raise UserError(
            f"params.yaml: prompts.unrelated: to the model at layer {layer} these are all alike, or the safe halves of pairs, "
            "so their difference is no control: give other safe prompts"
        )

    def drawn(name: str, family: str, basis: Tensor) -> Intervention:
        return Intervention(name, basis, 1.0, study.sites, family=family, direction_independent=True)

    d_model = unit.shape[1]
    chosen = [Intervention("harmless_difference", unit[layer], 1.0, study.sites, None, layer, "harmless")]
    chosen += [drawn(f"random_{i}", "random_1", v) for i, v in enumerate(random_unit(d_model, s.n_random, study.seed))]
    for k in ranks_of(study):
        bases = random_subspaces(d_model, k, s.n_subspaces, study.seed + k)
        chosen += [drawn(f"random_{k}.{i}", f"random_{k}", basis) for i, basis in enumerate(bases)]
    safe_mean = study.directions["safe_mean"].double()
    for i, rows in enumerate(random_unit(d_model, AT_LEAST * (1 + len(unit)), study.seed + 1).split(1 + len(unit))):
        own = torch.zeros(len(unit), 1, d_model, dtype=rows.dtype)
        own[study.layers, 0] = rows[1:][study.layers]
        chosen.append(Intervention(f"random_per_layer.{i}", own, 1.0, study.sites, family="random_per_layer"))
        if study.sites == "resid_pre":
            offset = (safe_mean @ rows[0])[:, None]
            chosen.append(Intervention(f"random_affine.{i}", rows[0], 1.0, study.sites, offset, family="random_affine"))
    return chosen


def planted(study: Study, truth: Float[Tensor, " d_model"] | None) -> list[Intervention]:
    """The planted direction, and each layer's difference-in-means without its component along it: does it work by that?"""
    if truth is None:
        return []
    chosen = [Intervention("planted", truth, 1.0, study.sites, family="planted", direction_independent=True)]
    for i in layers_of(study):
        unit = study.directions["unit"][i].double()
        rest = unit - (unit @ truth) * truth
        chosen.append(Intervention(f"less_planted.{i}", rest / rest.norm(), 1.0, study.sites, None, i, "less_planted"))
    return chosen


def by_family(interventions: Sequence[Intervention]) -> Mapping[str, list[Intervention]]:
    """Interventions by family, in the order in which families first occur."""
    families: dict[str, list[Intervention]] = {}
    for one in interventions:
        families.setdefault(one.family, []).append(one)
    return families


def _train(study: Study) -> tuple[Activations, Activations]:
    """Train activations of harmful and of safe prompts, [n, n_layers, d_model]."""
    return halves(study.activations[study.params.sweep.method], "train")
