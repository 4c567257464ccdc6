"""benchmark: lm-eval on the base and on every checkpoint, with paired differences to the base."""

import hashlib
import json
from pathlib import Path

from refusal.params import Params
from stages import STORE, read_json, stage, torch_ready, write_json, write_text

BASE, METRICS, PLOT = Path("models/base"), Path("metrics/benchmark.json"), Path("plots/benchmark.csv")


def main(params: Params) -> str:
    torch_ready(params)
    from refusal import benchmark
    from refusal.benchmark import TASKS, average, packaged, score
    from refusal.models import load_model, load_tokenizer, weights_hash
    from refusal.statistics import stratified_difference, wilson
    from refusal.store import Store, key
    from refusal.tables import csv_text

    b = params.benchmark
    selected = read_json(Path("metrics/orthogonalize.json"))
    folders = {"baseline": BASE} | {rank: Path("models/ablated") / cell["name"] for rank, cell in selected.items()}
    definitions = {
        task: [hashlib.sha256((TASKS / f"{task}{end}").read_bytes()).hexdigest() for end in (".yaml", ".jsonl")]
        if packaged(task)
        else None
        for task in b.tasks
    }
    shared = {
        "tasks": definitions,
        "limit": b.limit,
        "chat": b.apply_chat_template,
        "dtype": params.model.dtype,
        "device": params.model.device,
    }
    jobs = [(key("benchmark", benchmark, weights=weights_hash(folder), **shared), folder) for folder in folders.values()]

    def compute(folder: Path) -> bytes:
        model = load_model(folder, params.model.dtype, params.model.device)
        return json.dumps(score(model, load_tokenizer(folder), b.tasks, b.batch_size, b.apply_chat_template, b.limit)).encode()

    values = Store(STORE / "store.sqlite").run(jobs, compute, "benchmark", unit="checkpoint")
    scores = dict(zip(folders, map(json.loads, values), strict=True))
    metrics, rows = {}, []
    for rank, folder in folders.items():
        tasks = {}
        for task, documents in scores[rank].items():
            low, high = wilson(int(sum(documents)), len(documents))
            tasks[task] = {"score": sum(documents) / len(documents), "low": low, "high": high, "n": len(documents)}
            rows.append({"checkpoint": rank, "name": folder.name, "task": task, **tasks[task]})
        metrics[rank] = {"name": folder.name, "average": average(scores[rank]), "tasks": tasks}
        if rank != "baseline":
            difference, low, high = stratified_difference(scores[rank], scores["baseline"], b.n_resamples, b.seed)
            metrics[rank] |= {"difference": difference, "difference_low": low, "difference_high": high}
    write_json(METRICS, metrics)
    write_text(PLOT, csv_text(rows))
    first = metrics["rank_1"]
    return (
        f"{len(folders)} checkpoints on {len(b.tasks)} tasks; baseline {metrics['baseline']['average']:.3f}, rank_1 "
        f"{first['average']:.3f}, difference {first['difference']:+.3f} "
        f"[{first['difference_low']:+.3f}, {first['difference_high']:+.3f}]"
    )


stage(main)
