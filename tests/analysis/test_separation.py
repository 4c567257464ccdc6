"""Separation, agreement, spectra, origin and AUROC against numpy, naive loops, closed forms and simulation."""

import json
import random

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from synthetic import activations, gaussian, naive_d

from refusal.analysis.ceilings import ceilings, describe_noise
from refusal.analysis.separation import (
    auroc,
    bootstrap_unit,
    contrast,
    describe,
    effective_rank,
    harmless_sets,
    origin_between_means,
    plot_rows,
    separation_interval,
    sign_flip_null,
    spectrum,
)
from refusal.method.directions import cohens_d, cosine

TOPICS = [f"topic {i % 8}" for i in range(24)]


def described(sets, pairing="matched", topics=TOPICS):
    of, reference = contrast(sets, pairing, 0), contrast(sets, "matched", 0)
    m = describe(of, sets, [*topics, *topics], reference.directions, 50, 50, 0) | describe_noise(of, reference, 0)
    return m | {
        "cosine_to_sequential_ceiling": ceilings(m["reliability"], describe_noise(reference, reference, 0)["reliability"])
    }


def drawn_rows(n, n_topics, n_resamples, seed):
    """The rows of each bootstrap resample of whole topics, row i being of topic i % n_topics, by the generator that is in use."""
    counts = np.random.default_rng(seed).multinomial(n_topics, [1 / n_topics] * n_topics, size=n_resamples)
    return [[i for i in range(n) for _ in range(times[i % n_topics])] for times in counts]


def test_shuffled_equals_matched_to_rounding_but_pairs_other_prompts():
    sets = activations()
    matched, shuffled, unrelated = (contrast(sets, pairing, 0) for pairing in ("matched", "shuffled", "unrelated"))
    assert (cosine(matched.directions.unit, shuffled.directions.unit)[1:] >= 1 - 1e-12).all()
    rows = lambda t: sorted(map(tuple, t.flatten(1).tolist()))  # noqa: E731
    assert not torch.equal(matched.safe, shuffled.safe) and rows(matched.safe) == rows(shuffled.safe)
    for layer in (1, 2, 3):  # what pairing does matter to moves
        spectra = [spectrum(of.harmful[:, layer], of.safe[:, layer]) for of in (matched, shuffled)]
        assert not torch.allclose(*spectra, atol=1e-4)
    assert not torch.equal(shuffled.safe, contrast(sets, "shuffled", 1).safe)
    assert torch.equal(unrelated.safe, sets["train.unrelated"]) and (matched.paired, unrelated.paired) == (True, False)
    assert (cosine(matched.directions.unit, unrelated.directions.unit)[1:] < 0.999).all()


