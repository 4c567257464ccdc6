"""The sweep: every completion lands in its own cell, nothing is computed twice, and the best cells are chosen as said."""

from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.analysis.subspaces import random_subspaces
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.method import sweep
from refusal.method.directions import random_unit
from refusal.method.generate import WHERE, generate
from refusal.method.interventions import Addition, ablation
from refusal.method.select import cell_name, rank
from refusal.method.sweep import BASELINE, Cell, ablation_of, complete, grid

STOP, N_NEW = {5, 17}, 8


def random_prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (7, 3, 12, 7, 1, 9, 3)]


PROMPTS = random_prompts()


@pytest.fixture(scope="module")
def model():
    return tiny_model("qwen2")


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of `generate` was given."""
    sizes = []

    def counted(model, prompts, *args):
        sizes.append(len(prompts))
        return generate(model, prompts, *args)

    monkeypatch.setattr(sweep, "generate", counted)
    return sizes


def cells():
    return [
        BASELINE,
        *[
            Cell(f"cell_{i}", i % 3, alpha, v)
            for i, (alpha, v) in enumerate(zip((0.5, 1.0, 1.5, 1.0), tiny_direction(rows=4).double(), strict=True))
        ],
    ]


def run(model, store, chosen=None, **changes):
    settings = {
        "weights": "w",
        "prompts": PROMPTS,
        "cells": cells() if chosen is None else chosen,
        "sites": "resid_pre",
        "stop": STOP,
        "pad_id": 0,
        "max_new_tokens": N_NEW,
        "batch_size": 2,
        "label": "test",
        "addition": None,
    } | changes
    return complete(model, store=store, **settings)


@pytest.mark.parametrize("batch_size", [1, 6, 1000])
@pytest.mark.parametrize("sites", ["resid_pre", "writes"])
def test_every_completion_is_its_cells_and_prompts_own(model, tmp_path, sites, batch_size):
    found = run(model, Store(tmp_path / "s.sqlite"), sites=sites, batch_size=batch_size)
    assert list(found) == ["baseline", "cell_0", "cell_1", "cell_2", "cell_3"]
    for cell in cells():
        edit = None if cell.direction is None else ablation(cell.direction, cell.alpha, sites)
        assert found[cell.name] == [generate(model, [ids], STOP, N_NEW, 0, edit)[0] for ids in PROMPTS]
    assert len({str(runs) for runs in found.values()}) == 5  # the cells differ, so a mix-up would show


def test_affine_cells_and_others_share_a_batch(model, tmp_path, calls):
    chosen = [
        Cell("baseline"),
        Cell("affine", 1, 1.0, tiny_direction().double(), torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)),
    ]
    found = run(model, Store(tmp_path / "s.sqlite"), chosen, batch_size=100)
    assert calls == [2 * len(PROMPTS)]
    edit = lambda: ablation(chosen[1].direction, 1.0, "resid_pre", chosen[1].offset)  # noqa: E731
    assert found["affine"] == [generate(model, [ids], STOP, N_NEW, 0, edit())[0] for ids in PROMPTS]
    assert found["baseline"] == [generate(model, [ids], STOP, N_NEW, 0)[0] for ids in PROMPTS] != found["affine"]


def test_addition_reaches_every_row(model, tmp_path):
    vector = 4 * tiny_direction(seed=9)
    store = Store(tmp_path / "s.sqlite")
    for where in WHERE:  # one store: where is in the key
        found = run(model, store, [BASELINE], addition=(vector, 1), where=where)["baseline"]
        assert found == [generate(model, [ids], STOP, N_NEW, 0, None, Addition(vector, 1), where=where)[0] for ids in PROMPTS]


def test_a_second_run_computes_nothing(model, tmp_path, calls):
    first = run(model, Store(tmp_path / "s.sqlite"))
    assert calls == [7] * 5  # the baseline's, and 28 rows in as few units of at most ROUNDS * 2 as hold them, of like size
    calls.clear()
    assert run(model, Store(tmp_path / "s.sqlite")) == first and calls == []


def test_an_interrupted_run_goes_on(model, tmp_path, calls, monkeypatch):
    whole = run(model, Store(tmp_path / "whole.sqlite"))
    n_units = len(calls)
    calls.clear()
    counted = sweep.generate

    def interrupted(*args):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return counted(*args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep, "generate", interrupted)
        run(model, Store(tmp_path / "s.sqlite"))
    assert run(model, Store(tmp_path / "s.sqlite")) == whole
    assert len(calls) == n_units


def test_another_study_finds_what_is_fixed(model, tmp_path, calls):
    """Two sweeps of one store share the baseline and the random direction, and come out as each alone does."""
    store, random = Store(tmp_path / "s.sqlite"), Cell("random_0", None, 1.0, tiny_direction(seed=9).double(), fixed=True)
    run(model, store, [BASELINE, *cells()[1:3], random])
    calls.clear()
    after = run(model, store, [BASELINE, *cells()[2:], random])
    assert sum(calls) == 3 * len(PROMPTS)
    assert run(model, Store(tmp_path / "fresh.sqlite"), [BASELINE, *cells()[2:], random]) == after
    assert sum(calls) == (3 + 5) * len(PROMPTS)


CHANGES = {
    "weights": {"weights": "v"},
    "sites": {"sites": "paper"},
    "stop": {"stop": {5}},
    "length": {"max_new_tokens": 9},
    "batch_size": {"batch_size": 99},
    "addition": {"addition": (tiny_direction(), 1)},
    "basis": {"chosen": [Cell("cell_0", 0, 1.0, random_subspaces(32, 2, 1, 0)[0])]},
    "edit": {"edits": {"cell_0": (lambda model: nullcontext(), ["nothing"])}, "chosen": []},
    "prompt": {"prompts": [PROMPTS[0][:-1], *PROMPTS[1:]]},
    "alpha": {"chosen": [Cell("cell_0", 0, 1.25, tiny_direction().double())]},
    "direction": {"chosen": [Cell("cell_0", 0, 1.0, tiny_direction(seed=1).double())]},
    "offset": {"chosen": [Cell("cell_0", 0, 1.0, tiny_direction().double(), torch.ones(3))]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_determines_a_completion_is_in_its_key(model, tmp_path, calls, what):
    store, before = (
        Store(tmp_path / "s.sqlite"),
        {"chosen": [Cell("cell_0", 0, 1.0, tiny_direction().double())], "batch_size": 100},
    )
    run(model, store, **before)
    calls.clear()
    found = run(model, store, **before | CHANGES[what])
    assert calls == [len(PROMPTS)]
    assert found == run(model, Store(tmp_path / "fresh.sqlite"), **before | CHANGES[what])


def test_a_changed_dtype_is_another_key(model, tmp_path, calls):
    store = Store(tmp_path / "s.sqlite")
    run(model, store, [BASELINE], batch_size=100)
    run(tiny_model("qwen2", dtype=torch.bfloat16), store, [BASELINE], batch_size=100)
    assert len(calls) == 2


def test_a_cells_name_is_not_in_the_key(model, tmp_path, calls):
    store = Store(tmp_path / "s.sqlite")
    one = run(model, store, [Cell("one", 0, 1.0, tiny_direction().double())])["one"]
    calls.clear()
    assert run(model, store, [Cell("two", 2, 1.0, tiny_direction().double())])["two"] == one and calls == []


def found_directions(seed=0):
    unit = tiny_direction(rows=5, seed=seed).double()
    unit[0] = 0
    return {"unit": unit, "defined": torch.tensor([False, True, True, True, True]), "safe_mean": torch.randn(5, 32)}


def test_grid_is_baseline_controls_and_every_defined_layer_with_every_alpha():
    harmless = found_directions(seed=7)
    harmless["defined"][2] = False
    made = grid(found_directions(), harmless, None, [0.75, 1.0], 3, 0, affine=False)
    assert [cell.name for cell in made] == [
        "baseline",
        "random_0",
        "random_1",
        "random_2",
        "harmless_1",
        "harmless_3",
        "harmless_4",
        *[f"layer_{layer}_alpha_{alpha}" for layer in (1, 2, 3, 4) for alpha in (75, 100)],
    ]
    assert [(cell.layer, cell.alpha) for cell in made[7:]] == [(layer, alpha) for layer in (1, 2, 3, 4) for alpha in (0.75, 1.0)]
    for cell in made[7:]:
        assert torch.equal(cell.direction, found_directions()["unit"][cell.layer]) and cell.offset is None
    assert all(cell.layer is None and cell.alpha == 1.0 for cell in made[1:7])
    assert all(torch.equal(cell.direction, harmless["unit"][i]) for i, cell in zip((1, 3, 4), made[4:7], strict=True))
    assert made[0].direction is None
    assert [cell.fixed for cell in made] == [True] * 4 + [False] * 11
    # The random directions are drawn by the seed given, evenly on the sphere: normal numbers at length 1.
    for seed in (0, 5):
        drawn = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        randoms = grid(found_directions(), harmless, None, [0.75], 3, seed, affine=False)[1:4]
        for cell, v in zip(randoms, drawn, strict=True):
            assert cell.direction.tolist() == pytest.approx([float(x / v.square().sum().sqrt()) for x in v])
    # Affine offsets are those of the study's own safe prompts.
    affine = grid(found_directions(), harmless, None, [0.75, 1.0], 3, 0, affine=True)
    assert [cell.name for cell in affine if cell.fixed] == ["baseline"]
    assert [cell.name for cell in grid(found_directions(), harmless, [3], [1.0], 1, 0, affine=False)[2:]] == [
        "harmless_3",
        "layer_3_alpha_100",
    ]


def test_affine_offsets_are_the_safe_means_components():
    found = found_directions()
    for cell in grid(found, found_directions(seed=7), [2, 4], [1.0], 2, 0, affine=True)[1:]:
        wanted = [
            float(sum(a * b for a, b in zip(found["safe_mean"][layer].double(), cell.direction, strict=True)))
            for layer in range(5)
        ]
        assert cell.offset.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("layer", [0, 5, 99])
def test_a_layer_without_direction_is_refused(layer):
    with pytest.raises(
        UserError, match=rf"^params\.yaml: sweep\.layers: layer {layer} has no direction; choose among \[1, 2, 3, 4\]$"
    ):
        grid(found_directions(), found_directions(), [1, layer], [1.0], 1, 0, affine=False)


def test_random_directions_are_even_on_the_sphere():
    drawn = random_unit(32, 4000, 0)
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(4000, dtype=torch.float64))
    assert drawn.mean(0).norm() < 0.03  # 1 / sqrt(4000) = 0.016
    assert ((drawn.T @ drawn) / 4000 - torch.eye(32) / 32).abs().max() < 0.005
    assert torch.equal(random_unit(32, 3, 0), random_unit(32, 3, 0)) and not torch.equal(
        random_unit(32, 3, 0), random_unit(32, 3, 1)
    )


def test_ablation_of_rows():
    edit = ablation_of(cells(), "resid_pre")
    assert edit.alpha.tolist() == [0.0, 0.5, 1.0, 1.5, 1.0]
    r = torch.randn(5, 3, 32)
    out = edit.apply(r, 0)
    assert torch.equal(out[0], r[0])
    v = cells()[3].direction.float()
    assert torch.allclose(out[3], r[3] - 1.5 * (r[3] @ v)[:, None] * v, atol=1e-5)


def judged(layer, alpha, score, compliance=0.9):
    return {
        "layer": layer,
        "alpha": alpha,
        "score": score,
        "compliance": compliance,
        "compliance_low": compliance - 0.1,
        "compliance_high": compliance + 0.05,
        "coherence": 0.8,
        "n": 200,
    }


GRID = {
    "baseline": judged(None, None, 0.99),
    "random_0": judged(None, 1.0, 0.98),
    "layer_1_alpha_100": judged(1, 1.0, 0.80),
    "layer_2_alpha_75": judged(2, 0.75, 0.95),
    "layer_2_alpha_100": judged(2, 1.0, 0.90),
    "layer_3_alpha_100": judged(3, 1.0, 0.90),
    "layer_3_alpha_125": judged(3, 1.25, 0.90),
    "layer_4_alpha_100": judged(4, 1.0, 0.90),
    "layer_3_alpha_50": judged(3, 0.5, 0.90),
}
SEPARATION = [None, 1.0, 5.0, 7.0, None]


def test_rank_takes_the_best_and_breaks_ties_as_said():
    chosen = rank(GRID, SEPARATION, 7, "batched")
    assert [(cell["layer"], cell["alpha"]) for cell in chosen] == [
        (2, 0.75),  # the score comes first; baseline and random are no candidates
        (3, 1.0),
        (2, 1.0),
        (4, 1.0),  # of equals the alpha nearest 1, then the layer that separates better
        (3, 1.25),
        (3, 0.5),
        (1, 1.0),
    ]
    assert [cell["n_tied"] for cell in chosen] == [1, 5, 5, 5, 5, 5, 1]
    assert [cell["name"] for cell in chosen[:2]] == ["batched_layer_2_alpha_75", "batched_layer_3_alpha_100"]
    assert {k: chosen[0][k] for k in ("compliance", "low", "high", "coherence", "score", "n")} == {
        "compliance": 0.9,
        "low": 0.8,
        "high": 0.9500000000000001,
        "coherence": 0.8,
        "score": 0.95,
        "n": 200,
    }
    assert rank(dict(reversed(GRID.items())), SEPARATION, 7, "batched") == chosen  # the order of the file says nothing


def test_rank_of_too_few_cells():
    assert len(rank(GRID, SEPARATION, 7, "batched")) == 7
    with pytest.raises(UserError, match=r"^params\.yaml: select\.top is 8 but the sweep has 7 cells"):
        rank(GRID, SEPARATION, 8, "batched")


@pytest.mark.parametrize(
    ("alpha", "name"), [(1.0, "100"), (0.75, "75"), (1.1, "110"), (0.29, "29"), (0.57, "57"), (1.15, "115"), (2, "200")]
)
def test_cell_names_are_the_write_ups(alpha, name):
    assert cell_name(15, alpha) == f"layer_15_alpha_{name}"
