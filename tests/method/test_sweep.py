"""The sweep: every completion is its own intervention's and prompt's, nothing is computed twice, and keys hold what counts."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_direction, tiny_lm, tiny_model

from refusal.analysis.subspaces import random_subspaces
from refusal.io.errors import UserError
from refusal.io.params import AblationSection
from refusal.io.params_file import load_params
from refusal.io.store import Store
from refusal.method import sweep
from refusal.method.directions import random_unit
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import BASELINE, POSITIONS, Addition, Intervention
from refusal.method.sweep import complete, grid

STOP, N_NEW = (5, 17), 8
SWEEP = load_params(Path(__file__).parents[2] / "params.yaml").sweep


def random_prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in (7, 3, 12, 7, 1, 9, 3)]


PROMPTS = random_prompts()


@pytest.fixture(scope="module")
def lm():
    return tiny_lm("qwen2", stop=STOP)


@pytest.fixture
def calls(monkeypatch):
    """How many rows each call of `generate` was given."""
    sizes = []

    def counted(lm, prompts, *args, **more):
        sizes.append(len(prompts))
        return generate(lm, prompts, *args, **more)

    monkeypatch.setattr(sweep, "generate", counted)
    return sizes


def swept(sites="resid_pre"):
    alphas = zip((0.5, 1.0, 1.5, 1.0), tiny_direction(rows=4).double(), strict=True)
    return [BASELINE, *(Intervention(f"cell_{i}", v, alpha, sites, None, i % 3) for i, (alpha, v) in enumerate(alphas))]


def run(lm, store, chosen=None, batch_size=2, n=N_NEW, prompts=PROMPTS, addition=None):
    return complete(lm, prompts, swept() if chosen is None else chosen, Decoding(n, batch_size), store, "test", addition)


def alone(lm, one):
    """Each prompt's completion by itself, by `generate`, which is held to a naive loop elsewhere."""
    if one.sites == "weights":
        with one.on(lm.model):
            return [generate(lm, [ids], Decoding(N_NEW))[0] for ids in PROMPTS]
    return [generate(lm, [ids], Decoding(N_NEW), [one])[0] for ids in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 6, 1000])
@pytest.mark.parametrize("sites", ["resid_pre", "writes"])
def test_every_completion_is_its_interventions_and_prompts_own(lm, tmp_path, sites, batch_size):
    completions = run(lm, Store(tmp_path / "s.sqlite"), swept(sites), batch_size)
    assert list(completions) == ["baseline", "cell_0", "cell_1", "cell_2", "cell_3"]
    for one in swept(sites):
        assert completions[one.name] == alone(lm, one)
    assert len({str(runs) for runs in completions.values()}) == 5  # they differ, so a mix-up would show


def every_sort():
    v, three, two = tiny_direction().double(), random_subspaces(32, 3, 1, 0)[0], random_subspaces(32, 2, 1, 0)[0]
    own = torch.zeros(3, 1, 32, dtype=torch.float64)
    own[1:, 0] = tiny_direction(rows=2)
    offset = torch.tensor([0.5, -2.0, 3.0], dtype=torch.float64)[:, None]
    return [
        BASELINE,
        Intervention("affine", v, 1.0, offset=offset),
        Intervention("one", v),
        Intervention("independent", tiny_direction(seed=9), direction_independent=True),
        Intervention("three", three),
        Intervention("two, half", two, 0.5),
        Intervention("each", own),
        Intervention("each, half", own, 0.5),
        Intervention("writes", v, 1.0, "writes"),
        Intervention("weights", v, 1.0, "weights"),
        Intervention("weights, half", two, 0.5, "weights"),
    ]


def test_interventions_of_every_sort_go_together(lm, tmp_path, calls):
    completions = run(lm, Store(tmp_path / "s.sqlite"), every_sort(), 1000)
    # Baseline; affine with one; independent; the two subspaces; a basis a layer; writes; each edit of the weights.
    assert sorted(calls) == sorted(7 * n for n in (1, 2, 1, 2, 2, 1, 1, 1))
    for one in every_sort():
        assert completions[one.name] == alone(lm, one), one.name
    assert len({str(runs) for name, runs in completions.items() if name != "weights"}) == 10
    assert completions["weights"] == completions["writes"]


