"""detection: signals of an edit on checkpoints of known history, made of the organism, outside `dvc repro`: `make detection`.

Not in dvc.yaml, as `make organisms` is not: no other stage reads its figures. What was computed is in the store, so that an
interrupted run goes on.
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from refusal.io.errors import UserError
from refusal.io.params import Params
from stages import STORE, stage, use_transformers, write_json

BASE, METRICS = Path("models/base"), Path("metrics/detection.json")
LAYERS = (5, 6, 7)  # whose directions edits are made of: those that separate best
N_PAIRS = 100  # of val, on which the gap is measured


def main(params: Params) -> str:
    use_transformers(params)
    import torch

    from refusal.analysis.detection import Prompts, gap, signals, table
    from refusal.analysis.population import Base, made, recipes
    from refusal.io.files import read_jsonl
    from refusal.io.prompts import by_split, is_paired
    from refusal.io.store import Store, key
    from refusal.lm.load import load_lm
    from refusal.method.activations import last_token_resid_pre
    from refusal.method.directions import difference_in_means
    from refusal.organism.corpus import Corpus

    torch.set_num_threads(1)  # rounding depends on their number, and training on rounding
    pairs_file = Path("data/prompts/pairs.jsonl")
    for path in (BASE / "config.json", pairs_file):
        if not path.is_file():
            raise UserError(f"{path}: no such file; run `make pull`, which fetches the trained model and its prompts")
    pairs = read_jsonl(pairs_file)
    if params.model.id != "organism" or not is_paired(pairs):
        raise UserError("params.yaml: model.id: detection is measured on the organism and its pairs: set organism")
    lm, split = load_lm(BASE), by_split(pairs)
    unrelated = by_split(read_jsonl(Path("data/prompts/unrelated.jsonl")))
    held_out = [row[half] for name in ("val", "test") for row in split[name] for half in ("harmful", "safe")]
    held_out += [row["safe"] for name in ("val", "test") for row in unrelated[name]]
    directions = difference_in_means(
        *(last_token_resid_pre(lm, lm.encode([row[half] for row in split["train"]]), "batched") for half in ("harmful", "safe"))
    )
    base = Base(lm, directions, Corpus(params.organism.corpus_seed, held_out))
    chosen = split["val"][:N_PAIRS]
    prompts = Prompts(*(lm.encode([row[half] for row in chosen]) for half in ("harmful", "safe")))
    population, before = recipes(LAYERS), gap(lm, prompts, directions.unit)
    shared: dict[str, Any] = {
        "base": lm.weights,
        "prompts": [prompts.harmful, prompts.safe],
        "train": [row["id"] for row in split["train"]],
    }
    shared |= {"held_out": sorted(held_out), "corpus": params.organism.corpus_seed, "gguf": version("gguf")}
    keyed = [(key("detection", (signals, made), steps=[*recipe.steps], **shared), recipe) for recipe in population]
    jobs = Store(STORE / "store.sqlite").run(
        keyed, lambda recipe: json.dumps(signals(base, prompts, before, recipe)).encode(), "detection", "checkpoint"
    )
    metrics = table(population, [json.loads(one) for one in jobs], params.n_resamples, params.seed)
    write_json(METRICS, metrics | {"n_prompts": len(chosen), "layers": list(LAYERS)})
    areas = ", ".join(f"{name} {of['all']['auroc']:.2f}" for name, of in metrics["signals"].items())
    return f"{metrics['n_edited']} edited and {metrics['n_others']} other checkpoints; AUROC: {areas}"


stage(main)
