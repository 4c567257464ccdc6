"""docs/claims.md: what others say of refusal directions beside our figures, one table a claim."""

from collections.abc import Collection, Mapping
from typing import Any

from refusal.io.claims import Claim
from refusal.report.models import KINDS
from refusal.report.numbers import num
from refusal.stats import wilson

HEAD = """\
<!-- Made by `make claims`; what is written here by hand is lost. -->
# Claims, measured again

What others say of refusal directions, and what the same quantity is in each of our studies: the organism, whose truth is known
([across-models.md](across-models.md)), and the real models of `studies/`. Each claim predicts where the quantity lies
(`data/claims.yaml`). It *replicates* where our whole 95 % interval lies there; it *does not replicate* where the whole interval
lies elsewhere, or where a control that should not lie there does; all else is *not decided here*, as is what lies within the
limits of such a control. A figure of one small model says nothing of the models that a claim was made of.

Rates have intervals as in [intervals.md](intervals.md); differences of arms whose pairing the metrics do not keep are taken as of
unrelated prompts, which is too wide. A figure of categories has the width of its null. Where a study lacks a figure it was not
measured: `make claims STUDY=name` does it, for a study that was run here.
"""


def page(
    claims: Mapping[str, Claim],
    found: Mapping[str, Mapping[str, Mapping[str, Any]]],
    organisms: Mapping[str, Any],
    older: Collection[str],
) -> str:
    """The page. found: metrics/claims.json. organisms: metrics/organisms.json. older: studies whose figures are not of today's
    code."""
    lines = [HEAD, false_verdicts(organisms)]
    if older:
        lines.append(f"Not of today's code: {', '.join(sorted(older))}.\n")
    lines += ["| claim | " + " | ".join(found) + " |", "| --- |" + " --- |" * len(found)]
    lines += [
        f"| [{claim.claim.rstrip('.')}](#{name}) | " + " | ".join(of[name]["outcome"] for of in found.values()) + " |"
        for name, claim in claims.items()
    ]
    for name, claim in claims.items():
        lines += [
            "",
            f"## {name}",
            "",
            f"{claim.claim} {_source(claim)}",
            "",
            f"Measured: {claim.quantity}. {_predicted(claim)}",
            "",
        ]
        lines += ["| study | ours | n | control | outcome |", "| --- | --- | --- | --- | --- |"]
        lines += [_row(study, of[name]) for study, of in found.items()]
    return "\n".join(lines) + "\n"


def false_verdicts(organisms: Mapping[str, Any]) -> str:
    """How often a study of an organism whose answer was arranged found another, with Wilson's interval."""
    arranged = [(agrees, o) for name, o in organisms.items() if (agrees := KINDS[name.split(".")[0]][1])]
    wrong = sum(not agrees(o) for agrees, o in arranged)
    low, high = wilson(wrong, len(arranged))
    return (
        f"How often this package's own verdict is false: of {len(arranged)} organisms whose answer was arranged, {wrong} were "
        f"found otherwise, a rate of {_limits(wrong / len(arranged), low, high)} ([mediation.md](mediation.md)).\n"
    )


def _source(claim: Claim) -> str:
    return f"*{claim.source}* (read: {claim.read}); n: {claim.their_n}; figure: {claim.their_figure}."


def _predicted(claim: Claim) -> str:
    bounds = [
        f"{words} {bound:g}" for words, bound in (("at least", claim.at_least), ("at most", claim.at_most)) if bound is not None
    ]
    outside = ", and the control not" if claim.control_outside else ""
    return f"Predicted: {' and '.join(bounds)}{outside}. What would decide: {claim.decides}."


def _row(study: str, of: Mapping[str, Any]) -> str:
    if "ours" not in of:
        return f"| {study} | not measured | – | – | {of['outcome']} |"
    n = f"{of['n']} {of['of']}"
    return f"| {study} | {_limits(*of['ours'])} | {n} | {of['control']}: {_limits(*of['theirs'])} | {of['outcome']} |"


def _limits(value: float, low: float | None, high: float | None) -> str:
    return num(value) if low is None else f"{num(value)} [{num(low)}, {num(high)}]"