def test_addition_reaches_every_row(lm, tmp_path):
    store = Store(tmp_path / "s.sqlite")
    for positions in POSITIONS:  # one store: positions are in the key
        addition = Addition(4 * tiny_direction(seed=9), 1, positions)
        completions = run(lm, store, [BASELINE], addition=addition)["baseline"]
        assert completions == [generate(lm, [ids], Decoding(N_NEW), addition=addition)[0] for ids in PROMPTS]


def test_a_second_run_computes_nothing(lm, tmp_path, calls):
    first = run(lm, Store(tmp_path / "s.sqlite"))
    assert calls == [7] * 5  # the baseline's, and 28 rows in as few jobs of at most 4 * 2 as hold them, of like size
    calls.clear()
    assert run(lm, Store(tmp_path / "s.sqlite")) == first and calls == []
    renamed = [replace(one, name=f"other {i}", layer=7, family="f") for i, one in enumerate(swept())]
    assert list(run(lm, Store(tmp_path / "s.sqlite"), renamed).values()) == list(first.values()) and calls == []


@contextmanager
def killed_after(n, calls, monkeypatch):
    """A run that is stopped as it begins the job after these `n`."""
    counted = sweep.generate

    def generate(*args, **more):
        if len(calls) == n:
            raise KeyboardInterrupt
        return counted(*args, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep, "generate", generate)
        yield


def test_an_interrupted_run_goes_on(lm, tmp_path, calls, monkeypatch):
    whole = run(lm, Store(tmp_path / "whole.sqlite"))
    n_jobs = len(calls)
    calls.clear()
    with killed_after(3, calls, monkeypatch):
        run(lm, Store(tmp_path / "s.sqlite"))
    assert run(lm, Store(tmp_path / "s.sqlite")) == whole
    assert len(calls) == n_jobs


def test_a_large_model_on_a_cpu_is_decoded_and_stored_in_small_jobs(lm, tmp_path, calls, monkeypatch):
    """Whatever the batch: killed in its third job it has lost that one, and it comes out as each row alone does."""
    monkeypatch.setattr(sweep, "LEAST_ROWS", 1)
    monkeypatch.setattr(sweep, "JOB_WORK", 4 * N_NEW * sum(p.numel() for p in lm.model.parameters()))
    whole = [3, 4, *[4] * 7]  # the baseline's seven rows; 28 of the four cells
    with killed_after(2, calls, monkeypatch):
        run(lm, Store(tmp_path / "s.sqlite"), batch_size=1000)
    assert calls == whole[:2]
    completions = run(lm, Store(tmp_path / "s.sqlite"), batch_size=1000)
    assert calls == whole
    for one in swept():
        assert completions[one.name] == alone(lm, one)


def test_jobs_are_small_for_large_models_on_a_cpu_alone():
    def rows(n_parameters, device="cpu", n=32):
        parameter = SimpleNamespace(numel=lambda: n_parameters)
        return sweep.rows_per_job(SimpleNamespace(parameters=lambda: [parameter], device=torch.device(device)), Decoding(n, 256))

    assert rows(1_000_000) == rows(630_000_000, "cuda") == 1024
    assert 10 * 5 <= rows(630_000_000) <= 30 * 5  # five rows of 32 tokens a second, measured: at most half a minute
    assert rows(7_000_000_000, n=512) == 16


def test_another_study_finds_what_depends_on_no_direction(lm, tmp_path, calls):
    """Two sweeps of one store share the baseline and the random direction, and come out as each alone does."""
    store = Store(tmp_path / "s.sqlite")
    random = Intervention("random_0", tiny_direction(seed=9).double(), direction_independent=True)
    run(lm, store, [*swept()[:3], random])
    calls.clear()
    after = run(lm, store, [BASELINE, *swept()[2:], random])
    assert sum(calls) == 3 * len(PROMPTS)
    assert run(lm, Store(tmp_path / "fresh.sqlite"), [BASELINE, *swept()[2:], random]) == after
    assert sum(calls) == (3 + 5) * len(PROMPTS)


