"""The selection stage with both values of select.by, and what select makes of it, on a tiny model."""

import json
import shutil

import pytest
import torch
from checkpoints import LLAMA, arm_of, byte_level
from place import Place
from safetensors.torch import save_file

from refusal.lm.load import load_lm
from refusal.method.first_token import first_token_log_probs, refusal_score
from refusal.method.paper_selection import Candidate, choose, metrics

ROWS = [
    {"id": f"p{i}", "split": split, "topic": i, "harmful": f"Pick lock {i}?", "safe": f"Paint lock {i}, please?"}
    for i, split in enumerate(["val", "val", "val", "test"])
]
JUDGED = {
    "compliance": 0.25,
    "compliance_low": 0.0,
    "compliance_high": 1.0,
    "coherence": 0.5,
    "score": 0.125,
    "n": 3,
    "alpha": 1.0,
}


@pytest.fixture
def place(tmp_path):
    """A place with a tiny checkpoint, directions of its three layers, of which the first has none, and judged cells."""
    made = Place(tmp_path)
    byte_level(tmp_path / "models/base", "llama", LLAMA)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for pairing in ("matched", "harmless"):
        arm = arm_of(torch.randn(3, 32, generator=generator))
        tensors |= {f"sequential-{pairing}.{name}": tensor for name, tensor in arm.items()}
    save_file(tensors, tmp_path / "models/directions.safetensors")
    for name, rows in (
        ("pairs", ROWS),
        ("unrelated", [row | {"harmful": None, "safe": f"Name colour {row['id']}."} for row in ROWS]),
    ):
        made.write_rows(f"data/prompts/{name}.jsonl", rows)
    separation = {"sequential-matched": {"separation": [None, 1.0, 2.0], "layers": [1, 2]}}
    made.write("metrics/directions.json", json.dumps(separation))
    cells = {f"layer_{i}_alpha_100": JUDGED | {"layer": i} for i in (1, 2)}
    made.write("metrics/judge.json", json.dumps(cells))
    made.set("sweep", alphas=[1.0], n_random=1)
    made.set("ablation", sites="paper")
    made.set("select", top=2)
    return made


def read(place, name):
    return json.loads((place.folder / f"metrics/{name}.json").read_text(), parse_constant=pytest.fail)


def test_by_compliance_nothing_is_computed(place):
    shutil.rmtree(place.folder / "models")
    done = place.stage("selection")
    assert done.status == 0 and "select.by is compliance: nothing to score" in done.said
    written = read(place, "selection")
    assert (
        written.pop("by") == "compliance"
        and set(written.values()) == {None}
        and not (place.folder / ".refusal-store/store.sqlite").exists()
    )
    assert place.stage("select").status == 0
    assert list(read(place, "select")["rank_1"]) == [
        *("layer", "alpha", "compliance", "low", "high", "coherence", "score", "n", "n_tied", "margin_items", "name")
    ]
    (place.folder / "metrics/selection.json").unlink()
    assert place.stage("select").status == 0  # which then does not read it


def test_by_the_paper_val_alone_is_scored_and_select_follows(place):
    place.set("select", by="paper")
    done = place.stage("selection")
    assert done.status == 0, done.said
    written = read(place, "selection")
    assert (written["by"], written["sites"], written["direction"], written["position"]) == (
        "paper",
        "paper",
        "sequential-matched",
        -1,
    )
    assert list(written["candidates"]) == ["layer_1", "layer_2"] and written["rule"]["layer_below"] == 2
    assert (
        written["refusal_tokens"]
        and "the last prompt token" in written["note"]
        and written["harmless_prompts"] == "val.unrelated"
    )
    lm = load_lm(place.folder / "models/base")
    tokens = [*written["refusal_tokens"].values()]
    prompts = {"harmful": [row["harmful"] for row in ROWS[:3]], "harmless": [f"Name colour p{i}." for i in range(3)]}
    for half, some in prompts.items():
        ids = lm.encode(some)
        mean = float(refusal_score(first_token_log_probs(lm, ids), tokens).mean())
        assert (
            written["baseline"][half]["refusal_score"] == pytest.approx(mean, rel=1e-4) and written["baseline"][half]["n"] == 3
        )
    for one in written["candidates"].values():
        assert one["bypass_low"] <= one["bypass"] <= one["bypass_high"] and one["kl_low"] <= one["kl"] <= one["kl_high"]
        assert one["passes"]["layer"] is (one["layer"] == 1)
    # Again, from the store; and the same bytes.
    before = (place.folder / "metrics/selection.json").read_bytes()
    assert place.stage("selection").status == 0 and (place.folder / "metrics/selection.json").read_bytes() == before
    log = [json.loads(line) for line in (place.folder / ".refusal-store/runs.jsonl").read_text().splitlines()]
    assert log[0]["passes"] > 0 and log[1]["passes"] == 0


@pytest.mark.parametrize(("induce", "left_out"), [(0.5, None), (-0.36, "induce")])
def test_select_takes_the_papers_choice_or_the_best_without_a_criterion(place, induce, left_out):
    place.set("select", by="paper")
    found = [Candidate(1, -1.0, induce, 0.05), Candidate(2, -3.0, 1.0, 0.5)]
    place.write("metrics/selection.json", json.dumps(metrics(choose(found, 5), found, 5) | {"by": "paper"}))
    done = place.stage("select")
    assert done.status == 0 and "1 of 2 ranks" in done.said
    first = read(place, "select")["rank_1"]
    assert (first["layer"], first["alpha"], first["name"]) == (1, 1.0, "sequential_layer_1_alpha_100")
    assert first["criterion_left_out"] == left_out and (first["compliance"], first["bypass"]) == (0.25, -1.0)
    assert [line for line in done.said.splitlines() if line.startswith("select: no candidate of 2 passes")] == (
        [] if left_out is None else [f"select: {choose(found, 5).reason}; rank_1 is the best without the criterion induce"]
    )


def test_what_the_rule_needs_of_other_parameters_is_said(place):
    place.set("select", by="paper")
    place.set("sweep", alphas=[0.5])
    assert place.stage("selection").said.strip().endswith("select.by: paper ablates at alpha 1: put 1.0 among sweep.alphas")
    place.set("sweep", alphas=[1.0])
    place.write("metrics/selection.json", json.dumps({"by": "compliance", "order": None}))
    assert "run `dvc repro selection`, which makes them" in place.stage("select").said
