"""science: one direction, several or none; where zero lies; how the answer depends on prompts, padding, place and strength."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from refusal.io.errors import UserError
from refusal.io.params import Params, Science
from refusal.io.files import read_jsonl
from refusal.stats import subsample_indices
from stages import STORE, model_ready, read_json, stage, write_json, write_text
from stages.mediation import mediation
from stages.study import Study

BASE, TRUTH, METRICS, PLOTS = Path("models/base"), Path("models/truth/planted.safetensors"), Path("metrics"), Path("plots")


# What `make full` spends: all prompts. Its figures go to files of their own, which the pipeline does not read.
FULL = {
    **dict.fromkeys(("n_val", "n_test", "n_harmless")),
    "n_control": 100,
    "n_subspaces": 5,
    "n_fit": 5000,
    "optimised": {"steps": 200, "batch_size": 32},
    "sensitivity": {"n_resamples": 500},
    "padding": {"n_pads": [1, 2, 4, 8, 16, 32, 64], "n": 200},
    "strength": {"alphas": [i / 4 for i in range(13)], "n": 60},
}


def main(params: Params, budget: str = "") -> str:
    """`budget` full: FULL in place of the file's own figures."""
    if budget not in ("", "full"):
        raise UserError(f"science: there is no budget {budget}: say full, or nothing for that of params.yaml")
    if budget:
        params = params.model_copy(update={"science": Science.model_validate(params.science.model_dump() | FULL)})
    model_ready(params)
    from safetensors.torch import load_file

    from refusal.io.store import Store
    from refusal.io.files import csv_text
    from refusal.judges.panel import judge_with
    from refusal.lm.checkpoint import read_stacks
    from refusal.lm.load import load_model, load_tokenizer, weights_hash
    from refusal.method.directions import read_directions, select_directions

    sweep, directions = params.sweep, read_directions(Path("models/directions.safetensors"))
    pairs = read_jsonl(Path("data/prompts/pairs.jsonl"))
    store = Store(STORE / "store.sqlite")
    study = Study(
        params,
        load_model(BASE, params.model.dtype, params.model.device),
        load_tokenizer(BASE),
        store,
        judge_with(params.judge, params.endpoint, store),
        weights_hash(BASE),
        select_directions(directions, sweep.method, sweep.pairing),
        select_directions(directions, sweep.method, "harmless"),
        {m: read_stacks(Path(f"data/activations/{m}.safetensors")) for m in params.activations.methods},
        {split: [row for row in pairs if row["split"] == split] for split in ("train", "val", "test")},
        [row for row in read_jsonl(Path("data/prompts/unrelated.jsonl")) if row["split"] == "test"],
        read_json(Path("metrics/select.json"))["rank_1"],
    )
    truth = load_file(TRUTH)["direction"] if TRUTH.is_file() else None
    metrics: dict[str, Any] = {
        "layer": study.rank_1["layer"],
        "alpha": study.rank_1["alpha"],
        "sites": params.ablation.sites,
    }
    metrics |= mediation(study, truth)
    metrics["spectrum"] = spectra(study)
    metrics["zero"], metrics["monitor"] = projections(study)
    s = params.science
    metrics["addition"] = additions(study) if s.strength else None
    metrics["sensitivity"] = sensitivity(study) if s.sensitivity else None
    metrics["positions"], metrics["padding"] = places(study) if s.padding else (None, None)
    metrics["collapse_alpha"] = strengths(study) if s.strength else None
    name = f"science_{budget}" if budget else "science"
    write_json(METRICS / f"{name}.json", metrics)
    for plot, rows in study.plots.items():
        write_text(PLOTS / name / f"{plot}.csv", csv_text(rows))
    v, arms, random = metrics["verdict"], metrics["arms"], metrics["controls"]["random_1"]["compliance"]
    best = f" by {v['by']}" if v["by"] else f" ({v['reason']})"
    return (
        f"verdict {v['verdict']}{best}; compliance on test: rank_1 {arms['rank_1']['compliance']:.2f}, "
        f"{v['best_subspace']} {arms[v['best_subspace']]['compliance']:.2f}, random {random:.2f}"
    )


def spectra(study: Study) -> list[dict[str, Any] | None]:
    """The spectrum of the paired differences by layer, beside the sign-flip null; null where the direction is undefined."""
    from refusal.analysis.science import spectrum_row

    train, d = study.activations[study.params.sweep.method], study.params.directions
    return [
        spectrum_row(train["train.harmful"][:, i], train["train.safe"][:, i], d.n_sign_flips, d.seed) if defined else None
        for i, defined in enumerate(study.found["defined"].tolist())
    ]


