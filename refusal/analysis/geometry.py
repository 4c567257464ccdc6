"""A study's directions in activation space: spectra, where the origin lies, what prompts, positions and padding do to them."""

from typing import Any

import torch
from torch import Tensor

from refusal.analysis.sensitivity import by_size, collect, common_suffix, padding, positions
from refusal.analysis.separation import auroc, contrast, effective_rank, halves, origin_between_means, sign_flip_null, spectrum
from refusal.analysis.study import Study
from refusal.analysis.subspaces import captured, paired_svd
from refusal.io.params import Padding
from refusal.io.progress import progress
from refusal.method.activations import stored_resid_pre
from refusal.method.directions import project

ByLayer = list[dict[str, Any] | None]  # None where the direction is undefined


def spectra(study: Study) -> ByLayer | None:
    """The spectrum of the paired differences of each layer, beside the sign-flip null; None where prompts are no pairs."""
    if not study.paired:
        return None
    train, d = study.activations[study.params.sweep.method], study.params.directions
    rows: ByLayer = [None] * study.lm.n_layers
    with progress(len(study.layers), "science: spectra", "layer") as bar:
        for i in study.layers:
            rows[i] = spectrum_row(train["train.harmful"][:, i], train["train.safe"][:, i], d.n_sign_flips, d.seed)
            bar.update()
    return rows


def spectrum_row(harmful: Tensor, safe: Tensor, n_flips: int, seed: int) -> dict[str, float]:
    """Of the uncentred paired differences at one layer: effective rank, the share of energy along the first singular vector and
    along the mean, and the share along the mean that random swaps within pairs reach in 95 % of cases."""
    differences = harmful.double() - safe.double()
    energy, mean = float(differences.square().sum(-1).mean()), differences.mean(0)
    shares = spectrum(harmful, safe)
    null = sign_flip_null(harmful, safe, n_flips, seed).square() / energy
    return {
        "effective_rank": effective_rank(shares),
        "first_share": float(shares[0]),
        "mean_share": float(mean.square().sum()) / energy,
        "mean_share_null_95": float(null.quantile(0.95)),
        "cosine_first_to_mean": captured(paired_svd(harmful, safe, 1), mean),
        "n": len(harmful),
    }


def origins(study: Study) -> ByLayer:
    """Where the origin lies between the class means of val prompts, by layer."""
    activations = study.activations[study.params.sweep.method]
    harmful, safe = (project(some, study.directions["unit"]) for some in halves(activations, "val"))
    topics, how = study.topics("val"), (study.n_resamples, study.seed)
    return [
        origin_between_means(harmful[:, i], safe[:, i], topics, *how) if i in study.layers else None
        for i in range(study.lm.n_layers)
    ]


def monitor(study: Study) -> dict[str, Any]:
    """Projections as a detector of harmful test prompts, by layer: AUROC on all, and on seen and unseen cues where known."""
    test, safe_rows, unit = study.pairs["test"], study.rows("test", "safe"), study.directions["unit"]
    n_positions = study.params.activations.n_positions
    harmful, safe = (
        collect(
            study,
            study.lm.encode([row[side] for row in rows]),
            f"science: test, {side}",
            n_positions,
            of=lambda at: project(at.mean(1), unit),
        )
        for side, rows in (("harmful", test), ("safe", safe_rows))
    )
    cues = {"all": (list(range(len(test))), list(range(len(safe_rows))))}
    if any(row.get("seen") is False for row in test):
        cues |= {
            name: ([i for i, row in enumerate(test) if row["seen"] is seen],) * 2
            for name, seen in (("seen", True), ("unseen", False))
        }
    figures: dict[str, Any] = {"layer": study.layer}
    for name, (which, of_safe) in cues.items():
        topics = [*(test[i]["topic"] for i in which), *(safe_rows[i]["topic"] for i in of_safe)]
        figures[name] = [
            auroc(harmful[which, i], safe[of_safe, i], topics, study.n_resamples, study.seed) if i in study.layers else None
            for i in range(len(unit))
        ]
    return figures


def sensitivity(study: Study, n_resamples: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Cosine of directions from fewer prompts to the full-data ones, by method and pairing; at the selected layer, and all."""
    d = study.params.directions
    # As the stage has them: the reference is of matched pairs, where there are any.
    pairings = sorted((p for p in d.pairings if study.paired or p == "unrelated"), key=lambda p: p != "matched")
    contrasts = {(m, p): contrast(a, p, d.seed) for m, a in study.activations.items() for p in pairings}
    reference = contrasts.get(("sequential", pairings[0]), next(iter(contrasts.values()))).directions
    rows = []
    with progress(len(contrasts), "science: fewer prompts", "set") as bar:
        for (method, pairing), one in contrasts.items():
            sizes = by_size(one, reference, n_resamples, study.seed)
            rows += [{"method": method, "pairing": pairing, **row} for row in sizes]
            bar.update()
    keys = ("n", "cosine", "low", "high", "to_reference")
    at_layer: dict[str, Any] = {f"{m}-{p}": [] for m, p in contrasts}
    for row in rows:
        if row["layer"] == study.layer:
            at_layer[f"{row['method']}-{row['pairing']}"].append({k: row[k] for k in keys})
    return at_layer, rows


def positions_and_padding(study: Study, settings: Padding) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The position that the direction is taken at, and what padding does, masked and not."""
    ids = {
        (split, side): study.lm.encode([row[side] for row in study.sample(split, settings.n, side)])
        for split in ("train", "val")
        for side in ("harmful", "safe")
    }
    everyone = [tokens for group in ids.values() for tokens in group]
    n_positions = min(5, common_suffix(everyone) + 1, *map(len, everyone))
    at_end = {key: collect(study, group, "science: positions", n_positions) for key, group in ids.items()}
    train = [ids["train", side] for side in ("harmful", "safe")]
    clean = at_end["train", "harmful"][:, -1], at_end["train", "safe"][:, -1]
    padded: dict[tuple[bool, int | str], Any] = {}
    for n_pads in settings.n_pads:
        for masked in (True, False):
            label = f"science: {n_pads} pads{'' if masked else ', attended to'}"
            padded[masked, n_pads] = tuple(collect(study, group, label, pads=(n_pads, masked))[:, 0] for group in train)
    # As many pads as a batch of mixed lengths happens to need, prompts in the order given: the write-up's batches.
    for masked, method in ((True, "batched"), (False, "batched_unmasked")):
        padded[masked, "as batched"] = tuple(_in_batches(study, group, method) for group in train)
    return positions(*(at_end[split, side] for split in ("train", "val") for side in ("harmful", "safe"))), padding(clean, padded)


def _in_batches(study: Study, ids: list[list[int]], method: str) -> Tensor:
    size = study.params.activations.batch_size
    batches = [ids[i : i + size] for i in range(0, len(ids), size)]
    return torch.cat([*stored_resid_pre(study.lm, batches, method, study.store, f"science: {method}")])
