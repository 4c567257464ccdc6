"""What `refusal check` prints: each figure beside its threshold, why that threshold, and what to do where it is passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refusal.analysis.check import Check

# Of each figure: what it is, why the threshold is where it is, and what to do.
SAYS = {
    "norm_gain": (
        "greatest gain of a norm over its median",
        "a coordinate at 10 times the median has 100 times its square; Qwen2.5-Coder-0.5B has 7.3 at most, Gemma 3's post-norms "
        "20 to 34, which are reported to spoil a difference in means",
        "Look at loud_difference: where it is passed too, set directions.estimator to another than mean and compare the "
        "separation of both.",
    ),
    "loud_coordinate": (
        "share of |resid_pre|^2 in one coordinate, mean over prompts",
        "three quarters: three times as large as all others together; Qwen2.5-Coder-0.5B, whose direction it hardly touches, has "
        "half in its last layer",
        "Judge directions by Cohen's d and compliance: lengths and cosines of activations tell of this coordinate alone.",
    ),
    "loud_difference": (
        "share of the squared difference in means in one coordinate",
        "a quarter: the direction has a cosine of .5 with that axis",
        "Set directions.estimator to geometric_median, winsorized or normalised, and compare the layer's compliance with mean's.",
    ),
    "pad_resid_pre": (
        "what masked padding moves resid_pre by, of its length",
        "rounding of the dtype, in as many layers as models have, stays below",
        "Set sweep.method and activations.methods to sequential: this model does not hide its padding.",
    ),
    "pad_logits": (
        "what masked padding moves a logit by, of their spread",
        "as pad_resid_pre",
        "Set generation.batch_size to 1, or give the model its attention mask: answers depend on what they are batched with.",
    ),
    "pad_top_token": (
        "prompts whose likeliest token stays when padded",
        "all of them, or greedy answers depend on the batch",
        "Raise model.dtype to float32 where it is lower; else see pad_logits.",
    ),
    "not_edited": (
        "matrices that are no known writer or reader, and writers missing",
        "none: an edit would leave out what it does not know to write into the stream",
        "Look in the model's modeling_*.py for what they do: what writes beside attention and MLP is not ablated either.",
    ),
    "additivity": (
        "what a block's output has beside in + attn_out + mlp_out, in steps of the dtype",
        "a block makes two sums, each rounded by half a step at most",
        "Find in the model's modeling_*.py what scales or is added there: ablation at writes and edited weights are not what "
        "they are taken for.",
    ),
    "edited_parts": (
        "what an edited attention or MLP gives beside what it gave less its component along the direction, over its length",
        "the edit is rounded to the weights' dtype; a writer that was missed keeps the whole component",
        "Ablate only: some gate or norm within the layer undoes edited weights, and a checkpoint of them is not the ablation.",
    ),
    "refusal": (
        "upper limit of the rate of refusal of harmful prompts",
        "below .2 a study's verdict is none: no_refusal (docs/mediation.md)",
        "Take another model or other prompts: there is nothing here for an ablation to remove.",
    ),
    "refused_test_prompts": (
        "harmful test prompts that will be refused",
        "fewer than 30 and a study's verdict is undecided: too_few_refusals",
        "Give more harmful prompts, set science.n_test to null, or give the test split more of them.",
    ),
    "refusal_contrast": (
        "lower limit of refusal of harmful less safe prompts",
        "0: else it is not known to tell harmful prompts from safe ones",
        "Raise -n; where it stays so, set prompts.keep to behaving or give safe prompts that are answered.",
    ),
    "paper_tokens": (
        "share of refusals that begin with a token that select.by: paper reads",
        "half: else its scores see the smaller part of what is refused",
        "Leave select.by at compliance, which judges whole answers.",
    ),
}


def figures(found: Mapping[str, Check], model: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """All that was found, as JSON, each figure with its reason and what to do."""
    table = {}
    for name, one in found.items():
        what, reason, advice = SAYS[name]
        table[name] = {
            "what": what,
            "value": one.value,
            "threshold": one.threshold,
            "at_most": one.at_most,
            "passed": one.passed,
            "where": one.where,
            "reason": reason,
            "advice": advice,
            "by_layer": one.by_layer or None,
            **one.more,
        }
    return {"model": model, **about, "checks": table}


def text(found: Mapping[str, Check], model: str, about: Mapping[str, Any]) -> str:
    """A table, then a sentence for each figure beyond its threshold."""
    lines = [f"{model}: {', '.join(f'{name} {value}' for name, value in about.items())}"]
    names = max(map(len, found))
    lines.append(f"  {'check':{names}}  {'value':>9}  {'threshold':>16}  where")
    lines += [_line(name, one, names) for name, one in found.items()]
    if "refusal" in found:
        lines.append(f"by the rule of a study's verdict: {found['refusal'].more['verdict']}")
    failed = [name for name, one in found.items() if one.passed is False]
    lines += [_sentence(name, found[name]) for name in failed]
    known = sum(one.passed is not None for one in found.values())
    lines.append(f"{len(failed)} of {known} beyond their thresholds" if failed else f"all {known} within their thresholds")
    return "\n".join(lines) + "\n"


def short(found: Mapping[str, Check]) -> list[str]:
    """`look_at_weights` in two or three lines, the first of `make plan`."""
    gain, rest = found["norm_gain"], found["not_edited"]
    after = ", behind the writers too: edited weights are not run-time ablation" if gain.more["after_writers"] else ""
    tied = "tied to the unembedding: an edited checkpoint holds one matrix more" if rest.more["tied_embedding"] else "not tied"
    lines = [
        f"norms: the greatest gain is {_number(gain.value)} times the median ({gain.where}){after}",
        f"edits: {rest.where}; embedding {tied}",
    ]
    return lines + [_sentence(name, one) for name, one in found.items() if one.passed is False]


def _line(name: str, one: Check, width: int) -> str:
    mark = "!" if one.passed is False else " "
    limit = f"{'at most' if one.at_most else 'at least'} {_number(one.threshold)}"
    return f"{mark} {name:{width}}  {_number(one.value):>9}  {limit:>16}  {one.where}"


def _sentence(name: str, one: Check) -> str:
    what, reason, advice = SAYS[name]
    beyond = "above" if one.at_most else "below"
    return f"! {name}: {what} is {_number(one.value)}, {beyond} {_number(one.threshold)} ({reason}). {advice}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"
