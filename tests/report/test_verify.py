"""Which differences between two runs are rounding, and which are another figure."""

import hashlib
import json
import math
import sys

import pytest
from place import IDENTITY, Place

from refusal.report.verify import differences, digests, flips

FIGURES = {"n": 40, "rate": 0.975, "norm": 131.72, "residual": 3e-9, "best": "layer_5", "low": None, "layers": [0.5, 0.25]}


@pytest.mark.parametrize(
    ("change", "excess"),
    [
        ({}, None),
        ({"norm": 131.72 * (1 + 5e-5)}, 0.5),
        ({"norm": 131.72 * (1 + 2e-4)}, 2.0),
        ({"residual": 4e-7}, (4e-7 - 3e-9) / 2**-20),
        ({"residual": 3e-6}, (3e-6 - 3e-9) / 2**-20),
        ({"rate": 0.95}, 0.025 / 0.975e-4),
        ({"n": 41}, math.inf),
        ({"best": "layer_6"}, math.inf),
        ({"low": 0.1}, math.inf),
        ({"layers": [0.5, 0.25, 0.125]}, math.inf),
    ],
    ids=str,
)
def test_a_difference_is_told_in_units_of_its_tolerance(change, excess):
    found = differences(FIGURES, FIGURES | change, "float32", "metrics/a.json")
    assert [each.figure.split("/")[2] for each in found] == list(change)
    assert [each.excess for each in found] == ([] if excess is None else [pytest.approx(excess, rel=1e-3)])


def test_a_figure_that_one_side_lacks_is_a_difference():
    less = {key: value for key, value in FIGURES.items() if key != "rate"}
    for one, other in ((FIGURES, less), (less, FIGURES), (FIGURES, None)):
        assert differences(one, other, "float32", "a")[0].excess == math.inf


def test_a_coarser_dtype_has_a_higher_floor():
    assert [differences({"x": 0.0}, {"x": 1e-3}, dtype, "a")[0].excess > 1 for dtype in ("float32", "float16", "bfloat16")] == [
        *(True, False, False)
    ]


def test_flipped_completions_are_counted_and_explain_that_much_of_a_rate():
    rows = [{"cell": cell, "id": f"p{i}", "completion": f"{cell} {i}"} for cell in "ab" for i in range(40)]
    other = [dict(row) for row in rows]
    other[43]["completion"] = "another"
    one, two = ({"sweep": digests(each, "cell")} for each in (rows, other))
    assert one["sweep"]["a"].split()[7] == hashlib.sha256(b"a 7").hexdigest()[:6]
    found, n = flips(one, two)
    assert (found, n) == (["sweep/b/p3"], 80)
    assert flips(one, {}) == ([], 0)
    halves = [{"arm": "a", "id": "p0", "half": half, "completion": half} for half in ("harmful", "safe")]
    assert digests(halves, "arm")["prompts"] == "p0/harmful p0/safe"

    def excess(name: str, one: float, other: float) -> float:
        return differences({name: one}, {name: other}, "float32", "a", n_flips=1, n=40)[0].excess

    assert excess("compliance", 0.5, 0.525) < 1 < excess("compliance", 0.5, 0.55)
    assert excess("compliance_low", 0.5, 0.525) < 1 < excess("cosine", 0.5, 0.525)
    assert excess("n_degenerate", 3, 4) == 1 and excess("n_degenerate", 3, 5) == 2 and excess("n", 3, 4) == math.inf
    assert differences({"n_degenerate": 3}, {"n_degenerate": 4}, "float32", "a")[0].excess == math.inf


@pytest.fixture
def place(tmp_path):
    """A checkout with one metrics file, one plot and the completions' digests, committed."""
    place = Place(tmp_path)
    place.write("metrics/a.json", json.dumps(FIGURES))
    place.write("metrics/completions.json", json.dumps({"sweep": {"prompts": "p0 p1 p2", "baseline": "aaaaaa bbbbbb cccccc"}}))
    place.write("plots/a.csv", "layer,d\n0,1.5\n1,\n")
    for command in ("git init -q", "git add -A", "git commit -qm figures"):
        place.run(*command.split(), **IDENTITY)
    return place