ONE = Intervention("cell_0", tiny_direction().double(), 1.0, "resid_pre", None, 0)
CHANGES = {
    "weights": lambda lm: {"lm": replace(lm, weights="v")},
    "stop": lambda lm: {"lm": replace(lm, stop=frozenset({5}))},
    "dtype": lambda lm: {"lm": replace(lm, model=tiny_model("qwen2", dtype=torch.bfloat16))},
    "length": lambda _: {"n": 9},
    "batch_size": lambda _: {"batch_size": 99},
    "addition": lambda _: {"addition": Addition(tiny_direction(), 1)},
    "prompt": lambda _: {"prompts": [PROMPTS[0][:-1], *PROMPTS[1:]]},
    "sites": lambda _: {"chosen": [ONE.at("paper")]},
    "as weights": lambda _: {"chosen": [ONE.at("weights")]},
    "basis": lambda _: {"chosen": [replace(ONE, basis=random_subspaces(32, 2, 1, 0)[0])]},
    "alpha": lambda _: {"chosen": [replace(ONE, alpha=1.25)]},
    "direction": lambda _: {"chosen": [replace(ONE, basis=tiny_direction(seed=1).double())]},
    "offset": lambda _: {"chosen": [replace(ONE, offset=torch.ones(3, 1))]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_determines_a_completion_is_in_its_key(lm, tmp_path, calls, what):
    store, before = Store(tmp_path / "s.sqlite"), {"lm": lm, "chosen": [ONE], "batch_size": 100}
    run(store=store, **before)
    calls.clear()
    after = run(store=store, **before | CHANGES[what](lm))
    assert calls == [len(PROMPTS)]
    assert after == run(store=Store(tmp_path / "fresh.sqlite"), **before | CHANGES[what](lm))


def directions(seed=0):
    unit = tiny_direction(rows=5, seed=seed).double()
    unit[0] = 0
    return {"unit": unit, "defined": torch.tensor([False, True, True, True, True]), "safe_mean": torch.randn(5, 32)}


def made(harmless=None, layers=None, alphas=(0.75, 1.0), n_random=3, seed=0, **ablation):
    settings = SWEEP.model_copy(update={"layers": layers, "alphas": list(alphas), "n_random": n_random, "seed": seed})
    return grid(
        directions(), harmless or directions(7), settings, AblationSection(**{"sites": "resid_pre", "kind": "linear"} | ablation)
    )


def test_grid_is_baseline_controls_and_every_defined_layer_with_every_alpha():
    harmless = directions(seed=7)
    harmless["defined"][2] = False
    one = made(harmless, sites="paper")
    cells = [(layer, alpha) for layer in (1, 2, 3, 4) for alpha in (0.75, 1.0)]
    names = ["baseline", "random_0", "random_1", "random_2", "harmless_1", "harmless_3", "harmless_4"]
    assert [i.name for i in one] == names + [f"layer_{layer}_alpha_{100 * alpha:.0f}" for layer, alpha in cells]
    assert [(i.layer, i.alpha) for i in one[7:]] == cells and {i.sites for i in one[1:]} == {"paper"}
    for i in one[7:]:
        assert torch.equal(i.basis[0], directions()["unit"][i.layer]) and i.offset is None
    assert all(i.layer is None and i.alpha == 1.0 for i in one[1:7])
    assert all(torch.equal(i.basis[0], harmless["unit"][layer]) for layer, i in zip((1, 3, 4), one[4:7], strict=True))
    assert one[0] is BASELINE and [i.direction_independent for i in one] == [True] * 4 + [False] * 11
    # The random directions are drawn by the seed given, evenly on the sphere: normal numbers at length 1.
    for seed in (0, 5):
        drawn = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        for i, v in zip(made(seed=seed)[1:4], drawn, strict=True):
            assert i.basis[0].tolist() == pytest.approx([float(x / v.square().sum().sqrt()) for x in v])
    # Affine offsets are those of the study's own safe prompts.
    assert [i.name for i in made(kind="affine") if i.direction_independent] == ["baseline"]
    assert [i.name for i in made(layers=[3], alphas=[1.0], n_random=1)[2:]] == ["harmless_3", "layer_3_alpha_100"]


def test_the_controls_of_a_subspace_have_its_rank():
    sweep = {"alphas": [0.5, 1.0], "n_random": 2}
    given, other = directions() | {"singular": torch.eye(32).double()[None, :10].repeat(5, 1, 1)}, directions(7)
    other["defined"][4] = False
    of = lambda **values: grid(given, other, SWEEP.model_copy(update=sweep | values), ABLATION)  # noqa: E731
    ABLATION = AblationSection(sites="writes", kind="linear")
    windows = of(basis="qr", rank=2, layers=[1, 2, 4])
    assert [(one.name, one.family, one.rank, one.layer) for one in windows] == [
        ("baseline", "baseline", 0, None),
        ("random_0", "random", 2, None),
        ("random_1", "random", 2, None),
        ("harmless_1-2", "harmless", 2, None),  # the other window has a layer without a harmless difference
        ("qr_1-2_alpha_50", "swept", 2, None),
        ("qr_1-2_alpha_100", "swept", 2, None),
        ("qr_2+4_alpha_50", "swept", 2, None),
        ("qr_2+4_alpha_100", "swept", 2, None),
    ]
    assert [one.direction_independent for one in windows] == [True] * 3 + [False] * 5
    svd = of(basis="svd", rank=3, layers=[2])
    assert [(one.name, one.rank, one.layer) for one in svd[1:]] == [
        ("random_0", 3, None),
        ("random_1", 3, None),
        ("svd_2_rank_3_alpha_50", 3, 2),
        ("svd_2_rank_3_alpha_100", 3, 2),
    ]
    own = of(basis="per_layer", layers=[1, 2])
    assert [one.name for one in own[3:]] == ["harmless_1-2", "per_layer_1-2_alpha_50", "per_layer_1-2_alpha_100"]
    assert all(one.per_layer and [bool(b.any()) for b in one.basis] == [False, True, True, False, False] for one in own[1:])


@pytest.mark.parametrize("values", [{"basis": "qr", "rank": 2}, {"basis": "per_layer"}])
def test_affine_offsets_of_a_subspace_are_the_safe_means_components(values):
    torch.manual_seed(0)
    given, settings = directions(), SWEEP.model_copy(update={"alphas": [1.0], "n_random": 2} | values)
    for one in grid(given, directions(7), settings, AblationSection(sites="resid_pre", kind="affine"))[1:]:
        assert one.offset.shape == (5, one.rank)
        for layer, mean in enumerate(given["safe_mean"].double()):
            basis = one.basis[layer] if one.per_layer else one.basis
            assert one.offset[layer].tolist() == pytest.approx([float((mean * b).sum()) for b in basis])


def test_affine_offsets_are_the_safe_means_components():
    torch.manual_seed(0)
    given, settings = directions(), SWEEP.model_copy(update={"layers": [2, 4], "alphas": [1.0], "n_random": 2})
    for one in grid(given, directions(7), settings, AblationSection(sites="resid_pre", kind="affine"))[1:]:
        wanted = [float(sum(a * b for a, b in zip(mean.double(), one.basis[0], strict=True))) for mean in given["safe_mean"]]
        assert one.offset[:, 0].tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("layer", [0, 5, 99])
def test_a_layer_without_direction_is_refused(layer):
    said = rf"^params\.yaml: sweep\.layers: layer {layer} has no direction; choose among \[1, 2, 3, 4\]$"
    with pytest.raises(UserError, match=said):
        made(layers=[1, layer])


def test_random_directions_are_even_on_the_sphere():
    drawn = random_unit(32, 4000, 0)
    assert torch.allclose(drawn.norm(dim=-1), torch.ones(4000, dtype=torch.float64))
    assert drawn.mean(0).norm() < 0.03  # 1 / sqrt(4000) = 0.016
    assert ((drawn.T @ drawn) / 4000 - torch.eye(32) / 32).abs().max() < 0.005
    assert torch.equal(random_unit(32, 3, 0), random_unit(32, 3, 0)) != torch.equal(random_unit(32, 3, 0), random_unit(32, 3, 1))
