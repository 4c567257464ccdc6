"""The same commit gives the same figures: on one machine to the byte, but for sums that threads split; elsewhere nearly."""

import json
import math

import pytest

from pipeline.study import ROOT, change, copy, outputs, run, small

# Of a processor without vector instructions (ATEN_CPU_CAPABILITY=default) every figure was within a thousandth of these.
GOLDEN = json.loads((ROOT / "tests/pipeline/golden.json").read_text())




def figures(value: object, at: str = "") -> dict[str, object]:
    """Every leaf of a metrics file, by its place."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return {at: value} if parts is None else {k: v for name, part in parts for k, v in figures(part, f"{at}/{name}").items()}


def test_another_number_of_threads_gives_the_same_bytes_but_for_the_eighth_digit_of_norms(finished, tmp_path):
    """As far as the checkpoints; what two threads change in all of a study is in metrics/soak.json (`make soak`)."""
    first, _ = finished
    second = small(copy(tmp_path / "study"))
    change(second, "compute", threads=2)
    run(second, "dvc", "repro", "orthogonalize")
    ours, theirs = outputs(first), outputs(second)
    by_threads = "metrics/orthogonalize.json"  # the embedding's norms, sums over a whole matrix that threads share
    assert {path for path in theirs if ours[path] != theirs[path]} <= {by_threads} and len(theirs) > 12
    one, two = (figures(json.loads((folder / by_threads).read_text())) for folder in (first, second))
    assert one.keys() == two.keys()
    for place, value in one.items():
        same = math.isclose(value, two[place], rel_tol=1e-6) if isinstance(value, float) else value == two[place]
        assert same, (place, value, two[place])


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
