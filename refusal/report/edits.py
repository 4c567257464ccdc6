"""The tables of edited checkpoints on the page: what was done to each, what became of it, and what was claimed."""

from typing import Any

from refusal.report.numbers import ci, num, signed
from refusal.report.study import Metrics, Study

Table = list[list[Any]]


def edited_checkpoints(study: Study) -> Metrics | None:
    """{table of page.html: its rows}, and `n_refused` of the base; None where no checkpoint was looked at."""
    if not study.edits or not (found := study.edits["checkpoints"]):
        return None
    return {
        "anatomy": [_anatomy(name, m["anatomy"], m["cosines"]) for name, m in found.items()],
        "cosines": [row for name, m in found.items() for row in _cosines(name, m["cosines"])],
        "layers": [
            [name, row["layer"], num(row["attention"], 4), num(row["mlp"], 4), num(row["relative"], 4)]
            for name, m in found.items()
            for row in m["anatomy"]["layers"]
        ],
        "behaviour": _behaviour(study, found),
        "claims": [row for name, m in found.items() if m["claims"] for row in _claims(name, m["claims"])],
        "n_refused": next(iter(found.values()))["behaviour"]["evidence"]["n_refused"],
    }


def _anatomy(name: str, found: Metrics, beside: Metrics) -> list[Any]:
    alpha, known = found["alpha"], {i: c for i, c in enumerate(beside["cosine"]) if c is not None}
    at = max(known, key=lambda i: known[i], default=None)
    single = alpha and f"{num(alpha['mean'], 4)}, {num(alpha['min'], 4)} to {num(alpha['max'], 4)}"
    rank = "–" if found["rank"] is None else found["rank"] if found["shared"] else f"{found['rank']}, another in each layer"
    norms = "–" if found["norms_set_back"] is None else ", ".join(found["norms_set_back"]) or "none"
    kinds = ", ".join(f"{n} {kind}" for kind, n in found["n_tensors"].items())
    embedding = found["embedding"]["kind"] + (", untied" if found["embedding"]["untied"] else "")
    where = ["–"] * 3 if at is None else [num(known[at], 4), at, num(beside["ceiling"][at], 4)]
    return [name, found["kind"], rank, single or "–", norms, embedding, kinds, *where, num(beside["by_chance_95"], 4)]


def _cosines(name: str, beside: Metrics) -> Table:
    if not any(c is not None for c in beside["cosine"]):
        return []
    return [[f"{name}{of}", *(num(c, 4) for c in beside[key])] for of, key in (("", "cosine"), (", noise ceiling", "ceiling"))]


def _behaviour(study: Study, found: Metrics) -> Table:
    """The base and random directions at run time, as `evaluate` has them, then each checkpoint."""
    e = study.evaluate
    rows = [_rates(*each) + ["–"] * 3 for each in (("baseline", e["baseline"]), ("random directions, run time", e["random"]))]
    for name, m in found.items():
        of, less = m["behaviour"], m["behaviour"]["evidence"]
        removed = f"{signed(less['above_random'])}, {signed(less['above_random_low'])}"
        rows.append([*_rates(name, of), ci(of, "cross_entropy_difference", 4), removed, ci(m["benchmark"], "difference")])
    return rows


def _rates(name: str, m: Metrics) -> list[Any]:
    keys = ("compliance_difference", "coherence", "refusal_harmful", "answers_safe", "answers_safe_difference", "refusal_safe")
    return [name, m["n"], ci(m, "compliance"), *(ci(m, key) for key in keys), ci(m, "kl", 4)]


def _claims(name: str, of: Metrics) -> Table:
    told = {"refusals of harmful prompts": of["refusals"], "KL, nats": of["kl"]}
    return [
        [name, of["source"], what, ci(x, "claimed"), x.get("claimed_n", "–"), ci(x, "measured", 4), x["measured_n"]]
        for what, x in told.items()
        if x
    ]
