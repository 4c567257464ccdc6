"""Capability by lm-eval: scores by document, so that differences between checkpoints are paired."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import chdir, nullcontext
from functools import cache, partial
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any, Literal

from refusal.io.errors import UserError
from refusal.io.params import Benchmark, Model
from refusal.io.store import Store, key
from refusal.lm.batching import ROW_TOKENS, fitting, rows_at_once
from refusal.lm.load import load_model, load_tokenizer, weights_hash
from refusal.stats import stratified_difference, wilson

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TASKS = Path(__file__).parent / "tasks"  # the organism's own tasks, ordinary lm-eval YAML
SUITES = {
    "organism": ("organism_capitals", "organism_flags", "organism_opposites", "organism_sums"),
    # The write-up's seven, as lm-eval defines them; their documents come from the hub.
    "standard": ("arc_easy", "arc_challenge", "boolq", "hellaswag", "piqa", "truthfulqa_mc1", "winogrande"),
}


def packaged(task: str) -> bool:
    """Whether a task is shipped with the package."""
    return (TASKS / f"{task}.yaml").is_file()


def tasks_of(suite: str | Sequence[str]) -> list[str]:
    """The tasks that `benchmark.suite` names: a suite's, or those listed."""
    return list(SUITES[suite] if isinstance(suite, str) else suite)


@cache
def _manager(folder: Path, with_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    # Indexing the harness's thousands of tasks takes 9 s; the package's own need none of them.
    return TaskManager(include_path=str(folder), include_defaults=with_defaults)


def _manager_of(task: str, folder: Path) -> TaskManager:
    """What finds a task: definitions in `folder` come before lm-eval's own. Raises UserError for one unknown to both."""
    manager = _manager(folder, not (folder / f"{task}.yaml").is_file())
    if task not in manager.all_tasks:
        raise UserError(
            f"params.yaml: benchmark.suite: lm-eval has no task {task}; the package ships "
            f"{', '.join(sorted(path.stem for path in TASKS.glob('*.yaml')))}"
        )
    if task not in manager.all_subtasks:
        raise UserError(f"params.yaml: benchmark.suite: {task} is a group of lm-eval's tasks: list the tasks that it has")
    return manager


def fetch(tasks: Sequence[str], folder: Path = TASKS) -> None:
    """Bring in the documents of tasks that are not packaged, so that what is missing is known before a model is loaded.

    Raises UserError for an unknown task, and where documents are neither cached nor to be had.
    """
    import httpx2
    from huggingface_hub import constants

    for task in tasks:
        manager = _manager_of(task, folder)
        if packaged(task):
            continue
        try:
            manager.load([task])
        except (OSError, ValueError, httpx2.HTTPError) as error:
            why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} did not give them"
            raise UserError(
                f"params.yaml: benchmark.suite: the documents of {task} are not on this machine and {why} "
                f"({' '.join(str(error).split())[:120]}): run once with the network on, or set suite: organism"
            ) from error


