"""The paper's rule, one criterion at a time and on the scores that the paper's five runs published."""

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from refusal.io.errors import UserError
from refusal.method.paper_selection import Candidate, choose, layers_below, metrics, ranked

GOOD = Candidate(layer=3, bypass=-2.0, induce=1.0, kl=0.05)
N_LAYERS = 10
REFERENCE = Path(os.environ.get("REFUSAL_REFERENCE", "none"))
RUNS = ("gemma-2b-it", "llama-2-7b-chat-hf", "meta-llama-3-8b-instruct", "qwen-1_8b", "yi-6b-chat")


@pytest.mark.parametrize(
    ("change", "criterion", "passes"),
    [
        ({"kl": 0.1}, "kl", True),
        ({"kl": math.nextafter(0.1, 1)}, "kl", False),
        ({"kl": math.nan}, "kl", False),
        ({"induce": math.nextafter(0, 1)}, "induce", True),
        ({"induce": 0.0}, "induce", False),
        ({"layer": 7}, "layer", True),
        ({"layer": 8}, "layer", False),
    ],
)
def test_each_criterion_at_its_limit(change, criterion, passes):
    one = replace(GOOD, **change)
    assert one.passes(N_LAYERS) == {"kl": True, "induce": True, "layer": True} | {criterion: passes}
    choice = choose([one], N_LAYERS)
    assert choice.chosen == (one if passes else None) and choice.leaves_none == ([] if passes else [criterion])
    assert choice.best_without_induce == (one if passes or criterion == "induce" else None)


@pytest.mark.parametrize(("n_layers", "first_out"), [(3, 2), (5, 4), (18, 14), (24, 19), (32, 25), (100, 80)])
def test_the_last_fifth_is_rounded_as_the_papers_code_has_it(n_layers, first_out):
    assert layers_below(n_layers) == first_out == int(n_layers * (1.0 - 0.20))


def test_the_least_bypass_is_chosen_of_those_that_pass():
    better, first, tied = replace(GOOD, layer=5, bypass=-3.0), replace(GOOD, layer=1), replace(GOOD, layer=2)
    costly, weak, late = (
        replace(better, bypass=-9, kl=0.2),
        replace(better, bypass=-8, induce=-1),
        replace(better, bypass=-7, layer=9),
    )
    choice = choose([costly, first, weak, tied, replace(GOOD, bypass=math.nan), better, late], N_LAYERS)
    assert choice.passing == [better, first, tied] and choice.chosen is better and choice.reason is None
    assert choice.without_induce == [weak, better, first, tied] and choice.best_without_induce is weak


def test_what_leaves_none_is_said_in_one_sentence():
    weak = [replace(GOOD, layer=i, induce=-0.36 - i, bypass=-float(i)) for i in range(4)]
    choice = choose([*weak, replace(GOOD, kl=0.3, induce=-1)], N_LAYERS)
    assert choice.chosen is None and choice.leaves_none == ["induce"] and choice.best_without_induce == weak[3]
    assert choice.reason == (
        "no candidate of 5 passes: 4 have KL at most 0.1, 0 a refusal score above 0 of harmless prompts where added "
        "(the highest: -0.36), 5 lie below layer 8; without the criterion induce some would"
    )
    hopeless = choose([replace(GOOD, kl=0.3, induce=-1)], N_LAYERS)
    assert hopeless.leaves_none == [] and hopeless.best_without_induce is None
    assert hopeless.reason.endswith("no criterion alone is to blame")
    assert choose([], N_LAYERS).reason.startswith("no candidate of 0 passes: 0 have KL")


def judged(layer):
    figures = {"compliance": layer / 10, "compliance_low": 0.0, "compliance_high": 1.0, "coherence": 0.5, "score": 0.2, "n": 40}
    return {f"layer_{layer}_alpha_100": {"layer": layer, "alpha": 1.0, **figures}}


JUDGED = {name: cell for layer in range(10) for name, cell in judged(layer).items()}


def selection(*candidates):
    return metrics(choose(candidates, N_LAYERS), candidates, N_LAYERS) | {"by": "paper"}


def test_ranks_are_the_next_best_by_the_rule_and_marked_where_a_criterion_is_left_out():
    four = [replace(GOOD, layer=i, bypass=-float(i)) for i in (1, 2, 4)] + [replace(GOOD, layer=6, bypass=-6.0, induce=-1.0)]
    ranks = ranked(selection(*four), JUDGED, 2, "sequential")
    assert [(rank, cell["layer"], cell["name"]) for rank, cell in ranks.items()] == [
        ("rank_1", 4, "sequential_layer_4_alpha_100"),
        ("rank_2", 2, "sequential_layer_2_alpha_100"),
    ]
    first = ranks["rank_1"]
    assert (first["alpha"], first["compliance"], first["n"], first["n_tied"], first["margin_items"]) == (1.0, 0.4, 40, 1, None)
    assert first["bypass"] == -4.0 and first["criterion_left_out"] is None
    assert list(ranked(selection(*four), JUDGED, 20, "m")) == ["rank_1", "rank_2", "rank_3"]  # what does not pass is no rank
    none = selection(*(replace(one, induce=-1.0) for one in four))
    ranks = ranked(none, JUDGED, 2, "m")
    assert [(cell["layer"], cell["criterion_left_out"]) for cell in ranks.values()] == [(6, "induce"), (4, "induce")]
    assert none["chosen"] is None and none["best_without_induce"] == {"layer": 6, "position": -1}


def test_without_scores_and_without_any_candidate_it_is_said_what_to_do():
    with pytest.raises(UserError, match=r"^params\.yaml: select\.by is paper, .* run `dvc repro selection`"):
        ranked({"by": "compliance", "order": None}, JUDGED, 1, "m")
    with pytest.raises(
        UserError, match=r"^params\.yaml: select\.by is paper, and no candidate of 1 passes: .* set select\.by to"
    ):
        ranked(selection(replace(GOOD, kl=0.3)), JUDGED, 1, "m")


def published(run: str) -> tuple[list[Candidate], dict]:
    folder = REFERENCE / "published" / f"paper-{run}"
    rows = json.loads((folder / "direction_evaluations.json").read_text())
    names = {"bypass": "refusal_score", "induce": "steering_score", "kl": "kl_div_score"}
    read = [
        Candidate(row["layer"], position=row["position"], **{name: row[theirs] for name, theirs in names.items()}) for row in rows
    ]
    return read, json.loads((folder / "direction_metadata.json").read_text())


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="REFUSAL_REFERENCE names no folder with the published scores")
@pytest.mark.parametrize("run", RUNS)
def test_the_rule_on_the_papers_own_scores_gives_the_papers_own_choice(run):
    candidates, theirs = published(run)
    n_layers = 1 + max(one.layer for one in candidates)
    choice = choose(candidates, n_layers)
    assert asdict(choice.chosen) | {"layer": theirs["layer"], "position": theirs["pos"]} == asdict(choice.chosen)
    filtered = REFERENCE / "published" / f"paper-{run}" / "direction_evaluations_filtered.json"
    if filtered.exists():  # not of Qwen's: all that passes, in order
        assert [(one.position, one.layer) for one in choice.passing] == [
            (row["position"], row["layer"]) for row in json.loads(filtered.read_text())
        ]