def projections(study: Study) -> tuple[list, dict[str, Any]]:
    """Where zero lies by layer (val prompts), and projections as a detector of harmful test prompts, of unseen cues too."""
    from refusal.analysis.sensitivity import collect
    from refusal.analysis.zero import auroc, origin_between_means
    from refusal.method.directions import project

    p, found, s = study.params, study.found, study.params.science
    acts, test = study.activations[p.sweep.method], study.rows["test"]
    layers = [i for i, defined in enumerate(found["defined"].tolist()) if defined]
    topics = [r["topic"] for r in study.rows["val"]]
    harmful, safe = (project(acts[f"val.{side}"], found["unit"]) for side in ("harmful", "safe"))
    zero: list[dict[str, Any] | None] = [None] * len(found["unit"])
    for i in layers:
        zero[i] = origin_between_means(harmful[:, i], safe[:, i], topics, s.n_resamples, s.seed)
    study.plots["zero"] = [{"layer": i, **(zero[i] or {})} for i in layers]
    pad, size = study.tokenizer.pad_token_id, p.activations.batch_size
    on_test = [
        collect(study.model, study.ids([r[side] for r in test]), 1, pad, size, of=lambda at: project(at[:, 0], found["unit"]))
        for side in ("harmful", "safe")
    ]
    monitor: dict[str, Any] = {"layer": study.rank_1["layer"]}
    cues = {"all": list(range(len(test)))}
    if any(r.get("seen") is False for r in test):
        cues |= {"seen": [i for i, r in enumerate(test) if r["seen"]], "unseen": [i for i, r in enumerate(test) if not r["seen"]]}
    for name, which in cues.items():
        of = [test[i]["topic"] for i in which]
        monitor[name] = [
            auroc(on_test[0][which, i], on_test[1][which, i], of, s.n_resamples, s.seed) if i in layers else None
            for i in range(len(found["unit"]))
        ]
    return zero, monitor


def additions(study: Study) -> dict[str, Any]:
    """Refusal of safe test prompts when rank_1's raw difference is added, and when a random vector of its length is."""
    from refusal.analysis.science import refusal_three_ways
    from refusal.method.directions import random_unit
    from refusal.method.generate import WHERE
    from refusal.method.sweep import BASELINE, complete

    test, layer, s = study.rows["test"], study.rank_1["layer"], study.params.science
    rows = [test[i] for i in subsample_indices(len(test), s.n_test, s.seed)]
    prompts = [r["safe"] for r in rows]
    vector = study.found["difference"][layer]
    vectors = {"difference": vector, "random": random_unit(len(vector), 1, s.seed)[0] * vector.norm()}
    given = (study.model, study.weights, study.ids(prompts), [BASELINE], study.params.ablation.sites)
    found: dict[str, Any] = {}
    for name, v in vectors.items():
        for where in WHERE:
            label, how = f"science: {name} added, {where}", study.decoding()
            texts = study.texts(complete(*given, **how, label=label, addition=(v, layer), where=where)["baseline"])
            judged = study.judge(prompts, texts, f"judge: {name} added, {where}", study.organism)
            found.setdefault(name, {})[where] = refusal_three_ways(prompts, texts, judged, study.organism) | {
                "n": len(prompts),
                "n_degenerate": sum(v.label == "degenerate" for v in judged if v),
                "n_missing": judged.count(None),
            }
    return {"layer": layer, **found}


def sensitivity(study: Study) -> dict[str, Any]:
    """Cosine of directions from fewer prompts to the full-data ones, for every method and pairing."""
    from refusal.analysis.sensitivity import by_size
    from refusal.analysis.separation import arm

    d, s = study.params.directions, study.params.science
    arms = {(m, p): arm(study.activations[m], p, d.seed) for m in study.activations for p in d.pairings}
    reference = arms.get(("sequential", "matched"), next(iter(arms.values()))).directions
    rows = []
    for (method, pairing), a in arms.items():
        found = by_size(a, reference, pairing != "unrelated", (s.sensitivity or s).n_resamples, s.seed)
        rows += [{"method": method, "pairing": pairing, **r} for r in found]
    study.plots["sensitivity"] = rows
    layer = study.rank_1["layer"]
    return {
        f"{m}-{p}": [
            {k: r[k] for k in ("n", "cosine", "low", "high", "to_reference")}
            for r in rows
            if (r["method"], r["pairing"], r["layer"]) == (m, p, layer)
        ]
        for m, p in arms
    }


