"""Which safe prompts to subtract: matched, shuffled or unrelated ones, of all train prompts or of those that behave, few or many.

What a direction does is the share of the baseline's refusals that its ablation removes, on test, averaged over layers that were
named beforehand: no layer is chosen, so that no pairing gains by the choice. A unit vector is ablated, so the length of the
difference cannot matter; how far its prompts' noise has turned it is its reliability.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch

from refusal.analysis.claims import Measured
from refusal.analysis.reliability import N_SPLITS, Rows, corrected_cosine, split_half_cosine, step_up
from refusal.analysis.study import Study
from refusal.io.errors import UserError
from refusal.io.prompts import Rows as Prompts
from refusal.judges.verdicts import Flags, by_prompt, rates, values
from refusal.method.activations_file import Activations
from refusal.method.directions import difference_in_means, random_unit
from refusal.method.interventions import Intervention
from refusal.stats import clustered_mean, holm, intraclass_correlations, paired_difference, sign_flip_p, subsample_indices

FEWEST = 8  # pairs that a direction is estimated from
N_FLIPS = 10_000
PAIRINGS = ("matched", "shuffled", "unrelated")


@dataclass(frozen=True)
class Condition:
    """One way to estimate a direction: pairing, `all` or `behaving` prompts, and which rows of train its two means are of."""

    pairing: str
    behaviour: str
    harmful: Sequence[int]
    safe: Sequence[int]

    @property
    def name(self) -> str:
        """`matched-all-64`."""
        return f"{self.pairing}-{self.behaviour}-{len(self.harmful)}"

    def sets(self, activations: Mapping[str, Activations]) -> tuple[Activations, Activations]:
        """Its harmful and its safe activations."""
        safe = activations["train.unrelated" if self.pairing == "unrelated" else "train.safe"]
        return activations["train.harmful"][torch.tensor(self.harmful)], safe[torch.tensor(self.safe)]

    def rows(self, activations: Mapping[str, Activations], layer: int) -> Rows:
        """What each of its prompts, or matched pairs, adds to the direction of a layer."""
        harmful, safe = (some[:, layer] for some in self.sets(activations))
        return {"pairs": harmful - safe} if self.pairing == "matched" else {"harmful": harmful, "safe": -safe}


def contest(study: Study, activations: Mapping[str, Activations]) -> dict[str, Any]:
    """What metrics/claims/pairing.json says: conditions, contrasts stated here and corrected for their number, and `figures`.

    activations: of all train prompts, by one method. Raises UserError where prompts are no pairs, or too few of them behave.
    """
    s = study.params.claims
    if not study.paired:
        raise UserError("params.yaml: prompts.harmful: the claim `pairing` needs pairs: give them as prompts.source")
    layers = [layer for layer in study.layers if s.layers is None or layer in s.layers]
    pools = {"all": _everyone(study), "behaving": _behaving(study)}
    if min(map(len, pools["behaving"])) < FEWEST:
        raise UserError(
            f"params.yaml: model.id: of its train prompts {len(pools['behaving'][0])} pairs and {len(pools['behaving'][1])} "
            f"unrelated ones behave, and the claim `pairing` needs {FEWEST}: give more prompts, or a model that refuses more"
        )
    conditions = {one.name: one for one in _conditions(pools, s.n_pairs, study.seed)}
    acting = {name: _interventions(study, one, activations, layers) for name, one in conditions.items()}
    drawn = random_unit(study.lm.d_model, s.n_random, study.seed)
    acting["random"] = [Intervention(f"random_{i}", v, 1.0, study.sites, direction_independent=True) for i, v in enumerate(drawn)]
    rows = refused(study)
    flags, topics = removed(study, rows, acting, "claims: pairing")
    figures = rates("removed", flags, topics)
    noise = {name: _noise(one, activations, layers, study.seed) for name, one in conditions.items()}
    contrasts = _contrasts(study, {k: len(pools[k][0]) for k in pools}, conditions, flags, topics)
    n = len(rows)
    return {
        "layers": layers,
        "n_refused": n,
        "n_behaving": {"pairs": len(pools["behaving"][0]), "unrelated": len(pools["behaving"][1])},
        "conditions": {name: {**figures[name], **noise[name], "n": n} for name in conditions},
        "random": figures["random"] | {"n": n, "n_arms": len(drawn)},
        "contrasts": contrasts,
        "cosine_matched_to_unrelated": _cosines(conditions, activations, layers, len(pools["all"][0])),
        "figures": _figures(figures, contrasts, len(pools["all"][0]), n),
    }


def _everyone(study: Study) -> tuple[list[int], list[int]]:
    return [*range(len(study.pairs["train"]))], [*range(len(study.unrelated["train"]))]


def _behaving(study: Study) -> tuple[list[int], list[int]]:
    """(pairs whose harmful half is refused and whose safe half is answered in full, unrelated prompts that are answered)."""
    pairs, unrelated = study.pairs["train"], study.unrelated["train"]

    refused, answered = (study.behaving(pairs, half, f"claims: train, {half}") for half in ("harmful", "safe"))
    return sorted({*refused} & {*answered}), study.behaving(unrelated, "safe", "claims: train, unrelated")


def _conditions(pools: Mapping[str, tuple[list[int], list[int]]], sizes: Sequence[int], seed: int) -> list[Condition]:
    """Every pairing of both pools at each size below the pool's own and at that, and of `all` at the size of `behaving` too.

    Shuffled safe halves are those of other pairs, of which there are not enough where more than half of the pool is taken.
    """
    found = []
    for behaviour, (pairs, unrelated) in pools.items():
        for n in sorted({*(n for n in sizes if n < len(pairs)), len(pairs), min(len(pairs), len(pools["behaving"][0]))}):
            harmful = [pairs[i] for i in subsample_indices(len(pairs), n, seed)]
            others = [unrelated[i] for i in subsample_indices(len(unrelated), n, seed)]
            found += [Condition("matched", behaviour, harmful, harmful), Condition("unrelated", behaviour, harmful, others)]
            if 2 * n <= len(pairs):
                rest = sorted({*pairs} - {*harmful})
                shuffled = [rest[i] for i in subsample_indices(len(rest), n, seed + 1)]
                found.append(Condition("shuffled", behaviour, harmful, shuffled))
    return found


def _interventions(
    study: Study, of: Condition, activations: Mapping[str, Activations], layers: Sequence[int]
) -> list[Intervention]:
    directions = difference_in_means(*of.sets(activations))
    if lost := sorted({*layers} - {*directions.layers}):
        raise UserError(f"params.yaml: claims.layers: {of.name} has no direction at layers {lost}: name others")
    return [
        Intervention(f"{of.name}.{i}", directions.unit[i], 1.0, study.sites, None, i, of.name, direction_independent=False)
        for i in layers
    ]


def refused(study: Study) -> Prompts:
    """The test prompts that the baseline refuses, which every claim is measured on. Raises UserError where there is none."""
    rows = study.sample("test", study.params.claims.n)
    if not (found := [rows[i] for i in study.behaving(rows, "harmful", "claims: test, baseline")]):
        raise UserError("params.yaml: model.id: it refuses no harmful test prompt, so there is nothing to remove")
    return found


def removed(
    study: Study, rows: Prompts, acting: Mapping[str, Sequence[Intervention]], label: str
) -> tuple[dict[str, list[Flags]], list[Hashable]]:
    """(whether each refused prompt is answered in full, under each intervention of an arm; the topics of the prompts)."""
    asked = study.ask(rows, "harmful", [one for some in acting.values() for one in some], label)
    flags: dict[str, list[Flags]] = {
        name: [values(asked.verdicts[one.name], lambda v: v.compliance == 1) for one in some] for name, some in acting.items()
    }
    return flags, asked.topics


def without_noise(a: Rows, b: Rows) -> tuple[float, float, float] | tuple[None, None, None]:
    """`corrected_cosine`, None for all three where it or its limits are not to be had."""
    found = corrected_cosine(a, b)
    return found if all(map(math.isfinite, found)) else (None, None, None)


def _noise(of: Condition, activations: Mapping[str, Activations], layers: Sequence[int], seed: int) -> dict[str, Any]:
    """Mean over the layers of the reliability and of the difference's length."""
    halves = [split_half_cosine(of.rows(activations, i), N_SPLITS, seed) for i in layers]
    lengths = difference_in_means(*of.sets(activations)).difference.norm(dim=-1)
    return {
        "n_pairs": len(of.harmful),
        "reliability": fmean(step_up(c, 2) if c > 0 else 0.0 for c in halves),
        "length": float(lengths[list(layers)].mean()),
    }


