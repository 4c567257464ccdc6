"""benchmark: lm-eval on the base and on every checkpoint, with paired differences to the base."""

import hashlib
import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from refusal.io.params import Params
from stages import STORE, model_ready, read_json, stage, write_json, write_text

BASE, METRICS, PLOT = Path("models/base"), Path("metrics/benchmark.json"), Path("plots/benchmark.csv")


def main(params: Params) -> str:
    model_ready(params)
    import logging
    from importlib.metadata import version

    from refusal.analysis.benchmark import TASKS, Harness, average, fetch, packaged, standard_error, tasks_of
    from refusal.io.store import Store, key
    from refusal.io.files import csv_text
    from refusal.lm.load import load_tokenizer, weights_hash
    from refusal.lm.resident import SwappableLM
    from refusal.method.select import checked
    from refusal.stats import stratified_difference, wilson

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of every model that comes loaded

    b = params.benchmark
    selected = checked(read_json(Path("metrics/orthogonalize.json")))
    folders = {"baseline": BASE} | {rank: Path("models/ablated") / cell["name"] for rank, cell in selected.items()}
    tasks = tasks_of(b.suite)
    if foreign := [task for task in tasks if not packaged(task)]:
        cache = STORE / "datasets"
        print(f"benchmark: the documents of {', '.join(foreign)} come from the hub, once, and are kept in {cache}", flush=True)
    fetch(tasks)
    shared = {
        "limit": b.limit,
        "chat": b.apply_chat_template,
        "dtype": params.model.dtype,
        "device": params.model.device,
    }
    definitions = {
        task: [hashlib.sha256((TASKS / f"{task}{end}").read_bytes()).hexdigest() for end in (".yaml", ".jsonl")]
        if packaged(task)
        else version("lm_eval")
        for task in tasks
    }
    # A task of a checkpoint is what is stored: an interrupted run of real models loses one at most.
    weights = {folder: weights_hash(folder) for folder in folders.values()}
    jobs = [
        (
            key("benchmark", (Harness, SwappableLM), weights=weights[folder], task=task, definition=definitions[task], **shared),
            (folder, task),
        )
        for folder in folders.values()
        for task in tasks
    ]
    residents: list[SwappableLM] = []  # loaded only where something is left to compute
    harness = Harness(load_tokenizer(BASE), b.batch_size, b.apply_chat_template, b.limit)

    def compute(job: tuple[Path, str]) -> bytes:
        folder, task = job
        if not residents:
            residents.append(SwappableLM(BASE, params.model.dtype, params.model.device))
        return json.dumps(harness.score(residents[0].load_weights(folder), task)).encode()

    values = Store(STORE / "store.sqlite").run(jobs, compute, "benchmark", unit="task")
    scores: dict[str, dict[str, Sequence[float]]] = {rank: {} for rank in folders}
    for (rank, task), value in zip(product(folders, tasks), values, strict=True):
        scores[rank][task] = json.loads(value)
    metrics, rows = {}, []
    for rank, folder in folders.items():
        by_task: dict[str, dict[str, Any]] = {}
        for task, documents in scores[rank].items():
            low, high = wilson(int(sum(documents)), len(documents))
            by_task[task] = {"score": sum(documents) / len(documents), "low": low, "high": high, "n": len(documents)}
            rows.append({"checkpoint": rank, "name": folder.name, "task": task, **by_task[task]})
            by_task[task] |= {"standard_error": standard_error(documents)}
        metrics[rank] = {"name": folder.name, "average": average(scores[rank]), "tasks": by_task}
        if rank != "baseline":
            difference, low, high = stratified_difference(scores[rank], scores["baseline"], b.n_resamples, b.seed)
            metrics[rank] |= {"difference": difference, "difference_low": low, "difference_high": high}
    write_json(METRICS, metrics)
    write_text(PLOT, csv_text(rows))
    first = metrics["rank_1"]
    return (
        f"{len(folders)} checkpoints on {len(tasks)} tasks; baseline {metrics['baseline']['average']:.3f}, rank_1 "
        f"{first['average']:.3f}, difference {first['difference']:+.3f} "
        f"[{first['difference_low']:+.3f}, {first['difference_high']:+.3f}]"
    )


stage(main, online=lambda params: params.benchmark.suite != "organism")
