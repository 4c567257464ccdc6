"""A study's directions in activation space, by numpy, scikit-learn and transformers' own hidden states."""

import itertools

import given
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from refusal.analysis.geometry import monitor, origins, positions_and_padding, sensitivity, spectra, spectrum_row
from refusal.io.store import Store

N = 12  # pairs a split, so that some prompts are longer than others


@pytest.fixture
def study(tmp_path):
    """A study of random activations; of its test pairs every third has a cue that was not seen."""
    study = given.study(Store(tmp_path / "s"), N, directions={"n_resamples": 20, "n_sign_flips": 50})
    generator = torch.Generator().manual_seed(0)
    shift = torch.randn(3, 32, generator=generator)
    sides = {"harmful": 2 * shift, "safe": -shift, "unrelated": 0 * shift}
    drawn = {
        f"{s}.{name}": torch.randn(N, 3, 32, generator=generator) + of for s in ("train", "val") for name, of in sides.items()
    }
    study.activations = {"sequential": drawn}
    for i, row in enumerate(study.pairs["test"]):
        row["seen"] = i % 3 != 0
    return study


def end_of(lm, ids, pads=0, n=1):
    """resid_pre of a prompt's last n tokens in the mean, [n_layers, d_model], after so many padding tokens that are attended to."""
    with torch.no_grad():
        hidden = lm.model(torch.tensor([[0] * pads + ids]), output_hidden_states=True).hidden_states[:-1]
    return torch.stack([layer[0, -n:].mean(0) for layer in hidden]).double().numpy()


def test_spectrum_row_is_the_enumeration_of_all_swaps():
    """Ten pairs: every way to swap them, and numpy's singular values."""
    generator = torch.Generator().manual_seed(0)
    harmful, safe = (torch.randn(10, 24, dtype=torch.float64, generator=generator) + shift for shift in (1.0, 0.0))
    differences = (harmful - safe).numpy()
    energy = np.square(differences).sum() / 10
    swaps = np.array(list(itertools.product((1, -1), repeat=10)))
    shares = np.square(swaps @ differences / 10).sum(1) / energy
    row = spectrum_row(harmful, safe, 20_000, 0)
    assert row["mean_share_null_95"] == pytest.approx(np.quantile(shares, 0.95), rel=0.03)
    assert np.quantile(shares, 0.95) > 1.2 * max(np.quantile(shares, 0.9), np.median(shares))  # so that another would show
    _, values, vectors = np.linalg.svd(differences, full_matrices=False)
    spectrum, mean = np.square(values) / np.square(values).sum(), differences.mean(0)
    assert row["first_share"] == pytest.approx(spectrum[0])
    assert row["effective_rank"] == pytest.approx(1 / np.square(spectrum).sum())
    assert row["mean_share"] == pytest.approx(np.square(mean).sum() / energy)
    assert row["cosine_first_to_mean"] == pytest.approx(abs(vectors[0] @ mean) / np.linalg.norm(mean))
    assert row["n"] == 10


def test_spectra_and_origins_are_those_of_each_layer(study):
    acts, unit = study.activations["sequential"], study.directions["unit"].numpy()
    by_layer = [*zip(spectra(study), origins(study), strict=True)]
    assert by_layer[0] == (None, None) and len(by_layer) == 3
    for layer, (spectrum, origin) in enumerate(by_layer[1:], 1):
        of = {name: rows[:, layer].double().numpy() for name, rows in acts.items()}
        values = np.linalg.svd(of["train.harmful"] - of["train.safe"])[1]
        assert spectrum["first_share"] == pytest.approx(np.square(values[0]) / np.square(values).sum()) and spectrum["n"] == N
        harmful, safe = (of[f"val.{side}"] @ unit[layer] for side in ("harmful", "safe"))
        assert origin["zero"] == pytest.approx(-safe.mean() / (harmful.mean() - safe.mean())) and origin["n"] == N
        assert [origin["harmful_mean"], origin["safe_mean"]] == pytest.approx([harmful.mean(), safe.mean()])


