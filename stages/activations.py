"""activations: last-token `resid_pre` of every layer, or its mean over the last tokens, for train and val prompts."""

from pathlib import Path

from refusal.io.files import read_jsonl
from refusal.io.params import Params
from refusal.io.prompts import prompt_sets
from stages import STORE, stage, use_transformers

BASE, OUT = Path("models/base"), Path("data/activations")


def main(params: Params) -> str:
    use_transformers(params)
    from refusal.io.store import Store
    from refusal.lm.load import load_lm
    from refusal.method.activations import collect

    pairs, unrelated = (read_jsonl(Path(f"data/prompts/{name}.jsonl")) for name in ("pairs", "unrelated"))
    lm = load_lm(BASE, **params.model.loading)
    sets = {name: lm.encode(prompts) for name, prompts in prompt_sets(pairs, unrelated, ("train", "val")).items()}
    OUT.mkdir(parents=True, exist_ok=True)
    store = Store(STORE / "store.sqlite")
    a = params.activations
    for method in a.methods:
        collect(lm, sets, method, a.batch_size, store, OUT / f"{method}.safetensors", a.n_positions)
    n, shape = sum(map(len, sets.values())), f"{lm.n_layers} layers, d_model {lm.d_model}"
    return f"{', '.join(a.methods)}: resid_pre of {n} prompts at {shape}"


stage(main)
