"""The row of metrics/organisms.json, its picture, and what `make organisms` says of a wrong name."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from refusal.report.models import KINDS
from refusal.report.organisms import figures, mean_between_layers, picture

ROOT = Path(__file__).parents[2]
RATES = {"compliance": 0.5, "compliance_low": 0.4, "compliance_high": 0.6, "n": 100, "coherence": 1.0, "exact": 0.4, "kl": 0.01}
COSINES = [[None, None, None], [None, 1.0, 0.5], [None, 0.5, 1.0]]


def study(kind):
    planted = kind == "planted"

    def arm(family, layer=None, cosine=None, **more):
        return {"family": family, "layer": layer, "cosine_planted": cosine} | RATES | more

    arms = {
        "baseline": arm("baseline", refusal=1.0, refusal_low=0.96, refusal_high=1.0),
        "rank_1": arm("difference", 2, 0.3 if planted else None, compliance=0.9),
        "svd_2": arm("subspace", 2),
        "qr_2": arm("subspace"),
        "per_layer": arm("per_layer"),
    }
    if planted:
        arms |= {"planted": arm("planted", None, 1.0, compliance=0.97)}
        arms |= {"less_planted.1": arm("less_planted", 1, 0.0, compliance=0.1)}
    science = {
        "arms": arms,
        "verdict": {"verdict": "single", "reason": None, "by": "rank_1", "difference": {"mediates": True}},
        "controls": {"random_1": RATES | {"n_arms": 10}},
        "zero": [None, {"zero": 0.2}, {"zero": -0.1}],
        "layer": 2,
        "estimators": {},
    }
    judge = {
        "baseline": {"layer": None, "compliance": 0.0, "n": 200},
        "layer_1_alpha_100": {"layer": 1, "compliance": 0.2},
        "layer_2_alpha_100": {"layer": 2, "compliance": 0.9},
    }
    direction = {"separation": [None, 7.0, 5.0], "peak_separation": 7.0, "cross_layer_cosine": COSINES}
    model = {"refusal_safe": 0.0, "facts_accuracy": 0.98}
    return figures(kind, model, {"batched-matched": direction}, judge, science)


def test_a_row_of_the_grid():
    row = study("planted")
    assert (row["verdict"], row["by"], row["difference_mediates"], row["baseline_refusal_low"]) == (
        "single",
        "rank_1",
        True,
        0.96,
    )
    assert (row["compliance_single"], row["compliance_planted"], row["cosine_planted"]) == (0.9, 0.97, 0.3)
    assert (row["separation_peak"], row["cross_layer_cosine_mean"], row["facts_accuracy"]) == (7.0, 0.5, 0.98)
    assert set(row["compliance_rank_k"]) == {"svd_2", "qr_2"} and row["compliance_rank_k"]["svd_2"]["n"] == 100
    assert row["by_layer"] == {"compliance": {"1": 0.2, "2": 0.9}, "separation": {"1": 7.0, "2": 5.0}, "n": 200}
    assert row["zero"] == [None, 0.2, -0.1]
    assert row["less_planted"]["1"]["compliance"] == 0.1 and row["random"]["random_1"]["n_arms"] == 10


def test_other_kinds_have_the_same_keys_and_no_planted_figures():
    row = study("distributed")
    assert list(row) == list(study("planted"))
    assert row["compliance_planted"] is row["planted"] is row["cosine_planted"] is None and row["less_planted"] == {}


def test_the_picture_marks_every_layer_of_every_kind_that_refuses():
    """Marks of two layers each at d = 7 and 5 on an axis to 7, compliance 0.2 and 0.9 on one to 1, and four in the legend."""
    drawn = picture({"distributed.0": study("distributed"), "planted.1": study("planted"), "none.0": study("none")})
    marks = re.findall(r'<path transform="translate\(([\d.]+),([\d.]+)\)"[^>]* fill="(#\w+)"', drawn)
    at = [(round(7 * float(x) / 560, 6), round(1 - float(y) / 260, 6), ink) for x, y, ink in marks[:-4]]
    assert at == [(d, compliance, ink) for ink in ("#d1570f", "#1c7a3c") for d, compliance in ((7.0, 0.2), (5.0, 0.9))]
    assert "n = 200 harmful val prompts" in drawn and "Separation is not mediation" in drawn


def test_mean_between_layers():
    assert mean_between_layers(COSINES) == 0.5 and mean_between_layers([[None]]) is None


def test_what_mediation_md_says_of_seeds_that_stand_out():
    """Each sentence made from the committed figures; words that claim something of all seeds hold of all."""
    organisms = json.loads((ROOT / "metrics/organisms.json").read_text(encoding="utf-8"))
    text = " ".join((ROOT / "docs/mediation.md").read_text(encoding="utf-8").split())
    refuse = {name: o for name, o in organisms.items() if not name.startswith("none.")}

    def restores(name, control):
        row = organisms[name]["random"][control]
        return f"{row['compliance']:.2f} [{row['compliance_low']:.2f}, {row['compliance_high']:.2f}]"

    (usual,) = {restores(name, "harmless") for name in refuse if name != "single.1"}
    n = organisms["single.1"]["random"]["harmless"]["n"]
    assert f"two harmless sets restores {usual} on every seed" in text
    assert f"it restores {restores('single.1', 'harmless')} ({n} prompts)" in text
    assert f"on which the verdict rests, restore {restores('single.1', 'random_1')} there" in text
    assert organisms["single.1"]["single"]["compliance"] <= organisms["single.1"]["random"]["harmless"]["compliance"]
    distributed = [o for name, o in organisms.items() if name.startswith("distributed.")]
    verdicts = ", ".join(o["verdict"] + (f" by `{o['by']}`" if o["by"] else "") for o in distributed)
    assert f"whatever the verdict: {verdicts}." in text and not any(o["difference_mediates"] for o in distributed)
    assert all(KINDS["distributed"][1](o) for o in distributed)
    assert "subspace" not in {o["verdict"] for o in organisms.values()}


@pytest.mark.parametrize(
    ("names", "says"), [(["tame.0"], "there is no organism tame.0; choose among single.0"), ([], "run `dvc repro prompts` first")]
)
def test_a_wrong_name_and_missing_prompts_are_one_sentence(tmp_path, names, says):
    for name in ("params.yaml", "requirements.lock", "dvc.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "stages.organisms", *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and says in done.stderr and "Traceback" not in done.stderr
