"""Cost on harmless text: cross-entropy against transformers' own loss, KL against the definition."""

import math

import pytest
import torch
from tiny import tiny_direction, tiny_model

from refusal.analysis.harmless_kl import Edited, answer_log_probs, costs
from refusal.analysis.strength import edited_weights
from refusal.io.store import Store
from refusal.method.interventions import ablation, intervene


def sequences(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 96, (n,), generator=generator).tolist() for n in lengths]


PROMPTS, ANSWERS = sequences((7, 3, 12, 1, 5), 0), sequences((4, 9, 1, 6, 4), 1)
V = tiny_direction()


@pytest.fixture(scope="module", params=["qwen2", "gemma2"])
def model(request):
    return tiny_model(request.param)


@torch.no_grad()
def transformers_loss(model, prompt, answer):
    ids = torch.tensor([prompt + answer])
    return float(model(ids, labels=torch.tensor([[-100] * len(prompt) + answer])).loss)


@torch.no_grad()
def distributions(model, prompt, answer):
    """Token probabilities at each position that predicts the answer, a prompt alone."""
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().softmax(-1).tolist()


def price(edited, reference, tmp_path, batch_size=2):
    return costs(edited, reference, PROMPTS, ANSWERS, 0, batch_size, Store(tmp_path / "s.sqlite"), ["reference"], "test")


def run(model, tmp_path, reference=None, batch_size=2, key="k", **options):
    return price({"one": Edited(model, [key], **options)}, reference or model, tmp_path, batch_size)["one"]


@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_unedited_cross_entropy_is_transformers_loss_and_kl_is_zero(model, tmp_path, batch_size):
    entropy, divergence = run(model, tmp_path, batch_size=batch_size)
    wanted = [transformers_loss(model, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    assert entropy == pytest.approx(wanted, rel=1e-4)
    assert divergence == pytest.approx([0] * 5, abs=1e-6) and min(divergence) >= 0
    assert max(wanted) - min(wanted) > 0.1  # a mix-up of rows would show


def test_the_cost_of_an_ablation(model, tmp_path):
    def edit(model):
        return intervene(model, ablation(V, 1.0, "resid_pre"))

    entropy, divergence = run(model, tmp_path, edit=edit)
    before = [distributions(model, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
    with edit(model):
        after = [distributions(model, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]
        assert entropy == pytest.approx([transformers_loss(model, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)], rel=1e-4)
    for found, ps, qs in zip(divergence, before, after, strict=True):
        naive = [
            sum(p * (math.log(p) - math.log(q)) for p, q in zip(at, other, strict=True)) for at, other in zip(ps, qs, strict=True)
        ]
        backwards = [
            sum(q * (math.log(q) - math.log(p)) for p, q in zip(at, other, strict=True)) for at, other in zip(ps, qs, strict=True)
        ]
        assert found == pytest.approx(sum(naive) / len(naive), rel=1e-3, abs=1e-6)  # from the base, a token
        assert abs(found - sum(backwards) / len(backwards)) > 1e-3


def test_another_checkpoint_is_measured_against_the_reference(tmp_path):
    base, edited = tiny_model("qwen2"), tiny_model("qwen2", seed=1)
    entropy, divergence = run(edited, tmp_path, reference=base)
    assert entropy == pytest.approx([transformers_loss(edited, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)], rel=1e-4)
    assert min(divergence) > 0.1


def test_the_store_tells_edits_apart_and_computes_once(tmp_path, monkeypatch):
    model = tiny_model("qwen2")
    plain = run(model, tmp_path)
    edited = run(model, tmp_path, key="another", edit=lambda model: intervene(model, ablation(V, 1.0, "resid_pre")))
    assert edited != plain
    passes = []
    real = answer_log_probs
    monkeypatch.setattr("refusal.analysis.harmless_kl.answer_log_probs", lambda m, *rest: passes.append(m) or real(m, *rest))
    both = {
        "plain": Edited(model, ["k"]),
        "edited": Edited(model, ["another"], lambda model: intervene(model, ablation(V, 1.0, "resid_pre"))),
    }
    assert price(both, model, tmp_path) == {"plain": plain, "edited": edited}
    assert len(passes) == 3 * (1 + 2)  # three batches: the reference once for all edits
    monkeypatch.setattr("refusal.analysis.harmless_kl.answer_log_probs", None)  # not to be called again
    assert run(model, tmp_path) == plain
    assert run(model, tmp_path, key="another") == edited


def test_several_threads_price_each_its_own_models(tmp_path, threads):
    """A reference that is edited itself, an edit of a second model, a third model as it is."""
    model, second, third = (tiny_model("qwen2", seed=seed).requires_grad_(False) for seed in range(3))
    edited = {
        "hooks": Edited(model, ["h"], lambda one: intervene(one, ablation(V, 1.0, "resid_pre"))),
        "weights": Edited(model, ["w"], lambda one: edited_weights(one, V, 1.0)),
        "second": Edited(second, ["s"], lambda one: intervene(one, ablation(V, 1.0, "writes"))),
        "third": Edited(third, ["t"]),
    }
    found = []
    for n in (1, 2):
        threads(n)
        (tmp_path / str(n)).mkdir()
        found.append(price(edited, model, tmp_path / str(n), batch_size=1))
    for name, (entropies, divergences) in found[0].items():
        assert found[1][name][0] == pytest.approx(entropies, rel=1e-5)
        assert found[1][name][1] == pytest.approx(divergences, rel=1e-4, abs=1e-6) and min(divergences) > 1e-3


def test_log_probs_are_normalised_and_one_a_token():
    found = answer_log_probs(tiny_model("qwen2"), PROMPTS, ANSWERS, 0)
    assert [len(rows) for rows in found] == [len(answer) for answer in ANSWERS]
    for rows in found:
        assert torch.allclose(rows.exp().sum(-1), torch.ones(len(rows)), atol=1e-5)
