"""The likeliest mistakes of a user, each made as a user makes it: one sentence that says where and what to do, and no traceback."""

import fcntl
import json
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Mapping

import pytest
import torch
from api_server import Reply
from api_server import serve as serve_api
from checkpoints import word_level
from disk import Disk
from hub_server import Hub
from hub_server import serve as serve_hub
from place import IDENTITY, PAIRS, ROOT, Place, Result
from safetensors.torch import save_file

from refusal.io.params_file import RENAMED, load_params

Mistake = Callable[[Place], Result]
COMPLETION = {
    "cell": "baseline",
    "layer": None,
    "alpha": 0.0,
    "completion": "I can't.",
    **PAIRS[0],
    "prompt": PAIRS[0]["harmful"],
}
COMPLETIONS = {"data/sweep/completions.jsonl": json.dumps(COMPLETION) + "\n"}
VERDICT = {"label": "compliance", "compliance": 1.0, "coherence": 1.0, "refusal": False, "substring": False}
EVALUATED = {
    "data/evaluated/completions.jsonl": json.dumps(COMPLETION | VERDICT | {"arm": "baseline", "name": "baseline", "half": "harmful"})
}


def stage(name: str, section: str = "", files: Mapping[str, str] = {}, **values: object) -> Mistake:
    """A stage that is run with these values in a section of params.yaml, and with these files."""

    def make(place: Place) -> Result:
        for path, text in files.items():
            place.write(path, text)
        if section:
            place.set(section, **values)
        return place.stage(name)

    return make


def claims(*arguments: str, **of_prompts: object) -> Mistake:
    """`make claims` with these arguments, beside a study that nobody has run."""

    def make(place: Place) -> Result:
        place.write("studies/mine.yaml", "")
        place.set("prompts", **of_prompts)
        return place.run(sys.executable, "-m", "stages.claims", *arguments)

    return make


def checkpoint(template: str | None = "{{ messages }}", weights: bool = False, **values: object) -> Mistake:
    """A folder whose tokenizer and config are right; without `weights` it holds a pickle."""

    def make(place: Place) -> Result:
        word_level(place.folder / "checkpoint", template, weights=weights)
        if not weights:
            place.write("checkpoint/pytorch_model.bin", "PK")
        place.set("model", id="checkpoint", **values)
        return place.stage("model", CUDA_VISIBLE_DEVICES="")

    return make


def hub(**values: object) -> Mistake:
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


def judged(status: int = 200, **environment: str) -> Mistake:
    """The judge stage on one completion, with an endpoint that answers with this status."""

    def make(place: Place) -> Result:
        with serve_api(lambda n, question: Reply(status=status, content="")) as server:
            place.set("endpoint", base_url=server.url, api_key_variable="JUDGE_KEY", max_attempts=1)
            place.environment |= environment
            return stage("judge", "judge", COMPLETIONS, kind="llm")(place)

    return make


def by_paper_of_subspaces(place: Place) -> Result:
    place.set("select", by="paper")
    place.set("sweep", basis="qr")
    return place.stage("prompts")


def layer_out_of_range(place: Place) -> Result:
    unit = torch.eye(4)
    tensors = {"unit": unit, "safe_mean": unit, "difference": unit, "defined": torch.tensor([False, True, True, True])}
    (place.folder / "models").mkdir()
    both = {f"sequential-{of}.{k}": v.clone() for of in ("matched", "harmless") for k, v in tensors.items()}
    save_file(both, place.folder / "models/directions.safetensors")
    place.set("sweep", layers=[3, 8])
    return place.stage("sweep")


def disk_full(place: Place) -> Result:
    shutil.rmtree(place.folder / "data/prompts")
    with Disk(place.folder / "data/prompts") as disk:
        disk.resize(8)
        return place.stage("prompts")


