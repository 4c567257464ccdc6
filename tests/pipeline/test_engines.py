"""Ray in place of the stage's own process: no hash of DVC's and no byte of an output knows which of them computed."""

import shutil
import sys

from place import params_with

from pipeline.study import digests, run, runs, stages_run


def test_the_engine_is_in_no_hash_and_the_outputs_are_the_same(finished, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "study", symlinks=True)
    before = digests(folder, "data/activations", "data/sweep")
    params_with(folder, {"compute.engine": "ray", "compute.workers": 2})
    assert stages_run(run(folder, "dvc", "repro")) == []
    shutil.rmtree(folder / ".refusal-store")
    shutil.rmtree(folder / "data/activations")
    (folder / "data/sweep/completions.jsonl").unlink()
    for stage in ("activations", "sweep"):
        run(folder, sys.executable, "-m", f"stages.{stage}")
        assert runs(folder)[-1]["workers"] == 2 and runs(folder)[-1]["tokens"] > 0
    assert digests(folder, "data/activations", "data/sweep") == before and len(before) >= 4
