"""The paper's rule for choosing a direction: least refusal under its ablation, of those that meet three criteria. Plain figures.

Source: Arditi et al. 2024, arXiv 2406.11717, appendix C, as its code has it (andyrdt/refusal_direction,
pipeline/submodules/select_direction.py). There candidates are the difference-in-means at every token after the instruction; here
they are a study's own, at the last prompt token (POSITION) of each layer swept: others would need activations of their own.
`refusal.method.first_token` computes the scores.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refusal.io.errors import UserError
from refusal.method.select import cell_name, cell_row
from refusal.method.subspaces import Span

KL_AT_MOST = 0.1  # nats
INDUCE_ABOVE = 0.0
POSITION = -1
CRITERIA = ("kl", "induce", "layer")


@dataclass(frozen=True)
class Candidate:
    """A direction by its place, and its three scores, each a mean over val prompts.

    position: from the prompt's end, -1 the last token. bypass: refusal score of harmful prompts, the direction ablated. induce:
    that of harmless prompts, the raw difference added at its layer. kl: of harmless prompts' first token, in nats, from the
    baseline model to the ablated one.
    """

    layer: int
    bypass: float
    induce: float
    kl: float
    position: int = POSITION

    def passes(self, n_layers: int) -> dict[str, bool]:
        """Whether it meets each criterion: KL at most .1, refusal induced, not in the last fifth of the layers."""
        return {
            "kl": self.kl <= KL_AT_MOST,
            "induce": self.induce > INDUCE_ABOVE,
            "layer": self.layer < layers_below(n_layers),
        }


@dataclass(frozen=True)
class Choice:
    """passing, without_induce: those that meet all criteria, and all but `induce`, best first. reason: why none is chosen.

    leaves_none: each criterion without which there would be some, where none is chosen.
    """

    passing: list[Candidate]
    without_induce: list[Candidate]
    leaves_none: list[str]
    reason: str | None

    @property
    def chosen(self) -> Candidate | None:
        """The paper's choice."""
        return self.passing[0] if self.passing else None

    @property
    def best_without_induce(self) -> Candidate | None:
        """What the choice would be without the criterion that the direction induces refusal."""
        return self.without_induce[0] if self.without_induce else None


def layers_below(n_layers: int) -> int:
    """The first layer of the last fifth, which is left out: int(.8 n), as the paper's code rounds it."""
    return 4 * n_layers // 5


def choose(candidates: Sequence[Candidate], n_layers: int) -> Choice:
    """The candidate of least `bypass` among those that meet every criterion; ties go to the earlier one, NaN meets none."""
    scored = [one for one in candidates if not math.isnan(one.bypass)]

    def left(but: str = "") -> list[Candidate]:
        met = [one for one in scored if all(ok for name, ok in one.passes(n_layers).items() if name != but)]
        return sorted(met, key=lambda one: one.bypass)

    passing = left()
    if passing:
        return Choice(passing, left("induce"), [], None)
    leaves_none = [name for name in CRITERIA if left(name)]
    return Choice([], left("induce"), leaves_none, _reason(scored, n_layers, leaves_none))


def _reason(candidates: Sequence[Candidate], n_layers: int, leaves_none: Sequence[str]) -> str:
    """Why none is left, in one sentence with how many meet each criterion."""
    met = {name: sum(one.passes(n_layers)[name] for one in candidates) for name in CRITERIA}
    most = max((one.induce for one in candidates), default=None)
    highest = "" if most is None else f" (the highest: {most:.2f})"
    words = (
        f"{met['kl']} have KL at most {KL_AT_MOST:g}, {met['induce']} a refusal score above {INDUCE_ABOVE:g} of harmless prompts "
        f"where added{highest}, {met['layer']} lie below layer {layers_below(n_layers)}"
    )
    alone = f"without the criterion {' or '.join(leaves_none)} some would" if leaves_none else "no criterion alone is to blame"
    return f"no candidate of {len(candidates)} passes: {words}; {alone}"


def ranked(selection: Mapping[str, Any], judged: Mapping[str, Any], top: int, method: str) -> dict[str, dict[str, Any]]:
    """`rank_1`, ... at most `top` by the paper's rule, at alpha 1, from metrics/selection.json and metrics/judge.json.

    Each has the keys of `refusal.method.select.rank`, its three scores, and `criterion_left_out`: None, or `induce` where no
    candidate passes. `n_tied` counts equal `bypass`; `margin_items` is None, since a log odds is no number of prompts.
    Raises UserError where the rule was not computed, and where it leaves nothing even so.
    """
    if selection["by"] != "paper":
        raise UserError(
            "params.yaml: select.by is paper, and the scores are not there: run `dvc repro selection`, which makes them"
        )
    if not selection["order"]:
        raise UserError(
            f"params.yaml: select.by is paper, and {selection['reason']}: set select.by to compliance, or sweep more layers"
        )
    ranks: dict[str, dict[str, Any]] = {}
    found = selection["candidates"]
    for i, layer in enumerate(selection["order"][:top], 1):
        scores, span = found[f"layer_{layer}"], Span("single", (layer,))
        n_tied = sum(found[f"layer_{other}"]["bypass"] == scores["bypass"] for other in selection["order"])
        ranks[f"rank_{i}"] = {
            **cell_row(judged[cell_name(span.name, 1.0)], span, layer, method, n_tied, None),
            **{key: scores[key] for key in ("bypass", "induce", "kl")},
            "criterion_left_out": selection["criterion_left_out"],
        }
    return ranks


def metrics(choice: Choice, candidates: Sequence[Candidate], n_layers: int) -> dict[str, Any]:
    """What metrics/selection.json says of the choice: the rule, each candidate by `layer_<l>`, the order, and the reason."""

    def shown(one: Candidate | None) -> dict[str, Any] | None:
        return None if one is None else {"layer": one.layer, "position": one.position}

    return {
        "rule": {"kl_at_most": KL_AT_MOST, "induce_above": INDUCE_ABOVE, "layer_below": layers_below(n_layers)},
        "candidates": {
            f"layer_{one.layer}": {
                "layer": one.layer,
                "position": one.position,
                "bypass": one.bypass,
                "induce": one.induce,
                "kl": one.kl,
                "passes": one.passes(n_layers),
            }
            for one in candidates
        },
        "chosen": shown(choice.chosen),
        "reason": choice.reason,
        "leaves_none": choice.leaves_none,
        "best_without_induce": shown(choice.best_without_induce),
        "criterion_left_out": None if choice.passing or not choice.without_induce else "induce",
        "order": [one.layer for one in choice.passing or choice.without_induce],
    }
