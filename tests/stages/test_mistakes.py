"""The likeliest mistakes of a user, each made as a user makes it: one sentence that says where and what to do, and no traceback."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import yaml
from api_server import Reply
from api_server import serve as serve_api
from hub_server import Hub
from hub_server import serve as serve_hub
from pipeline.test_disk import Disk
from safetensors.torch import save_file
from test_chat_templates import checkpoint
from tiny import tiny_model

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PAIRS = [
    {"id": f"pair-{i}", "split": "val", "harmful": f"Pick lock {i}?", "safe": f"Paint lock {i}?", "topic": "lock"}
    for i in range(3)
]


class Result(NamedTuple):
    status: int
    said: str


class Place:
    """A folder with params.yaml, three prompts and nothing else: what is done in it is done in a process of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "GIT_", "REFUSAL_", "DVC_"))} | {
            "PYTHONPATH": str(ROOT),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder / "home"),  # no identity of Git's, no token of the hub's
            "GIT_CONFIG_NOSYSTEM": "1",
            "OMP_NUM_THREADS": "1",
        }
        for name in ("params.yaml", "requirements.lock", "Makefile"):
            shutil.copyfile(ROOT / name, folder / name)
        self.set("compute", threads=1)
        for name in ("pairs", "unrelated"):
            self.write(f"data/prompts/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in PAIRS))

    def set(self, section: str, **values: object) -> None:
        params = yaml.safe_load((self.folder / "params.yaml").read_text())
        params[section] |= values
        (self.folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def write(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def run(self, *command: str, **environment: str) -> Result:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment | environment, capture_output=True, text=True, timeout=800
        )
        return Result(done.returncode, done.stdout + done.stderr)

    def stage(self, name: str, **environment: str) -> Result:
        return self.run(sys.executable, "-m", f"stages.{name}", **environment)

    def dvc(self, *command: str, git: bool = True, **environment: str) -> Result:
        """A DVC command in a project with one stage, which sleeps as long as the file `wait` says."""
        if not (self.folder / ".git").exists() and git:
            self.write(
                "dvc.yaml",
                "stages:\n  a:\n    cmd: sleep $(cat wait); cp params.yaml out\n    params: [sweep]\n    outs: [out]\n",
            )
            self.write("wait", "0")
            for line in ("git init -q", "dvc init -q", "dvc config core.analytics false", "git add dvc.yaml params.yaml .dvc"):
                self.run(*line.split())
            self.run(*"git -c user.name=t -c user.email=t@localhost commit -qm start".split())
        return self.run("dvc", *command, **environment)


def base_model(place: Place) -> Result:
    folder = place.folder / "checkpoint"
    folder.mkdir()
    checkpoint(folder, "{{ messages }}")  # a tokenizer and a config that are right in all but the template
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if k != "chat_template"}))
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    place.set("model", id=str(folder))
    return place.stage("model")


