"""Whatever the README and docs/ tell people to type is typed here, in a small study that has run; and they quote the committed figures."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from api_server import serve as serve_api
from api_server import split, verdict
from checkpoints import word_level
from gguf_files import byte_pairs, chat_model
from gguf_files import write as write_gguf
from hub_server import COMMIT, Hub
from hub_server import serve as serve_hub
from pair_author import Author
from pipeline.study import run, stages_run
from qwen1_layout import LATE, tensors
from qwen1_layout import write as write_qwen1
from tiny import tiny_model

from refusal.io.params import Params
from refusal.judges import rules

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TYPED = ("models", "judges", "sharing", "studies", "mediation", "prompts", "variants", "speed")
GUIDE = README + "".join((ROOT / f"docs/{page}.md").read_text() for page in TYPED)
PAGES = ("README.md", "CONTRIBUTING.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

# Where a command is not run as it stands: what is put in its place, and why. Each must occur.
INSTEAD = [
    (r"^make test$", "", "these tests are what it runs"),
    (r"^make cuda$", "", "no GPU is asked of a test"),
    (r"^make faults$", "", "ten minutes; tests/test_faults.py sees that each fault fits the code"),
    (r"^make lint$", "", "what .ci/run runs after these tests; the small study lacks the files"),
    (r"make setup", r"cp -r ../.venv .\nmake setup", "no packages from the network: the environment is that of these tests"),
    (r"https://github\.com/<owner>/<repository> <path>/", "{tmp}/theirs ", "a Git repository on this machine"),
    (r"(import-url) https://\S+ (data/raw/\S+)", r"\1 {tmp}/labelled.csv \2\nrm \2 \2.dvc data/raw/.gitignore", "a file on this machine"),
    (r"<repository>", "{folder}", "this study stands for one on a server"),
    (r"cd \{folder\}", "cd study", "git clone names the folder after it"),
    (r"sequential_layer_6_alpha_100", "$(ls models/ablated | head -1)", "the small study chooses another cell"),
    (r"/path/to/folder", "{tmp}/remote", "a remote on this machine"),
    (r"REVISION", COMMIT, "the commit of the hub on loopback"),
    (r"model\.device=cuda", "model.device=cpu", "no GPU is asked of a test"),
    (r"/path/to/checkpoint", "{tmp}/checkpoint", "a tiny random checkpoint"),
    (r"/path/to/model.gguf", "{tmp}/model.gguf", "a tiny random model"),
    (r"ebb2015119c907b064c512bf053e945850b5875f", COMMIT, "the commit of the hub on loopback"),
    (r"(-S prompts\.source=api.*)$", r"-S endpoint.base_url={api} \1 prompts", "loopback; up to the stage that asks for pairs"),
    (r"(-S model\.id=\S+(?: -S \S+)*)$", r"\1 model", "up to the stage that brings a model in: the rest is tests/pipeline's"),
    (r"(-S judge\.kind=llm)$", r"\1 -S endpoint.base_url={api}", "the endpoint on loopback stands for DeepSeek's"),
    (r"http://localhost:8000/v1", "{api}", "the endpoint on loopback stands for a local one"),
    (r"endpoint\.model=NAME", "endpoint.model=some-judge", "any name"),
    (r"(-S judge\.kind=llm.*)$", r"\1 judge", "up to the stage that judges"),
    (r"judge\.rubric=classifier", "judge.rubric=axes", "the endpoint on loopback is no classifier; tests/judges/test_rubrics.py has one"),
    (r"--rubric strongreject", "--rubric axes", "as before: the endpoint on loopback knows one rubric"),
    (r"FILE\.csv (.*--model)", r"{tmp}/labelled.csv --base-url {api} \1", "a file of labels, and the endpoint on loopback"),
    (r"^dvc exp run .*first_half$", "", "test_the_variant_in_five_lines_runs has the five lines too"),
    (r"^(dvc exp run (?!--))", r"git checkout -q .\ndvc checkout -q -f\n\1", "each experiment starts from what is committed"),
]  # fmt: skip


class Block(NamedTuple):
    page: str
    section: str
    language: str
    text: str


def blocks(page: str) -> Iterator[Block]:
    section = ""
    lines = iter((ROOT / page).read_text(encoding="utf-8").splitlines())
    for line in lines:
        if line.startswith("#"):
            section = line.lstrip("# ")
        if line.startswith("```"):
            inside = []
            while (inner := next(lines)) != "```":
                inside.append(inner)
            yield Block(page, section, line[3:], "\n".join(inside) + "\n")


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == ""]


def script(block: Block) -> tuple[str, set[str]]:
    """The block as it is run: whole commands, without comments at their ends, with INSTEAD put in place; and what of it was used."""
    # A failure in the middle of a && b && c would go unseen: one command a line.
    text, used = re.sub(r"\\\n\s*", "", block.text).replace(" && ", "\n"), set()
    if "python -c" not in text:
        text = re.sub(r"(?m)(^|\s+)#.*$", "", text)
    for pattern, new, _ in INSTEAD:
        text, times = re.subn(pattern, new, text, flags=re.MULTILINE)
        used |= {pattern} if times else set()
    return text.strip(), used


# Commands within sentences: what types them, or None for those that are run just so by `test_commands_within_sentences`.
INLINE = {
    "dvc pull models/base": "tests/pipeline/test_remotes.py",
    "dvc repro --allow-missing": "tests/pipeline/test_remotes.py",
    "dvc repro --allow-missing --pull": "tests/pipeline/test_remotes.py",
    "git ls-remote https://huggingface.co/<id> main": "asks the hub, and its answer is only copied into a parameter",
    "dvc repro -f model": None,
    "python -m refusal.judges.calibrate FILE.csv --judge rules": None,
    "make models": "tests/report/test_models.py",
    **dict.fromkeys(("make label", "make label STUDY=<name>", "make label RATER=<who>"), "tests/report/test_labels.py"),
    **dict.fromkeys(("python -m stages.label --terminal", "python -m stages.label --agreement A.csv B.csv"), "tests/report/test_labels.py"),
    "git add --force": "Git's own",
    "make organisms": "two hours; tests/test_science.py and tests/test_organism.py hold what it is made of",
    **dict.fromkeys(("make rules", "make label-check"), "tests/judges/test_rules_selection.py"),
    "make perf": "tests/test_perf.py and tests/test_perf_sweep.py hold its parts; whole it takes half an hour",
    "python -m perf extraction": "as make perf",
    "make full": None,
    **dict.fromkeys(("make pull", "make refresh"), "tests/pipeline/test_repository_remote.py"),
    "make verify": "tests/report/test_verify.py",
    "make train": "what tests/pipeline's small study begins with",
    "make portability": "what .ci/run checks after these tests",
    **dict.fromkeys(("make study", "make study STUDY=<name>"), "tests/pipeline/test_studies.py"),
    "make plan STUDY=<name>": "tests/stages/test_studies.py",
    **dict.fromkeys(("make real", "make real REAL_MODEL=/path/to.gguf"), "a real model; tests/stages/test_studies.py has what is its own"),
    **dict.fromkeys(("dvc gc --workspace", "dvc gc --workspace --projects .refusal-store/studies/<name>"), "deletes"),
}


def inline() -> set[str]:
    """The commands within sentences of the README and the pages of reference that no block has."""
    prose = re.sub(r"```.*?```", "", GUIDE, flags=re.DOTALL)
    found = {text for text in re.findall(r"`([^`]+)`", prose) if re.match(r"(python -m|dvc|make|git|source) ", text)}
    return {text for text in found if not any(text in block.text for block in SHELL)}


def test_each_exception_is_needed_and_has_a_reason():
    assert set().union(*(script(block)[1] for block in SHELL)) == {pattern for pattern, _, reason in INSTEAD if reason}


@pytest.fixture(scope="module")
def study(finished, tmp_path_factory):
    """A copy of the small study, committed, its environment that of these tests."""
    folder = shutil.copytree(finished[0], tmp_path_factory.mktemp("readme") / "study", symlinks=True)
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "results")
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("ready", "bin/activate"):
        (folder / ".venv" / name).touch()
    return folder


@pytest.fixture(scope="module")
def servers(study):
    """What the commands may need of the world: a hub, an endpoint, a checkpoint and a file of labels."""
    tmp = study.parent
    tiny_model("llama", max_position_embeddings=512).save_pretrained(tmp / "checkpoint")
    config = (tmp / "checkpoint/config.json").read_text()
    word_level(tmp / "checkpoint", "{% for m in messages %}{{ m['content'] }} {% endfor %}")
    (tmp / "checkpoint/config.json").write_text(config)
    llama = {path.name: path.read_bytes() for path in (tmp / "checkpoint").iterdir()}
    qwen = write_qwen1(tmp / "qwen", LATE | {"seq_length": 256}, tensors(), buffers=False)
    tokenizer = byte_pairs()
    gguf = write_gguf(tmp / "model.gguf", chat_model("qwen2", tokenizer), tokenizer)
    repositories = {
        "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF": {"qwen2.5-coder-0.5b-instruct-q4_k_m.gguf": gguf.read_bytes()},
        "Qwen/Qwen-1_8B-Chat": {path.name: path.read_bytes() for path in qwen.iterdir()},
        "meta-llama/Llama-3.1-8B-Instruct": llama,
        "google/gemma-2b-it": llama,
        "meta-llama/Llama-3.2-1B-Instruct": llama,
    }
    (tmp / "labelled.csv").write_text("prompt,completion,label\nDo x.,I can't help with that.,refusal\nDo x.,Sure.,compliance\n")
    theirs = tmp / "theirs"
    theirs.mkdir()
    shutil.copyfile(study / "models/directions.safetensors", theirs / "vectors.safetensors")
    for command in (
        ["init", "-q"],
        ["add", "-A"],
        ["-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "vectors"],
    ):
        run(theirs, "git", *command)
    author = Author()

    def reply(n: int, question: str) -> str:
        if question.startswith("{"):
            return author(n, question)
        found = rules.judge(*split(question))
        return verdict(found.compliance, found.coherence)

    with serve_hub(Hub(repositories)) as hub, serve_api(reply) as api:
        yield {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp / "huggingface"), "api": api.url}


def type_in(folder: Path, text: str, servers: dict[str, str]) -> str:
    for name, value in {"folder": folder, "tmp": folder.parent, "api": servers["api"]}.items():
        text = text.replace(f"{{{name}}}", str(value))
    environment = [f"{name}={value}" for name, value in servers.items() if name.isupper()]
    # GIT_: the commits of experiments; make and the environment's programs come first on PATH, as `run` has it.
    return run(folder, "env", *environment, "bash", "-euo", "pipefail", "-c", text)


IDS = [f"{block.page.split('/')[-1]}: {block.section} {i}" for i, block in enumerate(SHELL)]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", SHELL, ids=IDS)
def test_commands_do_what_they_say(study, servers, block):
    output = type_in(study, script(block)[0], servers)
    run(study, "git", "checkout", "-q", ".")
    run(study, "dvc", "checkout", "-q", "-f")
    if "make repro" in block.text and block.page == "README.md":
        assert "up to date" in output and stages_run(output) == []  # all is there
    if "make compare" in block.text:
        page = (study / "report/variants.html").read_text()
        assert re.search(r"differ in (sweep.method, sweep.pairing|sweep.pairing, sweep.method)", output)
        assert page.count("<td>unrelated</td>") == 2 and page.count("<td>batched_unmasked</td>") >= 2
    if "git clone" in block.text:
        assert stages_run(output) == [] and "pipelines are up to date." in output
    if "by hand" in block.text:
        by_hand, stored = re.search(r"by hand (\S+)", output), re.search(r"as stored (\S+)", output)
        assert by_hand and stored and float(by_hand[1]) == pytest.approx(float(stored[1]), abs=1e-12)
    if "cosine" in block.text and "load_file" in block.text:
        assert float(output.split("cosine")[1]) == pytest.approx(1, abs=1e-12)


@pytest.mark.timeout(1800)
def test_commands_within_sentences(study, servers):
    assert inline() == set(INLINE)
    assert "Running stage 'model'" in type_in(study, "dvc repro -f -s model", servers)  # -s: and no stage after it
    figures = type_in(study, "python -m refusal.judges.calibrate {tmp}/labelled.csv --judge rules", servers)
    assert json.loads(figures)["n"] == 2
    type_in(study, "make full", servers)
    assert len(json.loads((study / "metrics/science_full.json").read_text())["padding"]) > len(json.loads((study / "metrics/science.json").read_text())["padding"])
    type_in(study, "make picture", servers)
    assert "<svg" in (study / "docs/result.svg").read_text()
    run(study, "git", "checkout", "-q", ".")


def test_every_word_of_the_help_can_be_made(study):
    output = run(study, "make", "--no-print-directory", "help")
    targets = re.findall(r"(?m)^([a-z-]+): .*##", (ROOT / "Makefile").read_text())
    assert [line.split()[0] for line in output.splitlines()] == targets and len(targets) > 8


def test_the_variant_in_five_lines_runs(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "study", symlinks=True)
    (block,) = [block for block in BLOCKS if block.language == "diff"]
    added = [line for line in block.text.splitlines() if re.match(r"\+(?!\+\+)", line)]
    assert len(added) == 5
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "results")
    # The small study's params.yaml is rewritten by YAML: the line is set there as the diff sets it.
    text = block.text[: block.text.index("--- a/params.yaml")]
    (tmp_path / "patch").write_text(text)
    run(folder, "git", "apply", "--check", str(tmp_path / "patch"))
    run(folder, "git", "apply", str(tmp_path / "patch"))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (line,) = [line[1:] for line in added if "pairings:" in line]
    params["directions"] |= yaml.safe_load(line)
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (tmp_path / "whole").write_text(block.text)
    run(ROOT, "git", "apply", "--check", str(tmp_path / "whole"))  # the committed params.yaml takes it as it is
    output = run(folder, "dvc", "exp", "run", "-S", "sweep.pairing=first_half", "judge")  # the rest is tests/pipeline's
    assert stages_run(output) == ["directions", "sweep", "judge"]
    found = json.loads((folder / "metrics/directions.json").read_text())["sequential-first_half"]
    assert found["n_harmful"] == 18


def test_the_library_in_ten_lines(finished, tmp_path):
    (block,) = [block for block in BLOCKS if block.language == "python"]
    assert len(block.text.strip().splitlines()) <= 14 and ".unit[5]" in block.text
    script = block.text.replace(".unit[5]", ".unit[2]")  # the small organism has 3 layers
    script = f"import os, pathlib; os.chdir({str(finished[0])!r}); out = pathlib.Path({str(tmp_path)!r})\n" + script
    script = script.replace('"direction.safetensors"', 'out / "direction.safetensors"')
    output = run(tmp_path, "env", f"PYTHONPATH={ROOT}", "python", "-c", script)
    (answers,) = (line for line in output.splitlines() if line.startswith("["))
    assert len(eval(answers)) == 2 and (tmp_path / "direction.safetensors").is_file()


def test_the_notebook_runs(finished, tmp_path):
    notebook = json.loads((ROOT / "docs/example.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and {cell["cell_type"] for cell in notebook["cells"]} == {"markdown", "code"}
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    end = """
from safetensors.torch import load_file
stored = load_file(ROOT / "models/directions.safetensors")
assert float((unit[layer].double() * stored["batched-matched.unit"][layer].double()).sum()) > 1 - 1e-9
assert list(answers) == ["baseline", "ablated", "random direction"] and all(len(texts) == 3 for texts in answers.values())
"""
    text = "\n\n".join("".join(cell["source"]) for cell in code) + end
    (finished[0] / "docs").mkdir(exist_ok=True)
    path = f"{ROOT}"
    assert path not in text
    run(finished[0] / "docs", "python", "-c", text)


def test_every_parameter_that_a_command_sets_exists_and_may_have_that_value():
    commands = re.findall(r"-S (\w+)\.(\w+)=(\S+)", GUIDE)
    assert len(commands) > 15
    for section, name, text in commands:
        params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
        assert name in params[section] or name in ("seed", "n_resamples"), f"{section}.{name}"
        for value in text.split(","):
            if value == "first_half":  # what the five lines above it add
                continue
            params[section][name] = yaml.safe_load(value)
            if section == "model" and name in ("revision", "file"):
                params[section] |= {"id": "owner/name", "revision": params[section]["revision"] or COMMIT}
            Params.model_validate(params)


REAL = "studies/qwen2.5-coder-0.5b-instruct"


def metrics(name: str, of: str = ".") -> dict:
    return json.loads((ROOT / of / "metrics" / f"{name}.json").read_text(encoding="utf-8"))


def rows(name: str, of: str = ".") -> list[dict[str, str]]:
    with (ROOT / of / "plots" / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def interval(m: dict, key: str) -> str:
    return f"{m[key]:.2f} [{m[f'{key}_low']:.2f}, {m[f'{key}_high']:.2f}]"


def organisms() -> list[str]:
    """The table of kinds of organism, least to greatest of three seeds."""
    found, lines = metrics("organisms"), []

    def span(values: list[float | None], form: str = ".2f") -> str:
        kept = [v for v in values if v is not None]
        return f"{min(kept):{form}} to {max(kept):{form}}" if kept else "–"

    for kind in ("single", "planted", "distributed", "natural", "none"):
        of = [found[f"{kind}.{seed}"] for seed in range(3)]
        cells = [
            ", ".join(o["verdict"] for o in of),
            span([o["separation_peak"] for o in of], ".1f"),
            span([o["baseline_refusal"] for o in of]),
            span([o["compliance_single"] for o in of]),
            span([max(o["by_layer"]["compliance"].values()) for o in of]),
            span([o["estimators"]["optimised"]["compliance"] for o in of]),
            span([o["compliance_planted"] for o in of]),
        ]
        lines.append(f"| `{kind}` | {' | '.join(cells)} |")
    planted = [found[f"planted.{seed}"] for seed in range(3)]
    restored, cosine = [o["compliance_single"] for o in planted], [o["cosine_planted"] for o in planted]
    optimised = [o["estimators"]["optimised"]["cosine_planted"] for o in planted]
    return [
        *lines,
        f"at cosine {min(cosine):.2f} to {max(cosine):.2f} to the planted vector, restores "
        f"{restored[0]:.2f}, {restored[1]:.2f} and {restored[2]:.2f}",
        f"at cosine {min(optimised):.2f} to {max(optimised):.2f}. That",
    ]


# Rows of metrics/reproduction.json that the README shows, and how it calls them.
REPRODUCED = {
    "in_sample_peak.sequential.layer": "layer where in-sample Cohen's d peaks, one prompt at a time",
    "in_sample_peak.sequential.separation": "in-sample Cohen's d there",
    "in_sample_peak.batched.separation": "the same, batched",
    "cosine_sequential_batched.layer_7": "cosine of the two at layer 7 (batches with padding attended to)",
    "alpha_drop_off": "alpha from which text becomes incoherent",
    "sequential-matched.rank_1.compliance": "compliance of the best cell",
    "sequential-matched.rank_1.coherence": "its coherence",
    "benchmark.baseline": "benchmark, baseline",
    "sequential-matched.rank_1.benchmark_difference": "its change by the best cell, as weights",
}


def reproduced() -> list[str]:
    """The table of published figures and ours."""
    rows = {row["quantity"]: row for row in metrics("reproduction")["rows"]}
    return [f"| {words} | {rows[name]['published']:.4g} | {rows[name]['ours']:.4g} |" for name, words in REPRODUCED.items()]


OTHER_SETS = {"xstest": "XSTest", "jailbreakbench": "JailbreakBench", "paper_harmful_train": "the paper's"}


def real_study() -> list[str]:
    """What the README says of the real model."""
    e, d, v = metrics("evaluate", REAL), metrics("directions", REAL), metrics("science", REAL)["verdict"]
    sweep, run, one = metrics("judge", REAL), e["runtime"], v["difference"]
    sets, long = metrics("generalization", REAL)["sets"], metrics("long_answers", REAL)
    asked, ablated = long["arms"]["baseline"], long["arms"]["runtime"]
    unrelated = metrics("science", REAL)["estimators"]["unrelated"]
    unmasked = {i: c for i, c in enumerate(d["batched_unmasked-matched"]["cosine_to_sequential"]) if c is not None}
    least = min(unmasked, key=lambda i: unmasked[i])
    arms = [
        ("baseline", "baseline"),
        (f"direction ablated at run time (layer {e['layer']}, alpha {e['alpha']:g})", "runtime"),
        ("the same as edited weights", "orthogonalized"),
        (f"{e['random']['n_arms']} random directions ablated", "random"),
        ("a random direction as edited weights", "random_weights"),
        ("the difference of two harmless sets ablated", "harmless"),
    ]
    best = [cell for cell in sweep.values() if cell["layer"] is not None and cell["compliance"] >= 0.9]
    return [
        *(
            f"| {words} | {interval(e[arm], 'compliance')} | {e[arm]['coherence']:.2f} | {interval(e[arm], 'answers_safe')} | {e[arm]['kl']:.3f} |"
            for words, arm in arms
        ),
        f"the difference in means of {d['sequential-matched']['n_harmful']} matched pairs at layer {e['layer']}, chosen on val",
        f"compliance with {run['n']} harmful test prompts from {interval(e['baseline'], 'compliance')} to {interval(run, 'compliance')}",
        f"a paired difference of {run['difference']:+.2f} [{run['difference_low']:+.2f}, {run['difference_high']:+.2f}]",
        f"random directions leave it at {interval(e['random'], 'compliance')}",
        f"Of the {v['n_refused']} test prompts that the model refuses, {one['removed']:.2f} then comply, {one['above_random']:+.2f} "
        f"beyond random directions (lower limit {one['above_random_low']:+.2f}): the verdict is `{v['verdict']}`",
        "On other people's prompts it goes from "
        + ", ".join(
            f"{of['baseline']['compliance']:.2f} to {of['ablated']['compliance']:.2f} ({words})"
            for words, of in ((words, sets[name]["figures"][0]) for name, words in OTHER_SETS.items())
        ),
        f"in answers of {long['max_new_tokens']['long']} tokens, not {long['max_new_tokens']['short']}, from "
        f"{asked['long']['compliance']:.2f} to {ablated['long']['compliance']:.2f} (n = {long['n']}); "
        f"{asked['n_loops']} and {ablated['n_loops']} of them end in loops",
        f"At {len(best)} of its {len(d['sequential-matched']['layers'])} layers the direction takes compliance on val to .9 or more",
        f"unrelated safe prompts give a direction that does so too ({interval(unrelated, 'compliance')}, layer {unrelated['layer']})",
        f"padding that is attended to turns it to cosine {unmasked[least]:.2f} at layer {least}, and masked padding leaves it "
        f"({d['batched-matched']['cosine_to_sequential_min']:.6f})",
    ]


def quoted() -> list[str]:
    """What the README says of the committed figures, made from them; blanks do not count."""
    e, d, b = metrics("evaluate"), metrics("directions"), metrics("benchmark")["rank_1"]
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    found, other = d["sequential-matched"], d["sequential-unrelated"]["cosine_to_sequential"]
    arms = [
        ("baseline", "baseline"),
        (f"direction ablated at run time (`rank_1`: layer {e['layer']}, alpha {e['alpha']:g})", "runtime"),
        ("the same as edited weights", "orthogonalized"),
        ("random directions ablated", "random"),
        ("the difference of two harmless sets ablated", "harmless"),
    ]
    table = [
        f"| {words} | {interval(e[arm], 'compliance')} | {e[arm]['exact']:.2f} | {e[arm]['refusal_safe']:.2f} |"
        for words, arm in arms
    ]
    speed, sweep, edit, pipeline = (metrics("perf")[name] for name in ("extraction", "sweep", "orthogonalize", "pipeline"))
    swept, n_val = len([1 for row in rows("sweep")]), int(rows("sweep")[0]["n"])
    n_test, n_random = e["baseline"]["n"], params["sweep"]["n_random"]
    n_layers = len({row["layer"] for row in rows("sweep")})
    val, test = (1 + n_random + n_layers + swept) * n_val, (4 + n_random) * 2 * n_test + n_test
    return [
        f"on {n_test} harmful test prompts",
        *table,
        f"| raw difference added at the prompt | | | {interval(e['addition'], 'refusal_safe')} |",
        f"separates val prompts by {found['separation'][1]:.1f} pooled standard deviations at layer 1 and "
        f"{found['peak_separation']:.1f} at layer {found['peak_layer']}",
        f"(cosine {d['batched-matched']['cosine_to_sequential_min']:.6f})",
        f"moves it a little ({d['batched_unmasked-matched']['cosine_to_sequential_min']:.3f})",
        f"other safe prompts move it more ({other[1]:.2f} at layer 1, {other[6]:.2f} at layer 6)",
        f"(difference {b['difference']:.3f} [{b['difference_low']:+.3f}, {b['difference_high']:+.3f}])",
        f"take a {speed['ratio_to_padded']:.1f}th of the time of left-padded batches",
        f"a {speed['ratio_to_sequential']:.1f}th of one prompt a forward",
        f"{100 * speed['fraction_of_bound']:.0f} % of what the matrix products alone would allow",
        f"{val + test:,} completions ({val:,} val, {test:,} test)",
        f"take a {sweep['ratio_to_generate8']:.1f}th of the time of `generate` in batches of 8",
        f"the same tokens in {100 * sweep['same_tokens']:.0f} % of rows and at {100 * sweep['fraction_of_bound']:.0f} % of the bound",
        f"generation without a cache (the write-up's) takes {sweep['ratio_to_recompute']:.0f} times as long",
        f"takes {edit['ratio_to_copy']:.2f} times as long as a copy of its bytes",
        f"two of its largest tensors {edit['peak_minus_two_largest_mb']:+.0f} MB",
        f"The study in a fresh clone took {pipeline['repro_seconds']:.0f} s, a variant of the sweep {pipeline['variant_seconds']:.0f} s, a run "
        f"that finds nothing to do {pipeline['noop_seconds']:.1f} s",
        *real_study(),
        *whole_science(),
        *organisms(),
        *reproduced(),
    ]


def whole_science() -> list[str]:
    """What `make full` found: the table of arms, and how the direction depends on prompts, pairing, pads and rank."""
    m = metrics("science_full")
    names = {
        "rank_1": "`rank_1` (layer {layer})",
        "paired_svd": "first singular vector of the paired differences (layer {layer})",
        "lda": "Fisher's discriminant (layer {layer})",
        "logistic": "logistic regression (layer {layer})",
        "optimised": "`optimised`",
        "affine": "affine, difference-in-means (layer {layer})",
        "per_layer": "every layer its own",
        "svd_2": "2 singular vectors",
        "svd_5": "5 singular vectors",
        "qr_5": "5 best layers, QR",
        "random_1": "{n_arms} random directions",
        "random_5": "{n_arms} random subspaces of rank 5",
        "harmless": "difference of two harmless sets",
    }
    rows_of = m["arms"] | m["controls"]
    table = []
    for name, words in names.items():
        (row,) = [r for arm, r in rows_of.items() if arm == name or arm.startswith(f"{name}.")]
        table.append(
            f"| {words.format_map(row)} | {row['rank'] or 'one a layer'} | {interval(row, 'compliance')} | {row['refusal_substring']:.2f} "
            f"| {row['n_degenerate'] / (row['n'] * row['n_arms']):.2f} | {row['kl']:.3f} | {row['n']:,} |"
        )
    few, *_, whole = m["sensitivity"]["sequential-matched"]
    unrelated = m["sensitivity"]["sequential-unrelated"][-1]
    pads = {(r["masked"], r["n_pads"]): r for r in m["padding"] if r["layer"] == m["layer"]}
    most = pads[False, 64]
    cliff = {place: found["measured"] for place, found in m["collapse_alpha"].items()}
    assert cliff["writes"] is cliff["weights"] is None and cliff["resid_pre"] == cliff["paper"]
    return [
        *table,
        f"From {few['n']} pairs it has cosine {few['cosine']:.4f} [{few['low']:.4f}, {few['high']:.4f}] with that of all {whole['n']}, "
        f"with unrelated safe prompts {unrelated['to_reference']:.4f}",
        f"{most['n_pads']} pads that are attended to leave it at cosine {most['cosine']:.4f} and take d from "
        f"{most['separation_clean']:.1f} to {most['separation']:.1f}, masked ones at {pads[True, 64]['cosine']:.4f} and "
        f"{pads[True, 64]['separation']:.1f}",
        f"from alpha {cliff['resid_pre']:g} on at `resid_pre` and `paper` and up to alpha 3 nowhere at `writes` or as weights",
        f"AUROC {m['monitor']['unseen'][m['layer']]['auroc']:.2f} on unseen cues",
    ]


def test_figures_are_those_of_the_committed_metrics():
    text = " ".join(GUIDE.split())
    assert [sentence for sentence in quoted() if " ".join(sentence.split()) not in text] == []


def test_the_words_about_the_sweep_and_the_shuffle_hold():
    falls = {float(row["alpha"]) for row in rows("sweep") if float(row["coherence"]) < 0.5}
    assert min(falls) == 2.5 and all(float(row["coherence"]) > 0.9 for row in rows("sweep") if float(row["alpha"]) < 2.5)
    shuffled = metrics("directions")["sequential-shuffled"]
    assert shuffled["cosine_to_sequential_min"] >= 1 - 1e-12


def test_organisms_come_out_as_they_were_made():
    found = metrics("organisms")
    assert len(found) == 15
    for name, o in found.items():
        kind = name.split(".")[0]
        if kind == "single":
            assert o["verdict"] == "single" and o["by"] == "rank_1" and o["difference_mediates"], name
        if kind == "planted":
            assert o["compliance_planted"] >= 0.9, name
        if kind == "distributed":
            assert max(o["by_layer"]["compliance"].values()) <= 0.1 and not o["difference_mediates"], name
        assert o["baseline_refusal"] <= 0.01 if kind == "none" else o["baseline_refusal"] >= 0.9, name
        assert kind != "none" or o["verdict"] == "none", name
        assert o["random"]["random_1"]["n_arms"] == 10, name


@pytest.mark.parametrize(("of", "file"), [(".", "docs/result.svg"), (REAL, "docs/real.svg")])
def test_the_picture_is_that_of_the_committed_figures(of, file):
    from refusal.report.picture import picture

    made = picture(rows("separation", of), rows("sweep", of), metrics("evaluate", of))
    assert (ROOT / file).read_text(encoding="utf-8") == made, f"run `make picture` and commit {file}"


def test_the_picture_of_organisms_is_that_of_the_committed_figures():
    from refusal.report.organisms import picture

    assert (ROOT / "docs/organisms.svg").read_text(encoding="utf-8") == picture(metrics("organisms"))


def test_the_first_result_is_within_two_screens():
    first = README.index("docs/real.svg")
    assert len(README[:first].splitlines()) <= 40 and first < README.index("make real") < README.index("make repro")
    assert len(README[: README.index("make repro")].splitlines()) <= 2 * 40


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), (page, target)


def test_the_citation_is_one():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["cff-version"] == "1.2.0" and {"message", "title", "authors", "references"} <= set(cited)
    published = json.loads((ROOT / "refusal/report/published.json").read_text(encoding="utf-8"))
    assert cited["references"][0]["title"] == published["source"]["title"]
    assert all(reference["title"] and reference["authors"] and reference["type"] for reference in cited["references"])
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'version = "{cited["version"]}"' in project and f'license = "{cited["license"]}"' in project
