"""behaviour: which train prompts directions are fitted on: all, or those that behave as they should."""

from functools import partial
from pathlib import Path

from refusal.io.files import read_jsonl, write_jsonl
from refusal.io.params import Params
from refusal.io.prompts import by_split
from stages import STORE, stage, use_transformers, write_json

BASE, OUT, METRICS = Path("models/base"), Path("data/behaviour/train.jsonl"), Path("metrics/behaviour.json")


def main(params: Params) -> str:
    pairs, unrelated = (by_split(read_jsonl(Path(f"data/prompts/{name}.jsonl")))["train"] for name in ("pairs", "unrelated"))
    use_transformers(params)
    from refusal.io.store import Store
    from refusal.judges.behaviour import all_kept, behaving
    from refusal.judges.panel import for_safe_prompts, judge_with
    from refusal.lm.load import load_lm

    keep, j = params.prompts.keep, params.judge
    if keep == "all":
        rows, figures = all_kept(pairs, unrelated)
    else:
        lm, store = load_lm(BASE, **params.model.loading), Store(STORE / "store.sqlite")
        judge = judge_with(j, params.endpoint, store)
        exact = params.model.id == "organism"
        judges = {"harmful": partial(judge, exact=exact), "safe": partial(for_safe_prompts(judge), exact=exact)}
        rows, figures = behaving(lm, pairs, unrelated, judges, params.generation, store, j.allow_missing)
    write_jsonl(OUT, rows)
    write_json(METRICS, {"keep": keep, **figures})
    return f"{keep} train prompts kept: " + ", ".join(f"{of['n_kept']} of {of['n']} {part}" for part, of in figures.items())


stage(main)
