"""The judge and agreement stages as processes, on a small sweep: the same keys by either judge, interrupted, and badly set."""

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from api_server import Reply, serve, split, verdict

from refusal.io.endpoint import Endpoint
from refusal.io.store import Store
from refusal.judges import rules
from refusal.judges.llm import LLMJudge
from refusal.judges.rubrics import question

ROOT = Path(__file__).parents[2]
CANARY = "sk-canary-77aa01"
CELLS = [("baseline", None, 0.0), ("random_0", None, 1.0), ("random_1", None, 1.0), ("layer_1_alpha_100", 1, 1.0)]
SETTINGS = {"api_key_variable": "JUDGE_KEY", "timeout_seconds": 10, "max_attempts": 2, "concurrency": 4}


def by_the_rules(n, asked):
    judged = rules.judge(*split(asked))
    return verdict(judged.compliance, judged.coherence)


def answers(i: int) -> list[str]:
    """Of each cell, the completion of prompt i."""
    given = [f"I'm sorry, but I can't help with door {i}.", f"To open door {i}, turn the key.", f"Take the key of door {i} and turn it."]
    ablated = {0: "", 1: "door door door door door door"}.get(i, f"Sure, door {i} opens with a key.")
    return [given[0] if i % 5 == 0 else text for text in given] + [ablated]


def study(folder: Path, n: int, url: str | None = None, **judge) -> Path:
    """A folder with params.yaml and a sweep of n prompts: some refused, some answered, one empty and one degenerate a cell.

    The judge is the endpoint at `url`, if there is one.
    """
    folder.mkdir()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["judge"] |= ({"kind": "llm"} if url else {}) | judge
    params["endpoint"] |= SETTINGS | ({"base_url": url} if url else {})
    params["model"]["id"] = "a-folder"  # no organism: its refusals are known, these are judged
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    shutil.copy(ROOT / "requirements.lock", folder)
    prompts = [{"id": f"pair-{i}", "topic": f"door {i // 2}", "harmful": f"How do I open door {i}?"} for i in range(n)]
    rows = [
        {"cell": cell, "layer": layer, "alpha": alpha, "id": row["id"], "prompt": row["harmful"], "completion": answers(i)[c], "n_tokens": 9}
        for c, (cell, layer, alpha) in enumerate(CELLS)
        for i, row in enumerate(prompts)
    ]  # fmt: skip
    for name, content in (("prompts/pairs", prompts), ("sweep/completions", rows)):
        path = folder / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return folder


def change(folder: Path, section: str, settings: dict) -> None:
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params[section] |= settings
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


def questions(folder: Path) -> dict[str, None]:
    rows = map(json.loads, (folder / "data/sweep/completions.jsonl").read_text().splitlines())
    return {question(row["prompt"], row["completion"]): None for row in rows if row["completion"].strip()}


def start(folder: Path, stage: str = "judge") -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JUDGE_KEY": CANARY, "DVC_ROOT": str(folder)}
    command = [sys.executable, "-m", f"stages.{stage}"]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, stage: str = "judge", ok: bool = True) -> str:
    process = start(folder, stage)
    output = "".join(process.communicate(timeout=120))
    assert (process.returncode == 0) is ok and "Traceback" not in output and CANARY not in output, output
    return output


def judged_as_test(folder: Path) -> None:
    """The sweep's completions and verdicts as those of the evaluation."""
    rows = [[json.loads(line) for line in (folder / f"data/{name}.jsonl").read_text().splitlines()]
            for name in ("sweep/completions", "judged/verdicts")]  # fmt: skip
    evaluated = [
        {**a, **b, "arm": "runtime" if a["layer"] else a["cell"].split("_")[0], "name": a["cell"], "half": "harmful"} for a, b in zip(*rows, strict=True)
    ]  # fmt: skip
    (folder / "data/evaluated").mkdir()
    (folder / "data/evaluated/completions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluated))


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and ".refusal-store" not in p.parts}


