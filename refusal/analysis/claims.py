"""What others say of refusal directions, beside the same quantity in a study of ours: replicates, does not, or not decided.

A claim predicts where a quantity lies. Ours, with its 95 % interval, replicates it where the whole interval lies there, and does
not where the whole interval lies elsewhere, or where the control that should not lie there does so too. All else is not decided,
and so is what lies within the limits of that control: a claim is not refuted by a wide interval, nor borne out by one.
Predictions stand in the list of claims, beside what would decide.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from refusal.io.claims import Claim
from refusal.stats import difference_of

REPLICATES, DOES_NOT, NOT_DECIDED = "replicates", "does not replicate", "not decided here"
Metrics = Mapping[str, Any]  # of one study, by the name of the file
Limits = tuple[float, float, float]  # value, low, high


@dataclass(frozen=True)
class Measured:
    """Our quantity (value, low, high), of n prompts, pairs or layers (`of`), and its control, whose limits may be missing."""

    ours: Limits
    n: int
    of: str
    control: str
    theirs: Limits | tuple[float, None, None]


def outcome(claim: Claim, measured: Measured | None) -> str:
    """By the rule above; nothing measured decides nothing."""
    if measured is None:
        return NOT_DECIDED
    _, low, high = measured.ours
    if claim.holds(low) and claim.holds(high):
        control, *limits = measured.theirs
        if not claim.control_outside:
            return REPLICATES
        if claim.holds(control):
            return DOES_NOT
        within = limits[0] is not None and limits[0] <= measured.ours[0] <= limits[1]
        return NOT_DECIDED if within else REPLICATES
    below, above = claim.at_least is not None and high < claim.at_least, claim.at_most is not None and low > claim.at_most
    return DOES_NOT if below or above else NOT_DECIDED


def beside(claims: Mapping[str, Claim], metrics: Metrics) -> dict[str, dict[str, Any]]:
    """Of one study, what stands beside each claim, by its name: `outcome`, and our figure where its metrics have it."""
    found = {}
    for name, claim in claims.items():
        measured = MEASURES[claim.measure](metrics)
        found[name] = {"outcome": outcome(claim, measured)} | ({} if measured is None else asdict(measured))
    return found


def _limits(figures: Mapping[str, Any], name: str) -> Limits:
    return figures[name], figures[f"{name}_low"], figures[f"{name}_high"]


def _less(ours: Limits, theirs: Limits) -> Limits:
    """A difference of two rates of the same prompts, whose correlation is not kept: taken as none, which is too wide."""
    return difference_of(ours, theirs, 0.0)


def _of(limits: Limits, share: float) -> Limits:
    value, low, high = limits
    return value / share, low / share, high / share


def _restored(figures: Metrics, arm: str, control: str) -> Measured | None:
    """The rise of compliance under an arm over the share that the baseline refuses, which is taken as known: 1 is all of it."""
    baseline, ours = figures["baseline"], figures[arm]
    if not baseline["refusal"] or control not in figures:
        return None
    rise = _less(_limits(figures[control], "compliance"), _limits(baseline, "compliance"))
    refused = baseline["refusal"]
    return Measured(_of(_limits(ours, "difference"), refused), ours["n_paired"], "test prompts", control, _of(rise, refused))


def single(metrics: Metrics) -> Measured | None:
    """What the selected direction's ablation restores."""
    return _restored(metrics["evaluate"], "runtime", "random")


def weights(metrics: Metrics) -> Measured | None:
    """What the edited weights restore."""
    return _restored(metrics["evaluate"], "orthogonalized", "random_weights")


def other_set(metrics: Metrics) -> Measured | None:
    """What the selected direction restores on JailbreakBench, which nothing was chosen on."""
    figures = metrics["generalization"]["sets"].get("jailbreakbench", {}).get("figures")
    return None if not figures else _restored(figures[0], "ablated", "random")


def affine(metrics: Metrics) -> Measured | None:
    """What affine ablation restores, at its best layer on val."""
    science = metrics["science"]
    if not (best := science["estimators"].get("affine")):
        return None
    arms = {"baseline": science["arms"]["baseline"], "affine": science["arms"][best["arm"]], **science["controls"]}
    return _restored(arms, "affine", "random_affine")


def subspace(metrics: Metrics) -> Measured | None:
    """Compliance under the best subspace less that under the best single direction; the control is random subspaces' less
    random directions'. None where the baseline leaves too little to remove."""
    verdict, arms, controls = (metrics["science"][key] for key in ("verdict", "arms", "controls"))
    if verdict["best_subspace"] is None or verdict["reason"] in ("no_refusal", "too_few_refusals"):
        return None
    several, one = arms[verdict["best_subspace"]], arms[verdict["best_single"]]
    ours = _less(_limits(several, "compliance"), _limits(one, "compliance"))
    random = controls[f"random_{several['rank']}"]
    theirs = _less(_limits(random, "compliance"), _limits(controls["random_1"], "compliance"))
    return Measured(ours, several["n"], "test prompts", "random subspaces less random directions", theirs)


