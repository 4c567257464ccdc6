"""The benchmark: lm-eval's accuracy against log likelihoods by hand, on the package's tasks and on lm-eval's definitions of the
standard seven, whose rows stand in for the hub's; and checkpoints compared document by document."""

import copy
import json
import os
import statistics
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from qwen1_layout import LATE, tensors, write
from synthetic import naive_wilson
from tiny import tiny_direction

from refusal.analysis import benchmark
from refusal.analysis.benchmark import SUITES, TASKS, Harness, average, fetch, packaged, score_checkpoints, table, tasks_of
from refusal.io.errors import UserError
from refusal.io.params import Benchmark, Model
from refusal.io.store import Store
from refusal.lm.load import load_model, load_tokenizer, render_chats
from refusal.lm.qwen1 import convert
from refusal.method.interventions import Intervention

NAMES = [f"organism_{task}" for task in ("capitals", "flags", "opposites", "sums")]
LIMIT = 6
STOCK = {
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "boolq": "super_glue/boolq/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "piqa": "piqa/piqa.yaml",
    "truthfulqa_mc1": "truthfulqa/truthfulqa_mc1.yaml",
    "winogrande": "winogrande/default.yaml",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a tiny random model, a byte a token."""
    folder = tmp_path_factory.mktemp("model")
    convert(write(folder / "source", LATE | {"seq_length": 4096}, tensors()), folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


@pytest.fixture(scope="module")
def models(base):
    """The model and two others."""
    others = [load_model(base), load_model(base)]
    for seed, other in enumerate(others):
        generator = torch.Generator().manual_seed(seed)
        for parameter in other.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return [load_model(base), *others]


@pytest.fixture(scope="module")
def rows():
    if not os.environ.get("REFUSAL_REFERENCE"):
        pytest.skip("REFUSAL_REFERENCE is not set: the rows of the seven tasks are not at hand")
    return Path(os.environ["REFUSAL_REFERENCE"]) / "benchmarks"


@pytest.fixture(scope="module")
def definitions(rows, tmp_path_factory):
    """A folder of tasks that include lm-eval's own files and change nothing but where the documents come from."""
    folder, stock = tmp_path_factory.mktemp("tasks"), Path(lm_eval.__file__).parent / "tasks"
    for task, path in STOCK.items():
        files = dict.fromkeys(("train", "validation", "test"), str(rows / f"{task}.jsonl"))
        fields = {"include": str(stock / path), "task": task, "dataset_path": "json", "dataset_name": None}
        fields["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(fields))
    return folder


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


@torch.no_grad()
def by_hand(task: str, row: dict, model, tokenizer, chat: bool = False) -> float:
    """A document's score from the task's description: the likeliest answer, by character where acc_norm is reported."""

    def log_likelihood(context: str, answer: str) -> float:
        head, whole = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, context + answer))
        logs = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(logs[i - 1, whole[i]].item() for i in range(len(head), len(whole)))

    def normed(context: str, answers: list[str]) -> int:
        return best([log_likelihood(context, f" {a}") / len(a) for a in answers])

    if task.startswith("organism"):
        context = render_chats(tokenizer, [row["question"]])[0] if chat else row["question"]
        return float(best([log_likelihood(context, choice) for choice in row["choices"]]) == row["label"])
    if task.startswith("arc"):
        found = normed(f"Question: {row['question']}\nAnswer:", row["choices"]["text"])
        return float(row["choices"]["label"][found] == row["answerKey"])
    if task == "piqa":
        return float(normed(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]) == row["label"])
    if task == "boolq":
        context = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:"
        return float(best([log_likelihood(context, answer) for answer in (" no", " yes")]) == int(row["label"]))
    assert task == "winogrande"
    head, tail = row["sentence"].split("_", 1)
    likelihoods = [log_likelihood(head + row[option], f" {tail.strip()}") for option in ("option1", "option2")]
    return float(best(likelihoods) == int(row["answer"]) - 1)


def documents(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:LIMIT]]


@pytest.mark.parametrize("chat", [True, False])
def test_accuracy_equals_log_likelihoods_by_hand(models, tokenizer, chat):
    harness = Harness(tokenizer, 8, chat, LIMIT)
    found = {task: harness.score(models[0], task) for task in NAMES}
    assert found == {task: [by_hand(task, row, models[0], tokenizer, chat) for row in documents(TASKS, task)] for task in NAMES}
    flat = [value for values in found.values() for value in values]
    assert 0 < sum(flat) < len(flat)