def assert_same_keys(a: object, b: object) -> None:
    if isinstance(a, dict) and isinstance(b, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same_keys(a[key], b[key])


def metrics(folder: Path, name: str) -> dict:
    return json.loads((folder / "metrics" / f"{name}.json").read_text())


def test_either_judge_writes_the_same_files_with_the_same_keys(tmp_path):
    labelled = tmp_path / "labelled.csv"
    with open(labelled, "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "completion", "label"), ("Do x.", "I can't help with that.", "refusal"),
                                    ("Do x.", "Sure, here it is.", "compliance"), ("Do x.", "", "refusal")])  # fmt: skip
    offline = study(tmp_path / "rules", 10, labelled=str(labelled))
    assert "40 completions by rules" in run(offline)
    judged_as_test(offline)
    said = run(offline, "agreement")
    assert "not in data/raw/" in said and "3 of 3 texts" in said
    with serve(by_the_rules) as server:
        asked = study(tmp_path / "llm", 10, server.url, labelled=str(labelled))
        assert "40 completions by llm" in run(asked)
        judged_as_test(asked)
        assert "corrected by labelled file" in run(asked, "agreement")
        assert server.asked.total() == len(questions(asked)) + 2 and set(server.asked.values()) == {1}
    assert files(offline) == files(asked)
    for name in ("judge", "agreement"):
        assert_same_keys(metrics(offline, name), metrics(asked, name))
    assert metrics(offline, "judge") == metrics(asked, "judge")  # this server judges by the rules
    for name in ("data/judged/verdicts.jsonl", "plots/sweep.csv"):
        assert (offline / name).read_text() == (asked / name).read_text()
    alone, both = metrics(offline, "agreement"), metrics(asked, "agreement")
    assert set(alone["rules_and_llm"].values()) == set(alone["labelled"]["llm"].values()) == {None}
    assert both["rules_and_llm"] | {"spearman_coherence": 1} == {
        "kappa": 1, "spearman_compliance": 1, "spearman_coherence": 1, "n": 38, "n_coherence": 39, "n_missing": 0, "n_empty": 1,
        "n_degenerate": 1}  # fmt: skip
    assert both["judge"]["model"] == "deepseek-chat" and both["judge"]["rubric"] == "axes"
    rubric = ROOT / "refusal/judges/rubric.txt"
    assert both["judge"]["rubric_sha256"] == hashlib.sha256(rubric.read_bytes()).hexdigest()
    assert both["judge"]["versions"] == [{"version": "deepseek-chat-0324/fp_1", "n": 39}]
    assert both["labelled"]["rules"] == both["labelled"]["llm"] == alone["labelled"]["rules"]
    assert both["labelled"]["llm"]["accuracy_binary"] == 1
    assert both["by_judge"]["rules"] == both["by_judge"]["llm"] == alone["by_judge"]["rules"]
    assert both["corrected"]["calibration"] == {"sensitivity": [1, 1], "specificity": [2, 2]}
    runtime = both["corrected"]["arms"]["runtime"]  # of one right verdict of one nothing can be told
    assert runtime["corrected"] == both["by_judge"]["llm"]["runtime"]["full"] and runtime["corrected_high"] == 1
    for path in asked.rglob("*"):
        assert path.is_dir() or CANARY.encode() not in path.read_bytes(), path


def test_killed_in_the_middle_and_run_again_no_verdict_is_lost_and_none_asked_twice(tmp_path):
    with serve(lambda n, asked: Reply(by_the_rules(n, asked), wait=0.05)) as server:
        folder = study(tmp_path / "study", 40, server.url)
        everything = questions(folder)
        process = start(folder)
        while server.answered.total() < 50:
            assert process.poll() is None and time.sleep(0.01) is None
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not (folder / "metrics").exists()
        store = Store(folder / ".refusal-store" / "store.sqlite")
        judge = LLMJudge(Endpoint(base_url=server.url), store)
        kept = [text for text in everything if any(store.get(judge._key((text,), v)) for v in judge._versions())]
        # Answered but not yet stored: at most what was under way at the kill.
        assert len(kept) >= server.answered.total() - SETTINGS["concurrency"] > 0
        assert len(kept) < len(everything)
        time.sleep(0.2)  # what was under way is over for the server too
        before = server.asked.copy()
        run(folder)
        again = server.asked - before
        assert set(again) == set(everything) - set(kept) and set(again.values()) == {1}
        assert sum(n > 1 for n in server.asked.values()) <= SETTINGS["concurrency"]
        assert metrics(folder, "judge")["layer_1_alpha_100"]["n_missing"] == 0
        total = server.asked.total()
        run(folder)
        assert server.asked.total() == total


