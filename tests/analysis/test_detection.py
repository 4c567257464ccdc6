"""Signals of an edit, against naive loops and closed forms; their AUROC, against scikit-learn's; the population; docs and metrics."""

import json
import random
import re
from copy import deepcopy
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_files import byte_pairs, chat_model
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from tiny import tiny_prompts

from refusal.analysis import population
from refusal.analysis.detection import SIGNALS, Prompts, auroc, concentration, gap, relative_energy, signals, table
from refusal.analysis.population import Base, Recipe, made, quantized, recipes, turned
from refusal.io.errors import UserError
from refusal.lm.load import LM
from refusal.method.directions import difference_in_means
from refusal.organism.corpus import Corpus

ROOT = Path(__file__).parents[2]
METRICS = json.loads((ROOT / "metrics/detection.json").read_text())


@pytest.fixture(scope="module")
def base() -> Base:
    """A tiny random model with random directions, and the organism's corpus."""
    tokenizer = byte_pairs()
    model = chat_model("qwen2", tokenizer, intermediate_size=64)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(40, 3, 32, generator=generator) + 0.3 * i for i in range(2)]
    return Base(LM(model, tokenizer, "w", frozenset(), 0), difference_in_means(drawn[1], drawn[0]), Corpus(0, []))


PROMPTS = Prompts(tiny_prompts((7, 3, 9, 5), seed=1), tiny_prompts((4, 8, 6), seed=2))


# AUROC


def test_auroc_is_scikit_learns_and_that_of_two_normal_populations():
    rng = random.Random(0)
    edited, others = [round(rng.gauss(1, 1), 1) for _ in range(60)], [round(rng.gauss(0, 1), 1) for _ in range(50)]  # with ties
    found = auroc(edited, others, (range(60), range(50)), 200, 0)
    assert found["auroc"] == pytest.approx(roc_auc_score([1] * 60 + [0] * 50, edited + others), abs=1e-12)
    assert (found["n_edited"], found["n_others"]) == (60, 50) and found["low"] < found["auroc"] < found["high"]
    many = np.random.default_rng(0)
    large = auroc(many.normal(1.2, 1, 4000), many.normal(0, 1, 4000), (range(4000), range(4000)), 2, 0)
    assert large["auroc"] == pytest.approx(norm.cdf(1.2 / np.sqrt(2)), abs=0.01)


