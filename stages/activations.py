"""activations: last-token `resid_pre` of every layer for train and val prompts, by each method."""

from pathlib import Path

from refusal.params import Params
from refusal.tables import read_jsonl
from stages import STORE, stage, torch_ready

BASE, OUT = Path("models/base"), Path("data/activations")


def main(params: Params) -> str:
    torch_ready(params)
    import torch
    from safetensors.torch import load, save, save_file

    from refusal import activations, anatomy
    from refusal.activations import batches, last_token_resid_pre
    from refusal.models import encode_chats, load_model, load_tokenizer, weights_hash
    from refusal.store import Store, key

    pairs = read_jsonl(Path("data/prompts/pairs.jsonl"))
    unrelated = read_jsonl(Path("data/prompts/unrelated.jsonl"))
    sets = {
        f"{split}.{name}": [row[field] for row in rows if row["split"] == split]
        for split in ("train", "val")
        for name, rows, field in (("harmful", pairs, "harmful"), ("safe", pairs, "safe"), ("unrelated", unrelated, "safe"))
    }
    model = load_model(BASE, params.model.dtype, params.model.device)
    tokenizer = load_tokenizer(BASE)
    encoded = {name: encode_chats(tokenizer, prompts, params.model.system_prompt) for name, prompts in sets.items()}
    pad_id, weights, store = tokenizer.pad_token_id, weights_hash(BASE), Store(STORE / "store.sqlite")
    OUT.mkdir(parents=True, exist_ok=True)
    for method in params.activations.methods:
        collected = {}
        for name, ids in encoded.items():
            plan = batches([len(tokens) for tokens in ids], method, params.activations.batch_size)
            shared = {
                "weights": weights,
                "method": method,
                "dtype": params.model.dtype,
                "device": params.model.device,
                "pad": pad_id,
            }
            jobs = [
                (key("activations", activations, anatomy, **shared, ids=[ids[i] for i in batch]), [ids[i] for i in batch])
                for batch in plan
            ]

            def compute(batch: list[list[int]], method: str = method) -> bytes:
                return save({"resid_pre": last_token_resid_pre(model, batch, method, pad_id)})

            rows = torch.empty(len(ids), model.config.num_hidden_layers, model.config.hidden_size, dtype=model.dtype)
            for batch, value in zip(plan, store.run(jobs, compute, f"{method} {name}"), strict=True):
                rows[batch] = load(value)["resid_pre"]
            collected[name] = rows
        save_file(collected, OUT / f"{method}.safetensors")
    n, shape = sum(map(len, encoded.values())), f"{model.config.num_hidden_layers} layers, d_model {model.config.hidden_size}"
    return f"{', '.join(params.activations.methods)}: resid_pre of {n} prompts at {shape}"


stage(main)