def test_missing_verdicts_are_counted_and_too_many_are_an_error_unless_allowed(tmp_path):
    mute = lambda n, asked: "?" if any(f"door {i}?" in asked for i in range(3)) else by_the_rules(n, asked)  # noqa: E731
    with serve(mute) as server:
        folder = study(tmp_path / "study", 10, server.url)
        said = run(folder, ok=False)
        assert "judge: baseline on val: 3 of 10 completions have no verdict" in said and not (folder / "metrics").exists()
        change(folder, "judge", {"allow_missing": True})
        assert "11 without a verdict" in run(folder)
    grid = metrics(folder, "judge")
    assert {name: (cell["n"], cell["n_missing"]) for name, cell in grid.items()} == {
        "baseline": (7, 3), "random": (7, 6), "layer_1_alpha_100": (8, 2)}  # fmt: skip
    rows = [json.loads(line) for line in (folder / "data/judged/verdicts.jsonl").read_text().splitlines()]
    assert [row["compliance"] for row in rows if row["label"] == "missing"] == [None] * 11


@pytest.mark.parametrize(("section", "setting", "said"), [
    ("endpoint", {"api_key_variable": CANARY}, "endpoint.api_key_variable: must be the NAME"),
    ("endpoint", {"base_url": f"https://me:{CANARY}@localhost"}, "endpoint.base_url: must be http"),
    ("endpoint", {"base_url": "localhost"}, "endpoint.base_url: must be http"),
    ("endpoint", {"timeout_seconds": 600}, "endpoint.timeout_seconds: .*300"),
    ("endpoint", {"concurrency": 0}, "endpoint.concurrency"),
    ("endpoint", {"api_key_variable": "NOT_SET_ANYWHERE"}, "endpoint.api_key_variable: NOT_SET_ANYWHERE is not set"),
    ("judge", {"base_url": "http://localhost"}, "judge.base_url is now endpoint.base_url"),
    ("judge", {"kind": "gpt"}, "judge.kind"),
    ("judge", {"labelled": "data/raw/none.csv"}, "data/raw/none.csv cannot be read"),
])  # fmt: skip
def test_a_bad_setting_is_one_sentence_that_shows_no_key(tmp_path, section, setting, said):
    folder = study(tmp_path / "study", 2, "http://127.0.0.1:9" if section == "endpoint" else None)
    change(folder, section, setting)
    if "labelled" in setting:
        run(folder)
        judged_as_test(folder)
    assert re.search(said, output := run(folder, "agreement" if "labelled" in setting else "judge", ok=False)), output


def test_calibrate_takes_the_llm_judge_and_keeps_its_verdicts(tmp_path):
    file = tmp_path / "labelled.csv"
    file.write_text("prompt,completion,label\nDo x.,I can't help with that.,refusal\nDo x.,Sure.,compliance\nDo x.,?!,refusal\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DEEPSEEK_API_KEY": CANARY}

    def calibrate(*options: str, ok: bool = True) -> str:
        command = [sys.executable, "-m", "refusal.judges.calibrate", str(file), "--judge", "llm", *options]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) is ok and "Traceback" not in done.stderr and CANARY not in done.stdout + done.stderr
        return done.stdout if ok else done.stderr

    with serve(by_the_rules) as server:
        first = calibrate("--base-url", server.url, "--model", "some-judge")
        assert calibrate("--base-url", server.url, "--model", "some-judge") == first
        assert set(server.asked.values()) == {1} and {body["model"] for body in server.bodies} == {"some-judge"}
    assert json.loads(first)["n"] == 3 and json.loads(first)["n_missing"] == 0
    with serve(lambda n, completion: "safe" if "can't" in completion else "unsafe\nS2") as server:
        guarded = json.loads(calibrate("--base-url", server.url, "--rubric", "classifier"))
        assert {body["messages"][-1]["role"] for body in server.bodies} == {"assistant"}
    assert guarded["confusion"]["refusal"] == {"compliance": 0, "partial_refusal": 0, "refusal": 2}  # "?!" is noise to the rules
    assert guarded["confusion"]["compliance"]["compliance"] == 1
    with serve(lambda n, asked: "?") as server:
        assert "3 of 3 completions have no verdict" in calibrate("--base-url", server.url, ok=False)
    assert calibrate("--base-url", "here", ok=False).startswith("--base-url: must be http")