def places(study: Study) -> tuple[list, list]:
    """The position that the direction is taken at, and what padding does, masked and not."""
    from refusal.analysis.sensitivity import collect, common_suffix, padding, positions
    from refusal.method.activations import batches, last_token_resid_pre

    assert study.params.science.padding is not None
    b, pad, size = study.params.science.padding, study.tokenizer.pad_token_id, study.params.activations.batch_size
    chosen = {split: subsample_indices(len(study.rows[split]), b.n, study.params.science.seed) for split in ("train", "val")}
    ids = {
        (split, side): study.ids([study.rows[split][i][side] for i in chosen[split]])
        for split in ("train", "val")
        for side in ("harmful", "safe")
    }
    n_positions = min(
        5, common_suffix([i for group in ids.values() for i in group]) + 1, *(len(i) for g in ids.values() for i in g)
    )
    at_end = {key: collect(study.model, group, n_positions, pad, size) for key, group in ids.items()}
    by_position = positions(at_end["train", "harmful"], at_end["train", "safe"], at_end["val", "harmful"], at_end["val", "safe"])
    groups = (ids["train", "harmful"], ids["train", "safe"])
    clean = at_end["train", "harmful"][:, -1], at_end["train", "safe"][:, -1]
    padded: dict = {}
    for n_pads in b.n_pads:
        for masked in (True, False):
            padded[masked, n_pads] = tuple(collect(study.model, g, 1, pad, size, n_pads, masked)[:, 0] for g in groups)
    import torch

    # As many pads as a batch of mixed lengths happens to need, prompts in the order given: the write-up's batches.
    for masked, method in ((True, "batched"), (False, "batched_unmasked")):
        padded[masked, "as batched"] = tuple(
            torch.cat(
                [
                    last_token_resid_pre(study.model, [g[i] for i in part], method, pad)
                    for part in batches([len(i) for i in g], "batched_unmasked", size)
                ]
            )
            for g in groups
        )
    rows = padding(clean, padded)
    study.plots["padding"] = rows
    study.plots["positions"] = by_position
    return by_position, rows


def strengths(study: Study) -> dict[str, Any]:
    """Compliance, coherence and cost against alpha at the three sites and as weights, and where each falls off."""
    from refusal.analysis.strength import PLACES, collapse_alpha, diverges_beyond, edited_weights, residual_gain
    from refusal.judges.verdicts import summary
    from refusal.method.arms import complete_arms, direction_arm, edit, fingerprint
    from refusal.method.sweep import complete

    assert study.params.science.strength is not None
    b, p, layer = study.params.science.strength, study.params, study.rank_1["layer"]
    test = [study.rows["test"][i] for i in subsample_indices(len(study.rows["test"]), b.n, p.science.seed)]
    prompts, topics = [r["harmful"] for r in test], [r["topic"] for r in test]
    ids, unit = study.ids(prompts), study.found["unit"][layer]
    arms = [direction_arm(f"alpha {alpha:g}", "alpha", unit, alpha, layer) for alpha in b.alphas]
    rows = []
    edits: dict[str, tuple[Callable[[Any], AbstractContextManager], list]]
    for place in PLACES:
        decoding = study.decoding() | {"label": f"science: alphas, {place}"}
        if place == "weights":
            edits = {a.name: (partial(edited_weights, direction=unit, alpha=a.alpha), fingerprint(a, place)) for a in arms}
            tokens = complete(study.model, study.weights, ids, [], "resid_pre", **decoding, edits=edits)
        else:
            edits = {a.name: (edit(a, place), fingerprint(a, place)) for a in arms}
            tokens = complete_arms(study.model, study.weights, ids, arms, place, **decoding)
        costs = study.costs(edits, f"cost: {place}")
        for arm in arms:
            judged = study.judge(prompts, study.texts(tokens[arm.name]), f"judge: {arm.name}, {place}", study.organism)
            said = summary(judged, topics, p.science.n_resamples, p.science.seed, f"{arm.name}, {place}", p.judge.allow_missing)
            names = ("compliance", "compliance_low", "compliance_high", "coherence", "score", "refusal", "n_degenerate", "n")
            rows.append(
                {"place": place, "alpha": arm.alpha, **{k: said[k] for k in names}}
                | {k: costs[arm.name][k] for k in ("cross_entropy", "kl")}
                | {"residual_gain": residual_gain(study.model.config.num_hidden_layers, place, arm.alpha)}
            )
    study.plots["alphas"] = rows
    return {
        place: {"measured": collapse_alpha([r for r in rows if r["place"] == place]), "diverges_beyond": diverges_beyond(place)}
        for place in PLACES
    }


stage(main)
