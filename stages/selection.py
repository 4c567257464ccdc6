"""selection: the paper's scores of every layer's direction on val, where select.by is paper; else it computes nothing."""

from pathlib import Path
from typing import Any

from refusal.io.files import read_jsonl
from refusal.io.params import Params
from refusal.io.prompts import by_split, resolve_pairing
from refusal.method.paper_selection import POSITION, choose, metrics
from stages import STORE, stage, use_transformers, write_json

BASE, METRICS = Path("models/base"), Path("metrics/selection.json")
NOTE = (
    "candidates are the study's own directions, at the last prompt token (position -1) of each layer swept; the paper has "
    "those at every token after the instruction"
)
KEYS = (
    *("by", "note", "position", "direction", "sites", "refusal_tokens", "harmless_prompts", "baseline", "rule", "candidates"),
    *("chosen", "reason", "leaves_none", "best_without_induce", "criterion_left_out", "order"),
)


def main(params: Params) -> str:
    if params.select.by == "compliance":
        write_json(METRICS, dict.fromkeys(KEYS) | {"by": "compliance"})
        return "select.by is compliance: nothing to score"
    found = by_paper(params)
    write_json(METRICS, {key: found[key] for key in KEYS})
    best = found["chosen"] or found["best_without_induce"]
    if best is None:
        return found["reason"]
    c = found["candidates"][f"layer_{best['layer']}"]
    scored = f"layer {best['layer']}: refusal score {c['bypass']:.2f} ablated, {c['induce']:.2f} induced, KL {c['kl']:.3f}"
    return (
        f"the paper's rule takes {scored}"
        if found["chosen"]
        else f"{found['reason']}; best without the criterion induce: {scored}"
    )


def by_paper(params: Params) -> dict[str, Any]:
    """What metrics/selection.json says."""
    use_transformers(params)
    from refusal.io.store import Store
    from refusal.lm.load import load_lm
    from refusal.method import first_token
    from refusal.method.directions import read_directions, select_directions
    from refusal.method.interventions import Addition
    from refusal.method.sweep import grid

    s = params.sweep
    everything = read_directions(Path("models/directions.safetensors"))
    ours, harmless = (select_directions(everything, s.method, pairing) for pairing in (s.pairing, "harmless"))
    # The sweep's own cells at alpha 1: the layers that judged compliance is known of.
    at_1 = grid(ours, harmless, s.model_copy(update={"alphas": [1.0]}), params.ablation)
    swept = {one.layer: one for one in at_1 if one.layer is not None}
    directions = [(one, Addition(ours["difference"][layer], layer)) for layer, one in swept.items()]
    # Harmless prompts are those without counterpart, as the paper's are and those that evaluate prices ablation on.
    files = {"harmful": ("pairs", "harmful"), "harmless": ("unrelated", "safe")}
    val = {half: by_split(read_jsonl(Path(f"data/prompts/{name}.jsonl")))["val"] for half, (name, _) in files.items()}
    lm = load_lm(BASE, **params.model.loading)
    ids = {half: lm.encode([row[files[half][1]] for row in rows]) for half, rows in val.items()}
    tokens = first_token.refusal_tokens(lm)
    found = first_token.scores(lm, ids["harmful"], ids["harmless"], directions, [*tokens.values()], Store(STORE / "store.sqlite"))
    topics = {half: [row["topic"] for row in rows] for half, rows in val.items()}
    candidates, baseline, limits = first_token.figures(found, [*swept], topics, params.n_resamples, params.seed)
    told = metrics(choose(candidates, lm.n_layers), candidates, lm.n_layers)
    for candidate, of in zip(told["candidates"].values(), limits, strict=True):
        candidate |= of
    return told | {
        "by": "paper",
        "note": NOTE,
        "position": POSITION,
        "direction": f"{s.method}-{resolve_pairing(s.pairing, s.method, everything)}",
        "sites": params.ablation.sites,
        "refusal_tokens": tokens,
        "harmless_prompts": "val.unrelated",
        "baseline": baseline,
    }


stage(main)
