"""prompts: the pairs and the unrelated set, split so that no topic phrase or near-duplicate crosses."""

import sys
from collections import Counter
from pathlib import Path

from refusal.data.prompts import pairs_of, unrelated_of
from refusal.data.prompts_api import api_pairs, api_unrelated
from refusal.io.errors import UserError
from refusal.io.files import write_jsonl
from refusal.io.params import Params
from refusal.io.store import Store
from stages import ROOT, STORE, stage

OUT = Path("data/prompts")
TRACKED = Path("data/raw")


def main(params: Params) -> str:
    p = params.prompts
    for source in {p.source, p.unrelated} - {"grammar", "api"}:
        if not Path(source).exists() and (ROOT / source).exists():
            raise UserError(
                f"params.yaml: prompts: {source} exists, but queued and temporary runs see only what git tracks: run "
                f"`git add -N {source}` in {ROOT}, and the experiment again"
            )
        if not Path(source).resolve().is_relative_to(TRACKED.resolve()):
            print(
                f"prompts: {source} is not in {TRACKED}/, so DVC cannot see it change; after an edit run `dvc repro -f prompts`",
                file=sys.stderr,
            )
    store = Store(STORE / "store.sqlite")
    pairs = api_pairs(p, params.endpoint, store) if p.source == "api" else pairs_of(p)
    texts = [pair[half] for pair in pairs for half in ("harmful", "safe")]
    unrelated = api_unrelated(p, params.endpoint, store, texts) if p.unrelated == "api" else unrelated_of(p)
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(OUT / "pairs.jsonl", pairs)
    write_jsonl(OUT / "unrelated.jsonl", unrelated)
    counts = Counter(row["split"] for row in pairs)
    return (
        f"{len(pairs)} pairs on {len({row['topic'] for row in pairs})} topic phrases "
        f"(train {counts['train']}, val {counts['val']}, test {counts['test']}), {len(unrelated)} unrelated"
    )


stage(main)
