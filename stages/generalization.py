"""generalization: the selected direction on other sets of prompts, which nothing was chosen on; with no sets it costs nothing."""

import os
import sys
from pathlib import Path

from refusal.io.errors import UserError
from refusal.io.files import read_jsonl, write_jsonl
from refusal.io.params import Params
from stages import RAW, STORE, in_raw, stage, use_transformers, write_json

OUT, METRICS = Path("data/generalization"), Path("metrics/generalization.json")
NONE = "generalization.sets names no set: none was asked for"


def main(params: Params) -> str:
    g = params.generalization
    if not g.sets:
        write_jsonl(OUT / "completions.jsonl", [])
        write_json(METRICS, {"sets": {}, "note": NONE})
        return NONE
    from refusal.data.held_out import held_out, locate

    copies = os.environ.get("REAL_SETS")
    for one in g.sets:
        if not in_raw(one.file):
            raise UserError(
                f"params.yaml: generalization.sets: {one.file} is not in {RAW}/, where DVC sees it change: move it there"
            )
    paths = {one.name: locate(one, STORE / "sets", Path(copies) if copies else None) for one in g.sets}
    own = [
        row[half]
        for name in ("pairs", "unrelated")
        for row in read_jsonl(Path(f"data/prompts/{name}.jsonl"))
        for half in ("harmful", "safe")
        if row.get(half)
    ]
    sets, said = held_out(paths, own, params.prompts.near_duplicate, g.n, g.seed)
    for sentence in said:
        print(f"generalization: {sentence}", file=sys.stderr)
    use_transformers(params)
    from refusal.analysis.generalization import generalize
    from stages.study import load_study

    metrics, rows = generalize(load_study(params, g), sets)
    write_jsonl(OUT / "completions.jsonl", rows)
    write_json(METRICS, metrics | {"note": None})
    firsts = {name: found["figures"][0] for name, found in metrics["sets"].items()}
    return "compliance, baseline and ablated: " + "; ".join(
        f"{name} {f['baseline']['compliance']:.2f}, {f['ablated']['compliance']:.2f} "
        f"[{f['ablated']['compliance_low']:.2f}, {f['ablated']['compliance_high']:.2f}], n = {f['baseline']['n']}"
        for name, f in firsts.items()
    )


stage(main, online=lambda params: any(one.url and not Path(one.file).is_file() for one in params.generalization.sets))
