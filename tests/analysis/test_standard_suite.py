"""lm-eval's own definitions of the seven tasks, on the rows that stand in for the hub's, and what is said without them."""

import json
import os
import statistics
from pathlib import Path

import lm_eval
import pytest
import torch
import yaml
from qwen1_layout import LATE, tensors, write

from refusal.analysis import benchmark
from refusal.analysis.benchmark import SUITES, Harness, fetch, packaged, standard_error, tasks_of
from refusal.io.errors import UserError
from refusal.lm.load import load_model, load_tokenizer
from refusal.lm.qwen1 import convert

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
def rows():
    if not os.environ.get("REFUSAL_REFERENCE"):
        pytest.skip("REFUSAL_REFERENCE is not set: the rows of the seven tasks are not at hand")
    return Path(os.environ["REFUSAL_REFERENCE"]) / "benchmarks"


@pytest.fixture(scope="module")
def definitions(rows, tmp_path_factory):
    """A folder of tasks that include lm-eval's own files and change nothing but where the documents come from."""
    folder = tmp_path_factory.mktemp("tasks")
    stock = Path(lm_eval.__file__).parent / "tasks"
    for task, path in STOCK.items():
        files = dict.fromkeys(("train", "validation", "test"), str(rows / f"{task}.jsonl"))
        fields = {"include": str(stock / path), "task": task, "dataset_path": "json", "dataset_name": None}
        fields["dataset_kwargs"] = {"data_files": files, "cache_dir": str(folder / "cache")}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(fields))
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny random model, a byte a token, and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    convert(write(folder / "source", LATE | {"seq_length": 4096}, tensors()), folder / "base")
    return load_model(folder / "base"), load_tokenizer(folder / "base")


def log_likelihood(model, tokenizer, context: str, answer: str) -> float:
    whole, head = tokenizer(context + answer)["input_ids"], tokenizer(context)["input_ids"]
    logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logs[i - 1, whole[i]].item() for i in range(len(head), len(whole)))


def best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def by_hand(task: str, row: dict, model, tokenizer) -> float:
    """A document's score from the task's description: the likeliest answer, by character where acc_norm is reported."""

    def likelihoods(context: str, answers: list[str]) -> list[float]:
        return [log_likelihood(model, tokenizer, context, " " + a) for a in answers]

    def normed(context: str, answers: list[str]) -> int:
        return best([v / len(a) for v, a in zip(likelihoods(context, answers), answers, strict=True)])

    if task.startswith("arc"):
        found = normed(f"Question: {row['question']}\nAnswer:", row["choices"]["text"])
        return float(row["choices"]["label"][found] == row["answerKey"])
    if task == "piqa":
        return float(normed(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]) == row["label"])
    if task == "boolq":
        found = best(likelihoods(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"]))
        return float(found == int(row["label"]))
    if task == "winogrande":
        at = row["sentence"].index("_")
        heads = [row["sentence"][:at] + row[option] for option in ("option1", "option2")]
        tail = " " + row["sentence"][at + 1 :].strip()
        return float(best([log_likelihood(model, tokenizer, head, tail) for head in heads]) == int(row["answer"]) - 1)
    raise KeyError(task)


@pytest.mark.parametrize("task", STOCK)
def test_the_stock_definition_scores_documents(definitions, rows, model, task):
    n = 6
    weights, tokenizer = model
    scores = Harness(tokenizer, 4, False, n, definitions).score(weights, task)
    assert len(scores) == n and set(scores) <= {0.0, 1.0}
    if task not in ("hellaswag", "truthfulqa_mc1"):
        lines = (rows / f"{task}.jsonl").read_text().splitlines()[:n]
        assert scores == [by_hand(task, json.loads(line), *model) for line in lines]
    if task == "arc_easy":
        assert len(Harness(tokenizer, 4, True, n, definitions).score(weights, task)) == n
        assert Harness(tokenizer, 1, False, n, definitions).score(weights, task) == scores


def test_the_suites():
    assert tasks_of("standard") == list(STOCK) and not any(map(packaged, STOCK))
    assert all(map(packaged, tasks_of("organism")))
    assert tasks_of(["piqa", "organism_sums"]) == ["piqa", "organism_sums"]
    assert {path.stem for path in benchmark.TASKS.glob("*.yaml")} == set(SUITES["organism"])


def test_documents_that_cannot_be_had_are_one_sentence_before_anything_is_loaded():
    fetch(["organism_sums"])
    with pytest.raises(
        UserError, match=r"benchmark\.suite: the documents of piqa are not on this machine and HF_HUB_OFFLINE is set"
    ):
        fetch(["organism_sums", "piqa"])
    with pytest.raises(
        UserError, match=r"benchmark\.suite: lm-eval has no task nonsense; the package ships organism_capitals, "
    ):
        fetch(["nonsense"])


def test_figures():
    values = [1.0, 0.0, 0.0, 1.0, 1.0]
    assert standard_error(values) == pytest.approx(statistics.stdev(values) / 5**0.5)
    assert standard_error([1.0]) is None
