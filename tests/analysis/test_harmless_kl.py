"""Cost on harmless text: cross-entropy against transformers' own loss, KL against the definition."""

from dataclasses import replace

import given
import pytest
import torch
from tiny import text_lm, tiny_direction, tiny_lm, tiny_prompts

from refusal.analysis.harmless_kl import Texts, cost_figures, harmless_kl, harmless_texts
from refusal.io.store import Store
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE, Intervention

PROMPTS, ANSWERS = tiny_prompts((7, 3, 12, 1, 5)), tiny_prompts((4, 9, 1, 6, 4), 1)
TEXTS, ROWS = Texts(PROMPTS, ANSWERS, range(5)), [*zip(PROMPTS, ANSWERS, strict=True)]
LM, V = tiny_lm(), tiny_direction()
ABLATED = Intervention("ablated", V)


def costs(edited, reference, tmp_path, batch_size=2, texts=TEXTS):
    return harmless_kl(reference, edited, texts, batch_size, Store(tmp_path / "s.sqlite"), "test")


def naive(lm, intervention, reference):
    before = [given.log_probs(reference.model, *row) for row in ROWS]
    with intervention.on(lm.model):
        return given.text_costs(lm.model, before, ROWS)


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
def test_costs_are_transformers_loss_and_the_definition_of_kl(model_type, tmp_path, batch_size):
    """As it is, under an ablation, with edited weights, and of another checkpoint, all against one reference."""
    base, other = tiny_lm(model_type), tiny_lm(model_type, weights="other", seed=1)
    edited = {
        "baseline": (base, BASELINE),
        "hooks": (base, ABLATED),
        "weights": (base, Intervention("w", V, 1.5, "weights")),
        "other": (other, BASELINE),
        "other, ablated": (other, Intervention("o", V, 0.5, "writes")),
    }
    found = costs(edited, base, tmp_path, batch_size)
    assert list(found) == list(edited)
    for name, (entropies, divergences) in found.items():
        losses, kl = naive(*edited[name], base)
        assert entropies == pytest.approx(losses, rel=1e-4) and divergences == pytest.approx(kl, rel=1e-3, abs=1e-6), name
        assert max(losses) - min(losses) > 0.1 and min(divergences) >= 0  # a mix-up of rows would show
        assert (max(kl) > 1e-3) is (name != "baseline")
    backwards = naive(base, BASELINE, other)[1]
    assert max(abs(a - b) for a, b in zip(backwards, found["other"][1], strict=True)) > 1e-2  # KL is from the reference


def test_a_reference_runs_once_a_batch_and_what_another_study_shares_is_found(tmp_path):
    base, passes = tiny_lm(), []
    base.model.register_forward_pre_hook(lambda *_: passes.append(1))
    random = Intervention("random", tiny_direction(seed=1), direction_independent=True)
    mine = {"baseline": (base, BASELINE), "random": (base, random), "ablated": (base, ABLATED)}
    found = costs(mine, base, tmp_path)
    assert len(passes) == 3 * (1 + 2) + 3 * (1 + 1)  # in three batches, those of every study by themselves
    assert costs(mine, base, tmp_path) == found and len(passes) == 15
    theirs = mine | {"ablated": (base, replace(ABLATED, alpha=0.5))}
    after = costs(theirs, base, tmp_path)
    assert len(passes) == 15 + 3 * (1 + 1) and after["random"] == found["random"] and after["ablated"] != found["ablated"]


CHANGES = {
    "the reference's weights": {"reference": tiny_lm(weights="other", seed=1)},
    "the edited weights": {"lm": tiny_lm(weights="other", seed=1)},
    "the dtype": {"reference": tiny_lm(dtype=torch.bfloat16), "lm": tiny_lm(dtype=torch.bfloat16)},
    "the direction": {"intervention": Intervention("ablated", tiny_direction(seed=1))},
    "the sites": {"intervention": ABLATED.at("writes")},
    "edited weights": {"intervention": ABLATED.at("weights")},
    "a prompt": {"texts": Texts([[9, *PROMPTS[0]], *PROMPTS[1:]], ANSWERS, range(5))},
    "an answer": {"texts": Texts(PROMPTS, [[9], *ANSWERS[1:]], range(5))},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_determines_a_cost_is_in_its_key(tmp_path, what):
    def cost(folder, **change):
        how = {"reference": LM, "lm": LM, "intervention": ABLATED, "texts": TEXTS} | change
        folder.mkdir(exist_ok=True)
        return costs({"one": (how["lm"], how["intervention"])}, how["reference"], folder, 100, how["texts"])["one"]

    before, after = cost(tmp_path / "a"), cost(tmp_path / "a", **CHANGES[what])
    assert after != before and after == cost(tmp_path / "b", **CHANGES[what])


def test_several_threads_price_each_its_own_models(tmp_path, threads):
    """A reference that is edited itself, an edit of a second model, a third model as it is."""
    model, second, third = (tiny_lm(weights=str(seed), seed=seed) for seed in range(3))
    for lm in (model, second, third):
        lm.model.requires_grad_(False)
    edited = {
        "hooks": (model, ABLATED),
        "weights": (model, ABLATED.at("weights")),
        "second": (second, ABLATED.at("writes")),
        "third": (third, BASELINE),
    }
    found = []
    for n in (1, 2):
        threads(n)
        (tmp_path / str(n)).mkdir()
        found.append(costs(edited, model, tmp_path / str(n), batch_size=1))
    for name, (entropies, divergences) in found[0].items():
        assert found[1][name][0] == pytest.approx(entropies, rel=1e-5)
        assert found[1][name][1] == pytest.approx(divergences, rel=1e-4, abs=1e-6) and min(divergences) > 1e-3


def test_texts_are_the_baselines_own_answers_where_there_is_one(tmp_path):
    """Of a model that ends some answers before they begin: transformers' own greedy ones, and their prompts and topics."""
    lm, rows = text_lm(), [{"safe": f"{'abcdefgh'[i] * (i + 1)}?", "topic": i} for i in range(8)]
    prompts = lm.encode([row["safe"] for row in rows])
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "pad_token_id": 0}
    free = [lm.model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    lm = replace(lm, stop=frozenset({free[2][0], free[5][0]}))
    texts = harmless_texts(lm, rows, Decoding(4, 3), Store(tmp_path / "s.sqlite"), "test")
    kept = [i for i, answer in enumerate(free) if answer[0] not in lm.stop]
    assert 0 < len(kept) < 7 and texts.topics == kept and texts.prompts == [prompts[i] for i in kept]
    for i, answer in zip(kept, texts.answers, strict=True):
        end = next((n for n, token in enumerate(free[i]) if token in lm.stop), 4)
        assert answer == free[i][:end]


def test_figures_are_means_over_all_edits_and_all_texts():
    """Of one edit the interval is over texts, of two clusters from the one's mean to the other's; of several over edits."""
    topics, members = ["a", "a", "b"], [([1.0, 2.0, 6.0], [0.0, 0.5, 0.1]), ([3.0, 4.0, 8.0], [1.0, 0.5, 0.3])]
    found = cost_figures(members, topics, 500, 0)
    assert given.figure(found, "cross_entropy") == pytest.approx([4.0, 3.0, 5.0])
    assert given.figure(found, "kl") == pytest.approx([0.4, 0.2, 0.6])
    assert given.figure(cost_figures(members[:1], topics, 500, 0), "cross_entropy") == pytest.approx([3.0, 1.5, 6.0])
    assert cost_figures([([], [])], [], 500, 0) == {"cross_entropy": None, "kl": None}
