"""select: the top cells by compliance x coherence on val."""

from pathlib import Path

from refusal.io.params import Params
from refusal.io.prompts import resolve_pairing
from refusal.method.select import rank
from stages import read_json, stage, write_json

METRICS = Path("metrics/select.json")


def main(params: Params) -> str:
    s = params.sweep
    directions = {name: m for name, m in read_json(Path("metrics/directions.json")).items() if m is not None}  # null: left out
    separation = directions[f"{s.method}-{resolve_pairing(s.pairing, s.method, directions)}"]["separation"]
    chosen = rank(read_json(Path("metrics/judge.json")), separation, params.select.top, s.method)
    write_json(METRICS, {f"rank_{i}": cell for i, cell in enumerate(chosen, 1)})
    first = chosen[0]
    return (
        f"rank_1 is {first['name']}, compliance {first['compliance']:.2f} [{first['low']:.2f}, {first['high']:.2f}] on val; "
        f"{first['n_tied']} cells have its score, ahead of the next by {first['margin_items'] or 0:.1f} prompts"
    )


stage(main)