@pytest.mark.parametrize("pairing", ["matched", "shuffled", "unrelated"])
def test_describe_gives_each_figure_of_each_layer(pairing):
    """By numpy, a layer at a time, with the same draws; prompts of a topic alike, so that resampling prompts is another thing."""
    sets = activations()
    level = 2 * gaussian(8, 1, 12, seed=9)[[i % 8 for i in range(24)]].double()
    for half, sign in (("harmful", 1), ("safe", -1)):  # far from zero, where a difference of squares would lose digits
        sets[f"val.{half}"] = 1e6 + sets[f"val.{half}"] + sign * level
    sets["train.unrelated"] = sets["train.unrelated"][:33]
    of, reference = contrast(sets, pairing, 0), contrast(sets, "matched", 0).directions.unit
    m, n, n_safe = described(sets, pairing), 40, 33 if pairing == "unrelated" else 40
    assert (m["n_harmful"], m["n_safe"], m["n_val"], m["layers"]) == (n, n_safe, 24, [1, 2, 3])
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, n, (50, n), generator=generator).tolist()
    second = torch.randint(0, n_safe, (50, n_safe), generator=generator).tolist() if pairing == "unrelated" else first
    flips = torch.randint(0, 2, (50, n), generator=torch.Generator().manual_seed(0)).numpy() * 2 - 1
    units = [(of.harmful[:, i].double().mean(0) - of.safe[:, i].double().mean(0)).numpy() for i in range(4)]
    for layer in (1, 2, 3):
        harmful, safe, v = of.harmful[:, layer].double().numpy(), of.safe[:, layer].double().numpy(), units[layer]
        cosine_to = lambda u, v=v: float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))  # noqa: E731
        assert m["norm"][layer] == pytest.approx(np.linalg.norm(v)) and not 0.99 < m["norm"][layer] < 1.01
        assert m["cosine_to_sequential"][layer] == pytest.approx(cosine_to(reference[layer].numpy()))
        assert m["cross_layer_cosine"][layer] == [None, *(pytest.approx(cosine_to(u)) for u in units[1:])]
        resampled = [cosine_to(harmful[a].mean(0) - safe[b].mean(0)) for a, b in zip(first, second, strict=True)]
        shown = [m[f"bootstrap_cosine_{name}"][layer] for name in ("low", "median")]
        assert shown == pytest.approx(np.quantile(resampled, [0.025, 0.5]).tolist())
        unit = v / np.linalg.norm(v)
        assert m["separation_in_sample"][layer] == pytest.approx(naive_d((harmful @ unit).tolist(), (safe @ unit).tolist()))
        # On the matched val pairs, whatever the direction was fitted on.
        on_val = [sets[f"val.{half}"][:, layer].double().numpy() @ unit for half in ("harmful", "safe")]
        assert m["separation"][layer] == pytest.approx(naive_d(*(side.tolist() for side in on_val)))
        naive = [naive_d(*(side[rows].tolist() for side in on_val)) for rows in drawn_rows(24, 8, 50, 0)]
        shown = [m[f"separation_{name}"][layer] for name in ("low", "high")]
        assert shown == pytest.approx(np.quantile(naive, [0.025, 0.975]).tolist())
        if pairing != "unrelated":
            differences = harmful - safe
            energy = np.linalg.svd(differences, compute_uv=False) ** 2
            energy /= energy.sum()
            assert m["spectrum"][layer] == pytest.approx(energy[:10].tolist()) and len(energy) == 12
            assert m["effective_rank"][layer] == pytest.approx(1 / (energy**2).sum())
            null = [np.linalg.norm((flip[:, None] * differences).mean(0)) for flip in flips]
            assert m["sign_flip_null_95"][layer] == pytest.approx(np.quantile(null, 0.95))
    for row in plot_rows({f"sequential-{pairing}": m})["cross_layer_cosine"]:
        assert row["ceiling"] ** 2 == pytest.approx(m["reliability"][row["layer"]] * m["reliability"][row["other_layer"]])
    assert ("spectrum" in m) is (pairing != "unrelated") and m["cross_layer_cosine"][0] == [None] * 4
    assert all(m[key][0] in (None, [None] * 4) for key in m if isinstance(m[key], list) and key != "layers")
    d = m["separation"]
    assert m["separation_first"] == d[1] and m["separation_last_half_min"] == min(d[2:])
    assert m["peak_separation"] == max(d[1:]) and m["peak_layer"] == d.index(max(d[1:]))
    assert m["cosine_to_sequential_min"] == min(m["cosine_to_sequential"][1:])
    assert (m["cosine_to_sequential_min"] > 1 - 1e-12) is (pairing != "unrelated")


def one_row(sets):
    return {name: rows[:1].expand(len(rows), -1, -1) for name, rows in sets.items()}


@pytest.mark.parametrize(
    ("change", "topics", "defined", "scored"),
    [
        (lambda sets: sets, TOPICS, [1, 2, 3], True),
        (lambda sets: sets, ["same"] * 24, [1, 2, 3], True),
        (lambda sets: {name: rows[:2] for name, rows in sets.items()}, TOPICS[:2], [1, 2, 3], True),
        (lambda sets: {name: rows[:1] for name, rows in sets.items()}, TOPICS[:1], [1, 2, 3], False),
        (one_row, TOPICS, [1, 2, 3], False),  # no spread: no effect size
        (lambda sets: sets | {f"{of}.harmful": sets[f"{of}.safe"] for of in ("train", "val")}, TOPICS, [], False),
    ],
    ids=["ordinary", "one topic", "two prompts", "one prompt", "equal prompts", "harmful equal to safe"],
)
def test_figures_are_numbers_or_null_whatever_the_input(change, topics, defined, scored):
    """No NaN and no infinity, nor the largest float in their place; an interval only where there is a value."""
    m = described(change(activations()), topics=topics)
    assert "e+308" not in json.dumps([m, plot_rows({"sequential-matched": m})], allow_nan=False)
    assert m["layers"] == defined and [value is not None for value in m["separation"]] == [False, *[scored] * 3]
    for value, low, high in zip(m["separation"], m["separation_low"], m["separation_high"], strict=True):
        assert value is not None or (low is None and high is None)
    if not scored:
        assert m["peak_layer"] is None and m["peak_separation"] is None and m["separation_first"] is None
    if not defined:
        assert m["norm"] == [None] * 4 == m["spectrum"]


