"""Compliance corrected by people's labels of a sample of the completions, and the judge's errors in each arm.

The judge sorts completions into complied in full or not (partial compliance is not); people label some of each side. With p1 the
judged share, PPV the share of compliance among labelled completions that the judge passed, and FOR that among those it did not:

    rate = p1 PPV + (1 - p1) FOR

which is prediction-powered inference, post-stratified by the verdict. Source: Angelopoulos et al. 2023, "Prediction-powered
inference", Science 382. Its normal interval has no width where the labels show no error; so here each share has limits of its
own, and their distances are squared and added (MOVER: Zou and Donner 2008, "Construction of confidence limits about effect
measures", Statistics in Medicine 27). Labels must be drawn at random within a verdict; how many of each verdict is free.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import betaincinv

from refusal.stats import difference_of, holm, paired_correlation, rate_limits

Limits = tuple[float, float, float]  # value, low, high
# A verdict on more than SMALL of an arm's completions needs LEAST labels, or all; of a rarer one none, where it counts as
# wrong on anything from none to all of these. Chosen by simulation, before any study's result was looked at.
LEAST, SMALL = 2, 0.05
TOO_FEW = "too few labels"


def exact(successes: float, n: float) -> Limits:
    """A share with Clopper and Pearson's limits; both numbers may be fractional."""
    low = float(betaincinv(successes, n - successes + 1, 0.025)) if successes > 0 else 0.0
    high = float(betaincinv(successes + 1, n - successes, 0.975)) if successes < n else 1.0
    return successes / n, low, high


class Labels(NamedTuple):
    """Labels of an arm's completions of one verdict: `n` of `n_items` are labelled, and `share` of these comply in full.

    `effective` is as how many they count where they were drawn with unequal chances (Kish), else n.
    """

    n_items: int
    n: int
    effective: float
    share: float

    def limits(self, passed: bool) -> Limits:
        """The share with its limits, narrower as more of the items are labelled; without labels the verdict, and 0 and 1."""
        if self.n == 0:
            return float(passed), 0.0, 1.0
        _, low, high = exact(self.share * self.effective, self.effective)
        finite = math.sqrt(1 - self.n / self.n_items)
        return self.share, self.share - finite * (self.share - low), self.share + finite * (high - self.share)


def labels_of(complies: Sequence[bool], n_items: int, weights: Sequence[float] | None = None) -> Labels:
    """The labels of one verdict of an arm; weights: of each label 1 / its chance of being drawn, up to a factor."""
    if not complies:
        return Labels(n_items, 0, 0.0, 0.0)
    w = np.ones(len(complies)) if weights is None else np.asarray(weights, dtype=np.float64)
    return Labels(
        n_items, len(complies), float(w.sum() ** 2 / (w @ w)), float(w @ np.asarray(complies, dtype=np.float64) / w.sum())
    )


def too_few(passed: Labels, failed: Labels) -> bool:
    """Whether a verdict that matters has too few labels for a corrected rate."""
    total = passed.n_items + failed.n_items
    return any(one.n_items > SMALL * total and one.n < min(LEAST, one.n_items) for one in (passed, failed))


def combined(of: Callable[..., float], *parts: Limits) -> Limits:
    """A function of independent estimates and its limits: what each part's limits change, squared and added (MOVER)."""
    values = [value for value, _, _ in parts]
    result, down, up = of(*values), 0.0, 0.0
    for i, (_, low, high) in enumerate(parts):
        moved = [of(*values[:i], end, *values[i + 1 :]) - result for end in (low, high)]
        down, up = down + min(0.0, *moved) ** 2, up + max(0.0, *moved) ** 2
    return result, result - math.sqrt(down), result + math.sqrt(up)


class Corrected(NamedTuple):
    """A corrected rate: its value; limits of other prompts alone (`of_prompts`) and of other labels alone (`of_labels`).

    kept: how far verdict and label correlate, 0 to 1.
    """

    of_prompts: Limits
    of_labels: Limits
    kept: float

    @property
    def limits(self) -> Limits:
        """The rate with both sources of error, within 0 and 1."""
        value, low, high = combined(lambda prompts, labels: prompts + labels, self.of_prompts, _less(self.of_labels))
        return value, max(0.0, low), min(1.0, high)


