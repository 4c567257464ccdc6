"""activations: last-token `resid_pre` of every layer for train and val prompts, by each method."""

from pathlib import Path

from refusal.io.params import Params
from refusal.io.files import read_jsonl
from stages import STORE, model_ready, stage

BASE, OUT = Path("models/base"), Path("data/activations")


def main(params: Params) -> str:
    model_ready(params)
    from refusal.io.store import Store
    from refusal.lm.load import encode_chats, load_model, load_tokenizer, weights_hash
    from refusal.method.collection import collect, prompt_sets

    pairs = read_jsonl(Path("data/prompts/pairs.jsonl"))
    unrelated = read_jsonl(Path("data/prompts/unrelated.jsonl"))
    model = load_model(BASE, params.model.dtype, params.model.device)
    tokenizer = load_tokenizer(BASE)
    sets = {
        name: encode_chats(tokenizer, prompts, params.model.system_prompt)
        for name, prompts in prompt_sets(pairs, unrelated, ("train", "val")).items()
    }
    OUT.mkdir(parents=True, exist_ok=True)
    weights, store, pad_id = weights_hash(BASE), Store(STORE / "store.sqlite"), tokenizer.pad_token_id
    for method in params.activations.methods:
        path = OUT / f"{method}.safetensors"
        collect(model, weights, sets, method, pad_id, params.activations.batch_size, store, path)
    n, shape = sum(map(len, sets.values())), f"{model.config.num_hidden_layers} layers, d_model {model.config.hidden_size}"
    return f"{', '.join(params.activations.methods)}: resid_pre of {n} prompts at {shape}"


stage(main)
