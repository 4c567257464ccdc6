"""sweep: run-time ablation over layers x alphas on val prompts, with the baseline and the controls."""

from pathlib import Path

from refusal.io.files import read_jsonl, write_jsonl
from refusal.io.params import Params
from stages import STORE, stage, use_transformers

BASE, OUT = Path("models/base"), Path("data/sweep")


def main(params: Params) -> str:
    use_transformers(params)
    from refusal.io.store import Store
    from refusal.lm.batching import rows_at_once
    from refusal.lm.load import load_lm
    from refusal.method.directions import defined_layers, read_directions, select_directions
    from refusal.method.generate import Decoding
    from refusal.method.select import cell_name
    from refusal.method.subspaces import spans
    from refusal.method.sweep import complete, grid

    s, g = params.sweep, params.generation
    directions = read_directions(Path("models/directions.safetensors"))
    matched, harmless = (select_directions(directions, s.method, pairing) for pairing in (s.pairing, "harmless"))
    interventions = grid(matched, harmless, s, params.ablation)
    val = [row for row in read_jsonl(Path("data/prompts/pairs.jsonl")) if row["split"] == "val"]
    lm = load_lm(BASE, **params.model.loading)
    ids = lm.encode([row["harmful"] for row in val], g.max_new_tokens)
    decoding = Decoding(g.max_new_tokens, rows_at_once(g.batch_size, lm.model, g.max_new_tokens + 1, "generation"))
    completions = complete(lm, ids, interventions, decoding, Store(STORE / "store.sqlite"), "sweep")
    shown = {cell_name(span.name, alpha): span.shown for span in spans(s, defined_layers(matched)) for alpha in s.alphas}
    rows = [
        {
            "cell": one.name,
            "layer": shown.get(one.name),
            "alpha": one.alpha,
            "id": row["id"],
            "prompt": row["harmful"],
            "completion": text,
            "n_tokens": len(tokens),
        }
        for one in interventions
        for row, tokens, text in zip(val, completions[one.name], lm.decode(completions[one.name]), strict=True)
    ]
    write_jsonl(OUT / "completions.jsonl", rows)
    return f"{len(interventions)} cells x {len(val)} val prompts at {params.ablation.sites}, alphas {s.alphas}"


stage(main)