def harmless(metrics: Metrics) -> Measured | None:
    """The rise of compliance where the difference of two harmless sets is ablated."""
    figures = metrics["evaluate"]
    if "harmless" not in figures:
        return None
    ours, random = (
        _less(_limits(figures[a], "compliance"), _limits(figures["baseline"], "compliance")) for a in ("harmless", "random")
    )
    return Measured(ours, figures["harmless"]["n"], "test prompts", "random", random)


def padding(metrics: Metrics) -> Measured | None:
    """The least cosine over layers of directions from batches whose padding is attended to with sequential ones, without noise;
    the control is batches whose padding is hidden, at that layer."""
    directions = metrics["directions"]
    pairing = "matched" if "batched_unmasked-matched" in directions else "unrelated"
    unmasked, masked = (directions.get(f"{method}-{pairing}") for method in ("batched_unmasked", "batched"))
    if unmasked is None or masked is None:
        return None
    name = "cosine_to_sequential_corrected"
    known = [i for i in unmasked["layers"] if unmasked[name][i] is not None and unmasked[f"{name}_low"][i] is not None]
    if not known:
        return None
    layer = min(known, key=lambda i: unmasked[name][i])
    ours, theirs = ((of[name][layer], of[f"{name}_low"][layer], of[f"{name}_high"][layer]) for of in (unmasked, masked))
    return Measured(ours, unmasked["n_harmful"], f"train pairs, at layer {layer}", "padding hidden", theirs)


def _categories(metrics: Metrics, name: str, scale: Callable[[int], float]) -> Measured | None:
    """A figure of the categories' directions at the selected layer, beside random groups as large. It has no interval of its own:
    that of the random groups is moved onto it."""
    layer = metrics["select"]["rank_1"]["layer"]
    swept = next((of for of in metrics["directions"].values() if of.get("categories")), None)
    if swept is None or not isinstance(layer, int) or swept["categories"][name][layer] is None:
        return None  # a subspace has several layers
    of = swept["categories"]
    value, low, null, high = (of[f"{name}{end}"][layer] / scale(len(of["n"])) for end in ("", "_null_low", "_null", "_null_high"))
    ours = (value, value - (null - low), value + (high - null))
    return Measured(
        ours, sum(of["n"].values()), f"train prompts of {len(of['n'])} categories", "random groups", (null, low, high)
    )


def categories(metrics: Metrics) -> Measured | None:
    """The mean cosine of two categories' directions."""
    return _categories(metrics, "mean_cosine", lambda k: 1)


def dimensions(metrics: Metrics) -> Measured | None:
    """The participation ratio of the categories' directions over their number."""
    return _categories(metrics, "participation_ratio", float)


def substrings(metrics: Metrics) -> Measured | None:
    """Of the ablated arm: the share without one of the literature's refusal phrases, less compliance by the study's judge. The
    control is the baseline's."""
    figures = metrics["evaluate"]

    def gap(arm: str) -> Limits:
        value, low, high = _limits(figures[arm], "substring_refusal")
        return _less((1 - value, 1 - high, 1 - low), _limits(figures[arm], "compliance"))

    return Measured(gap("runtime"), figures["runtime"]["n"], "test prompts", "baseline", gap("baseline"))


def late_refusals(metrics: Metrics) -> Measured | None:
    """Refusal by long answers of the ablated arm less that by short ones; the control is the baseline's."""
    if not (long := metrics["long_answers"]):
        return None
    arms = long["arms"]
    ours, theirs = (_limits(arms[arm], "refusal_difference") for arm in ("runtime", "baseline"))
    return Measured(ours, arms["runtime"]["n_paired"], "test prompts", "baseline", theirs)


def _measured(name: str, figure: str) -> Callable[[Metrics], Measured | None]:
    """A figure of `make claims`, where it was asked for."""

    def of(metrics: Metrics) -> Measured | None:
        found = metrics.get(name)
        if not found or (kept := found["figures"].get(figure)) is None:
            return None
        ours, theirs = (tuple(kept[key]) for key in ("ours", "theirs"))
        return Measured(ours, kept["n"], f"{kept['of']}, {found['dtype']}", kept["control"], theirs)  # type: ignore[arg-type]

    return of


MEASURES: dict[str, Callable[[Metrics], Measured | None]] = {
    **{of.__name__: of for of in (single, weights, other_set, affine, subspace, harmless, padding)},
    **{of.__name__: of for of in (categories, dimensions, substrings, late_refusals)},
    **{f"pairing.{name}": _measured("pairing", name) for name in ("matched", "matched_less_unrelated", "behaviour")},
    **{f"harmfulness.{name}": _measured("harmfulness", name) for name in ("cosine", "belief")},
    **{f"selection.{name}": _measured("selection", name) for name in ("separation", "val", "bypass", "cosmic")},
}