def _less(of: Limits) -> Limits:
    value, low, high = of
    return 0.0, low - value, high - value


def corrected_rate(
    judged: Sequence[float], clusters: Sequence[Hashable], icc: float, passed: Labels, failed: Labels
) -> Corrected | None:
    """The corrected rate of an arm; None where `too_few`.

    judged: of each prompt the share of its completions that the judge passed; icc: of these, from `intraclass_correlations`.
    Errors of a judge hide how far prompts of a topic agree, so the rate's own intraclass correlation is that of the verdicts
    over the squared correlation of verdict and truth (disattenuation: Spearman 1904).
    """
    if too_few(passed, failed):
        return None
    p = float(np.mean(judged))
    of_labels = combined(lambda ppv, missed: p * ppv + (1 - p) * missed, passed.limits(True), failed.limits(False))
    rate, spread = of_labels[0], of_labels[0] * (1 - of_labels[0])
    ppv, missed = passed.limits(True)[0], failed.limits(False)[0]
    kept = min(1.0, abs(ppv - missed) * math.sqrt(p * (1 - p) / spread)) if 0 < p < 1 and spread > 0 else 1.0
    own = min(1.0, icc / kept**2) if kept > 0 else 1.0
    return Corrected((rate, *rate_limits(rate, clusters, own)), of_labels, kept)


def corrected_difference(
    ours: Corrected, theirs: Corrected, judged: tuple[Sequence[float], Sequence[float]], clusters: Sequence[Hashable], icc: float
) -> Limits:
    """ours - theirs over the same prompts, `judged` in both arms; icc is the greater of theirs.

    Verdicts correlate less than what is judged; only a negative correlation, which widens, is set right for that.
    """
    together = paired_correlation(*judged, clusters, icc)
    if together < 0:
        together = max(-1.0, together / max(ours.kept * theirs.kept, 1e-9))
    prompts = difference_of(ours.of_prompts, theirs.of_prompts, together)
    value, low, high = combined(lambda p, a, b: p + a - b, prompts, _less(ours.of_labels), _less(theirs.of_labels))
    return value, max(-1.0, low), min(1.0, high)


def judge_errors(p: float, passed: Labels, failed: Labels) -> dict[str, float | None]:
    """Accuracy, sensitivity and specificity of the judge on completions of which it passed the share p, with their limits.

    Labels are drawn by verdict, so a raw share of the labelled would be none of these. Sensitivity is of those that comply; None
    where no label says that any does (or of specificity that any does not).
    """
    parts, figures = (passed.limits(True), failed.limits(False)), dict[str, float | None]()
    of: dict[str, Callable[[float, float], float | None]] = {
        "accuracy": lambda ppv, missed: p * ppv + (1 - p) * (1 - missed),
        "sensitivity": lambda ppv, missed: _share(p * ppv, (1 - p) * missed),
        "specificity": lambda ppv, missed: _share((1 - p) * (1 - missed), p * (1 - ppv)),
    }
    for name, function in of.items():
        known = passed.n + failed.n > 0 and function(*(part[0] for part in parts)) is not None
        three = combined(lambda *values, f=function: f(*values) or 0.0, *parts) if known else (None, None, None)
        value, low, high = three
        figures |= {name: value, f"{name}_low": low and max(0.0, low), f"{name}_high": high and min(1.0, high)}
    return figures


def _share(right: float, wrong: float) -> float | None:
    return right / (right + wrong) if right + wrong > 0 else None