@pytest.mark.parametrize("n_positions", [1, 3])
def test_the_monitor_is_scikit_learns_area_on_seen_and_unseen_cues(study, n_positions):
    study.params = given.params(activations={"n_positions": n_positions})
    test, unit = study.pairs["test"], study.directions["unit"].numpy()
    at_end = {
        side: np.stack([end_of(study.lm, ids, n=n_positions) for ids in study.lm.encode([row[side] for row in test])])
        for side in ("harmful", "safe")
    }
    figures = monitor(study)
    which = {"all": range(N), "seen": [i for i in range(N) if i % 3], "unseen": range(0, N, 3)}
    assert figures.keys() == {"layer", *which} and figures["layer"] == 1
    for name, some in which.items():
        assert figures[name][0] is None
        for layer in (1, 2):
            projected = [*(at_end["harmful"][some, layer] @ unit[layer]), *(at_end["safe"][some, layer] @ unit[layer])]
            area = roc_auc_score([1] * len(some) + [0] * len(some), projected)
            assert (figures[name][layer]["auroc"], figures[name][layer]["n"]) == (pytest.approx(area), len(some))
    for row in test:
        row["seen"] = True
    assert monitor(study).keys() == {"layer", "all"}


def test_positions_and_padding_are_those_of_plain_forwards(study):
    """Attended padding turns the direction: as many pads as are named, or as a batch of four in the order given takes."""
    study.params = given.params(science={"padding": {"n_pads": [3], "n": N}}, activations={"batch_size": 4})
    study.pairs["train"].reverse()  # the longest first
    positions, padding = positions_and_padding(study, study.params.science.padding)
    ids = {side: study.lm.encode([row[side] for row in study.pairs["train"]]) for side in ("harmful", "safe")}
    longest = {side: [max(map(len, of[i // 4 * 4 :][:4])) for i in range(N)] for side, of in ids.items()}
    assert any(len(tokens) < longest[side][i] for side, of in ids.items() for i, tokens in enumerate(of))

    def direction(pads):
        means = [np.mean([end_of(study.lm, t, pads(side, i, t)) for i, t in enumerate(of)], axis=0) for side, of in ids.items()]
        return means[0] - means[1]

    clean = direction(lambda *_: 0)
    turned = {
        (True, 3): clean,
        (True, "as batched"): clean,
        (False, 3): direction(lambda *_: 3),
        (False, "as batched"): direction(lambda side, i, tokens: longest[side][i] - len(tokens)),
    }
    layers = [i for i in range(3) if np.linalg.norm(clean[i]) > 1e-6]
    assert {(row["masked"], row["n_pads"], row["layer"]) for row in padding} == {(*how, i) for how in turned for i in layers}
    for row in padding:
        a, b = clean[row["layer"]], turned[row["masked"], row["n_pads"]][row["layer"]]
        assert row["cosine"] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
    assert min(row["cosine"] for row in padding) < 0.99
    # Prompts end in their number, so that no token after the request is common to all: the last position alone.
    assert {(row["position"], row["n"]) for row in positions} == {(-1, N)}
    assert all(row["cosine_to_last"] == pytest.approx(1) for row in positions)


def test_sensitivity_holds_each_method_and_pairing(study):
    study.activations["batched"] = {name: rows + 0.5 * rows.flip(-1) for name, rows in study.activations["sequential"].items()}
    at_layer, rows = sensitivity(study, 20)
    names = {f"{method}-{pairing}" for method in study.activations for pairing in ("matched", "shuffled", "unrelated")}
    assert set(at_layer) == {f"{row['method']}-{row['pairing']}" for row in rows} == names
    assert {row["layer"] for row in rows} == {0, 1, 2}
    for name, of in at_layer.items():
        (row,) = of  # of twelve pairs all alone
        assert row["n"] == N and row["low"] <= row["cosine"] <= row["high"]
        assert (row["to_reference"] > 1 - 1e-9) is (name in ("sequential-matched", "sequential-shuffled"))