def test_the_command_says_what_is_out_and_exits_with_1(place):
    assert place.stage("verify") == (
        0,
        "verify: 0 figures differ in a digit, 0 by more than rounding; 0 of 3 texts differ\nverify: everything as committed\n",
    )
    place.write("plots/a.csv", "layer,d\n0,1.6\n1,\n")
    status, said = place.stage("verify")
    assert status == 1 and "plots/a.csv/0/d: 1.5 committed, 1.6 here" in said and "everything" not in said
    place.write("plots/a.csv", "layer,d\n0,1.5\n1,\n")
    place.write("metrics/completions.json", json.dumps({"sweep": {"prompts": "p0 p1 p2", "baseline": "aaaaaa bbbbbb dddddd"}}))
    status, said = place.stage("verify")
    assert status == 1 and "sweep/baseline/p2: another completion" in said


def test_only_the_committed_study_is_compared(place):
    place.write("plots/a.csv", "layer,d\n0,9\n1,\n")
    place.set("sweep", n_random=3)
    command = (sys.executable, "-m", "stages.verify", "committed")
    assert place.run(*command) == (0, "verify: not compared with the committed figures: params.yaml is not as committed\n")
    place.run("git", "checkout", "params.yaml")
    assert place.run(*command).status == 1
    place.run("rm", "-rf", ".git")
    assert place.run(*command) == (0, "verify: Git holds no figures here to compare with\n")


def test_digits_of_another_processor_are_kept_aside_and_taken_up_again(place):
    def lock(activations: str, code: str = "c" * 32) -> str:
        dep, out = (
            f"- path: {path}\n      hash: md5\n      md5: {md5}" for path, md5 in (("refusal/lm", code), ("data/a", activations))
        )
        return f"schema: '2.0'\nstages:\n  activations:\n    cmd: python\n    deps:\n    {dep}\n    outs:\n    {out}\n"

    ours, theirs, digits = lock("a" * 32), lock("b" * 32), "layer,d\n0,1.50001\n1,\n"
    place.write("dvc.lock", ours)
    place.run("git", "add", "-A")
    place.run("git", "commit", "-qm", "lock", **IDENTITY)
    verify, rebuilt = ((sys.executable, "-m", "stages.verify", "committed"), (sys.executable, "-m", "stages.rebuilt"))

    def here() -> tuple[str, ...]:
        return tuple((place.folder / name).read_text() for name in ("dvc.lock", "plots/a.csv"))

    committed = here()
    assert "kept" not in place.run(*verify).said and place.run(*rebuilt) == (0, "")
    place.write("dvc.lock", theirs)
    place.write("plots/a.csv", digits)
    status, said = place.run(*verify)
    assert status == 0 and "1 figures differ in a digit" in said and "are kept in .refusal-store/rebuilt" in said
    assert here() == committed and place.run("git", "status", "--porcelain", "dvc.lock", "plots").said == ""
    assert "2 files as this processor" in place.run(*rebuilt).said and here() == (theirs, digits)
    place.run(*verify)
    place.write("plots/a.csv", "layer,d\n0,7\n1,\n")  # by hand, since
    place.run(*rebuilt)
    assert here() == (theirs, "layer,d\n0,7\n1,\n")

    # A figure that is out, or a lock of code that was committed without it, stays for a person to see.
    status, said = place.run(*verify)
    assert status == 1 and here()[0] == theirs
    place.write("plots/a.csv", digits)
    place.write("dvc.lock", lock("b" * 32, "d" * 32))
    assert place.run(*verify).status == 0 and here() == (lock("b" * 32, "d" * 32), digits)
