"""select: the top cells by compliance x coherence on val, or where select.by is paper those of the paper's rule."""

import sys
from pathlib import Path

from refusal.io.params import Params
from refusal.io.prompts import resolve_pairing
from refusal.method.paper_selection import ranked
from refusal.method.select import rank
from refusal.method.subspaces import spans
from stages import read_json, stage, write_json

METRICS = Path("metrics/select.json")


def main(params: Params) -> str:
    if params.select.by == "paper":
        return by_paper(params)
    s = params.sweep
    directions = {name: m for name, m in read_json(Path("metrics/directions.json")).items() if m is not None}  # null: left out
    described = directions[f"{s.method}-{resolve_pairing(s.pairing, s.method, directions)}"]
    among = spans(s, described["layers"])
    chosen = rank(read_json(Path("metrics/judge.json")), among, described["separation"], params.select.top, s.method)
    write_json(METRICS, {f"rank_{i}": cell for i, cell in enumerate(chosen, 1)})
    first = chosen[0]
    return (
        f"rank_1 is {first['name']}, compliance {first['compliance']:.2f} [{first['low']:.2f}, {first['high']:.2f}] on val; "
        f"{first['n_tied']} cells have its score, ahead of the next by {first['margin_items'] or 0:.1f} prompts"
    )


def by_paper(params: Params) -> str:
    """Ranks by the paper's rule, from metrics/selection.json; what it leaves out is said on stderr."""
    selection, judged = (read_json(Path(f"metrics/{name}.json")) for name in ("selection", "judge"))
    chosen = ranked(selection, judged, params.select.top, params.sweep.method)
    write_json(METRICS, chosen)
    first, without = chosen["rank_1"], ""
    if first["criterion_left_out"]:
        without = " without the criterion induce"
        print(f"select: {selection['reason']}; rank_1 is the best{without}", file=sys.stderr)
    return (
        f"rank_1 by the paper's rule{without} is {first['name']}, refusal score {first['bypass']:.2f} ablated, compliance "
        f"{first['compliance']:.2f} [{first['low']:.2f}, {first['high']:.2f}] on val; {len(chosen)} of {params.select.top} ranks"
    )


stage(main)
