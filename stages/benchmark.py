"""benchmark: lm-eval on the base and on every checkpoint, with paired differences to the base."""

from pathlib import Path

from refusal.io.files import csv_text
from refusal.io.params import Params
from stages import STORE, read_json, stage, use_transformers, write_json, write_text

BASE, METRICS, PLOT = Path("models/base"), Path("metrics/benchmark.json"), Path("plots/benchmark.csv")


def main(params: Params) -> str:
    use_transformers(params)
    import logging

    from refusal.analysis.benchmark import fetch, packaged, score_checkpoints, table, tasks_of
    from refusal.io.store import Store
    from refusal.method.select import checked

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that comes loaded
    b, tasks = params.benchmark, tasks_of(params.benchmark.suite)
    selected = checked(read_json(Path("metrics/orthogonalize.json")))
    checkpoints = {"baseline": BASE} | {rank: Path("models/ablated") / cell["name"] for rank, cell in selected.items()}
    if foreign := [task for task in tasks if not packaged(task)]:
        kept = STORE / "datasets"
        print(f"benchmark: the documents of {', '.join(foreign)} come from the hub, once, and are kept in {kept}", flush=True)
    fetch(tasks)
    scores = score_checkpoints(checkpoints, BASE, b, params.model, Store(STORE / "store.sqlite"))
    metrics = {rank: {"name": checkpoints[rank].name} | row for rank, row in table(scores, b.n_resamples, b.seed).items()}
    keys = ("score", "low", "high", "n")
    rows = [
        {"checkpoint": rank, "name": row["name"], "task": task, **{k: of[k] for k in keys}}
        for rank, row in metrics.items()
        for task, of in row["tasks"].items()
    ]
    write_json(METRICS, metrics)
    write_text(PLOT, csv_text(rows))
    first = metrics["rank_1"]
    return (
        f"{len(checkpoints)} checkpoints on {len(tasks)} tasks; baseline {metrics['baseline']['average']:.3f}, rank_1 "
        f"{first['average']:.3f}, difference {first['difference']:+.3f} "
        f"[{first['difference_low']:+.3f}, {first['difference_high']:+.3f}]"
    )


stage(main, online=lambda params: params.benchmark.suite != "organism")
