"""The organism holds on other seeds than the committed one: initial weights and corpus both drawn anew."""

import os
import subprocess
import sys

import pytest
from place import ROOT, params_with

from pipeline.study import copy, run


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_study_comes_out_on_another_seed(tmp_path, seed):
    folder = copy(tmp_path)
    params_with(folder, {"organism.seed": seed, "organism.corpus_seed": seed})
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "repro", "benchmark", "evaluate")
    checks = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT / "tests/pipeline/check_figures.py")]
    done = subprocess.run(checks, cwd=ROOT, env={**os.environ, "REFUSAL_STUDY": str(folder)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
