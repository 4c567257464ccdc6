"""The same commit gives the same figures: on one machine to the byte, but for sums that threads split; elsewhere nearly."""

import json
import math

import pytest
from place import ROOT, params_with

from pipeline.study import metrics, outputs, run, small

# Of a processor without vector instructions (ATEN_CPU_CAPABILITY=default) every figure was within a thousandth of these.
GOLDEN = json.loads((ROOT / "tests/pipeline/golden.json").read_text())


def figures(value: object, at: str = "") -> dict[str, object]:
    """Every leaf of a metrics file, by its keys joined with /."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return {at[1:]: value} if items is None else {k: v for name, item in items for k, v in figures(item, f"{at}/{name}").items()}


def test_another_number_of_threads_gives_the_same_bytes_but_for_the_eighth_digit_of_norms(finished, tmp_path):
    """As far as the checkpoints; what two threads change in all of a study is in metrics/soak.json (`make soak`)."""
    first, second = finished[0], small(tmp_path / "study")
    params_with(second, {"compute.threads": 2})
    run(second, "dvc", "repro", "orthogonalize")
    ours, theirs = outputs(first), outputs(second)
    # There are the embedding's norms, sums over a whole matrix that threads share.
    assert {path for path in theirs if ours[path] != theirs[path]} <= {"metrics/orthogonalize.json"} and len(theirs) > 12
    one, two = (figures(metrics(folder, "orthogonalize")) for folder in (first, second))
    assert one.keys() == two.keys()
    for key, value in one.items():
        same = math.isclose(value, two[key], rel_tol=1e-6) if isinstance(value, float) else value == two[key]
        assert same, (key, value, two[key])


@pytest.mark.parametrize("path", GOLDEN["values"])
def test_a_tiny_whole_run_comes_out_as_it_did(finished, path):
    name, key = path.split("/", 1)
    value, wanted = figures(metrics(finished[0], name))[key], GOLDEN["values"][path]
    assert math.isclose(value, wanted, rel_tol=GOLDEN["tolerance"]), (value, wanted)