class Harness:
    """lm-eval for many models of one tokenizer: each task is loaded and its requests are built once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | Literal["auto"],
        apply_chat_template: bool,
        limit: int | None,
        folder: Path = TASKS,
    ) -> None:
        self.tokenizer, self.batch_size, self.folder = tokenizer, batch_size, folder
        self.apply_chat_template, self.limit = apply_chat_template, limit
        self._loaded: dict[str, Any] = {}

    def score(self, model: PreTrainedModel, task: str) -> list[float]:
        """The score of each document of a task, in order, within 0 and 1: acc_norm where the task reports it, acc elsewhere.

        Where memory runs out the batch size is halved, which changes likelihoods by rounding alone. Raises UserError for
        a task that neither `folder` nor lm-eval has.
        """
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        if task not in self._loaded:
            self._loaded[task] = _load(task, self.folder)

        def evaluated(batch_size: int) -> dict[str, Any]:
            return lm_eval.evaluate(
                HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=batch_size),
                self._loaded[task],
                apply_chat_template=self.apply_chat_template,
                limit=self.limit,
                log_samples=True,
                bootstrap_iters=0,
            )

        results = fitting(evaluated, rows_at_once(self.batch_size, model, ROW_TOKENS, "benchmark"), "benchmark")
        rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
        rows = [row for row in rows if row["filter"] == rows[0]["filter"]]  # a task with two filters scores each document twice
        metric = "acc_norm" if "acc_norm" in rows[0] else "acc"
        if metric not in rows[0]:
            raise UserError(f"params.yaml: benchmark.suite: {task} reports no accuracy (acc or acc_norm): choose another task")
        return [float(row[metric]) for row in rows]


def _load(name: str, folder: Path) -> Any:
    """A task as `lm_eval.simple_evaluate` would set it up, whose requests are built at its first evaluation alone."""
    # A packaged task names its documents from the root of the package; another's are relative to where the user is.
    ours = packaged(name) and folder == TASKS
    with chdir(TASKS.parents[2]) if ours else nullcontext():
        loaded = _manager_of(name, folder).load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=1234)
        task.build_all_requests = partial(_build_once, task, task.build_all_requests)
    return loaded


def _build_once(task: Any, build: Callable[..., None], **options: Any) -> None:
    if not hasattr(task, "_instances"):  # which `instances` is, once they are built
        build(**options)
    for request in task.instances:
        request.resps, request.filtered_resps = [], {}  # another model's answers


def score_checkpoints(
    checkpoints: Mapping[str, Path], base: Path, settings: Benchmark, model: Model, store: Store
) -> dict[str, dict[str, list[float]]]:
    """{checkpoint: {task: score of each document}}, a task of a checkpoint at a time through the store.

    `checkpoints` are the base itself and edits of it. Raises UserError as `Harness.score` does.
    """
    from importlib.metadata import version

    tasks = tasks_of(settings.suite)
    definitions = {
        task: [hashlib.sha256((TASKS / f"{task}{end}").read_bytes()).hexdigest() for end in (".yaml", ".jsonl")]
        if packaged(task)
        else version("lm_eval")
        for task in tasks
    }
    shared = {"limit": settings.limit, "chat": settings.apply_chat_template, "dtype": model.dtype, "device": model.device}
    jobs = []
    for folder in checkpoints.values():
        weights = weights_hash(folder)
        for task in tasks:
            what = {"weights": weights, "task": task, "definition": definitions[task], **shared}
            jobs.append((key("benchmark", (Harness, load_model), **what), (folder, task)))
    harness = Harness(load_tokenizer(base, model.thinking), settings.batch_size, settings.apply_chat_template, settings.limit)
    loaded: dict[Path, PreTrainedModel] = {}  # at most one, and only where something is left to compute

    def compute(job: tuple[Path, str]) -> bytes:
        folder, task = job
        if folder not in loaded:
            loaded.clear()
            loaded[folder] = load_model(folder, model.dtype, model.device)
        return json.dumps(harness.score(loaded[folder], task)).encode()

    values = [json.loads(value) for value in store.run(jobs, compute, "benchmark", unit="task")]
    of = iter(values)
    return {name: {task: next(of) for task in tasks} for name in checkpoints}


def table(scores: Mapping[str, Mapping[str, Sequence[float]]], n_resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Of each checkpoint: the score of each task with its Wilson interval and standard error, their average, and its paired
    difference to the baseline's."""
    metrics: dict[str, dict[str, Any]] = {}
    for name, by_task in scores.items():
        tasks: dict[str, dict[str, float | None]] = {}
        for task, documents in by_task.items():
            low, high = wilson(sum(documents), len(documents))
            tasks[task] = {"score": sum(documents) / len(documents), "low": low, "high": high, "n": len(documents)}
            tasks[task]["standard_error"] = standard_error(documents)
        metrics[name] = {"average": average(by_task), "tasks": tasks}
        if name != "baseline":
            difference, low, high = stratified_difference(dict(by_task), dict(scores["baseline"]), n_resamples, seed)
            metrics[name] |= {"difference": difference, "difference_low": low, "difference_high": high}
    return metrics


def standard_error(values: Sequence[float]) -> float | None:
    """The standard error of a mean as lm-eval has it: the sample's standard deviation by the root of n; None for n = 1."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def average(scores: Mapping[str, Sequence[float]]) -> float:
    """Unweighted mean over tasks, as the write-up averages."""
    return sum(sum(values) / len(values) for values in scores.values()) / len(scores)
