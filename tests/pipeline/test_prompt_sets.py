"""Each published set of harmful prompts by one line of params.yaml: the whole study runs to its end, on a tiny random model.

All stages of all studies run in one process, since most of what a small study takes is imports; how DVC runs them is tested
elsewhere.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import LLAMA, byte_level
from place import ROOT, Place, params_with

from pipeline.study import SMALL, metrics
from refusal.io.files import read_jsonl

REFERENCE = Path(os.environ.get("REFUSAL_REFERENCE", "none")) / "prompts"
pytestmark = pytest.mark.skipif(not REFERENCE.is_dir(), reason="REFUSAL_REFERENCE names no folder of published sets")
SETS = ["advbench.csv", "harmbench_val.csv", "jailbreakbench.csv", "malicious_instruct.txt", "paper_harmful_train.json"]
SETS += ["paper_harmful_val.json", "strongreject.csv", "xstest_prompts.csv"]
ONE_LAYER = "harmbench_val.csv"  # swept alone, it leaves no subspace to try where prompts are no pairs
WORDS = "apple river candle meadow button ladder violin pepper garden mirror basket pillow lantern kettle bridge".split()
OWN = [f"Describe {word} {WORDS[i * 2 % 15]} {WORDS[i * 4 % 15]} {i}" for i, word in enumerate(WORDS * 2)]
STAGES = [*yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"], "plan"]
RUN = """
import os, runpy, sys
stages, folders = sys.argv[1].split(), sys.argv[2:]
del sys.argv[1:]
for folder in folders:
    os.chdir(folder)
    for stage in stages:
        runpy.run_module(f"stages.{stage}", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    """The folder of each set's study, and what all of them said."""
    top = tmp_path_factory.mktemp("sets")
    byte_level(top / "model", "llama", LLAMA, max_position_embeddings=2048)
    small = SMALL | {"prompts.n_pairs": 30, "prompts.n_unrelated": 24, "activations.methods": ["sequential", "batched"]}
    for name in SETS:
        (top / name).mkdir()
        place = Place(top / name)
        params_with(top / name, small | {"model.id": str(top / "model"), "benchmark.limit": 2})
        params_with(top / name, {"prompts.harmful": f"data/raw/{name}"})  # the one line
        if name == ONE_LAYER:
            params_with(top / name, {"sweep.layers": [2], "select.top": 2})
        place.write_rows("data/raw/harmless.jsonl", ({"prompt": text} for text in OWN))
        shutil.copyfile(REFERENCE / name, top / name / "data/raw" / name)
        for path in (
            "refusal/report/published.json",
            *(f"refusal/analysis/tasks/organism_capitals.{e}" for e in ("jsonl", "yaml")),
        ):
            place.write(path, (ROOT / path).read_text(encoding="utf-8"))
    command = [sys.executable, "-c", RUN, " ".join(STAGES), *(str(top / name) for name in SETS)]
    # The resume store is shared: what all studies ask of the model alike is computed once.
    done = subprocess.run(command, cwd=top, env=place.environment | {"DVC_ROOT": str(top)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return top, done.stdout + done.stderr


def numbers(value):
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, float) else [n for part in parts for n in numbers(part)]


@pytest.mark.parametrize("name", SETS)
def test_the_study_of_a_published_set_runs_to_its_end(studies, name):
    folder, paired = studies[0] / name, name == "xstest_prompts.csv"
    pairs, unrelated = (read_jsonl(folder / f"data/prompts/{rows}.jsonl") for rows in ("pairs", "unrelated"))
    assert len(pairs) == 30 and len(unrelated) == 24 and {row["safe"] is not None for row in pairs} == {paired}
    files = {path.stem: metrics(folder, path.stem) for path in (folder / "metrics").glob("*.json")}
    assert all(math.isfinite(n) for value in files.values() for n in numbers(value))
    test = [row for row in pairs if row["split"] == "test"]
    safe = test if paired else [row for row in unrelated if row["split"] == "test"]

    evaluated, science = files["evaluate"], files["science"]
    for arm in ("baseline", "runtime", "orthogonalized", "random", "random_weights", "harmless"):
        assert (evaluated[arm]["n"], evaluated[arm]["n_safe"]) == (len(test), len(safe)), arm
    assert evaluated["n_harmless"] <= len([row for row in unrelated if row["split"] == "test"])
    asked = [row for row in read_jsonl(folder / "data/evaluated/completions.jsonl") if row["arm"] == "baseline"]
    assert [row["prompt"] for row in asked] == [row["harmful"] for row in test] + [row["safe"] for row in safe]

    left_out = {f"{method}-{pairing}" for method in ("sequential", "batched") for pairing in ("matched", "shuffled")}
    assert {arm for arm, m in files["directions"].items() if m is None} == (set() if paired else left_out)
    assert files["directions"]["sequential-unrelated"]["n_safe"] == sum(row["split"] == "train" for row in unrelated)
    families = {row["family"] for row in science["arms"].values()}
    assert families >= {"difference", "logistic", "lda", "affine"} | (set() if name == ONE_LAYER else {"subspace"})
    for needs_pairs in ("spectrum", "optimised_loss"):
        assert (science[needs_pairs] is not None) is paired
    assert (families >= {"paired_svd", "optimised"}) is paired and ("svd_2" in science["arms"]) is paired
    assert (science["verdict"]["best_subspace"] in science["arms"]) is (name != ONE_LAYER)
    page = (folder / "report/index.html").read_text(encoding="utf-8")
    assert ("These are no pairs" in page) is not paired and f"data/raw/{name}" in page
    settings = {row["quantity"]: row for row in files["reproduction"]["rows"]}
    assert settings["settings.n_pairs"]["ours"] == (30 if paired else None)


def test_that_prompts_are_no_pairs_is_said_once_a_study(studies):
    _, said = studies
    assert said.count("prompts: these are no pairs: what contrasts the halves of a pair is left out, and null") == len(SETS) - 1
    assert "data/raw/harmbench_val.csv: 19 rows ask about a text of their own (ContextString), and are left out" in said


def test_the_plan_counts_each_prompt_once(studies):
    """Of activations: every train and val prompt once a method, and once what all prompts begin with (batched)."""
    top, said = studies
    planned = [int(line.split()[1]) for line in said.splitlines() if line.startswith("activations   ")]
    for name, passes in zip(SETS, planned, strict=True):
        rows = [row for kind in ("pairs", "unrelated") for row in read_jsonl(top / name / f"data/prompts/{kind}.jsonl")]
        texts = [row[half] for row in rows if row["split"] != "test" for half in ("harmful", "safe") if row.get(half)]
        assert passes == 2 * len(texts) + 1 and len(set(texts)) == len(texts)
