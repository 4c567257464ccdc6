"""judge: compliance and coherence of every completion of the sweep; the grid."""

import sys
from pathlib import Path
from typing import Any

from refusal.io.files import read_jsonl, write_jsonl
from refusal.io.params import Params
from stages import STORE, stage, write_json, write_text

OUT, METRICS, PLOT = Path("data/judged"), Path("metrics/judge.json"), Path("plots/sweep.csv")


def main(params: Params) -> str:
    from refusal.io.files import csv_text
    from refusal.io.store import Store
    from refusal.judges.language import english_share
    from refusal.judges.panel import judge_with
    from refusal.judges.verdicts import COUNTS, summaries
    from refusal.judges.verdicts import row as verdict_row

    j = params.judge

    topic = {row["id"]: row["topic"] for row in read_jsonl(Path("data/prompts/pairs.jsonl"))}
    rows = read_jsonl(Path("data/sweep/completions.jsonl"))
    exact = params.model.id == "organism"
    texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    judged = judge_with(j, params.endpoint, Store(STORE / "store.sqlite"))(*texts, "judge", exact)
    write_jsonl(
        OUT / "verdicts.jsonl",
        ({"cell": row["cell"], "id": row["id"], **verdict_row(verdict)} for row, verdict in zip(rows, judged, strict=True)),
    )
    # Cells without a layer are controls (baseline, random_0, ...): those of one kind are one arm.
    of_cell: dict[str, dict[str, Any]] = {}
    for row, verdict in zip(rows, judged, strict=True):
        of_cell.setdefault(row["cell"], row | {"verdicts": []})["verdicts"].append(verdict)
    arms: dict[str, list[list[Any]]] = {}
    place: dict[str, dict[str, Any]] = {}
    for cell, found in of_cell.items():
        arm = cell if found["layer"] is not None else cell.split("_")[0]
        arms.setdefault(arm, []).append(found["verdicts"])
        place[arm] = {key: found[key] for key in ("layer", "alpha")}
    topics = [topic[row["id"]] for row in rows if row["cell"] == rows[0]["cell"]]
    metrics = {arm: place[arm] | figures for arm, figures in summaries(arms, topics, " on val", j.allow_missing).items()}
    write_json(METRICS, metrics)
    english = english_share([*dict.fromkeys(texts[0])])
    keys = ("layer", "alpha", "compliance", "coherence", "score", "refusal", *COUNTS)
    swept = {cell: m for cell, m in metrics.items() if m["layer"] is not None}
    write_text(PLOT, csv_text([{"cell": cell, **{key: m[key] for key in keys}} for cell, m in swept.items()]))
    best = max(swept.values(), key=lambda m: m["score"])
    missing = f", {n} without a verdict" if (n := judged.count(None)) else ""
    if unfinished := sum(m["n_unfinished"] for m in metrics.values()):
        print(
            f"judge: {unfinished} of {len(rows)} completions are thinking that never ends (no </think>), and count as no answer: "
            "raise generation.max_new_tokens",
            file=sys.stderr,
        )
    if j.kind == "rules" and english < 0.5 and not exact:
        print(
            f"judge: {1 - english:.0%} of the prompts are not English, the only language the rules read: they take a refusal "
            "in another one for compliance; set judge.kind to llm",
            file=sys.stderr,
        )
    return (
        f"{len(rows)} completions by {j.kind}{missing}; baseline compliance {metrics['baseline']['compliance']:.2f}, random "
        f"{metrics['random']['compliance']:.2f}, best cell {best['compliance']:.2f} with coherence {best['coherence']:.2f}"
    )


stage(main)
