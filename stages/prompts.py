"""prompts: harmful and safe ones, pairs or not, and the unrelated set, split so that no topic or near-duplicate crosses."""

import sys
from collections import Counter
from pathlib import Path

from refusal.data.prompts import prompts_of
from refusal.data.prompts_api import api_pairs, api_unrelated
from refusal.io.errors import UserError
from refusal.io.files import write_jsonl
from refusal.io.params import Params
from refusal.io.prompts import WITHOUT_PAIRS, is_paired
from refusal.io.store import Store
from stages import OWN_HARMLESS, ROOT, STORE, stage, warn_unless_in_raw

OUT = Path("data/prompts")
HALVES = ("harmful", "safe")


def main(params: Params) -> str:
    p = params.prompts
    for source in sorted({p.source, p.unrelated, p.harmless or "api", *(p.harmful or ())} - {"grammar", "api"}):
        if not Path(source).exists() and (ROOT / source).exists():
            raise UserError(
                f"params.yaml: prompts: {source} exists, but queued and temporary runs see only what git tracks: run "
                f"`git add -N {source}` in {ROOT}, and the experiment again"
            )
        warn_unless_in_raw(source, "prompts")
    store = Store(STORE / "store.sqlite")
    pairs, unrelated, said = prompts_of(p, OWN_HARMLESS)
    for sentence in said:
        print(f"prompts: {sentence}", file=sys.stderr)
    if p.source == "api":
        pairs = api_pairs(p, params.endpoint, store)
    if p.unrelated == "api":
        unrelated = api_unrelated(p, params.endpoint, store, (pair[half] for pair in pairs for half in HALVES if pair[half]))
    if not is_paired(pairs):
        print(f"prompts: these are no pairs: {WITHOUT_PAIRS}", file=sys.stderr)
    write_jsonl(OUT / "pairs.jsonl", pairs)
    write_jsonl(OUT / "unrelated.jsonl", unrelated)
    counts = Counter(row["split"] for row in pairs)
    what = "pairs" if is_paired(pairs) else "harmful prompts"
    return (
        f"{len(pairs)} {what} on {len({row['topic'] for row in pairs})} topic phrases "
        f"(train {counts['train']}, val {counts['val']}, test {counts['test']}), {len(unrelated)} unrelated"
    )


stage(main)
