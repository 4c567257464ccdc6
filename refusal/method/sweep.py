"""Completions of many prompts under many interventions, through the resume store.

Rows (a prompt under an intervention) are put in order of prompt length and cut into jobs of at most BATCHES_PER_JOB batches. A
job decodes a batch at a time, new rows entering as others end, and is stored whole: its composition is fixed, so rows come out
the same whatever else is stored, and a run that was interrupted meets the same jobs again and ends in the same bytes. What a kill
costs is the job at hand. What a job of several batches gains: its slots run empty once and not once a batch (where completions
end anywhere up to the limit, a batch alone decodes half empty, four of them a quarter), and the prompts' common beginning is
computed once an intervention and job. Of a large model on a CPU, which few rows keep busy, a job is a quarter of a minute's
work. Rows are not stored one by one: those left over would be decoded in other company, and bfloat16 rounds by company.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from refusal.io.errors import UserError
from refusal.io.params import AblationSection
from refusal.io.store import Store, key
from refusal.io.sweep import Sweep
from refusal.lm.batching import job_slices
from refusal.lm.engine import hand_out
from refusal.lm.load import LM
from refusal.method.directions import defined_layers
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import BASELINE, Addition, Intervention
from refusal.method.select import cell_name
from refusal.method.subspaces import basis_of, random_of, spans

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCHES_PER_JOB = 4
JOB_WORK = 1_500_000_000_000  # parameters times new tokens in a quarter of a minute, at 0.5B and five rows of 32 tokens a second
LEAST_ROWS = 16  # fewer wait for the weights' way from memory, not for arithmetic
FEW = 128  # rows: fewer take as long as half of them


def grid(
    directions: Mapping[str, Tensor], harmless: Mapping[str, Tensor], sweep: Sweep, ablation: AblationSection
) -> list[Intervention]:
    """The interventions of a sweep: the baseline; as controls at alpha 1, random directions (of a subspace random ones of its
    rank) and each layer's difference of two harmless sets; and what each of `spans` takes out at every alpha. By `family`.

    `directions` holds `unit`, `defined`, `safe_mean` and for svd `singular` of one method and pairing, `harmless` those of its
    pairing `harmless`, which are no pairs: svd has no such control.
    Raises UserError for a layer that does not exist or whose direction is undefined, and where all are.
    """
    safe_mean = directions["safe_mean"].double()
    defined = defined_layers(directions)
    if not defined:
        raise UserError(
            "no layer has a direction, so nothing can be swept: to the model, harmful and safe prompts are the same (it has one "
            "layer, or its tokenizer does not tell them apart); set another model.id or prompts.source in params.yaml"
        )
    among, affine = spans(sweep, defined), ablation.kind == "affine"

    def one(family: str, name: str, basis: Tensor, alpha: float = 1.0, layer: int | None = None) -> Intervention:
        offset = safe_projection(safe_mean, basis.double()) if affine else None
        independent = family == "random" and not affine
        return Intervention(name, basis, alpha, ablation.sites, offset, layer, family, independent)

    drawn = random_of(among[0], directions, sweep.n_random, sweep.seed)
    randoms = [one("random", f"random_{i}", basis) for i, basis in enumerate(drawn)]
    differences = [
        one("harmless", f"harmless_{span.shown}", basis_of(span, harmless))
        for span in among
        if span.basis != "svd" and all(harmless["defined"][i] for i in span.layers)
    ]
    swept = [
        one("swept", cell_name(span.name, alpha), basis, alpha, span.layers[0] if len(span.layers) == 1 else None)
        for span, basis in ((span, basis_of(span, directions)) for span in among)
        for alpha in sweep.alphas
    ]
    return [BASELINE, *randoms, *differences, *swept]


def safe_projection(
    safe_mean: Float[Tensor, "n_layers d_model"], basis: Float[Tensor, "*n_layers k d_model"]
) -> Float[Tensor, "n_layers k"]:
    """B m of each layer's safe mean m: where an affine ablation sends the component."""
    if basis.ndim == 3:
        return (basis @ safe_mean[:, :, None])[..., 0]
    return torch.stack([safe_mean @ v for v in basis], 1)


