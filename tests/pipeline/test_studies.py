"""Studies beside the default one: other parameters, the same pipeline, store and cache, and nothing of the default study touched."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from pipeline.interruption import STORE, repeats, running, watch_repeats
from pipeline.study import commit, digests, metrics, outputs, run, stages_run, surroundings
from refusal.io.store import Store

FEW = "# fewer\nscience: {n_val: 5}\nbenchmark:\n  limit: 3\n"
# A pipeline of fewer stages, the last of which stands for the page.
SHORT = {
    "cmd": "mkdir -p report && echo page > report/index.html",
    "deps": ["models/directions.safetensors"],
    "outs": ["report/index.html"],
}


def make(folder, *arguments, ok=True):
    return run(folder, "make", "-o", ".venv/ready", "study", *arguments, ok=ok)


def status(folder):
    return run(folder, "git", "status", "--porcelain", "-uall").split()[1::2]


@pytest.fixture(scope="module")
def repository(finished, tmp_path_factory):
    """The finished small study, committed, and an overlay that is not."""
    folder = shutil.copytree(finished[0], tmp_path_factory.mktemp("studies") / "repository", symlinks=True)
    commit(folder)
    (folder / "studies").mkdir(exist_ok=True)
    (folder / "studies/few.yaml").write_text(FEW)
    return folder


def killed(folder, stage, number, group):
    """Begin the study, and send a signal two seconds into a stage, to its process or to all of its group."""
    log = folder.parent / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "stages.studies", "few"]
        process = subprocess.Popen(
            command, cwd=folder, env=surroundings(folder), stdout=file, stderr=file, start_new_session=True
        )
    while process.poll() is None and f"Running stage '{stage}'" not in log.read_text():
        time.sleep(0.05)
    time.sleep(2)
    assert process.poll() is None, log.read_text()
    (os.killpg if group else os.kill)(process.pid, number)
    process.wait(60)
    psutil.wait_procs([p for p in psutil.process_iter() if _group(p) == process.pid], timeout=60)
    assert running(process.pid) == [], log.read_text()


def _group(process):
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None


def test_a_study_is_killed_resumed_and_committed_beside_the_default_one(repository):
    before = digests(repository, "metrics", "plots", "models", "data") | {"lock": (repository / "dvc.lock").read_bytes()}
    params = (repository / "params.yaml").read_bytes()
    watch_repeats(repository / STORE)
    killed(repository, "model", signal.SIGTERM, group=False)
    assert not (repository / "studies/few").exists()
    killed(repository, "science", signal.SIGKILL, group=True)
    assert status(repository) == ["studies/few.yaml"]
    said = make(repository, "STUDY=few")
    assert "report/few/index.html" in said and (repository / "report/few/index.html").is_file()
    assert stages_run(said)[0] == "science" and repeats(repository / STORE) == (0, 0)

    # Nothing else changed, and nothing that Git sees is a completion, a weight, or tells where this is.
    after = digests(repository, "metrics", "plots", "models", "data") | {"lock": (repository / "dvc.lock").read_bytes()}
    assert after == before and (repository / "params.yaml").read_bytes() == params
    new = status(repository)
    assert {path.split("/")[2] for path in new if path != "studies/few.yaml"} == {"metrics", "plots", "dvc.lock", "study.json"}
    assert all(path.endswith((".json", ".csv", ".lock", ".yaml")) for path in new)
    assert not [path for path in new if str(repository).encode() in (repository / path).read_bytes()]

    # The overlay's two keys changed what depends on them, and no other figure.
    study = repository / "studies/few"
    names = {path.name for path in (repository / "metrics").iterdir()}
    assert names == {path.name for path in (study / "metrics").iterdir()}
    differ = {name for name in names if (study / "metrics" / name).read_bytes() != (repository / "metrics" / name).read_bytes()}
    assert {"benchmark.json", "science.json"} <= differ <= {f"{of}.json" for of in "benchmark science edits reproduction summary".split()}
    assert [metrics(folder, "science")["arms"]["rank_1"]["n_val"] for folder in (study, repository)] == [5, 12]
    assert outputs(study)["models/base"] == outputs(repository)["models/base"]


def test_an_unchanged_study_runs_nothing_and_is_up_to_date(repository):
    watch = digests(repository, "studies")
    connection = Store(repository / STORE).connection
    (stored,) = connection.execute("SELECT count(*) FROM blobs").fetchone()
    assert stages_run(make(repository, "STUDY=few")) == []
    assert connection.execute("SELECT count(*) FROM blobs").fetchone() == (stored,) and digests(repository, "studies") == watch
    connection.close()
    assert "few: up to date\n" in make(repository)


def test_a_changed_overlay_runs_what_depends_on_it(repository):
    overlay = repository / "studies/few.yaml"
    overlay.write_text(FEW + "report: {n_examples: 3}\n")
    assert "few: overlay has changed since\n" in make(repository)
    assert stages_run(make(repository, "STUDY=few")) == ["report"]
    assert "few: up to date\n" in make(repository)
    committed = json.loads((repository / "studies/few/study.json").read_text())
    overlay.write_text(FEW + "report: {n_exampels: 3}\n")
    said = make(repository, "STUDY=few", ok=False)
    assert "studies/few.yaml: report.n_exampels: there is no such key (the nearest is report.n_examples)" in said
    assert json.loads((repository / "studies/few/study.json").read_text()) == committed  # what it was made with stays
    overlay.write_text(FEW + "report: {n_examples: 3}\n")


def test_figures_older_than_the_code_say_so_by_stage(repository):
    module = repository / "refusal/report/charts.py"
    text = module.read_text()
    module.write_text(f"{text}\n# A remark.\n")
    assert "few: up to date\n" in make(repository)
    module.write_text(f"{text}\n\ndef called_by_no_stage():\n    return 1\n")
    assert "few: up to date\n" in make(repository)
    module.write_text(f"{text}\nprint()\n")
    assert "few: older than today's code of report\n" in make(repository)
    module.write_text(text)
    harmless = repository / "data/raw/harmless.jsonl"
    text = harmless.read_text()
    harmless.write_text(text + text.splitlines()[0] + "\n")
    assert "few: older than today's data/raw/harmless.jsonl\n" in make(repository)
    harmless.write_text(text)
    params = repository / "params.yaml"
    text = params.read_text()
    values = yaml.safe_load(text)
    values["benchmark"]["n_resamples"] += 1
    params.write_text(yaml.safe_dump(values))
    assert "few: older than today's parameters of benchmark, edits, report\n" in make(repository)
    params.write_text(text)


def test_another_study_sees_uncommitted_code_and_leaves_the_first_alone(repository):
    """A second overlay, and a pipeline of fewer stages that nobody committed, one of which is changed."""
    first = digests(repository, "studies/few")
    pipeline = yaml.safe_load((repository / "dvc.yaml").read_text())["stages"]
    short = {name: pipeline[name] for name in ("prompts", "model", "behaviour", "activations", "directions")} | {"page": SHORT}
    (repository / "dvc.yaml").write_text(yaml.safe_dump({"stages": short}))
    stage = repository / "stages/directions.py"
    stage.write_text(stage.read_text().replace("stage(main)", "stage(lambda params: 'as changed: ' + main(params))"))
    (repository / "studies/flips.yaml").write_text("directions: {n_sign_flips: 40}\n")
    said = make(repository, "STUDY=flips")
    assert "directions: as changed: " in said and "'activations' is cached - skipping run" in said
    assert digests(repository, "studies/few") == first
    run(repository, "git", "checkout", "-q", "dvc.yaml", "stages")
    new = {path for path in status(repository) if not path.startswith(("studies/few/", "studies/flips/"))}
    assert new == {"studies/few.yaml", "studies/flips.yaml"}
    assert "Data and pipelines are up to date" in run(repository, "dvc", "status")
