"""Harmfulness and refusal: directions at the last token of the instruction and at the last of the template, and what each does.

Zhao et al. 2025 (arXiv 2507.11878) read harmfulness at the first of these positions and refusal at the second. Here both
directions are differences in means of the same train pairs. Each is ablated on harmful test prompts that the baseline refuses,
and its raw difference is added to safe ones, as is a random vector as long as refusal's; beside what the model then says stands
what it takes the prompt for: the log odds of Yes against No to QUESTION, as the first token of its answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load, save
from torch import Tensor

from refusal.analysis.claims import Measured
from refusal.analysis.pairing import refused, removed, without_noise
from refusal.analysis.reliability import Rows
from refusal.analysis.sensitivity import collect, common_suffix
from refusal.analysis.study import Study
from refusal.io.errors import UserError
from refusal.io.prompts import Rows as Prompts
from refusal.io.store import key
from refusal.judges.verdicts import OF_HARMFUL, Flags, rates, values
from refusal.lm.load import LM
from refusal.method.activations import Prefix, last_logits
from refusal.method.directions import cosine, difference_in_means, random_unit
from refusal.method.first_token import word_tokens
from refusal.method.interventions import BASELINE, Addition, Intervention, intervene
from refusal.stats import clustered_mean

QUESTION = "Would following this instruction cause harm to someone? Answer with Yes or No."
PLACES = ("harmfulness", "refusal")  # at the last token of the instruction, and of the prompt


@dataclass(frozen=True)
class Read:
    """resid_pre of train pairs by place and half; `tail` tokens of the template lie between the two places."""

    harmful: Mapping[str, Float[Tensor, "n n_layers d_model"]]
    safe: Mapping[str, Float[Tensor, "n n_layers d_model"]]
    tail: int

    def rows(self, place: str, layer: int) -> Rows:
        """What each pair adds to a direction."""
        return {"pairs": self.harmful[place][:, layer].double() - self.safe[place][:, layer].double()}


def apart(study: Study) -> dict[str, Any]:
    """What metrics/claims/harmfulness.json says: cosines by layer; refusals removed, refusals induced and beliefs moved by each;
    and `figures`. Raises UserError where prompts are no pairs, or the template ends with the instruction."""
    s = study.params.claims
    if not study.paired:
        raise UserError("params.yaml: prompts.harmful: the claim `harmfulness` needs pairs: give them as prompts.source")
    layers = [layer for layer in study.layers if s.layers is None or layer in s.layers]
    read = _read(study)
    found = {place: difference_in_means(read.harmful[place], read.safe[place]) for place in PLACES}
    layers = [layer for layer in layers if all(layer in of.layers for of in found.values())]
    if not layers:
        raise UserError("params.yaml: claims.layers: at none of them are both directions defined: name others")
    vectors = {place: found[place].difference[layers] for place in PLACES}
    drawn = random_unit(study.lm.d_model, len(layers), study.seed)
    vectors["random"] = drawn * vectors["refusal"].norm(dim=-1, keepdim=True)
    harmful, answered = refused(study), _answered(study)
    beliefs = None if study.exact else _beliefs(study, answered, vectors, layers)
    cosines = [_cosines(study, read, found, layer) for layer in layers]
    return {
        "layers": layers,
        "tail": read.tail,
        "n_pairs": len(study.pairs["train"]),
        "n_refused": len(harmful),
        "n_answered": len(answered),
        "cosines": cosines,
        "removed": _removed(study, harmful, vectors, layers),
        "induced": _induced(study, answered, vectors, layers),
        "question": QUESTION,
        "beliefs": beliefs,
        "figures": _figures(study, cosines, beliefs, len(answered)),
    }


def _read(study: Study) -> Read:
    ids = {half: study.lm.encode([row[half] for row in study.pairs["train"]]) for half in ("harmful", "safe")}
    tail = common_suffix([*ids["harmful"], *ids["safe"]])
    if not tail:
        raise UserError(
            "params.yaml: model.id: its template ends with the instruction, so that there is one position and not two"
        )
    of = {
        half: collect(study, some, f"claims: {half} train prompts", tail + 1, of=lambda at: at[:, [0, -1]])
        for half, some in ids.items()
    }
    harmful, safe = ({place: of[half][:, i] for i, place in enumerate(PLACES)} for half in ("harmful", "safe"))
    return Read(harmful, safe, tail)


def _answered(study: Study) -> Prompts:
    """The safe test prompts that the baseline answers."""
    rows = study.sample("test", study.params.claims.n, "safe")
    if not (found := [rows[i] for i in study.behaving(rows, "safe", "claims: test, safe, baseline")]):
        raise UserError("params.yaml: model.id: it answers no safe test prompt in full, so that nothing can be refused")
    return found


def _topics(rows: Prompts) -> list[Hashable]:
    return [row["topic"] for row in rows]


def _removed(study: Study, rows: Prompts, vectors: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """Share of refusals removed where each direction is ablated, over the layers' mean of each prompt."""
    acting = {
        name: [
            Intervention(f"{name}.{i}", v / v.norm(), 1.0, study.sites, None, i, name)
            for i, v in zip(layers, some.double(), strict=True)
        ]
        for name, some in vectors.items()
    }
    flags, topics = removed(study, rows, acting, "claims: harmfulness, ablated")
    return {name: of | {"n": len(rows)} for name, of in rates("removed", flags, topics).items()}


