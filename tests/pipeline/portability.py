"""python tests/pipeline/portability.py: rebuild the study as another processor would, and compare it with the committed figures.

One thread, torch's kernels without vector instructions, oneDNN and MKL held to AVX2. `make portability` writes the greatest
difference to metrics/portability.json; with `check` nothing is written. Exits with 1 where a figure is out, or where the
instruction set made no difference to the activations, so that nothing was shown.
"""

import math
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from perf.workload import machine  # noqa: E402
from pipeline.study import changed, clone, outputs, run, stages_run  # noqa: E402
from stages import verify, write_json  # noqa: E402

NARROW = {
    **{"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2", "DNNL_MAX_CPU_ISA": "AVX2"},
    **{"MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
}


def main(write: bool) -> int:
    with tempfile.TemporaryDirectory(prefix="portability-") as name:
        folder = clone(Path(name) / "study")
        run(folder, "make", "-o", "restore", "pull")
        with changed(folder, {"compute.threads": 1}):
            run(folder, "dvc", "repro", "--force", "--downstream", "behaviour", "activations", **NARROW)
        ours, theirs = outputs(ROOT), outputs(folder)
        if ours["data/activations"] == theirs["data/activations"]:
            print("portability: the activations are the same bytes, so the instruction set was none other: nothing is shown")
            return 1
        os.chdir(folder)
        found, flipped, n = verify.compare()
        status = verify.main(only_committed=True)
        if status == 0:
            again = run(folder, "make", "-o", "restore", "repro", **NARROW)
            assert not stages_run(again) and "verify: everything as committed" in again, again
            assert run(folder, "git", "status", "--porcelain") == "", "the tree is not as Git knows it"
    worst = next((each for each in found if math.isfinite(each.excess)), None)
    if write:
        figures = {
            "n_different": len(found),
            "n_out": sum(each.excess > 1 for each in found),
            "greatest": worst and {"figure": worst.figure, "committed": worst.committed, "rebuilt": worst.rebuilt, "of_tolerance": worst.excess},
            "n_completions": n,
            "completions_different": flipped,
            "environment": NARROW,
            "machine": machine(),
        }  # fmt: skip
        write_json(ROOT / "metrics/portability.json", figures)
    return status


if __name__ == "__main__":
    sys.exit(main(write="check" not in sys.argv[1:]))
