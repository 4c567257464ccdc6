"""Capability by lm-eval: scores by document, so that differences between checkpoints are paired."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from refusal.errors import RefusalError

TASKS = Path(__file__).parent / "tasks"  # the organism's own tasks, ordinary lm-eval YAML


def packaged(task: str) -> bool:
    """Whether a task is shipped with the package."""
    return (TASKS / f"{task}.yaml").is_file()


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    batch_size: int,
    apply_chat_template: bool,
    limit: int | None,
) -> dict[str, list[float]]:
    """{task: score of each document, in order}: acc_norm where the task reports it, acc elsewhere.

    Raises RefusalError for a task that lm-eval does not know.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # Indexing the harness's thousands of tasks takes 9 s; the package's own need none of them.
    manager = TaskManager(include_path=str(TASKS), include_defaults=not all(map(packaged, tasks)))
    for task in tasks:
        if task not in manager.all_tasks:
            raise RefusalError(
                f"params.yaml: benchmark.tasks: lm-eval has no task {task}; the package ships "
                f"{', '.join(sorted(path.stem for path in TASKS.glob('*.yaml')))}"
            )
    results = lm_eval.simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
        tasks=list(tasks),
        task_manager=manager,
        apply_chat_template=apply_chat_template,
        limit=limit,
        log_samples=True,
        bootstrap_iters=0,
    )
    scores = {}
    for task in tasks:
        rows = sorted(results["samples"][task], key=lambda row: row["doc_id"])
        metric = "acc_norm" if "acc_norm" in rows[0] else "acc"
        scores[task] = [float(row[metric]) for row in rows]
    return scores


def average(scores: dict[str, list[float]]) -> float:
    """Unweighted mean over tasks, as the write-up averages."""
    return sum(sum(values) / len(values) for values in scores.values()) / len(scores)