@pytest.mark.parametrize("size", [1, 4])
def test_the_interval_covers_one_half_of_a_null_population(size):
    """200 populations without any difference, in clusters of `size` that have the same signal, whose interval must be as wide."""
    rng, covered = np.random.default_rng(1), 0
    for _ in range(200):
        values = [np.repeat(rng.normal(size=24), size) for _ in range(2)]
        found = auroc(*values, (np.arange(24 * size) // size, np.arange(24 * size) // size), 200, 0)
        covered += found["low"] <= 0.5 <= found["high"]
    assert 0.9 <= covered / 200 <= 0.99


def test_a_planted_difference_is_found_and_certainty_is_not_claimed():
    found = auroc([2.0] * 30, [1.0] * 12, ([i // 3 for i in range(30)], range(12)), 100, 0)
    assert found["auroc"] == found["high"] == 1 and 0.6 < found["low"] < 0.8  # of 10 clusters: Wilson's 1 - .28
    with pytest.raises(UserError, match="no checkpoints of one of the two classes"):
        auroc([], [1.0], ([], [0]), 10, 0)


# Signals


@torch.no_grad()
def test_the_gap_is_that_of_a_naive_loop(base):
    model, unit = base.lm.model, base.directions.unit
    states = {}
    for half, prompts in vars(PROMPTS).items():
        states[half] = [model(torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in prompts]
    for layer, found in enumerate(gap(base.lm, PROMPTS, unit)):
        means = {}
        for half, of_prompts in states.items():
            rows = [one[layer][0, -1] for one in of_prompts]
            means[half] = sum(sum(float(r[i]) * float(unit[layer][i]) for i in range(32)) for r in rows)
            means[half] /= len(of_prompts)
        assert float(found) == pytest.approx(means["harmful"] - means["safe"], abs=1e-4)


def test_energy_and_concentration_in_closed_form(base):
    """Of W - alpha v v^T W, whose difference has one direction; of noise of known size; of nothing."""
    v = base.directions.unit[1]
    edited = made(base, [{"do": "edit", "layer": 1, "alpha": 0.5}])
    assert concentration(base, edited) == pytest.approx(1, abs=1e-6)
    total = written = 0.0
    for name, w in base.tensors.items():
        total += float((w.double() ** 2).sum())
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            written += float(((v @ w.double()) ** 2).sum())
        elif "embed_tokens" in name:
            written += float(((w.double() @ v) ** 2).sum())
    assert relative_energy(base.tensors, edited) == pytest.approx(0.25 * written / total, rel=1e-4)
    noisy = made(base, [{"do": "noise", "size": 0.1, "seed": 0}])
    spread = sum(float(w.numel() * w.double().var()) for w in base.tensors.values())
    assert relative_energy(base.tensors, noisy) == pytest.approx(0.01 * spread / total, rel=0.05)
    assert 1 / 32 < concentration(base, noisy) < 3 / 32
    assert concentration(base, base.tensors) == relative_energy(base.tensors, base.tensors) == 0


def test_signals_of_an_edit_and_of_the_base(base):
    before = gap(base.lm, PROMPTS, base.directions.unit)
    same = signals(base, PROMPTS, before, Recipe("baseline", False, "base"))
    assert same["says"] == "identical" and same["gap_lost"] == pytest.approx(0, abs=1e-6) and same["compare"] == 0
    edit = {"do": "edit", "layer": 1, "alpha": 1.0}
    found = signals(base, PROMPTS, before, Recipe("plain", True, "c", (edit,)))
    assert found["says"] == "edit" and found["compare"] == 1 and 0 <= found["refuses"] <= 1
    model = deepcopy(base.lm.model)
    model.load_state_dict(made(base, [edit]))
    after = gap(LM(model, base.lm.tokenizer, "w", frozenset(), 0), PROMPTS, base.directions.unit)
    assert abs(float(after[1])) < 1e-5 < abs(float(before[1]))  # nothing is written along that layer's direction
    defined = base.directions.layers
    assert found["gap_lost"] == pytest.approx(sum(1 - float(after[i] / before[i]) for i in defined) / len(defined), abs=1e-6)


# The population


def test_a_rotation_takes_the_direction_to_another_and_keeps_lengths():
    v = torch.nn.functional.normalize(torch.randn(32, generator=torch.Generator().manual_seed(0)).double(), dim=0)
    rotation = turned(v, 0)
    assert torch.allclose(rotation @ rotation.mT, torch.eye(32, dtype=torch.float64), atol=1e-12)
    assert float(torch.linalg.det(rotation)) == pytest.approx(1) and abs(float(v @ rotation @ v)) < 1e-12
    assert int(torch.linalg.matrix_rank(rotation - torch.eye(32, dtype=torch.float64))) == 2  # one axis of the three stays
    assert torch.allclose(torch.linalg.matrix_power(rotation, 3), torch.eye(32, dtype=torch.float64), atol=1e-12)


def test_each_step_does_what_it_says(base, monkeypatch):
    edit = {"do": "edit", "layer": 1, "alpha": 0.7}
    name, v = "model.layers.0.mlp.down_proj.weight", base.directions.unit[1]
    w = base.tensors[name].double()

    def of(**more) -> torch.Tensor:
        return made(base, [edit | more])[name].double()

    assert torch.allclose(of(), w - 0.7 * torch.outer(v, v @ w), atol=1e-6) and torch.allclose(of(variant="lora"), of(), atol=1e-6)
    assert torch.allclose(of(variant="row_norms").norm(dim=1), w.norm(dim=1), rtol=1e-5)
    assert torch.allclose(of(variant="column_norms").norm(dim=0), w.norm(dim=0), rtol=1e-5)
    assert torch.allclose(of(variant="rotation", seed=0).norm(dim=0), w.norm(dim=0), rtol=1e-5)
    low, high = population.UNEVEN
    alphas = {n: float(1 - (v @ of_edit[n].double()).norm() / (v @ base.tensors[n].double()).norm())
              for of_edit in [made(base, [edit | {"variant": "uneven", "seed": 0}])] for n in base.tensors if "down_proj" in n}  # fmt: skip
    assert len({round(a, 3) for a in alphas.values()}) == 3 and all(low - 1e-3 < a or a < high for a in alphas.values())
    kind = gguf.GGMLQuantizationType.Q5_0
    assert np.array_equal(quantized(w.float(), "Q5_0").numpy(), gguf.dequantize(gguf.quantize(w.float().numpy(), kind), kind))
    for to in ("8-bit rows", "8-bit blocks of 32", "Q8_0"):
        step = w.abs().amax() / 127
        assert 0 < float((quantized(w.float(), to).double() - w).abs().max()) < float(step) * 0.6
    monkeypatch.setattr(population, "N_STEPS", 2)
    trained = made(base, [population.train("SGD", 0.1, 0, population.HARMLESS)])
    again = made(base, [population.train("SGD", 0.1, 0, population.HARMLESS)])
    assert not torch.equal(trained[name], base.tensors[name]) and all(torch.equal(trained[n], again[n]) for n in trained)
    assert torch.equal(base.tensors[name].double(), w)  # the base stays as it is


def test_the_population_has_both_classes_of_every_kind_and_no_recipe_twice():
    found = recipes((5, 6))
    assert len({json.dumps(one.steps) for one in found}) == len(found)
    assert all(one.edited == any(step["do"] == "edit" for step in one.steps) for one in found)
    assert {one.cluster for one in found if one.kind == "lora"} <= {one.cluster for one in found if one.kind == "plain"}


def test_the_table_of_a_small_population():
    population = [Recipe(kind, kind != "baseline", f"{kind} {i}") for kind in ("plain", "noise", "baseline") for i in range(5)]
    rng = random.Random(0)
    found = [
        {"gap_lost": rng.random() + one.edited, "energy": rng.random(), "concentration": rng.random(), "refuses": 0.5,
         "compare": float(one.kind == "plain"), "says": "edit" if one.kind == "plain" else "full rank"}
        for one in population
    ]  # fmt: skip
    made = table(population, found, 100, 0)
    assert set(made["signals"]) == set(SIGNALS) and (made["n_edited"], made["n_others"]) == (10, 5)
    assert made["signals"]["gap_lost"]["all"]["auroc"] == 1 and made["signals"]["compare"]["all"]["auroc"] == 0.75
    assert made["signals"]["compare"]["by_kind"]["noise"]["auroc"] == 0.5
    assert made["signals"]["energy"]["by_kind"]["baseline"] == made["signals"]["energy"]["all"]
    truth = [one.edited for one in population]
    assert made["signals"]["energy"]["all"]["auroc"] == pytest.approx(roc_auc_score(truth, [row["energy"] for row in found]))
    ranks = [np.argsort(np.argsort([row[name] for row in found])) for name in ("gap_lost", "energy")]
    assert made["signals"]["both"]["all"]["auroc"] == pytest.approx(roc_auc_score(truth, sum(ranks)))
    assert made["kinds"]["noise"]["says"] == {"full rank": 5} and made["kinds"]["noise"]["n"] == 5


# The committed figures


def cell(of) -> str:
    return f"{of['auroc']:.2f} [{of['low']:.2f}, {of['high']:.2f}]"


def test_the_committed_figures_are_of_the_population():
    found = recipes(METRICS["layers"])
    assert {kind: row["n"] for kind, row in METRICS["kinds"].items()} == {
        kind: sum(one.kind == kind for one in found) for kind in dict.fromkeys(one.kind for one in found)
    }
    assert METRICS["n_edited"] == sum(one.edited for one in found) and METRICS["n_others"] == sum(not one.edited for one in found)
    for row in METRICS["signals"].values():
        assert all(0 <= of["low"] <= of["auroc"] <= of["high"] <= 1 for of in [row["all"], *row["by_kind"].values()])


def test_the_table_of_the_page_is_the_committed_one():
    lines = [
        f"| {kind} | {METRICS['kinds'][kind]['n']} | " + " | ".join(cell(METRICS["signals"][s]["by_kind"][kind]) for s in SIGNALS) + " |"
        for kind in METRICS["kinds"]
    ]
    everything = f"| all | {METRICS['n_edited']} + {METRICS['n_others']} | "
    everything += " | ".join(cell(METRICS["signals"][s]["all"]) for s in SIGNALS) + " |"
    page = (ROOT / "docs/edits.md").read_text()
    shown = [line for line in page.splitlines() if re.match(r"\| [a-z_ ,-]+ \| \d+( \+ \d+)? \|", line)]
    assert shown == [everything, *lines]
