"""sweep: run-time ablation over layers x alphas on val prompts, with the baseline and the controls in the same batches."""

from pathlib import Path

from refusal.io.params import Params
from refusal.io.files import read_jsonl, write_jsonl
from stages import STORE, model_ready, stage

BASE, OUT = Path("models/base"), Path("data/sweep")


def main(params: Params) -> str:
    model_ready(params)
    from refusal.io.store import Store
    from refusal.lm.load import encode_chats, load_model, load_tokenizer, stop_ids, weights_hash
    from refusal.lm.memory import rows_at_once
    from refusal.method.directions import read_directions, select_directions
    from refusal.method.sweep import complete, grid

    s = params.sweep
    directions = read_directions(Path("models/directions.safetensors"))
    found, harmless = (select_directions(directions, s.method, pairing) for pairing in (s.pairing, "harmless"))
    cells = grid(found, harmless, s.layers, s.alphas, s.n_random, s.seed, affine=params.ablation.kind == "affine")
    val = [row for row in read_jsonl(Path("data/prompts/pairs.jsonl")) if row["split"] == "val"]
    model, tokenizer = load_model(BASE, params.model.dtype, params.model.device), load_tokenizer(BASE)
    completions = complete(
        model,
        weights_hash(BASE),
        encode_chats(tokenizer, [row["harmful"] for row in val], params.model.system_prompt, params.generation.max_new_tokens),
        cells,
        params.ablation.sites,
        stop_ids(model, tokenizer),
        tokenizer.pad_token_id,
        params.generation.max_new_tokens,
        rows_at_once(params.generation.batch_size, model, params.generation.max_new_tokens + 1, "sweep"),
        Store(STORE / "store.sqlite"),
        "sweep",
    )
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        OUT / "completions.jsonl",
        (
            {
                "cell": cell.name,
                "layer": cell.layer,
                "alpha": cell.alpha,
                "id": row["id"],
                "prompt": row["harmful"],
                "completion": text,
                "n_tokens": len(tokens),
            }
            for cell in cells
            for row, tokens, text in zip(
                val, completions[cell.name], tokenizer.batch_decode(completions[cell.name], skip_special_tokens=True), strict=True
            )
        ),
    )
    return f"{len(cells)} cells x {len(val)} val prompts at {params.ablation.sites}, alphas {s.alphas}"


stage(main)