def _cosines(
    conditions: Mapping[str, Condition], activations: Mapping[str, Activations], layers: Sequence[int], n: int
) -> list[dict[str, Any]]:
    """By layer the cosine of the matched with the unrelated direction of all prompts, without the noise of either."""
    matched, unrelated = (conditions[f"{pairing}-all-{n}"] for pairing in ("matched", "unrelated"))
    found = []
    for layer in layers:
        harmful, safe = (some[:, layer] for some in matched.sets(activations))
        a = {"harmful": harmful, "safe": -safe}
        limits = without_noise(a, {"harmful": harmful, "unrelated": -unrelated.sets(activations)[1][:, layer]})
        found.append({"layer": layer} | dict(zip(("cosine", "low", "high"), limits, strict=True)))
    return found


def _contrasts(
    study: Study, n: Mapping[str, int], conditions: Mapping[str, Condition], flags: Mapping[str, Sequence[Flags]], topics: Any
) -> dict[str, Any]:
    """Differences in the share removed, paired by prompt, with p corrected by Holm for their number.

    Stated here, before any figure: matched less unrelated, of all prompts, of those that behave, and of as many of all as
    behave; the second less the third (does conditioning on behaviour help matching more?); shuffled less matched at the largest
    size that has both, which should be nothing where no direction is of few prompts.
    """
    few = n["behaving"]
    wanted = {
        "matched_less_unrelated": (f"matched-all-{n['all']}", f"unrelated-all-{n['all']}"),
        "matched_less_unrelated_behaving": (f"matched-behaving-{few}", f"unrelated-behaving-{few}"),
        "matched_less_unrelated_as_few": (f"matched-all-{few}", f"unrelated-all-{few}"),
    }
    if shuffled := [name for name in conditions if name.startswith("shuffled-all-")]:
        wanted["shuffled_less_matched"] = (shuffled[-1], shuffled[-1].replace("shuffled", "matched"))
    means = {name: by_prompt(flags[name], topics) for pair in wanted.values() for name in pair}
    iccs = dict(zip(means, intraclass_correlations([*means.values()]), strict=True))
    found, gaps = {}, {}
    for name, (ours, theirs) in wanted.items():
        (a, kept), (b, _) = means[ours], means[theirs]
        gaps[name] = [x - y for x, y in zip(a, b, strict=True)]
        limits = paired_difference(a, b, kept, max(iccs[ours], iccs[theirs]))
        found[name] = {"ours": ours, "theirs": theirs} | dict(zip(("difference", "low", "high"), limits, strict=True))
    by_behaviour = [a - b for a, b in zip(*(gaps[f"matched_less_unrelated_{of}"] for of in ("behaving", "as_few")), strict=True)]
    gaps["behaviour"] = by_behaviour
    limits = clustered_mean(by_behaviour, topics, study.n_resamples, study.seed)
    found["behaviour"] = dict(zip(("difference", "low", "high"), limits, strict=True))
    p = {name: sign_flip_p(gap, topics, N_FLIPS, study.seed) for name, gap in gaps.items()}
    return {name: found[name] | {"p": p[name], "p_holm": corrected} for name, corrected in holm(p).items()}


def _figures(rates_of: Mapping[str, Mapping[str, float]], contrasts: Mapping[str, Any], n_all: int, n: int) -> dict[str, Any]:
    """What claims.MEASURES reads."""

    def limits(figures: Mapping[str, Any], *names: str) -> Any:
        return tuple(figures[name] for name in names)

    def shown(ours: Any, control: str, theirs: Any) -> dict[str, Any]:
        return vars(Measured(ours, n, "refused test prompts", control, theirs))

    names = ("difference", "low", "high")
    same = contrasts.get("shuffled_less_matched")
    removed = [limits(rates_of[name], "removed", "removed_low", "removed_high") for name in (f"matched-all-{n_all}", "random")]
    figures: dict[str, Any] = {"matched": shown(removed[0], "random directions", removed[1])}
    for name in ("matched_less_unrelated", "behaviour"):
        known = None if same is None else shown(limits(contrasts[name], *names), "shuffled less matched", limits(same, *names))
        figures[name] = known
    return figures
