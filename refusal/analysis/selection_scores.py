"""Which score of a direction foretells what its ablation does: every layer's direction scored, and ablated on test.

What it does is mean compliance x coherence on test. A score that needs no completion is worth having where it puts the layers
in the same order, or where the layer that it picks loses little against the best. All scores are of train or val prompts.
"""

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from safetensors.torch import load, save
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.functional import cosine_similarity

from refusal.analysis.claims import Measured
from refusal.analysis.sensitivity import resid_pre_at_end
from refusal.analysis.study import Study
from refusal.io.errors import UserError
from refusal.io.store import key
from refusal.judges.verdicts import OF_HARMFUL, values
from refusal.lm.load import LM
from refusal.method import first_token
from refusal.method.interventions import BASELINE, Addition, Intervention, intervene
from refusal.method.paper_selection import choose
from refusal.stats import resampled_sums

LEAST_SIMILAR = 0.1  # of the layers: those in which COSMIC compares
N_PERMUTATIONS = 10_000


def contest(study: Study, judged: Mapping[str, Mapping[str, Any]], separation: Sequence[float | None]) -> dict[str, Any]:
    """What metrics/claims/selection.json says: layers' scores and means on test, each score's rank correlation and regret.

    judged: metrics/judge.json, whose cells at alpha 1 are the score `val`. separation: Cohen's d on val by layer. Raises
    UserError where the sweep is of subspaces, or has fewer than three layers at alpha 1.
    """
    if study.params.sweep.basis != "single":
        raise UserError("params.yaml: sweep.basis: the claim `selection` compares single directions: set single")
    val = {cell["layer"]: cell["score"] for cell in judged.values() if cell["layer"] is not None and cell["alpha"] == 1}
    layers = [layer for layer in study.layers if layer in val]
    if len(layers) < 3:
        raise UserError("params.yaml: sweep.layers: fewer than three at alpha 1, and there is no order to compare: sweep more")
    unit = study.directions["unit"]
    ablations = [Intervention(f"layer_{i}", unit[i], 1.0, study.sites, None, i) for i in layers]
    directions = [(one, Addition(study.directions["difference"][i], i)) for one, i in zip(ablations, layers, strict=True)]
    by_paper, candidates = _paper(study, directions)
    scores: dict[str, list[float | None]] = {
        "separation": [separation[i] for i in layers],
        "val": [val[i] for i in layers],
        "bypass": [-candidate.bypass for candidate in candidates],
        "cosmic": [*_cosmic(study, directions)],
    }
    picks = {name: layers[_best(some)] for name, some in scores.items()} | {"paper": by_paper}
    asked = study.ask(study.sample("test", study.params.claims.n), "harmful", ablations, "claims: selection")
    table = np.array([values(asked.verdicts[one.name], OF_HARMFUL["score"]) for one in ablations], dtype=np.float64).T
    known = [not any(row) for row in np.isnan(table)]
    topics = [topic for topic, is_known in zip(asked.topics, known, strict=True) if is_known]
    test = table[known]
    resampled = resampled_sums(test, topics, study.n_resamples, study.seed)
    null = _null(len(layers), study.seed)
    correlations = {name: _correlation(some, test.mean(0), resampled) | null for name, some in scores.items()}
    regrets = {name: _regret(layers, pick, test, resampled) for name, pick in picks.items() if pick is not None}
    return {
        "layers": layers,
        "n": len(test),
        "test": test.mean(0).tolist(),
        "scores": scores,
        "correlations": correlations,
        "regrets": regrets,
        "regret_of_any_layer": float(test.mean(0).max() - test.mean()),
        "figures": {name: _figure(correlations[name], len(layers)) for name in scores},
    }


def _best(scores: Sequence[float | None]) -> int:
    return max(range(len(scores)), key=lambda i: -math.inf if (score := scores[i]) is None else score)


def _paper(study: Study, directions: Sequence[first_token.Direction]) -> tuple[int | None, list[Any]]:
    """The layer that the paper's rule takes, with or without its criterion that refusal is induced; and all candidates."""
    lm, val = study.lm, {half: study.rows("val", half) for half in ("harmful", "safe")}
    val["safe"] = study.unrelated["val"]  # as the stage `selection` has them
    ids = {half: lm.encode([row[half] for row in rows]) for half, rows in val.items()}
    tokens = first_token.refusal_tokens(lm)
    found = first_token.scores(lm, ids["harmful"], ids["safe"], directions, [*tokens.values()], study.store)
    topics: dict[str, list[Hashable]] = {
        name: [row["topic"] for row in val[half]] for name, half in (("harmful", "harmful"), ("harmless", "safe"))
    }
    layers = [addition.layer for _, addition in directions]
    candidates, _, _ = first_token.figures(found, layers, topics, 1, study.seed)
    choice = choose(candidates, lm.n_layers)
    chosen = choice.chosen or choice.best_without_induce
    return chosen.layer if chosen else None, candidates