def old_python(place: Place) -> Result:
    python = place.write("python3.9", "#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    return place.run("make", "setup", f"PYTHON={python}")


def renamed_added(place: Place) -> Result:
    """What DVC advises where it cannot override a key: it adds the old one, and the stage says the new name."""
    place.dvc("version")
    done = place.dvc("exp", "run", "-S", "+sweep.max_new_tokens=8", **IDENTITY)
    assert done.status == 0
    return place.stage("prompts")


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


def not_initialised(place: Place) -> Result:
    return place.run("dvc", "repro", DVC_ROOT="", GIT_CEILING_DIRECTORIES=str(place.folder.parent))


def experiment(setting: str) -> Mistake:
    return lambda place: place.dvc("exp", "run", "-S", setting, **IDENTITY)


def no_remote(place: Place) -> Result:
    place.dvc("repro")
    return place.dvc("push")


def study(overlay: str, *arguments: str) -> Mistake:
    """A study that is run with this overlay, studies/mine.yaml."""

    def make(place: Place) -> Result:
        place.write("studies/mine.yaml", overlay)
        return place.run(sys.executable, "-m", "stages.studies", *arguments)

    return make


def study_at_work(place: Place) -> Result:
    with place.write(".refusal-store/studies/mine.lock", "").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        return study("", "mine")(place)


def prompts_of(file: str, text: str, key: str = "source") -> Mistake:
    """The prompts stage with this file of prompts."""
    return stage("prompts", "prompts", {f"data/raw/{file}": text}, **{key: f"data/raw/{file}"})


# What is done, and what is said of it.
MISTAKES: dict[str, tuple[Mistake, str]] = {
    "alpha as a string": (stage("prompts", "sweep", alphas=["1.0"]), r"params.yaml: sweep.alphas.0: .*number \(it is '1.0'\)"),
    "a misspelt key": (
        stage("prompts", "sweep", alpha=1.0),
        r"params.yaml: sweep.alpha: there is no such key \(the nearest is sweep.alphas\): correct or delete it",
    ),
    "an old key": (stage("prompts", "judge", model="m"), "params.yaml: judge.model is now endpoint.model: change the name"),
    "an old key, added by -S": (renamed_added, "params.yaml: sweep.max_new_tokens is now generation.max_new_tokens: change the"),
    "merge marks in params.yaml": (
        stage("prompts", files={"params.yaml": "<<<<<<< HEAD\na: 1\n=======\n"}),
        "params.yaml: cannot be read as YAML: ",
    ),
    "no such pair file": (stage("prompts", "prompts", source="data/raw/pairs.csv"), r"data/raw/pairs.csv: no such file"),
    "a pair file of one column": (
        prompts_of("pairs.csv", "harmful\nHow?\n"),
        r"data/raw/pairs.csv: row 1 has no safe",
    ),
    "a pair file of another kind": (
        prompts_of("pairs.txt", "a"),
        r"pairs.txt: .*\.jsonl, \.csv or \.json",
    ),
    "a harmful set that is not known": (
        prompts_of("h.csv", "a,b\nx,y\n", "harmful"),
        r"data/raw/h.csv: its rows are of no set that is known .* name the column or key of the prompts `prompt`",
    ),
    "harmful prompts alone, without the package's own harmless ones": (
        prompts_of("h.txt", "Pick lock a?\n", "harmful"),
        r"data/raw/harmless.jsonl: the package's own harmless prompts are not there; name others in prompts.harmless",
    ),
    "pairs asked of prompts that are none": (
        stage("directions", "sweep", {"data/prompts/pairs.jsonl": json.dumps(PAIRS[0] | {"safe": None}) + "\n"}, pairing="matched"),
        r"params.yaml: sweep.pairing: there are no directions sequential-matched: .* no pairs set sweep.pairing to auto",
    ),
    "wrong path of a model": (
        stage("model", "model", id="models/mine"),
        "params.yaml: model.id: models/mine is neither organism nor a folder; give the path of a checkpoint, or a hub id",
    ),
    "wrong id of a model": (hub(id="lab/none", revision="v1.0"), "lab/none@v1.0: no such repository.* check model.id"),
    "a branch for a revision": (hub(id="lab/gated", revision="main"), "params.yaml: model.revision: 'main' pins nothing: give a"),
    "a licence not accepted": (hub(id="lab/gated", revision="v1.0"), "its licence must be accepted first: do so at .*HF_TOKEN"),
    "an old checkpoint, from the hub": (hub(id="lab/pickled", revision="v1.0"), "a pickle can run code when loaded: give a rev"),
    "an old checkpoint, from a folder": (checkpoint(), "checkpoint: no model.safetensors .* give a folder of safetensors"),
    "no network": (no_network, "http://127.0.0.1:9 cannot be reached .*: run again"),
    "a base model": (
        checkpoint(None),
        "checkpoint: the tokenizer has no chat template; this is a base model: set model.id to its",
    ),
    "an architecture not supported": (
        stage("model", "model", {"checkpoint/config.json": '{"model_type": "t5"}'}, id="checkpoint"),
        r"config.json: model_type 't5' is not supported: transformers has no causal language model of it: use another one",
    ),
    "too many layers to be a model": (
        stage("model", "model", {"checkpoint/config.json": '{"model_type": "llama", "num_hidden_layers": 100000}'}, id="checkpoint"),
        "config.json: num_hidden_layers is 100000, and 1 to 1000 are read: fetch it again",
    ),
    "no such GPU": (
        checkpoint("{% for m in messages %}{{ m['content'] }}{% endfor %}", weights=True, device="cuda:7"),
        "params.yaml: model.device is cuda:7 but torch sees no CUDA device; set it to cpu",
    ),
    "a rank for one direction": (
        stage("prompts", "sweep", rank=4),
        "params.yaml: sweep: rank 4 is of basis qr or svd, and basis is single: set basis to one of these, or rank to null",
    ),
    "more layers in a basis than there are": (
        stage("prompts", "sweep", basis="qr", layers=[7, 8], rank=4),
        "params.yaml: sweep: basis qr needs the directions of 4 layers or more, and layers names 2: name more",
    ),
    "a basis of one layer": (
        stage("prompts", "sweep", basis="qr", layers=[7]),
        "params.yaml: sweep: basis qr needs the directions of 2 layers or more, and layers names 1: name more",
    ),
    "a QR basis of rank 1": (stage("prompts", "sweep", basis="qr", rank=1), "sweep: basis qr of rank 1 is .*: set basis to single"),
    "singular vectors without how many": (stage("prompts", "sweep", basis="svd"), "sweep: basis svd takes the first of 10 .*: set rank"),
    "a subspace by the paper's rule": (by_paper_of_subspaces, "select.by: paper is of single directions, and sweep.basis is qr: set one"),
    "layer out of range": (layer_out_of_range, r"params.yaml: sweep.layers: layer 8 has no direction; choose among \[1, 2, 3\]"),
    "no key": (judged(), "params.yaml: endpoint.api_key_variable: JUDGE_KEY is not set .* run `export JUDGE_KEY=...` first"),
    "a wrong key": (
        judged(401, JUDGE_KEY="sk-wrong"),
        r"params.yaml: endpoint: http://127.0.0.1.* refuses the key .*: export a valid one, and run again",
    ),
    "labels without their columns": (
        stage("agreement", "judge", EVALUATED | {"data/raw/a.csv": "prompt,answer\na,b\n"}, labelled="data/raw/a.csv"),
        r"data/raw/a.csv has no column completion \(it has prompt, answer\)",
    ),
    "an unknown task": (
        stage("benchmark", "benchmark", {"metrics/orthogonalize.json": "{}"}, suite=["organism_capital"]),
        "params.yaml: benchmark.suite: lm-eval has no task organism_capital; the package ships",
    ),
    "an edited checkpoint that is nowhere": (
        stage("edits", "edits", {"metrics/orthogonalize.json": "{}"}, checkpoints=["theirs/edited"]),
        "params.yaml: edits.checkpoints: theirs/edited is not here: give rank_1, random, the path of a checkpoint's or an adapter's",
    ),
    "an edited checkpoint at a branch": (
        stage("edits", "edits", checkpoints=[{"id": "lab/edited", "revision": "main"}]),
        "params.yaml: edits.checkpoints.0: revision: 'main' pins nothing: give a commit hash or a tag of lab/edited",
    ),
    "detection without the trained model": (stage("detection"), "models/base/config.json: no such file; run `make pull`"),
    "detection on another model": (
        stage("detection", "model", {"models/base/config.json": "{}"}, id="theirs"),
        "params.yaml: model.id: detection is measured on the organism and its pairs: set organism",
    ),
    "a claim that is not measured": (claims("pairings"), "there is no pairings to measure: choose among pairing, selection, harm"),
    "claims before the study": (claims("pairing"), "metrics/select.json: no such file: run `dvc repro`, which makes"),
    "claims of a study that was not run": (
        claims("--study", "mine", "pairing"),
        "studies: mine was not run here as far as select: run `make study STUDY=mine` first",
    ),
    "claims of prompts that were chosen": (
        claims("pairing", keep="behaving"),
        "params.yaml: prompts.keep: claims are measured with all train prompts and with those that behave: set all",
    ),
    "a stage before its inputs": (stage("select"), "metrics/directions.json: no such file: run `dvc repro`, which makes"),
    "a full disk": (disk_full, "the disk is full: make room .* and run `dvc repro` again to go on"),
    "another python": (
        lambda place: place.run(sys.executable, "-S", "-m", "stages.prompts"),  # -S: without the environment's packages
        "has no version of torch, and requirements.lock pins .* run `source .venv/bin/activate`",
    ),
    "no such study": (study("", "mein"), r"studies/mein.yaml: no such study; the nearest is mine"),
    "a path for a study": (study("", "../studies/mine"), r"studies/../studies/mine.yaml: no such study"),
    "a misspelt key of a study": (
        study("model:\n  revison: v1.0\n", "mine"),
        r"studies/mine.yaml: model.revison: there is no such key \(the nearest is model.revision\): correct or delete it",
    ),
    "a key of a study in no section": (study("alphas: [1.0]\n", "mine"), r"mine.yaml: alphas: .*the nearest is sweep.alphas"),
    "a study that contradicts params.yaml": (
        study("sweep: {method: batched}\nactivations: {methods: [sequential]}\n", "mine"),
        "mine.yaml: the file: sweep.method batched is not among activations.methods",
    ),
    "a study that is a list": (
        study("- 1\n", "mine"),
        r"mine.yaml: give the keys that differ from params.yaml, in their sections",
    ),
    "a study that is at work": (study_at_work, "mine is at work already; wait for its end"),
    "no such file for a real model": (study("", "mine", "/none/a.gguf"), "REAL_MODEL: /none/a.gguf is no .gguf file; give the"),
    "an old python": (old_python, "make: .*python3.9 is older than Python 3.11; set PYTHON=/path/to/python3.11"),
}
# DVC's own words, which docs/mistakes.md explains.
DVC_WORDS: dict[str, tuple[Mistake, str]] = {
    "another run holds the lock": (lock_held, r"(?s)failed to reproduce 'a': .* is busy, .*PID \d+\): .*dvc repro"),
    "no identity of Git's": (no_identity, "Git user name and email must be configured"),
    "DVC not initialised": (not_initialised, "you are not inside of a DVC repository"),
    "an experiment with a misspelt key": (experiment("sweep.metod=batched"), "Could not override 'sweep.metod'"),
    "an experiment with an old key": (experiment("sweep.max_new_tokens=8"), r"(?s)'sweep.max_new_tokens'.* use \+sweep.max_new_"),
    "no remote": (no_remote, "no remote"),
    "a text that is not quoted twice": (
        experiment("model.system_prompt=Be helpful, and brief."),
        "Sweep overrides can't be used",
    ),
}


@pytest.mark.parametrize("name", MISTAKES | DVC_WORDS)
def test_a_mistake_is_one_sentence_that_says_what_to_do(tmp_path, name):
    make, said = (MISTAKES | DVC_WORDS)[name]
    status, output = make(Place(tmp_path))
    assert status != 0 and re.search(said, output), output
    assert "Traceback" not in output and "hf_right" not in output and "sk-wrong" not in output
    if name in MISTAKES and name != "an old python":
        # Bars and notes may come before it; the sentence is the last line, and says whose it is.
        *_, last = output.strip().splitlines()
        assert re.search(said, last) and (last.startswith(sys.executable) or re.match(r"[a-z]+: ", last))


def test_an_experiment_gives_a_section_a_seed_of_its_own(tmp_path):
    place = Place(tmp_path)
    place.dvc("version")
    assert place.dvc("exp", "run", "-S", "+sweep.seed=1", **IDENTITY).status == 0
    params = load_params(tmp_path / "params.yaml")
    assert params.sweep.seed == 1 and params.science.seed == params.seed == 0


@pytest.mark.parametrize("debug", ["", "1"])
def test_a_traceback_is_for_those_who_ask_and_for_internal_errors(tmp_path, debug):
    place = Place(tmp_path)
    # A metrics file that another stage never wrote so: nobody's mistake but the package's.
    for name, text in (("directions", '{"sequential-matched": {}}'), ("judge", "{}")):
        place.write(f"metrics/{name}.json", text)
    status, output = place.stage("select", REFUSAL_DEBUG=debug)
    assert status == 1 and "Traceback" in output and "KeyError" in output
    assert re.match(r"select: internal error \(KeyError\): please report it", output.splitlines()[-1])
    place.set("sweep", alphas=["1.0"])
    status, output = place.stage("prompts", REFUSAL_DEBUG=debug)
    assert status == 1 and ("Traceback" in output) is (debug == "1")
    assert output.splitlines()[-1].startswith("prompts: params.yaml: sweep.alphas.0")


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


def test_docs_explain_the_words_of_dvc_and_name_every_renamed_key():
    text = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")
    for name in DVC_WORDS:
        assert name in text, name
    for old, new in RENAMED.items():
        assert f"`{old}" in text or f"`{old.rpartition('.')[0]}`" in text, old
        assert f"`{new.split(',')[0]}`" in text, new


@pytest.mark.parametrize(
    "setting",
    ["model.system_prompt='Be helpful, and brief.'", 'model.system_prompt="Don\'t lie."', "prompts.source='pairs (1).csv'"],
)
def test_a_text_that_is_quoted_twice_reaches_params_yaml(tmp_path, setting):
    place = Place(tmp_path)
    place.dvc("version")
    assert place.dvc("exp", "run", "-S", setting, **IDENTITY).status == 0
    params = load_params(tmp_path / "params.yaml")
    assert setting.split("=")[1][1:-1] in (params.model.system_prompt, params.prompts.source)


def test_a_small_number_that_dvc_writes_is_read(tmp_path):
    place = Place(tmp_path)
    place.dvc("version")
    assert place.dvc("exp", "run", "-S", "organism.phase_1.learning_rate=0.00001", **IDENTITY).status == 0
    assert load_params(tmp_path / "params.yaml").organism.phase_1.learning_rate == 1e-5


def test_a_temporary_run_sees_a_prompts_file_once_git_knows_of_it(tmp_path):
    place = Place(tmp_path)
    place.dvc("version")
    place.write(
        "dvc.yaml",
        f"stages:\n  prompts:\n    cmd: {sys.executable} -m stages.prompts\n    params: [prompts]\n    outs: [data/prompts]\n",
    )
    place.run("rm", "-r", "data/prompts")
    place.write(".gitignore", "/data/prompts\n/home\n/wait\n/.refusal-store\n")
    for line in ("git add .gitignore dvc.yaml params.yaml requirements.lock", "git commit -qm stage"):
        place.run(*line.split(), **IDENTITY)
    place.write(
        "data/raw/mine.csv", "harmful,safe\n" + "".join(f"Pick lock w{i} x{i}?,Paint lock y{i} z{i}?\n" for i in range(30))
    )
    queued = ("exp", "run", "--temp", "-S", "prompts.source=data/raw/mine.csv", "-S", "prompts.n_pairs=null")
    refused = place.dvc(*queued, **IDENTITY)
    assert refused.status != 0 and "prompts: data/raw/mine.csv exists, but queued and temporary" in refused.said, refused.said
    place.run("git", "add", "-N", "data/raw/mine.csv")
    done = place.dvc(*queued, **IDENTITY)
    assert done.status == 0 and "30 pairs" in done.said, done.said


def test_a_terminal_that_is_not_utf_8_stops_no_stage(tmp_path):
    place = Place(tmp_path)
    place.write("дата/пары.csv", "harmful,safe\n" + "".join(f"Pick lock w{i} x{i}?,Paint lock y{i} z{i}?\n" for i in range(30)))
    place.set("prompts", source="дата/пары.csv", n_pairs=None)
    done = place.stage("prompts", PYTHONIOENCODING="latin-1")
    assert done.status == 0 and "30 pairs" in done.said and "\\u0434" in done.said, done.said
