"""The same commit gives the same bytes on one machine, on one thread and on two; and on any machine the same figures, nearly."""

import json
import math

import pytest

from pipeline.study import ROOT, change, copy, outputs, run, small

# Of a processor without vector instructions (ATEN_CPU_CAPABILITY=default) every figure was within a thousandth of these.
GOLDEN = json.loads((ROOT / "tests/pipeline/golden.json").read_text())


def test_a_second_run_gives_the_same_bytes_on_another_number_of_threads_too(finished, tmp_path):
    first, _ = finished
    second = small(copy(tmp_path / "study"))
    change(second, "compute", threads=2)
    run(second, "dvc", "repro")
    assert outputs(second) == outputs(first) and len(outputs(first)) > 20


def found(folder, path: str) -> float:
    name, *keys = path.split("/")
    value = json.loads((folder / "metrics" / f"{name}.json").read_text())
    for key in keys:
        value = value[int(key) if isinstance(value, list) else key]
    return value


@pytest.mark.parametrize("path", GOLDEN["values"])
def test_a_tiny_whole_run_comes_out_as_it_did(finished, path):
    value, wanted = found(finished[0], path), GOLDEN["values"][path]
    assert math.isclose(value, wanted, rel_tol=GOLDEN["tolerance"]), (value, wanted)