@pytest.mark.parametrize("task", STOCK)
def test_the_stock_definition_scores_documents(definitions, rows, models, tokenizer, task):
    scores = Harness(tokenizer, 4, False, LIMIT, definitions).score(models[0], task)
    assert len(scores) == LIMIT and set(scores) <= {0.0, 1.0}
    if task not in ("hellaswag", "truthfulqa_mc1"):
        assert scores == [by_hand(task, row, models[0], tokenizer) for row in documents(rows, task)]
    if task == "arc_easy":
        assert len(Harness(tokenizer, 4, True, LIMIT, definitions).score(models[0], task)) == LIMIT
        assert Harness(tokenizer, 1, False, LIMIT, definitions).score(models[0], task) == scores


def test_one_harness_serves_many_models_and_builds_its_requests_once(models, tokenizer, monkeypatch):
    """The numbers of `lm_eval.simple_evaluate`, which loads the task and builds the requests anew for every model."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    built, construct = [], ConfigurableTask.construct_requests
    monkeypatch.setattr(ConfigurableTask, "construct_requests", lambda *a, **k: built.append(1) or construct(*a, **k))
    task, harness = "organism_sums", Harness(tokenizer, 8, True, LIMIT)
    in_turn = [models[1], models[2], models[1]]
    ours = [harness.score(model, task) for model in in_turn]
    assert len(built) == LIMIT and ours[0] == ours[2] != ours[1]
    for model, found in zip(in_turn, ours, strict=True):
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=[task],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            apply_chat_template=True,
            limit=LIMIT,
            log_samples=True,
        )
        assert [row["acc"] for row in results["samples"][task]] == found
    assert len(built) == LIMIT * (1 + len(in_turn))


def test_checkpoints_are_scored_once_each_by_their_own_weights(base, tokenizer, tmp_path, monkeypatch):
    folders = {"baseline": base, "rank_1": tmp_path / "rank_1", "rank_2": tmp_path / "rank_2"}
    for seed, folder in enumerate([*folders.values()][1:]):
        model = copy.deepcopy(load_model(base))
        with Intervention("edit", tiny_direction(model.config.hidden_size, seed), 2.5, "weights").on(model):
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    where = {"id": "x", "revision": None, "dtype": "float32", "device": "cpu", "system_prompt": None, "thinking": None}
    store, scored = Store(tmp_path / "s.sqlite"), []

    def scores(**change):
        settings = {
            "suite": NAMES[:2],
            "apply_chat_template": True,
            "batch_size": 8,
            "limit": LIMIT,
            "n_resamples": 99,
            "seed": 0,
        }
        settings = Benchmark(**settings | {k: v for k, v in change.items() if k in settings})
        return score_checkpoints(folders, base, settings, Model(**where | {k: v for k, v in change.items() if k in where}), store)

    found = scores()
    harness = Harness(tokenizer, 8, True, LIMIT)
    assert found == {n: {task: harness.score(load_model(f), task) for task in NAMES[:2]} for n, f in folders.items()}
    assert len({str(of) for of in found.values()}) == 3
    score = Harness.score
    monkeypatch.setattr(Harness, "score", lambda *args: scored.append(args[-1]) or score(*args))
    for change, tasks in (
        ({}, []),
        ({"batch_size": 4}, []),
        ({"suite": NAMES[1:3]}, NAMES[2:3]),
        ({"limit": 2}, NAMES[:2]),
        ({"apply_chat_template": False}, NAMES[:2]),
        ({"dtype": "bfloat16"}, NAMES[:2]),
    ):
        scored.clear()
        scores(**change)
        assert scored == tasks * 3, change


def test_a_table_of_checkpoints_is_paired_with_the_baseline():
    baseline = {"a": [1.0, 0.0, 0.0, 1.0, 1.0], "b": [1.0] * 4}
    rank_1 = {"a": [0.0, 0.0, 1.0, 1.0, 1.0], "b": [1.0, 0.0, 1.0, 0.0]}
    made = table({"baseline": baseline, "rank_1": rank_1}, 4000, 0)
    assert (made["baseline"]["average"], made["rank_1"]["average"]) == pytest.approx((0.8, 0.55))
    assert "difference" not in made["baseline"] and made["rank_1"]["difference"] == pytest.approx(0.55 - 0.8)
    for name, of in (("baseline", baseline), ("rank_1", rank_1)):
        for task, values in of.items():
            row, error = made[name]["tasks"][task], statistics.stdev(values) / len(values) ** 0.5
            share = sum(values) / len(values)
            expected = [share, *naive_wilson(share, len(values))]
            assert [row[k] for k in ("score", "low", "high")] == pytest.approx(expected, abs=1e-6)
            assert row["n"] == len(values) and row["standard_error"] == pytest.approx(error)
    # The mean of two strata's means of resampled differences, -1, 0, 1, 0, 0 and 0, -1, 0, -1: by all resamples of each.
    generator = torch.Generator().manual_seed(1)
    strata = [torch.tensor([-1.0, 0, 1, 0, 0]), torch.tensor([0, -1.0, 0, -1])]
    student = {5: 2.776445, 4: 3.182446}  # of n documents' degrees of freedom, by a table
    drawn = {d: d[torch.randint(0, len(d), (100_000, len(d)), generator=generator)].mean(1) for d in strata}
    spread = {n: (n / (n - 1)) ** 0.5 * t / 1.959964 for n, t in student.items()}
    means = sum(d.mean() + spread[len(d)] * (resampled - d.mean()) for d, resampled in drawn.items()) / 2
    limits = [made["rank_1"]["difference_low"], made["rank_1"]["difference_high"]]
    assert limits == pytest.approx(means.quantile(torch.tensor([0.025, 0.975])).tolist(), abs=0.03)
    assert table({"baseline": {"a": [1.0]}}, 9, 0)["baseline"]["tasks"]["a"]["standard_error"] is None


def test_average_counts_tasks_and_not_documents():
    assert average({"small": [1.0], "large": [0.0] * 99}) == 0.5


def test_the_packaged_tasks_are_found_from_anywhere(models, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scores = Harness(tokenizer, 8, False, 3).score(models[0], "organism_sums")
    assert len(scores) == 3 and set(scores) <= {0.0, 1.0}


def test_the_suites():
    assert [packaged(name) for name in (*NAMES, "arc_easy", "organism", "../benchmark")] == [True] * 4 + [False] * 3
    assert tasks_of("standard") == list(STOCK) and not any(map(packaged, STOCK))
    assert tasks_of("organism") == NAMES and tasks_of(["piqa", "organism_sums"]) == ["piqa", "organism_sums"]
    assert {path.stem for path in TASKS.glob("*.yaml")} == set(SUITES["organism"])


def test_a_group_and_a_task_without_accuracy_are_told(models, tokenizer, tmp_path):
    scored = yaml.safe_load((TASKS / "organism_capitals.yaml").read_text())
    metric = {"metric": "brier_score", "aggregation": "brier_score", "higher_is_better": False}
    (tmp_path / "unscored.yaml").write_text(yaml.safe_dump(scored | {"task": "unscored", "metric_list": [metric]}))
    (tmp_path / "several.yaml").write_text("group: several\ntask: [unscored]\n")
    harness = Harness(tokenizer, 8, True, 2, tmp_path)
    for task, says in (
        ("several", "several is a group of lm-eval's tasks: list the tasks"),
        ("unscored", r"unscored reports no accuracy .*: choose another task"),
    ):
        with pytest.raises(UserError, match=rf"^params\.yaml: benchmark\.suite: {says}"):
            harness.score(models[0], task)


def test_an_unknown_task_is_told(models, tokenizer, monkeypatch):
    from lm_eval.tasks import TaskManager

    asked = []

    def quick(include_path, include_defaults):  # indexing the harness's own thousands of tasks takes 10 s
        asked.append(include_defaults)
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", quick)
    benchmark._manager.cache_clear()
    for look in (lambda: Harness(tokenizer, 8, True, LIMIT).score(models[0], "capitol"), lambda: fetch(["capitol"])):
        with pytest.raises(UserError, match=r"^params\.yaml: benchmark\.suite: lm-eval has no task capitol; .*organism_capitals"):
            look()
    assert asked == [True]  # they were looked through
    benchmark._manager.cache_clear()


def test_documents_that_cannot_be_had_are_one_sentence_before_anything_is_loaded():
    fetch(["organism_sums"])
    says = r"benchmark\.suite: the documents of piqa are not on this machine and HF_HUB_OFFLINE is set"
    with pytest.raises(UserError, match=says):
        fetch(["organism_sums", "piqa"])