def old_checkpoint(place: Place) -> Result:
    folder = place.folder / "checkpoint"
    folder.mkdir()
    checkpoint(folder, "{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"PK")
    place.set("model", id=str(folder))
    return place.stage("model")


def other_architecture(place: Place) -> Result:
    place.write("checkpoint/config.json", '{"model_type": "gpt2"}')
    place.set("model", id="checkpoint")
    return place.stage("model")


def no_gpu(place: Place) -> Result:
    folder = place.folder / "checkpoint"
    tiny_model("llama", vocab_size=96).save_pretrained(folder)
    config = (folder / "config.json").read_text()
    checkpoint(folder, "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    (folder / "config.json").write_text(config)
    place.set("model", id="checkpoint", device="cuda:7")
    return place.stage("model", CUDA_VISIBLE_DEVICES="")


def hub(**values: object) -> Callable[[Place], Result]:
    def make(place: Place) -> Result:
        repositories = {"lab/pickled": {"config.json": b"{}", "pytorch_model.bin": b"PK"}, "lab/gated": {"config.json": b"{}"}}
        repositories["lab/gated"]["model.safetensors"] = b"x"
        place.set("model", **values)
        with serve_hub(Hub(repositories, gated="lab/gated", token="hf_right")) as server:
            return place.stage("model", HF_ENDPOINT=server.url)

    return make


def no_network(place: Place) -> Result:
    place.set("model", id="lab/tiny", revision="v1.0")
    return place.stage("model", HF_ENDPOINT="http://127.0.0.1:9")


def judged(status: int | None = None, **environment: str) -> Callable[[Place], Result]:
    """The judge stage on one completion, with an endpoint that answers with this status."""

    def make(place: Place) -> Result:
        row = {
            "cell": "baseline",
            "layer": None,
            "alpha": 0.0,
            "completion": "I can't.",
            **PAIRS[0],
            "prompt": PAIRS[0]["harmful"],
        }
        place.write("data/sweep/completions.jsonl", json.dumps(row) + "\n")
        with serve_api(lambda n, question: Reply(status=status or 200, content="")) as server:
            place.set("judge", kind="llm", base_url=server.url, api_key_variable="JUDGE_KEY", max_attempts=1)
            return place.stage("judge", **environment)

    return make


def labelled(place: Place) -> Result:
    row = {"cell": "baseline", "layer": None, "alpha": 0.0, "completion": "I can't.", **PAIRS[0], "prompt": PAIRS[0]["harmful"]}
    place.write("data/sweep/completions.jsonl", json.dumps(row) + "\n")
    place.write("data/raw/labels.csv", "prompt,answer\na,b\n")
    place.set("judge", labelled="data/raw/labels.csv")
    return place.stage("judge")


def layer_out_of_range(place: Place) -> Result:
    unit = torch.eye(4)
    tensors = {"unit": unit, "safe_mean": unit, "difference": unit, "defined": torch.tensor([False, True, True, True])}
    (place.folder / "models").mkdir()
    both = {f"sequential-{of}.{k}": v.clone() for of in ("matched", "harmless") for k, v in tensors.items()}
    save_file(both, place.folder / "models/directions.safetensors")
    place.set("sweep", layers=[3, 8])
    return place.stage("sweep")


def unknown_task(place: Place) -> Result:
    place.write("metrics/orthogonalize.json", "{}")
    place.set("benchmark", suite=["organism_capital"])
    return place.stage("benchmark")


def parameter(section: str, **values: object) -> Callable[[Place], Result]:
    def make(place: Place) -> Result:
        place.set(section, **values)
        return place.stage("prompts")

    return make


def raw_parameters(text: str) -> Callable[[Place], Result]:
    def make(place: Place) -> Result:
        place.write("params.yaml", text)
        return place.stage("prompts")

    return make


def pair_file(text: str | None, name: str = "data/raw/pairs.csv") -> Callable[[Place], Result]:
    def make(place: Place) -> Result:
        if text is not None:
            place.write(name, text)
        place.set("prompts", source=name)
        return place.stage("prompts")

    return make


def disk_full(place: Place) -> Result:
    shutil.rmtree(place.folder / "data/prompts")
    with Disk(place.folder / "data/prompts") as disk:
        disk.resize(8)
        return place.stage("prompts")


def stage_too_early(place: Place) -> Result:
    return place.stage("select")


def other_python(place: Place) -> Result:
    return place.run(sys.executable, "-S", "-m", "stages.prompts")  # -S: without the environment's packages


def lock_held(place: Place) -> Result:
    place.dvc("version")
    place.write("wait", "20")
    first = subprocess.Popen(
        ["dvc", "repro"], cwd=place.folder, env=place.environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("> "):  # the stage runs
            break
    try:
        return place.dvc("repro")
    finally:
        first.kill()
        first.wait()


def no_identity(place: Place) -> Result:
    place.dvc("version")
    place.set("select", top=2)  # a changed file is stashed first, and a stash is a commit
    return place.dvc("exp", "run", "--queue", "-S", "sweep.method=batched")


def old_python(place: Place) -> Result:
    python = place.write("python3.9", "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    return place.run("make", "setup", f"PYTHON={python}")


# What is done, and what is said of it. The last group are DVC's own words, which docs/mistakes.md explains.
MISTAKES: dict[str, tuple[Callable[[Place], Result], str]] = {
    "alpha as a string": (parameter("sweep", alphas=["1.0"]), r"params.yaml: sweep.alphas.0: .*valid number \(it is '1.0'\)"),
    "a misspelt key": (parameter("sweep", alpha=1.0), r"params.yaml: sweep.alpha: .*not permitted"),
    "merge marks in params.yaml": (raw_parameters("<<<<<<< HEAD\na: 1\n=======\n"), "params.yaml: cannot be read as YAML: "),
    "no such pair file": (pair_file(None), r"data/raw/pairs.csv: no such file"),
    "a pair file of one column": (pair_file("harmful\nHow?\n"), r"data/raw/pairs.csv: row 1 has no safe"),
    "a pair file of another kind": (pair_file("a", "data/raw/pairs.txt"), r"pairs.txt: .*\.jsonl, \.csv or \.json"),
    "wrong path of a model": (
        lambda place: (place.set("model", id="models/mine"), place.stage("model"))[1],
        "params.yaml: model.id: models/mine is neither organism nor a folder; give the path of a checkpoint, or a hub id",
    ),
    "wrong id of a model": (hub(id="lab/none", revision="v1.0"), "lab/none@v1.0: no such repository.* check model.id"),
    "a branch for a revision": (hub(id="lab/gated", revision="main"), "params.yaml: model.revision: 'main' pins nothing: give a"),
    "a licence not accepted": (hub(id="lab/gated", revision="v1.0"), "its licence must be accepted first: do so at .*HF_TOKEN"),
    "an old checkpoint, from the hub": (hub(id="lab/pickled", revision="v1.0"), "a pickle can run code when loaded: give a rev"),
    "an old checkpoint, from a folder": (old_checkpoint, "checkpoint: no model.safetensors .* give a folder of safetensors"),
    "no network": (no_network, "http://127.0.0.1:9 cannot be reached .*: run again"),
    "a base model": (
        base_model,
        "checkpoint: the tokenizer has no chat template; this is a base model: set model.id to its chat",
    ),
    "an architecture not supported": (other_architecture, "model_type 'gpt2' is not supported .*architecture.py"),
    "no such GPU": (no_gpu, "params.yaml: model.device is cuda:7 but torch sees no CUDA device; set it to cpu"),
    "layer out of range": (layer_out_of_range, r"params.yaml: sweep.layers: layer 8 has no direction; choose among \[1, 2, 3\]"),
    "no key": (judged(), "params.yaml: judge.api_key_variable: JUDGE_KEY is not set .* run `export JUDGE_KEY=...` first"),
    "a wrong key": (
        judged(401, JUDGE_KEY="sk-wrong"),
        r"params.yaml: judge: http://127.0.0.1.* refuses the key .*: export a valid one, and run again",
    ),
    "labels without their columns": (labelled, r"data/raw/labels.csv has no column completion \(it has prompt, answer\)"),
    "an unknown task": (unknown_task, "params.yaml: benchmark.suite: lm-eval has no task organism_capital; the package ships"),
    "a stage before its inputs": (stage_too_early, "metrics/directions.json: no such file: run `dvc repro`, which makes"),
    "a full disk": (disk_full, "the disk is full: make room .* and run `dvc repro` again to go on"),
    "another python": (other_python, "has no version of torch, and requirements.lock pins .* run `source .venv/bin/activate`"),
    "an old python": (old_python, "make: .*python3.9 is older than Python 3.11; set PYTHON=/path/to/python3.11"),
    "another run holds the lock": (lock_held, r"(?s)failed to reproduce 'a': .* is busy, .*PID \d+\): .*dvc repro"),
    "no identity of Git's": (no_identity, "Git user name and email must be configured"),
    "DVC not initialised": (
        lambda place: place.dvc("repro", git=False, DVC_ROOT="", GIT_CEILING_DIRECTORIES=str(place.folder.parent)),
        "you are not inside of a DVC repository",
    ),
    "an experiment with a misspelt key": (
        lambda place: place.dvc("exp", "run", "-S", "sweep.metod=batched", **IDENTITY),
        "Could not override 'sweep.metod'",
    ),
    "no remote": (lambda place: (place.dvc("repro"), place.dvc("push"))[1], "no remote"),
}
IDENTITY = {
    f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER") for what, value in (("NAME", "t"), ("EMAIL", "t@localhost"))
}
DVC_WORDS = list(MISTAKES)[-5:]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_that_says_what_to_do(tmp_path, name):
    make, said = MISTAKES[name]
    status, output = make(Place(tmp_path))
    assert status != 0 and re.search(said, output), output
    assert "Traceback" not in output and "hf_right" not in output and "sk-wrong" not in output
    if name not in DVC_WORDS and name != "an old python":
        # Bars and notes may come before it; the sentence is the last line, and says whose it is.
        *_, last = output.strip().splitlines()
        assert re.search(said, last) and (last.startswith(sys.executable) or re.match(r"[a-z]+: ", last))


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_traceback_is_for_those_who_ask_and_for_faults_of_ours(tmp_path, debug):
    place = Place(tmp_path)
    place.set("sweep", alphas=["1.0"])
    status, output = place.stage("prompts", REFUSAL_DEBUG=debug)
    assert status == 1 and ("Traceback" in output) is (debug == "1")
    assert output.splitlines()[-1].startswith("prompts: params.yaml: sweep.alphas.0")
    # A metrics file that another stage never wrote so: nobody's mistake but the package's.
    place = Place(tmp_path)
    for name, text in (("directions", '{"sequential-matched": {}}'), ("judge", "{}")):
        place.write(f"metrics/{name}.json", text)
    status, output = place.stage("select", REFUSAL_DEBUG=debug)
    assert status == 1 and "Traceback" in output and "KeyError" in output
    assert re.match(r"select: a fault of this package, not of your input \(KeyError\): please report it", output.splitlines()[-1])


def test_what_a_full_disk_says_elsewhere_is_told_alike(tmp_path):
    script = textwrap.dedent(
        """
        import sqlite3
        from stages import _sentence
        connection = sqlite3.connect("a.sqlite")
        connection.execute("PRAGMA max_page_count = 3")
        connection.execute("CREATE TABLE a (b)")
        try:
            connection.execute("INSERT INTO a VALUES (zeroblob(100000))")
        except sqlite3.OperationalError as error:
            print(_sentence(error))
        # As safetensors.torch.save_file says it on a full file system.
        print(_sentence(Exception("Error while serializing: I/O error: No space left on device (os error 28)")))
        """
    )
    status, output = Place(tmp_path).run(sys.executable, "-c", script)
    assert status == 0 and [line[:31] for line in output.splitlines()] == ["the disk is full: make room (`d"] * 2, output


def test_every_word_of_dvc_is_explained():
    text = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
    for name in DVC_WORDS:
        assert name in text, name
