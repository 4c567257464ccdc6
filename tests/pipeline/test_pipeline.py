"""Whole runs with DVC, on an organism too small to be any good: what runs, what comes out, what runs again."""

import csv
import json
import math
import re
import shutil
import sys

import pytest
import yaml
from api_server import serve, split, verdict
from place import ROOT

from pipeline.study import CANARY, changed, commit, metrics, outputs, run, runs, stages_run
from refusal.judges import rules

# Stages that run the model, and whether what they take is known to the pass before they run.
PASSES = {"model": False, "activations": True, "sweep": False, "evaluate": False, "edits": False}


def numbers(value: object) -> list[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for item in value for n in numbers(item)]
    return [value] if isinstance(value, float) else []


def test_every_stage_runs_once_and_a_second_repro_does_nothing(study):
    folder, ran = study
    assert sorted(ran) == sorted(yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"])
    again = run(folder, "dvc", "repro")
    assert stages_run(again) == [] and "up to date" in again


def test_a_default_run_asks_for_no_connection(finished, tmp_path):
    folder, _ = finished
    assert not (folder.parent / "connections").exists()
    run(tmp_path, sys.executable, "-c", "import socket; socket.create_connection(('127.0.0.1', 9))", ok=False)
    assert "127.0.0.1" in (tmp_path.parent / "connections").read_text()  # asked for, it would be there


def test_the_plan_counts_what_runs(study):
    folder, _ = study
    plan = run(folder, sys.executable, "-m", "stages.plan")
    planned = {line.split()[0]: line.split()[1:3] for line in plan.splitlines() if line.split()[0] in PASSES}
    for stage, exact in PASSES.items():
        passes, tokens = (int(figure.replace(",", "")) for figure in planned[stage])
        first = next(line for line in runs(folder) if line["stage"] == stage)
        # Completions that end early take less than planned; texts that are read whole take just that.
        assert first["passes"] == passes if exact else 0 < first["passes"] <= passes, stage
        assert 0.2 * tokens < first["tokens"] <= 1.5 * tokens, stage  # padding is in the run's and not in the plan's
    assert re.search(r"^time: at most \S+ hours with 1 worker, at the rates of \d+ runs in runs.jsonl$", plan, re.MULTILINE)
    assert "2 a parameter and token" in plan and "GB of disk are free" in plan


def test_two_studies_compared_as_typed(study):
    """With a copy in which baseline and run time changed places: the paired difference is what evaluate found, limits too."""
    folder, _ = study
    swapped, arms = folder.parent / "swapped", {"baseline": "runtime", "runtime": "baseline"}
    for name in ("data/evaluated", "data/prompts"):
        shutil.copytree(folder / name, swapped / name)
    path = swapped / "data/evaluated/completions.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()  # a link into the cache
    path.write_text("".join(json.dumps(row | {"arm": arms.get(row["arm"], row["arm"])}) + "\n" for row in rows))
    lock = yaml.safe_load((folder / "dvc.lock").read_text())
    lock["stages"]["evaluate"]["params"]["params.yaml"]["judge"]["kind"] = "llm"
    (swapped / "dvc.lock").write_text(yaml.safe_dump(lock))
    found = folder.parent / "found.json"
    said = run(folder, sys.executable, "-m", "refusal", "compare", ".", str(swapped), "--json", str(found))
    evaluated, arms = metrics(folder, "evaluate"), json.loads(found.read_text())["arms"]
    for arm in ("baseline", "orthogonalized", "random"):
        assert arms[f"{arm} compliance"]["base"] == pytest.approx(evaluated[arm]["compliance"], rel=1e-5)
        assert arms[f"{arm} refusal_safe"]["base"] == pytest.approx(evaluated[arm]["refusal_safe"], rel=1e-5)
    for end in ("", "_low", "_high"):
        expected = evaluated["runtime"][f"difference{end}"]
        assert arms["baseline compliance"][f"difference{end}"] == pytest.approx(expected, rel=1e-5)
    assert arms["orthogonalized compliance"]["difference"] == 0 and arms["orthogonalized compliance"]["p"] == 1
    assert said.splitlines()[0].startswith("arm ") and 'judge.kind differs: "rules" and "llm"' in said.splitlines()


def test_the_log_names_every_input_by_the_hash_that_dvc_locks(study):
    folder, _ = study
    locked = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    first_runs = {line["stage"]: line for line in reversed(runs(folder))}
    assert set(first_runs) >= set(locked)
    for stage in locked:
        line = first_runs[stage]
        assert line["inputs"] == {dep["path"]: dep["md5"] for dep in locked[stage]["deps"]}, stage
        assert line["threads"] == 1 and line["machine"]["cpu"] and line["packages"]["torch"] and line["python"], stage
        assert line["seeds"]["seed"] == line["seeds"]["organism.seed"] == line["seeds"]["sweep.seed"] == 0, stage
        assert line["commit"] == run(folder, "git", "rev-list", "--max-parents=0", "HEAD").strip()


def test_metrics_hold_no_nan_and_every_cell(study):
    folder, _ = study
    found = {path.stem: metrics(folder, path.stem) for path in (folder / "metrics").glob("*.json")}
    assert all(math.isfinite(n) for value in found.values() for n in numbers(value))
    cells = {f"layer_{i}_alpha_{a}" for i in (1, 2) for a in (100, 200)}
    arms = {f"{m}-{p}" for m in ("sequential", "batched", "batched_unmasked") for p in ("matched", "shuffled", "unrelated")}
    ranks = {"rank_1", "rank_2", "rank_3"}
    assert set(found["judge"]) == {"baseline", "random", "harmless", *cells} and set(found["directions"]) == arms
    assert found["directions"]["sequential-matched"]["separation"][0] is None  # layer 0 is undefined
    assert set(found["select"]) == ranks and set(found["benchmark"]) == {"baseline", "random", *ranks}
    for rank in ranks:
        assert (folder / "models/ablated" / found["select"][rank]["name"] / "model.safetensors").is_file()


AFTER_SELECT = {"orthogonalize", "evaluate", "agreement", "long_answers", "generalization", "science", "benchmark", "edits", "report"}


@pytest.mark.parametrize(
    ("changes", "until", "rerun", "left"),
    [
        ({"report.n_examples": 3}, "report", ["report"], set()),
        ({"sweep.pairing": "unrelated"}, "select", ["selection", "sweep", "judge", "select"], AFTER_SELECT),
    ],
)
def test_one_changed_parameter_reruns_what_depends_on_it(study, changes, until, rerun, left):
    folder, _ = study
    with changed(folder, changes):
        assert sorted(stages_run(run(folder, "dvc", "repro", until))) == sorted(rerun)
        assert set(json.loads(run(folder, "dvc", "status", "--json"))) <= left
    assert set(stages_run(run(folder, "dvc", "repro", until))) <= set(rerun)
    assert json.loads(run(folder, "dvc", "status", "--json")) == {}  # what came out is what there was: nothing else runs


def test_a_model_of_which_no_prompt_behaves_is_said_before_anything_is_fitted(study):
    folder, _ = study
    with changed(folder, {"prompts.keep": "behaving"}):
        output = run(folder, "dvc", "repro", "directions", ok=False)
    assert stages_run(output) == ["prompts", "behaviour"] and "Traceback" not in output
    assert re.search(r"prompts\.keep: behaving leaves [01] of 36 harmful train prompts", output)
    run(folder, "dvc", "repro", "directions")
    assert json.loads(run(folder, "dvc", "status", "--json")) == {}


def test_adapters_in_place_of_checkpoints_give_the_same_figures(study):
    folder, _ = study
    before = {name: metrics(folder, name) for name in ("evaluate", "benchmark", "orthogonalize")}
    with changed(folder, {"orthogonalize.format": "lora"}):
        ran = stages_run(run(folder, "dvc", "repro", "evaluate", "benchmark"))
        assert ran[0] == "orthogonalize" and set(ran) <= set(before)
        edited = folder / "models/ablated" / before["orthogonalize"]["rank_1"]["name"]
        assert {path.name for path in edited.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
        assert all(metrics(folder, name) == before[name] for name in ("evaluate", "benchmark"))
    run(folder, "dvc", "repro")


def test_gguf_files_beside_the_checkpoints_leave_the_figures_as_they_are(study):
    folder, _ = study
    before = {name: metrics(folder, name) for name in ("evaluate", "benchmark", "orthogonalize")}
    with changed(folder, {"orthogonalize.format": "gguf-bf16"}):
        assert stages_run(run(folder, "dvc", "repro", "evaluate", "benchmark"))[0] == "orthogonalize"
        for cell in metrics(folder, "orthogonalize").values():
            assert (folder / "models/ablated" / cell["name"] / cell["gguf"]).stat().st_size > 100_000
            assert cell["gguf"] == f"{cell['name']}.gguf" and 0 < cell["max_cast"] < 2**-8
        assert all(metrics(folder, name) == before[name] for name in ("evaluate", "benchmark"))
    run(folder, "dvc", "repro")


def test_a_queued_variant_shares_the_store_and_is_listed_with_the_study(study):
    folder, _ = study
    commit(folder)
    run(folder, "dvc", "exp", "run", "--queue", "-S", "sweep.method=batched_unmasked", "-S", "report.n_examples=2")
    output = run(folder, "dvc", "exp", "run", "--run-all")
    assert not {"prompts", "model", "directions"} & set(stages_run(output))  # shared with the study
    rows = list(csv.DictReader(run(folder, "dvc", "exp", "show", "--csv").splitlines()))
    assert [row["sweep.method"] for row in rows].count("batched_unmasked") == 1
    # The copy that it ran in keeps no store of its own.
    assert not list((folder / ".dvc" / "tmp").rglob("store.sqlite"))


def test_bad_parameter_is_one_sentence_and_loses_nothing(study):
    folder, _ = study
    with changed(folder, {"sweep.alphas": ["one"]}):
        output = run(folder, "dvc", "repro", ok=False)
    assert "params.yaml: sweep.alphas.0:" in output and "Traceback" not in output
    # The first stage that reads it writes one file that is in no cache: it says again that there is nothing to score.
    assert set(stages_run(run(folder, "dvc", "repro"))) <= {"selection"}


def test_another_judge_gives_the_same_files_with_the_same_keys(study):
    def reply(n: int, question: str) -> str:
        judged = rules.judge(*split(question))
        return verdict(judged.compliance, judged.coherence)

    folder, _ = study
    before = {name: metrics(folder, name) for name in ("judge", "agreement", "select", "evaluate")}
    with serve(reply) as server, changed(folder, {}):
        settings = ("judge.kind=llm", f"endpoint.base_url={server.url}", "endpoint.concurrency=4")
        ran = stages_run(run(folder, "dvc", "exp", "run", *(part for text in settings for part in ("-S", text))))
        # Prompts, too, may be asked of the endpoint, and what becomes of train prompts judged.
        assert {*ran[:3]} == {"prompts", "behaviour", "judge"} and "evaluate" in ran
        assert not {"model", "activations", "sweep"} & set(ran) and server.asked.total() == len(server.asked) > 0
        assert {headers["authorization"] for headers in server.headers} == {f"Bearer {CANARY}"}
    after = {name: metrics(folder, name) for name in before}
    for name in before:
        assert list(after[name]) == list(before[name])
        for key in set(after[name]) - {"labelled"}:
            assert not isinstance(after[name][key], dict) or list(after[name][key]) == list(before[name][key]), (name, key)
    assert after["judge"]["baseline"]["n_missing"] == 0 and after["agreement"]["rules_and_llm"]["n"] is not None
    run(folder, "dvc", "repro")


def test_no_key_is_written_anywhere(study):
    """After all of the above: a run, a queued experiment, a judge that the key was sent to; and now one that fails."""
    folder, _ = study
    with changed(folder, {"judge.kind": "llm", "endpoint.base_url": "http://127.0.0.1:9", "endpoint.max_attempts": 1}):
        assert "Traceback" in run(folder, "dvc", "repro", "judge", ok=False, REFUSAL_DEBUG="1")
    files = [path for path in folder.parent.rglob("*") if path.is_file()]
    tops = {path.relative_to(folder).parts[0] for path in files if path.is_relative_to(folder)}
    assert tops >= {".dvc", ".git", ".refusal-store", "report", "metrics"}
    assert [path for path in files if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in run(folder, "git", "log", "-p", "--all", "--reflog", "--text")


def test_outputs_may_be_links_into_the_cache(finished, tmp_path):
    """As teams set DVC up whose models are large: what a stage reads are links, of which it may follow these."""
    folder = shutil.copytree(finished[0], tmp_path / "study", symlinks=True)
    wanted = outputs(folder)
    run(folder, "dvc", "config", "--local", "cache.type", "symlink")
    run(folder, "dvc", "checkout", "--relink")
    assert (folder / "models/base/model.safetensors").is_symlink()
    stages = "behaviour activations directions sweep judge select orthogonalize evaluate agreement long_answers generalization science benchmark edits report".split()
    assert stages_run(run(folder, "dvc", "repro", "--force", "--single-item", *stages)) == [*stages]
    assert outputs(folder) == wanted and (folder / "models/directions.safetensors").is_symlink()