def _cosmic(study: Study, directions: Sequence[first_token.Direction]) -> list[float]:
    """COSMIC's score of each direction: how similar ablated harmful prompts are to safe ones, and safe ones with it added to
    harmful ones, by the cosine of mean activations in the layers where the two are least similar.

    Source: Siu et al. 2025, arXiv 2506.00085, by its abstract; layers, positions and prompts are ours (val, last token).
    """
    ids = [study.lm.encode([row[half] for row in study.rows("val", half)]) for half in ("harmful", "safe")]
    jobs: list[tuple[str, tuple[int, Intervention | Addition]]] = []
    acting = [(0, BASELINE), (1, BASELINE), *((half, one[half]) for one in directions for half in (0, 1))]
    for half, one in acting:
        name = key("mean activations", (_mean,), **study.lm.identity, ids=ids[half], acting=one.fingerprint())
        jobs.append((name, (half, one)))

    def compute(job: tuple[int, Intervention | Addition]) -> bytes:
        return save({"mean": _mean(study.lm, ids[job[0]], job[1], study.params.activations.batch_size)})

    harmful, safe, *means = (load(value)["mean"] for value in study.store.run(jobs, compute, "claims: COSMIC", "mean"))
    similar = cosine_similarity(harmful, safe, dim=-1)
    where = similar.argsort()[: max(1, int(LEAST_SIMILAR * len(similar)))]

    def like(one: Tensor, other: Tensor) -> float:
        return float(cosine_similarity(one[where], other[where], dim=-1).mean())

    return [like(ablated, safe) + like(added, harmful) for ablated, added in zip(means[::2], means[1::2], strict=True)]


def _mean(
    lm: LM, ids: Sequence[Sequence[int]], acting: Intervention | Addition, batch_size: int
) -> Float[Tensor, "n_layers d_model"]:
    """Mean last-token `resid_pre` of every layer under an intervention, float64."""
    order, total = sorted(ids, key=len), torch.zeros(())
    with intervene(lm.model, acting) if isinstance(acting, Addition) else acting.on(lm.model):
        for first in range(0, len(order), batch_size):
            batch = resid_pre_at_end(lm, order[first : first + batch_size], 1)
            total = total + batch[:, 0].double().sum(0)
    return total / len(order)


def _correlation(
    scores: Sequence[float | None], test: Float[ndarray, " layer"], resampled: Float[ndarray, "resample layer"]
) -> dict[str, Any]:
    """Spearman's rank correlation over layers of a score with test, and its percentile interval over resampled test prompts."""
    kept = [i for i, score in enumerate(scores) if score is not None]
    some = rankdata([scores[i] for i in kept])
    (value,), drawn = (_with_ranks(some, rankdata(rows[:, kept], axis=1)) for rows in (test[None], resampled))
    if np.isnan(value) or np.isnan(drawn).all():
        return dict.fromkeys(("correlation", "low", "high"))
    low, high = np.nanquantile(drawn, [0.025, 0.975]).tolist()
    return {"correlation": float(value), "low": low, "high": high}


def _with_ranks(ranks: Float[ndarray, " layer"], rows: Float[ndarray, "row layer"]) -> Float[ndarray, " row"]:
    """The correlation of ranks with each row of ranks; NaN where either has one value alone."""
    a, b = ranks - ranks.mean(), rows - rows.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return b @ a / np.sqrt((a @ a) * (b * b).sum(1))


def _null(n_layers: int, seed: int) -> dict[str, float]:
    """The median and middle 95 % of the rank correlation of as many layers put in order by chance."""
    order = np.random.default_rng(seed).random((N_PERMUTATIONS, n_layers)).argsort(1)
    drawn = _with_ranks(np.arange(n_layers), order)
    low, median, high = np.quantile(drawn, [0.025, 0.5, 0.975]).tolist()
    return {"null_low": low, "null": median, "null_high": high}


def _regret(
    layers: Sequence[int], pick: int, test: Float[ndarray, "prompt layer"], resampled: Float[ndarray, "resample layer"]
) -> dict[str, Any]:
    """The best layer's mean on test less that of the pick, with a percentile interval. The best is the best of this very test, so
    that a regret is a little too great."""
    at, n = [*layers].index(pick), len(test)
    lost = (resampled.max(1) - resampled[:, at]) / n
    low, high = np.quantile(lost, [0.025, 0.975]).tolist()
    return {"layer": pick, "regret": float(test.mean(0).max() - test.mean(0)[at]), "low": low, "high": high}


def _figure(correlation: Mapping[str, Any], n: int) -> dict[str, Any] | None:
    """What claims.MEASURES reads."""
    if correlation["correlation"] is None:
        return None
    ours, null = (
        tuple(correlation[key] for key in keys) for keys in (("correlation", "low", "high"), ("null", "null_low", "null_high"))
    )
    return vars(Measured(ours, n, "layers", "layers in any order", null))  # type: ignore[arg-type]
