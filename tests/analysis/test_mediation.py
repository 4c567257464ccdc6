"""The verdict's criteria, case by case."""

import pytest

from refusal.analysis.mediation import Evidence, verdict

STRONG = Evidence("strong", 0.84, 0.8, 0.001)
WEAK = Evidence("weak", 0.2, 0.2, 0.001)
UNCORRECTED = Evidence("uncorrected", 0.84, 0.8, 0.06)
NO_BETTER_THAN_RANDOM = Evidence("random does it too", 0.84, 0.1, 0.001)


@pytest.mark.parametrize(
    ("difference", "above_random", "p", "mediates"),
    [
        (0.5, 0.5, 0.049, True),
        (0.49, 0.9, 0.001, False),
        (0.9, 0.49, 0.001, False),
        (0.9, 0.9, 0.05, False),
    ],
)
def test_the_limits_of_mediation_are_those_the_criteria_name(difference, above_random, p, mediates):
    arm = Evidence("a", difference, above_random, p)
    assert arm.mediates is mediates
    assert arm.shown() == {
        "name": "a",
        "difference_low": difference,
        "above_random_low": above_random,
        "p_holm": p,
        "mediates": mediates,
    }
    found = verdict(1.0, None, arm, None)
    assert found["verdict"] == ("subspace" if mediates else "none") and found["subspace"] == arm.shown()


@pytest.mark.parametrize(
    ("refusal", "single", "subspace", "gap", "expected"),
    [
        (1.0, STRONG, STRONG, -0.1, ("single", None, "strong")),
        (1.0, STRONG, STRONG, 0.05, ("single", None, "strong")),
        (1.0, STRONG, STRONG, 0.1, ("single", None, "strong")),
        (1.0, STRONG, STRONG, 0.11, ("subspace", None, "strong")),
        (1.0, STRONG, STRONG, 0.2, ("subspace", None, "strong")),
        (1.0, WEAK, STRONG, 0.5, ("subspace", None, "strong")),
        (1.0, WEAK, WEAK, 0.0, ("none", "no_mediation", None)),
        (1.0, UNCORRECTED, WEAK, -0.5, ("none", "no_mediation", None)),
        (1.0, NO_BETTER_THAN_RANDOM, WEAK, -0.5, ("none", "no_mediation", None)),
        (1.0, WEAK, NO_BETTER_THAN_RANDOM, 0.5, ("none", "no_mediation", None)),
        (0.3, STRONG, STRONG, 0.0, ("none", "no_refusal", None)),
        (0.49, STRONG, STRONG, 0.0, ("none", "no_refusal", None)),
        (0.5, STRONG, STRONG, 0.0, ("single", None, "strong")),
        (1.0, STRONG, None, None, ("single", None, "strong")),
        (1.0, None, None, None, ("none", "no_mediation", None)),
    ],
)
def test_verdict(refusal, single, subspace, gap, expected):
    found = verdict(refusal, single, subspace, gap)
    assert (found["verdict"], found["reason"], found["by"]) == expected
    assert found["baseline_refusal"] == refusal and found["subspace_above_single_low"] == gap
    if single is not None:
        assert found["single"]["name"] == single.name and found["single"]["mediates"] is single.mediates