@dataclass(frozen=True)
class _Job:
    """What is decoded and stored together: rows, (prompt, intervention) each by its index."""

    interventions: Sequence[Intervention]
    rows: Sequence[tuple[int, int]]


def complete(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    interventions: Sequence[Intervention],
    decoding: Decoding,
    store: Store,
    label: str,
    addition: Addition | None = None,
) -> dict[str, list[list[int]]]:
    """Greedy completions {name of the intervention: [token ids of each prompt]}, in the order of `prompts` (token ids).

    `addition` is made in every row. Interventions share batches where they can: those that are the same in every study of the
    model have batches of their own, which another study finds in the store, as has the baseline; so have those of several
    dimensions, of a basis a layer, and at other sites; every edit of the weights has its own.
    """
    shared = {
        **lm.identity,
        "stop": sorted(lm.stop),
        "max_new_tokens": decoding.max_new_tokens,
        "batch_size": decoding.batch_size,
        "addition": addition and addition.fingerprint(),
    }
    size = rows_per_job(lm.model, decoding)
    jobs: list[tuple[str, _Job]] = []
    for group in _groups(interventions):
        fingerprints = [one.fingerprint() for one in group]
        rows = [(p, i) for p in sorted(range(len(prompts)), key=lambda p: len(prompts[p])) for i in range(len(group))]
        if size < BATCHES_PER_JOB * decoding.batch_size:
            rows.sort(key=lambda row: row[1])  # few interventions a job, each of which computes the common beginning anew
        for share in job_slices(len(rows), size, FEW):
            job = _Job(group, rows[share])
            what = [[list(prompts[p]), fingerprints[i]] for p, i in job.rows]
            jobs.append((key("completions", (_completions,), **shared, rows=what), job))

    compute = partial(_encoded, prompts, decoding, addition)
    completions: dict[str, list[list[int]]] = {one.name: [[] for _ in prompts] for one in interventions}
    with hand_out(lm, compute, (_completions,), [job for _, job in jobs], store.done) as (run, pool):
        values = store.run(jobs, run, label, "token", pool, lambda job: len(job.rows) * decoding.max_new_tokens)
        for (_, job), value in zip(jobs, values, strict=True):
            for (p, i), tokens in zip(job.rows, json.loads(value), strict=True):
                completions[job.interventions[i].name][p] = tokens
    return completions


def _encoded(
    prompts: Sequence[Sequence[int]],
    decoding: Decoding,
    addition: Addition | None,
    lm: LM,
    job: _Job,
    progress: Callable[[int], None],
) -> bytes:
    return json.dumps(_completions(lm, prompts, job, decoding, addition, progress)).encode()


def rows_per_job(model: PreTrainedModel, decoding: Decoding) -> int:
    """Rows at most that are decoded and stored together: BATCHES_PER_JOB batches, on a CPU no more than JOB_WORK."""
    most = BATCHES_PER_JOB * decoding.batch_size
    if model.device.type != "cpu":
        return most
    row = sum(p.numel() for p in model.parameters()) * max(1, decoding.max_new_tokens)
    return min(most, max(LEAST_ROWS, JOB_WORK // row))


def _completions(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    job: _Job,
    decoding: Decoding,
    addition: Addition | None,
    progress: Callable[[int], None],
) -> list[list[int]]:
    """The completions of a job's rows."""
    used = sorted({i for _, i in job.rows})
    acting = [job.interventions[i] for i in used]
    ids, rows = [prompts[p] for p, _ in job.rows], [used.index(i) for _, i in job.rows]
    if acting[0].sites == "weights":
        with acting[0].on(lm.model):
            return generate(lm, ids, decoding, addition=addition, progress=progress)
    return generate(lm, ids, decoding, acting, rows, addition, progress)


def _groups(interventions: Sequence[Intervention]) -> list[list[Intervention]]:
    """Which interventions share batches."""
    groups: dict[tuple, list[Intervention]] = {}
    for one in interventions:
        sites = "" if one.basis is None else one.name if one.sites == "weights" else one.sites
        groups.setdefault((one.direction_independent, sites, one.rank > 1, one.per_layer), []).append(one)
    return list(groups.values())