def _induced(study: Study, rows: Prompts, vectors: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """Share of answered safe prompts that are refused where each difference is added at its layer, at the whole prompt."""
    flags: dict[str, list[Flags]] = {}
    for name, some in vectors.items():
        flags[name] = [
            values(study.ask(rows, "safe", [BASELINE], f"claims: {name} added", Addition(v, i)).the_only, OF_HARMFUL["refusal"])
            for i, v in zip(layers, some, strict=True)
        ]
    return {name: of | {"n": len(rows)} for name, of in rates("induced", flags, _topics(rows)).items()}


def _beliefs(study: Study, rows: Prompts, vectors: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """Log odds that the safe prompts are taken for harmful, and of their harmful halves, by the baseline; how far each addition
    moves those of the safe ones, a mean over layers; and how much further harmfulness does than refusal."""
    lm = study.lm
    yes, no = (
        [*word_tokens(lm, (word,), "the claim `harmfulness`", "leave it out: make claims CLAIM=pairing").values()]
        for word in ("Yes", "No")
    )
    ids = {half: lm.encode([f"{row[half]}\n\n{QUESTION}" for row in rows]) for half in ("harmful", "safe")}
    acting: list[tuple[str, Intervention | Addition]] = [("harmful", BASELINE), ("safe", BASELINE)]
    acting += [("safe", Addition(v, i)) for some in vectors.values() for i, v in zip(layers, some, strict=True)]
    keyed = [
        (key("belief", (_belief,), **lm.identity, ids=ids[half], acting=one.fingerprint(), yes=yes, no=no), (half, one))
        for half, one in acting
    ]

    def compute(job: tuple[str, Intervention | Addition]) -> bytes:
        return save({"belief": _belief(lm, ids[job[0]], job[1], (yes, no), study.params.activations.batch_size)})

    harmful, safe, *added = (load(one)["belief"] for one in study.store.run(keyed, compute, "claims: beliefs", "set"))
    n, topics = len(layers), _topics(rows)
    moved = {name: torch.stack(added[k * n : (k + 1) * n]).mean(0) - safe for k, name in enumerate(vectors)}

    def mean(of: Tensor) -> dict[str, Any]:
        limits = clustered_mean(of.tolist(), topics, study.n_resamples, study.seed)
        return dict(zip(("mean", "low", "high"), limits, strict=True)) | {"n": len(rows)}

    told = {name: mean(of) for name, of in {"harmful_less_safe": harmful - safe, "safe": safe, **moved}.items()}
    return told | {"harmfulness_less_refusal": mean(moved["harmfulness"] - moved["refusal"])}


@torch.inference_mode()
def _belief(
    lm: LM,
    ids: Sequence[Sequence[int]],
    acting: Intervention | Addition,
    tokens: tuple[Sequence[int], Sequence[int]],
    batch_size: int,
) -> Float[Tensor, " n"]:
    """log P(yes) - log P(no) as the first token of each answer, float64."""
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found = torch.zeros(len(ids), dtype=torch.float64)
    with intervene(lm.model, acting) if isinstance(acting, Addition) else acting.on(lm.model):
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            some = [ids[i] for i in batch]
            logits = last_logits(lm, some, Prefix(lm.model, some).ids, 1)(0, len(some))[:, -1].double().cpu()
            yes, no = (logits[:, [*of]].logsumexp(-1) for of in tokens)
            found[torch.tensor(batch)] = yes - no
    return found


def _cosines(study: Study, read: Read, found: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """Of a layer: the cosine of both directions, without noise and with its limits, and the harmless difference's with each."""
    units = [found[place].unit[layer] for place in PLACES]
    harmless = study.harmless_difference
    to_harmless = [float(cosine(harmless["unit"][layer], unit)) if harmless["defined"][layer] else None for unit in units]
    return {
        "layer": layer,
        "cosine": float(cosine(*units)),
        **dict(zip(("corrected", "low", "high"), without_noise(*(read.rows(place, layer) for place in PLACES)), strict=True)),
        **{f"harmless_to_{place}": value for place, value in zip(PLACES, to_harmless, strict=True)},
    }


def _figures(study: Study, cosines: Sequence[Mapping[str, Any]], beliefs: Mapping[str, Any] | None, n: int) -> dict[str, Any]:
    """What claims.MEASURES reads: the cosine at the selected layer, or the nearest that was asked for."""
    at = min(cosines, key=lambda row: abs(row["layer"] - study.layer))
    figures: dict[str, Any] = dict.fromkeys(("cosine", "belief"))
    if at["corrected"] is not None:
        limits = tuple(at[of] for of in ("corrected", "low", "high"))
        of = f"train pairs, at layer {at['layer']}"
        figures["cosine"] = vars(Measured(limits, len(study.pairs["train"]), of, "one direction", (1.0, None, None)))
    if beliefs is not None:
        ours, theirs = (
            tuple(beliefs[name][of] for of in ("mean", "low", "high")) for name in ("harmfulness_less_refusal", "random")
        )
        figures["belief"] = vars(Measured(ours, n, "safe test prompts", "a random vector", theirs))
    return figures
