"""Scores of a direction beside what it does: completions are given, scores are computed anew by plain hooks."""

import random
from statistics import fmean

import given
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tiny import tiny_direction

from refusal.analysis import selection_scores
from refusal.analysis.selection_scores import contest
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.method.first_token import refusal_score
from refusal.stats import resampled_sums

N, LAYERS = 12, [1, 2, 3, 4]
SEPARATION = [None, 1.0, 3.0, 2.0, 4.0]
VAL = {1: 0.2, 2: 0.9, 3: 0.9, 4: 0.5}
LETTERS = {1: "r", 2: "yyr", 3: "yh", 4: "y"}  # at each layer, of each test prompt one by chance


def letter(layer: int, i: int) -> str:
    return random.Random(f"{layer} {i}").choice(LETTERS[layer])


@pytest.fixture
def study(tmp_path, monkeypatch):
    unit = tiny_direction(rows=5).double()
    unit[0] = 0
    study = given.study(
        Store(tmp_path / "s"),
        n=N,
        n_topics=4,
        lm=given.text_lm(num_hidden_layers=5, dtype=torch.float64),
        claims={"layers": None, "n": None, "n_pairs": [8], "n_random": 2, "seed": 0},
    )
    study.directions = {"unit": unit, "difference": 2 * unit, "defined": unit.any(-1), "safe_mean": unit}
    monkeypatch.setattr(selection_scores.first_token, "refusal_tokens", lambda lm: {"I": 73})
    given.answers(monkeypatch, lambda lm, one, prompt, addition: given.TEXTS[letter(one.layer, int(prompt.split()[-1]))])
    return study


def judged() -> dict:
    cells = {f"layer_{k}_alpha_100": {"layer": k, "alpha": 1.0, "score": v} for k, v in VAL.items()}
    return cells | {"baseline": {"layer": None, "alpha": 0.0, "score": 0.7}, "more": {"layer": 1, "alpha": 2.0, "score": 1.0}}


def resid(study, prompt, ablate=None, add=None):
    """resid_pre at the last token of one prompt, [n_layers, d_model], and its refusal score, by torch's own hooks."""
    model, kept, handles = study.lm.model, [], []
    for i, block in enumerate(model.model.layers):

        def hook(_, args, i=i):
            x = args[0]
            if ablate is not None:
                x = x - (x @ ablate)[..., None] * ablate
            if add is not None and i == add[0]:
                x = x + add[1]
            kept.append(x[0, -1])
            return (x, *args[1:])

        handles.append(block.register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = model(torch.tensor([study.lm.encode([prompt])[0]])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return torch.stack(kept), float(refusal_score(logits.log_softmax(-1)[None], [73]))


def test_every_score_is_the_definition_one_prompt_at_a_time(study):
    found = contest(study, judged(), SEPARATION)
    harmful, safe = ([row[half] for row in study.pairs["val"]] for half in ("harmful", "safe"))

    def mean(prompts, **how):
        return torch.stack([resid(study, prompt, **how)[0] for prompt in prompts]).mean(0)

    cosine = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
    as_is = mean(harmful), mean(safe)
    where = min(range(5), key=lambda k: cosine(as_is[0][k], as_is[1][k]))  # a tenth of five layers is one
    for at, layer in enumerate(LAYERS):
        v = study.directions["unit"][layer]
        ablated, added = mean(harmful, ablate=v), mean(safe, add=(layer, 2 * v))
        expected = cosine(ablated[where], as_is[1][where]) + cosine(added[where], as_is[0][where])
        assert found["scores"]["cosmic"][at] == pytest.approx(expected, abs=1e-9)
        bypass = fmean(resid(study, prompt, ablate=v)[1] for prompt in harmful)
        assert found["scores"]["bypass"][at] == pytest.approx(-bypass, abs=1e-9)
    assert found["scores"]["separation"] == SEPARATION[1:] and found["scores"]["val"] == [*VAL.values()]
    assert found["layers"] == LAYERS and found["n"] == N


def table() -> list[list[float]]:
    """Compliance x coherence of each test prompt at each layer."""
    score = {"y": 1.0, "h": 0.25, "r": 0.0}
    return [[score[letter(layer, i)] for layer in LAYERS] for i in range(N)]


def test_correlations_and_regrets_are_those_of_test(study):
    found = contest(study, judged(), SEPARATION)
    test = [fmean(column) for column in zip(*table(), strict=True)]
    assert found["test"] == pytest.approx(test) and test[0] == 0 and test[3] == 1
    topics = [row["topic"] for row in study.pairs["test"]]
    drawn = resampled_sums(np.array(table()), topics, 2000, 0)
    for name in ("separation", "val"):
        scores, row = found["scores"][name], found["correlations"][name]
        assert row["correlation"] == pytest.approx(spearmanr(scores, test).statistic)
        of_drawn = [spearmanr(scores, some).statistic for some in drawn]
        assert [row["low"], row["high"]] == pytest.approx(np.quantile(of_drawn, [0.025, 0.975]))
    regret = found["regrets"]["val"]
    assert regret["layer"] == 2 and regret["regret"] == pytest.approx(1 - test[1])
    lost = [max(some) / N - some[1] / N for some in drawn]
    assert [regret["low"], regret["high"]] == pytest.approx(np.quantile(lost, [0.025, 0.975]))
    assert found["regrets"]["separation"] == {"layer": 4, "regret": 0.0, "low": 0.0, "high": 0.0}
    assert found["regret_of_any_layer"] == pytest.approx(1 - fmean(test))
    assert found["figures"]["val"]["ours"][0] == found["correlations"]["val"]["correlation"] and found["figures"]["val"]["n"] == 4


def test_chance_orders_four_layers_either_way(study):
    """Of 24 orders of four one is the same and one the reverse: the middle 95 % reach both."""
    row = contest(study, judged(), SEPARATION)["correlations"]["val"]
    assert (row["null_low"], row["null_high"]) == pytest.approx((-1, 1)) and abs(row["null"]) <= 0.2


def test_prompts_without_a_verdict_are_no_items(study, monkeypatch):
    given.answers(
        monkeypatch,
        lambda lm, one, prompt, addition: given.TEXTS["?" if (i := int(prompt.split()[-1])) == 3 and one.layer == 2 else letter(one.layer, i)],
    )
    found = contest(study, judged(), SEPARATION)
    kept = [row for i, row in enumerate(table()) if i != 3]
    assert found["n"] == N - 1 and found["test"] == pytest.approx([fmean(column) for column in zip(*kept, strict=True)])


def test_two_layers_have_no_order(study):
    few = {name: cell for name, cell in judged().items() if cell["layer"] in (None, 1, 2)}
    with pytest.raises(UserError, match=r"sweep.layers: fewer than three at alpha 1"):
        contest(study, few, SEPARATION)


def test_subspaces_have_no_order_of_layers(study):
    study.params = study.params.model_copy(update={"sweep": study.params.sweep.model_copy(update={"basis": "qr"})})
    with pytest.raises(UserError, match="compares single directions"):
        contest(study, judged(), SEPARATION)