def test_plot_rows_are_the_figures_of_defined_layers():
    m = {
        "layers": [1],
        "separation": [None, 3.0],
        "separation_low": [None, 2.0],
        "separation_high": [None, 4.0],
        "separation_in_sample": [None, 5.0],
        "cosine_to_sequential": [None, 0.9],
        "cosine_to_sequential_ceiling": [None, 0.7],
        "reliability": [None, 0.6],
        "bootstrap_cosine_low": [None, 0.8],
        "cross_layer_cosine": [[None, None], [None, 1.0]],
    }
    place = {"arm": "batched-matched", "method": "batched", "pairing": "matched", "layer": 1}
    assert plot_rows({"batched-matched": m | {"spectrum": [None, [0.7, 0.3]]}}) == {
        "separation": [place | {"separation": 3.0, "low": 2.0, "high": 4.0, "in_sample": 5.0}],
        "cosine_to_sequential": [place | {"cosine": 0.9, "bootstrap_low": 0.8, "ceiling": 0.7}],
        "cross_layer_cosine": [place | {"other_layer": 1, "cosine": 1.0, "ceiling": 0.6}],
        "spectrum": [place | {"component": 1, "share": 0.7}, place | {"component": 2, "share": 0.3}],
    }
    without = plot_rows({"batched-unrelated": m | {"cosine_to_sequential": [None, None]}})
    assert without["cosine_to_sequential"] == without["spectrum"] == [] and without["separation"][0]["pairing"] == "unrelated"


