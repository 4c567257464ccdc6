"""What could spoil a study of a model, looked at before it: gains of norms, one loud coordinate, padding, what an edit would not
reach, sums that are not the stream's, and whether the model refuses enough.

Each figure is a `Check`: a value, the threshold that it is held to, and where it was found. The thresholds are ours; what each
rests on is in `refusal.report.check`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from refusal.analysis.verdict import FEWEST_REFUSED, NO_REFUSAL, verdict
from refusal.io.errors import UserError
from refusal.io.progress import progress
from refusal.judges.verdicts import OF_HARMFUL, judge_all, rates, values
from refusal.lm.architecture import Architecture
from refusal.lm.load import LM
from refusal.lm.stream import norm_after_writer, stream_of
from refusal.lm.weights import Weights
from refusal.method import intake
from refusal.method.activations import last_token_resid_pre, left_pad
from refusal.method.directions import difference_in_means
from refusal.method.first_token import refusal_tokens
from refusal.method.generate import Decoding, generate
from refusal.stats import independent_difference

GAIN, SHARE, SHARE_OF_DIFFERENCE = 10.0, 0.75, 0.25
# How far a masked pad may move the stream, of its length, and the logits, of their spread, for rounding to explain it.
MOVED = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.3}
N_PADS = 8  # more than the batch needs
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Check:
    """A figure and what it is held to: `at_most` or at least `threshold`. value None: there is none, and `where` says why.

    where: the layer, tensor or coordinate that it is of. by_layer: the same figure of every layer, where it has layers.
    """

    value: float | None
    threshold: float
    where: str
    at_most: bool = True
    by_layer: list[float | None] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool | None:
        """Whether it is as it should be; None without a value."""
        if self.value is None:
            return None
        return self.value <= self.threshold if self.at_most else self.value >= self.threshold


def look_at_weights(weights: Weights) -> dict[str, Check]:
    """What the tensors say by themselves: `norm_gain` and `not_edited`."""
    architecture, gains, matrices = weights.architecture, {}, []
    for name in weights.names:
        tensor = weights.read(name)
        if (added := architecture.norms.get(architecture.names.in_model(name)[0])) is not None:
            gains[name] = (added + tensor.double()).abs()
        elif tensor.ndim > 1:
            matrices.append(name)
    return {"norm_gain": _norm_gain(gains, architecture), "not_edited": _not_edited(matrices, weights)}


def _norm_gain(gains: Mapping[str, Float[Tensor, " d_model"]], architecture: Architecture) -> Check:
    """The greatest gain of a norm over its median, by layer (the norm after the last block is left out of `by_layer`)."""
    tiny, after = torch.finfo(torch.float64).tiny, {"after_writers": norm_after_writer(architecture.config)}
    ratio = {name: float(gain.max() / gain.median().clamp_min(tiny)) for name, gain in gains.items()}
    if not ratio:
        return Check(None, GAIN, "its norms have no gains", by_layer=[None] * architecture.n_layers, more=after)
    name = max(ratio, key=lambda name: ratio[name])
    layers = [
        max((r for name, r in ratio.items() if architecture.layer_of(name) == i), default=None)
        for i in range(architecture.n_layers)
    ]
    where = f"{name}, coordinate {int(gains[name].argmax())}, gain {float(gains[name].max()):.3g}"
    return Check(ratio[name], GAIN, where, by_layer=layers, more=after)


def _not_edited(matrices: Sequence[str], weights: Weights) -> Check:
    """How many matrices neither write into the stream nor read it as far as is known, and writers that are not there."""
    architecture = weights.architecture
    writers = [name for name in matrices if architecture.writer_axis(name) is not None]
    unknown = [name for name in matrices if name not in writers and not architecture.reads(name)]
    missing = architecture.missing_writers(set(weights.names))
    named = [*unknown, *(f"{name} (missing)" for name in missing)]
    where = f"{len(writers)} matrices write, {len(matrices) - len(writers) - len(unknown)} read or embed"
    if named:
        where = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
    more = {"writers": writers, "unknown": unknown, "missing": missing, "tied_embedding": architecture.tied}
    return Check(float(len(named)), 0.0, where, more=more)


def look_at_stream(lm: LM, harmful: Sequence[Sequence[int]], safe: Sequence[Sequence[int]]) -> dict[str, Check]:
    """`loud_coordinate`: the share of the squared norm of the last token's `resid_pre` in one coordinate, mean over prompts;
    `loud_difference`: the share of the squared difference in means in one."""
    both = [last_token_resid_pre(lm, some, "sequential").double() for some in (harmful, safe)]
    squares = torch.cat(both).square()
    shares = (squares / squares.sum(-1, keepdim=True)).mean(0)
    directions = difference_in_means(*both)
    of_difference = directions.unit.square()
    n = {"n_harmful": len(harmful), "n_safe": len(safe)}
    loud = _greatest(shares, range(lm.n_layers), SHARE)
    inside = [float(of_difference[i, shares[i].argmax()]) if i in directions.layers else None for i in range(lm.n_layers)]
    more = n | {"coordinate": shares.argmax(-1).tolist(), "share_of_difference": inside}
    return {
        "loud_coordinate": Check(loud.value, SHARE, loud.where, by_layer=loud.by_layer, more=more),
        "loud_difference": _greatest(of_difference, directions.layers, SHARE_OF_DIFFERENCE, n),
    }


def _greatest(shares: Float[Tensor, "n_layers d_model"], layers: Sequence[int], limit: float, more: dict | None = None) -> Check:
    """The greatest share of one coordinate at these layers."""
    if not layers:
        return Check(None, limit, "no layer has a direction", by_layer=[None] * len(shares), more=more or {})
    greatest = shares.max(-1)
    layer = max(layers, key=lambda i: float(greatest.values[i]))
    by_layer = [float(value) if i in layers else None for i, value in enumerate(greatest.values)]
    where = f"layer {layer}, coordinate {int(greatest.indices[layer])}"
    return Check(by_layer[layer], limit, where, by_layer=by_layer, more=more or {})


def look_at_padding(lm: LM, ids: Sequence[Sequence[int]]) -> dict[str, Check]:
    """What masked padding on the left moves: `pad_resid_pre` |change| over |resid_pre| at the last token, by layer; `pad_logits`
    the greatest change of a next token's logit over the standard deviation of the prompt's logits; `pad_top_token` the share of
    prompts whose likeliest token stays."""
    alone = [_at_end(lm, [prompt], 0) for prompt in ids]
    logits, resid_pre = (torch.cat([one[part] for one in alone]) for part in (0, 1))
    padded_logits, padded_resid_pre = _at_end(lm, ids, N_PADS)
    limit, n = MOVED[lm.model.dtype], {"n": len(ids), "n_pads": N_PADS}
    moved = ((padded_resid_pre - resid_pre).norm(dim=-1) / resid_pre.norm(dim=-1)).amax(0).tolist()
    change = ((padded_logits - logits).abs().amax(-1) / logits.std(-1)).amax()
    same = (padded_logits.argmax(-1) == logits.argmax(-1)).double().mean()
    layer = max(range(len(moved)), key=lambda i: moved[i])
    at = f"{len(ids)} prompts, {N_PADS} pads and more"
    return {
        "pad_resid_pre": Check(moved[layer], limit, f"layer {layer}; {at}", by_layer=moved, more=n),
        "pad_logits": Check(float(change), limit, at, more=n),
        "pad_top_token": Check(float(same), 1.0, at, at_most=False, more=n),
    }


@torch.inference_mode()
def _at_end(lm: LM, ids: Sequence[Sequence[int]], n_pads: int) -> tuple[Tensor, Tensor]:
    """Logits [batch, vocab] and `resid_pre` [batch, n_layers, d_model] at the last token, after so many pads more than needed,
    masked; in float64."""
    model, device = cast(Any, lm.model), lm.model.device
    padded, mask = left_pad(ids, lm.pad_id)
    padded = torch.cat([torch.full((len(ids), n_pads), lm.pad_id), padded], 1).to(device)
    mask = torch.cat([mask.new_zeros(len(ids), n_pads), mask], 1).to(device)
    kept: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append((args[0] if args else kwargs["hidden_states"])[:, -1].cpu().double())

    handles = [b.register_forward_pre_hook(keep, with_kwargs=True) for b in stream_of(model).blocks(model)]
    try:
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        out = model(input_ids=padded, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return out.logits[:, -1].cpu().double(), torch.stack(kept, 1)


def look_at_writes(lm: LM, ids: Sequence[Sequence[int]]) -> dict[str, Check]:
    """`additivity`: what a block's output has beside what came in and what its parts wrote, by layer, in roundings;
    `edited_parts`: what a part with its writers orthogonalized gives, against what it gave less its component along the
    direction (`refusal.method.intake`)."""
    n_tokens = sum(map(len, ids))
    found = {}
    for name, gaps, limit in (
        ("additivity", intake.look_at_sums(lm, ids)[0], intake.ROUNDINGS),
        ("edited_parts", intake.look_at_edits(lm, ids), intake.EDITED[lm.model.dtype]),
    ):
        found[name] = Check(max(gaps), limit, f"layer {gaps.index(max(gaps))}; {n_tokens} tokens", by_layer=[*gaps])
    return found


def look_at_refusals(
    lm: LM,
    prompts: Mapping[str, Sequence[str]],
    topics: Mapping[str, Sequence[Hashable]],
    n_test: int,
    exact: bool,
    batch_size: int = 32,
) -> dict[str, Check]:
    """Greedy answers of MAX_NEW_TOKENS tokens to `harmful` and `safe` prompts, judged by the rules (`exact`: the organism's own
    sentences): how often each half is refused, what the verdict of a study of `n_test` harmful test prompts would say of that,
    and the tokens that refusals begin with."""
    texts = [*prompts["harmful"], *prompts["safe"]]
    ids = lm.encode(texts, MAX_NEW_TOKENS)
    with progress(len(ids) * MAX_NEW_TOKENS, "answers", "token") as bar:
        answers = generate(lm, ids, Decoding(MAX_NEW_TOKENS, batch_size), progress=lambda n: bar.update(n - bar.n))
    judged, n = judge_all(texts, lm.decode(answers), exact), len(prompts["harmful"])
    halves = {"harmful": judged[:n], "safe": judged[n:]}
    refused = {half: values(some, OF_HARMFUL["refusal"]) for half, some in halves.items()}
    found: dict[str, dict[str, Any]] = {}
    for half, flags in refused.items():
        # The interval of a study's own rate: Wilson's, for as many independent prompts as the topic phrases leave.
        rate = rates("refusal", {half: [flags]}, topics[half])[half]
        found[half] = rate | {"n": len(flags), "n_clusters": len(set(topics[half]))}
    harmful = found["harmful"]
    expected = harmful["refusal"] * n_test
    says = verdict(cast(Any, harmful), cast(Any, expected), None, None, None)
    decides = {"no_refusal": "none: no_refusal", "too_few_refusals": "undecided: too_few_refusals"}.get(says["reason"], "enough")
    arms = [(cast(Any, refused[half]), topics[half], found[half]["refusal_icc"]) for half in ("harmful", "safe")]
    difference = independent_difference(arms[0], arms[1])
    of_harmful = [answer for answer, verdict in zip(answers[:n], judged[:n], strict=True) if verdict.refusal]
    return {
        "refusal": Check(harmful["refusal_high"], NO_REFUSAL, _rate(harmful), at_most=False, more=harmful | {"verdict": decides}),
        "refused_test_prompts": Check(expected, FEWEST_REFUSED, f"of {n_test}, expected", at_most=False, more={"n_test": n_test}),
        "refusal_contrast": Check(difference[1], 0.0, f"safe prompts: {_rate(found['safe'])}", False, more=found["safe"]),
        "paper_tokens": _first_tokens(lm, of_harmful),
    }


def _rate(figures: Mapping[str, Any]) -> str:
    return f"{figures['refusal']:.2f} [{figures['refusal_low']:.2f}, {figures['refusal_high']:.2f}] of {figures['n']}"


def _first_tokens(lm: LM, refusals: Sequence[Sequence[int]]) -> Check:
    """The tokens that these answers begin with, and the share that begins with one that `select.by: paper` reads."""
    counts = Counter(answer[0] for answer in refusals)
    names = {token: lm.tokenizer.batch_decode([[token]])[0] for token in counts}
    listed = [{"token": token, "text": names[token], "n": n} for token, n in counts.most_common()]
    more = {"first_tokens": listed, "n": len(refusals)}
    if not refusals:
        return Check(None, 0.5, "nothing was refused", False, more=more)
    try:
        read = set(refusal_tokens(lm).values())
    except UserError as error:
        return Check(None, 0.5, str(error), False, more=more)
    share = sum(n for token, n in counts.items() if token in read) / len(refusals)
    return Check(share, 0.5, ", ".join(f"{one['text']!r} {one['n']}" for one in listed[:5]), False, more=more)