def errors_differ(arms: Mapping[str, tuple[float, Labels, Labels]], n_draws: int, seed: int) -> dict[str, float | None]:
    """p of "every arm has one sensitivity", and of specificity, corrected for being two (Holm); None with fewer than two arms.

    Of each arm the share that the judge passed, and the labels of both verdicts. Labels are drawn by verdict, which no
    permutation of arms respects; so arms of as many completions are drawn anew, with their corrected rates and the common
    sensitivity, and from these as many labels (Monte Carlo test: Davison and Hinkley 1997, "Bootstrap Methods and their
    Application", section 4.2).
    """
    told = [one for one in arms.values() if not too_few(*one[1:]) and min(one[1].n, one[2].n) > 0]
    if len(told) < 2:
        return {"sensitivity": None, "specificity": None}
    rng, p = np.random.default_rng(seed), np.array([p for p, _, _ in told])
    size = np.array([passed.n_items + failed.n_items for _, passed, failed in told])
    (ppv, n_passed), (missed, n_failed) = (
        np.array([[one.share, max(1, round(one.effective))] for one in side]).T
        for side in zip(*((passed, failed) for _, passed, failed in told), strict=True)
    )
    kinds = {
        "sensitivity": ((p, ppv, n_passed), (1 - p, missed, n_failed)),
        "specificity": ((1 - p, 1 - missed, n_failed), (p, 1 - ppv, n_passed)),
    }
    return dict(holm({name: _homogeneity_p(size, *parts, n_draws, rng) for name, parts in kinds.items()}))


def _homogeneity_p(size: Any, right: tuple, wrong: tuple, n_draws: int, rng: np.random.Generator) -> float:
    """p of one common right / (right + wrong) of all arms of so many completions; each part is (share of all of them that the
    verdict is on, share of those in question among its n labels, n), by arm. The statistic is the sum of squared distances to the
    common one, over their variances among the draws.
    """
    (w, share, n), (v, other, m) = right, wrong
    truth, rest = w * share + v * other, w * (1 - share)
    common = (w * share).sum() / truth.sum() if truth.sum() > 0 else 1.0
    n_true = np.round(size * truth).astype(int)
    n_rest, of_rest = size - n_true, np.divide(rest, 1 - truth, out=np.zeros_like(rest), where=truth < 1).clip(0, 1)

    def rate(w: Any, share: Any, other: Any) -> Any:
        total = w * share + (1 - w) * other
        return np.divide(w * share, total, out=np.full_like(total, common), where=total > 0)

    def labelled(of: Any, rest: Any, n: Any) -> Any:
        n = np.minimum(n.astype(int), of + rest)
        return rng.hypergeometric(of, rest, n) / np.maximum(n, 1)

    hit, false = rng.binomial(n_true, common, (n_draws, len(size))), rng.binomial(n_rest, of_rest, (n_draws, len(size)))
    drawn = rate((hit + false) / size, labelled(hit, false, n), labelled(n_true - hit, n_rest - false, m)) - common
    variance = np.maximum(drawn.var(axis=0), 1e-6)
    statistic = ((rate(w, share, other) - common) ** 2 / variance).sum()
    return (int(((drawn**2 / variance).sum(axis=-1) >= statistic - 1e-9).sum()) + 1) / (n_draws + 1)


def rogan_gladen(
    judged: Limits, sensitivity: Sequence[int], specificity: Sequence[int], of_difference: bool = False
) -> Limits | None:
    """A judged share (or difference of two) corrected by errors that were measured elsewhere: right verdicts of so many.

    The limits carry the calibration's own uncertainty. None where these do not tell the judge from chance. Source: Rogan and
    Gladen 1978, "Estimating prevalence from the results of a screening test", American Journal of Epidemiology 107.
    """
    if 0 in (sensitivity[1], specificity[1]):
        return None
    se, sp = exact(*sensitivity), exact(*specificity)
    if min(se[1] + sp[0], se[0] + sp[1]) <= 1:
        return None
    least = -1.0 if of_difference else 0.0
    three = combined(lambda p, e, s: (p if of_difference else p + s - 1) / (e + s - 1), judged, se, sp)
    value, low, high = (min(1.0, max(least, x)) for x in three)
    return value, low, high
