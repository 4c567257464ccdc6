"""judge: compliance and coherence of every completion of the sweep; the grid."""

from pathlib import Path

from refusal.params import Params
from refusal.tables import read_jsonl, write_jsonl
from stages import stage, write_json, write_text

OUT, METRICS, PLOT = Path("data/judged"), Path("metrics/judge.json"), Path("plots/sweep.csv")


def main(params: Params) -> str:
    from refusal.tables import csv_text
    from refusal.verdicts import judge_all, summary

    topics = {row["id"]: row["topic"] for row in read_jsonl(Path("data/prompts/pairs.jsonl"))}
    rows = read_jsonl(Path("data/sweep/completions.jsonl"))
    exact = params.model.id == "organism"
    judged = judge_all([row["prompt"] for row in rows], [row["completion"] for row in rows], exact)
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        OUT / "verdicts.jsonl",
        ({"cell": row["cell"], "id": row["id"], **verdict._asdict()} for row, verdict in zip(rows, judged, strict=True)),
    )
    # The random directions are one control: their completions are pooled.
    cells: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        cells.setdefault("random" if row["cell"].startswith("random_") else row["cell"], []).append(i)
    metrics = {
        cell: {"layer": rows[members[0]]["layer"], "alpha": rows[members[0]]["alpha"]}
        | summary(
            [judged[i] for i in members], [topics[rows[i]["id"]] for i in members], params.judge.n_resamples, params.judge.seed
        )
        for cell, members in cells.items()
    }
    write_json(METRICS, metrics)
    write_text(
        PLOT,
        csv_text(
            [
                {
                    "cell": cell,
                    "layer": m["layer"],
                    "alpha": m["alpha"],
                    "compliance": m["compliance"],
                    "coherence": m["coherence"],
                    "score": m["score"],
                    "refusal": m["refusal"],
                    "n": m["n"],
                }
                for cell, m in metrics.items()
                if m["layer"] is not None
            ]
        ),
    )
    best = max((m for m in metrics.values() if m["layer"] is not None), key=lambda m: m["score"])
    return (
        f"{len(rows)} completions by {params.judge.kind}; baseline compliance {metrics['baseline']['compliance']:.2f}, random "
        f"{metrics['random']['compliance']:.2f}, best cell {best['compliance']:.2f} with coherence {best['coherence']:.2f}"
    )


stage(main)
