"""The benchmark: lm-eval's accuracy against log likelihoods summed by hand."""

import json

import pytest
import torch

from refusal.analysis import benchmark
from refusal.analysis.benchmark import TASKS, Harness, average, packaged
from refusal.io.errors import UserError
from refusal.lm.load import encode_chats
from refusal.organism.train import Corpus, new_model, train_tokenizer
from refusal.stats import stratified_difference

NAMES = [f"organism_{task}" for task in ("capitals", "flags", "opposites", "sums")]
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LIMIT = 6


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus(0, []), 400)


def random_model(tokenizer, seed):
    model = new_model(SHAPE, tokenizer, seed).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that choices differ by nats and not by rounding
    return model


def scores(model, tokenizer, names, chat):
    harness = Harness(tokenizer, 8, chat, LIMIT)
    return {name: harness.score(model, name) for name in names}


def naive(model, tokenizer, chat):
    """{task: 1 where the right choice is the likeliest}: each choice alone after its question."""
    found = {}
    for name in NAMES:
        rows = [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()][:LIMIT]
        found[name] = []
        for row in rows:
            head = encode_chats(tokenizer, [row["question"]])[0] if chat else tokenizer(row["question"])["input_ids"]
            sums = []
            for choice in row["choices"]:
                text = tokenizer.decode(head) + choice
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    log_probs = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
                sums.append(sum(float(log_probs[i - 1, ids[i]]) for i in range(len(head), len(ids))))
            found[name].append(float(sums.index(max(sums)) == row["label"]))
    return found


@pytest.mark.parametrize("chat", [True, False])
def test_accuracy_equals_log_likelihoods_by_hand(tokenizer, chat):
    model = random_model(tokenizer, 0)
    found = scores(model, tokenizer, NAMES, chat)
    assert found == naive(model, tokenizer, chat)
    flat = [value for values in found.values() for value in values]
    assert 0 < sum(flat) < len(flat)


def test_checkpoints_are_compared_document_by_document(tokenizer):
    ours, theirs = (scores(random_model(tokenizer, seed), tokenizer, NAMES[:2], True) for seed in (1, 2))
    assert {name: len(values) for name, values in ours.items()} == dict.fromkeys(NAMES[:2], LIMIT)
    difference, low, high = stratified_difference(ours, theirs, 200, 0)
    assert difference == pytest.approx(average(ours) - average(theirs)) and low <= difference <= high


def test_one_harness_serves_many_models_and_builds_its_requests_once(tokenizer, monkeypatch):
    """The numbers of `lm_eval.simple_evaluate`, which loads the task and builds the requests anew for every model."""
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    built = []
    construct = ConfigurableTask.construct_requests
    monkeypatch.setattr(
        ConfigurableTask, "construct_requests", lambda *a, **k: built.append(1) or construct(*a, **k), raising=True
    )
    task, harness = "organism_sums", Harness(tokenizer, 8, True, LIMIT)
    random_models = [random_model(tokenizer, seed) for seed in (1, 2, 1)]
    ours = [harness.score(model, task) for model in random_models]
    assert len(built) == LIMIT and ours[0] == ours[2] != ours[1]
    for model, found in zip(random_models, ours, strict=True):
        results = lm_eval.simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
            tasks=[task],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            apply_chat_template=True,
            limit=LIMIT,
            log_samples=True,
        )
        assert [row["acc"] for row in results["samples"][task]] == found
    assert len(built) == LIMIT * (1 + len(random_models))


def test_average_counts_tasks_and_not_documents():
    assert average({"small": [1.0], "large": [0.0] * 99}) == 0.5


def test_packaged():
    assert [packaged(name) for name in (*NAMES, "arc_easy", "organism", "../benchmark")] == [True] * 4 + [False] * 3


NO_ACCURACY = """
task: unscored
dataset_path: json
dataset_kwargs: {data_files: {test: refusal/analysis/tasks/organism_capitals.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: brier_score, aggregation: brier_score, higher_is_better: false}]
"""


def test_a_group_and_a_task_without_accuracy_are_told(tokenizer, tmp_path):
    (tmp_path / "unscored.yaml").write_text(NO_ACCURACY)
    (tmp_path / "several.yaml").write_text("group: several\ntask: [unscored]\n")
    harness = Harness(tokenizer, 8, True, 2, tmp_path)
    with pytest.raises(UserError, match=r"^params\.yaml: benchmark\.suite: several is a group of lm-eval's tasks: list the tasks"):
        harness.score(random_model(tokenizer, 0), "several")
    with pytest.raises(UserError, match=r"^params\.yaml: benchmark\.suite: unscored reports no accuracy .*: choose another task"):
        harness.score(random_model(tokenizer, 0), "unscored")


def test_an_unknown_task_is_told(tokenizer, monkeypatch):
    from lm_eval.tasks import TaskManager

    asked = []

    def quick(include_path, include_defaults):  # indexing the harness's own thousands of tasks takes 10 s
        asked.append(include_defaults)
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", quick)
    benchmark._manager.cache_clear()
    with pytest.raises(UserError, match=r"^params\.yaml: benchmark\.suite: lm-eval has no task capitol; .*organism_capitals"):
        Harness(tokenizer, 8, True, LIMIT).score(random_model(tokenizer, 0), "capitol")
    assert asked == [True]  # they were looked through
    benchmark._manager.cache_clear()