def test_separation_interval_covers():
    """A true d of 1.5, 60 topics: about 95 % of the intervals hold it (1500 layers are as many samples, of the same resamples)."""
    harmful, safe = (gaussian(120, 1500, seed=seed, dtype=torch.float64) for seed in (1, 2))
    low, high = separation_interval(harmful + 1.5, safe, [i // 2 for i in range(120)] * 2, 2000, 0)
    assert 0.92 < float(((low <= 1.5) & (high >= 1.5)).double().mean()) < 0.97


def drawn_of_two_sets(topics, n_harmful, n_resamples, seed):
    """The rows of each set in each bootstrap resample of whole topics, which both sets may share: [(harmful, safe)]."""
    names = list(dict.fromkeys(topics))
    counts = np.random.default_rng(seed).multinomial(len(names), [1 / len(names)] * len(names), size=n_resamples)
    rows = [[i for i, topic in enumerate(topics) for _ in range(times[names.index(topic)])] for times in counts]
    return [([i for i in some if i < n_harmful], [i - n_harmful for i in some if i >= n_harmful]) for some in rows]


def test_intervals_of_prompts_that_are_no_pairs_draw_the_topics_of_both_sets():
    """24 harmful and 33 safe prompts, two topics in both sets, by a loop over topics and prompts."""
    harmful, safe = gaussian(24, 3, seed=1, dtype=torch.float64) + 1, gaussian(33, 3, seed=2, dtype=torch.float64)
    topics = [*(f"group {i // 2}" for i in range(24)), *(f"group {i // 3 + 10}" for i in range(33))]
    drawn = drawn_of_two_sets(topics, 24, 200, 5)
    d = torch.stack([cohens_d(harmful[a], safe[b]) for a, b in drawn])
    expected = [d.nanquantile(q, dim=0) for q in (0.025, 0.975)]
    for ours, theirs in zip(separation_interval(harmful, safe, topics, 200, 5), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-12)
    zero = [float(-safe[b, 0].mean() / (harmful[a, 0].mean() - safe[b, 0].mean())) for a, b in drawn]
    figures = origin_between_means(harmful[:, 0], safe[:, 0], topics, 200, 5)
    assert [figures["zero_low"], figures["zero_high"]] == pytest.approx(np.quantile(zero, [0.025, 0.975]).tolist())
    area = [roc_auc_score([1] * len(a) + [0] * len(b), [*harmful[a, 0], *safe[b, 0]]) for a, b in drawn]
    figures = auroc(harmful[:, 0], safe[:, 0], topics, 200, 5)
    assert [figures["auroc_low"], figures["auroc_high"]] == pytest.approx(np.quantile(area, [0.025, 0.975]).tolist())
    assert figures["auroc"] == pytest.approx(roc_auc_score([1] * 24 + [0] * 33, [*harmful[:, 0], *safe[:, 0]]))


def test_without_pairs_the_safe_prompts_are_the_unrelated_ones_and_their_halves_the_control():
    sets = {name: rows for name, rows in activations().items() if not name.endswith("safe")}
    sets["val.unrelated"] = gaussian(33, 4, 12, seed=9)
    topics = [*(f"a {i}" for i in range(24)), *(f"b {i}" for i in range(33))]
    m = describe(of := contrast(sets, "unrelated", 0), sets, topics, of.directions, 20, 20, 0)
    unit, val = of.directions.unit[1], (sets["val.harmful"][:, 1].double(), sets["val.unrelated"][:, 1].double())
    pooled = (23 * (val[0] @ unit).var() + 32 * (val[1] @ unit).var()) / 55
    assert m["separation"][1] == pytest.approx(float(((val[0] @ unit).mean() - (val[1] @ unit).mean()) / pooled.sqrt()))
    assert m["n_val"] == 24 and "spectrum" not in m
    both = torch.cat(harmless_sets(sets))
    assert len(both) == len(sets["train.unrelated"]) and torch.equal(both.sort(0)[0], sets["train.unrelated"].sort(0)[0])


def test_effective_rank_of_known_shapes():
    rank = lambda differences: effective_rank(spectrum(differences, torch.zeros_like(differences)))  # noqa: E731
    assert rank(torch.outer(gaussian(200), gaussian(9, seed=1))) == pytest.approx(1)
    assert 8.9 < rank(gaussian(20000, 9)) <= 9
    assert rank(gaussian(20000, 9) * torch.tensor([1, 1, 1, 0, 0, 0, 0, 0, 0])) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize(("offset", "agrees"), [(0.0, False), (0.5, True)])
def test_sign_flips_tell_agreement_from_none(offset, agrees):
    differences = gaussian(100, 20) + offset
    null = sign_flip_null(differences, torch.zeros(100, 20), 1000, 0)
    assert (float(differences.double().mean(0).norm()) > float(null.quantile(0.95))) is agrees


@pytest.mark.parametrize("paired", [True, False])
def test_bootstrap_unit_of_fewer_prompts(paired):
    harmful, safe = gaussian(30, 6, seed=6) + 1, gaussian(30 if paired else 45, 6, seed=7)
    generator, naive = torch.Generator().manual_seed(3), []
    first = torch.randint(0, 30, (8, 17), generator=generator)
    second = first if paired else torch.randint(0, 45, (8, 17), generator=generator)
    for a, b in zip(first, second, strict=True):
        d = harmful[a].double().mean(0) - safe[b].double().mean(0)
        naive.append(d / d.norm())
    assert torch.allclose(bootstrap_unit(harmful, safe, 8, 3, paired, 17), torch.stack(naive), atol=1e-12)


@pytest.mark.parametrize(("safe_mean", "harmful_mean", "zero"), [(0, 80, 0), (-40, 40, 0.5), (-100, -20, 1.25), (10, 90, -0.125)])
def test_where_zero_lies(safe_mean, harmful_mean, zero):
    harmful, safe = gaussian(2, 4000, dtype=torch.float64) + torch.tensor([[harmful_mean], [safe_mean]])
    figures = origin_between_means(harmful, safe, [i % 40 for i in range(4000)] * 2, 60, 3)
    assert figures["zero"] == pytest.approx(zero, abs=0.01) and figures["n"] == 4000
    naive = [float(-safe[rows].mean() / (harmful[rows].mean() - safe[rows].mean())) for rows in drawn_rows(4000, 40, 60, 3)]
    assert [figures["zero_low"], figures["zero_high"]] == pytest.approx(np.quantile(naive, [0.025, 0.975]).tolist())
    for name, values, mean in (("harmful", harmful, harmful_mean), ("safe", safe, safe_mean)):
        assert figures[f"{name}_mean"] == pytest.approx(float(values.mean()))
        quantiles = [figures[f"{name}_{q}"] for q in ("q05", "q25", "q50", "q75", "q95")]
        assert quantiles == pytest.approx([mean + z for z in (-1.645, -0.674, 0, 0.674, 1.645)], abs=0.1)


@pytest.mark.parametrize("at_once", [2**22, 100])  # in one chunk, and in many
@pytest.mark.parametrize("shift", [0, 1, 3])
def test_auroc_and_its_interval_are_scikit_learns_ties_included(monkeypatch, at_once, shift):
    monkeypatch.setattr("refusal.stats.AT_ONCE", at_once)
    harmful, safe = np.random.default_rng(2).integers(0, 9, (2, 40)) + np.array([[shift], [0]])
    figures = auroc(torch.tensor(harmful), torch.tensor(safe), [i % 12 for i in range(40)] * 2, 50, 3)
    area = lambda rows: roc_auc_score([1] * len(rows) + [0] * len(rows), [*harmful[rows], *safe[rows]])  # noqa: E731
    assert figures["auroc"] == pytest.approx(area(range(40))) and figures["n"] == 40
    limits = np.quantile([area(rows) for rows in drawn_rows(40, 12, 50, 3)], [0.025, 0.975])
    assert [figures["auroc_low"], figures["auroc_high"]] == pytest.approx(limits.tolist())


@pytest.mark.parametrize(("harmful", "separable"), [([2.0, 2, 2], True), ([1.0, 1, 1], False), ([2.0, 2, 1], False)])
def test_separable_means_that_the_sets_do_not_overlap(harmful, separable):
    assert auroc(torch.tensor(harmful), torch.ones(3), [0, 1, 2] * 2, 10, 0)["separable"] is separable


def test_auroc_of_many_prompts_holds_no_table_of_all_pairs():
    values = torch.arange(200_000).double()  # as a table, 320 GB
    figures = auroc(values + 0.5, values, [0, 1] * 200_000, 5, 0)
    assert figures["auroc"] == pytest.approx(0.5, abs=1e-5) and not figures["separable"]


def test_the_interval_of_auroc_covers():
    rng, held, n_samples = np.random.default_rng(1), 0, 400
    truth = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    for sample in range(n_samples):
        figures = auroc(torch.tensor(rng.normal(1, 1, 100)), torch.tensor(rng.normal(0, 1, 100)), [*range(100)] * 2, 300, sample)
        held += figures["auroc_low"] <= truth <= figures["auroc_high"]
    assert 0.915 < held / n_samples < 0.98


def test_the_interval_of_zero_draws_whole_topics():
    """Topics with a level of their own, against a loop over topics and prompts with another generator."""
    rng, topics = np.random.default_rng(4), [i // 6 for i in range(180)]
    levels = rng.normal(0, 1, (2, 30))
    harmful, safe = (levels[side][topics] + 0.2 * rng.normal(size=180) + 4 * side for side in (1, 0))
    found = origin_between_means(torch.tensor(harmful), torch.tensor(safe) - 1, topics * 2, 4000, 0)
    pick, resampled = random.Random(1), []
    for _ in range(4000):
        drawn = [6 * topic + i for topic in pick.choices(range(30), k=30) for i in range(6)]
        ours, theirs = harmful[drawn].mean(), safe[drawn].mean() - 1
        resampled.append(-theirs / (ours - theirs))
    low, high = np.quantile(resampled, [0.025, 0.975])
    assert [found["zero_low"], found["zero_high"]] == pytest.approx([low, high], abs=0.08 * (high - low))
    assert found["zero"] == pytest.approx((1 - safe.mean()) / (harmful.mean() - safe.mean() + 1))
    for name, values in (("harmful", harmful), ("safe", safe - 1)):
        assert found[f"{name}_mean"] == pytest.approx(values.mean())
        quantiles = [found[f"{name}_q{q}"] for q in ("05", "25", "50", "75", "95")]
        assert quantiles == pytest.approx(np.quantile(values, [0.05, 0.25, 0.5, 0.75, 0.95]).tolist())
