"""Directions at two positions: activations, beliefs and rates by a plain loop over single prompts; completions are given."""

import random
from dataclasses import replace
from statistics import fmean

import given
import pytest
import torch
from tiny import Ascii

from refusal.analysis import harmfulness
from refusal.analysis.harmfulness import QUESTION, apart
from refusal.analysis.reliability import corrected_cosine
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.stats import clustered_mean

N, LAYERS, TAIL = 12, [1, 2], ">>."
TEST_REFUSED, TEST_ANSWERED = [0, 1, 2, 3, 5, 6, 7, 8, 9, 11], [0, 2, 3, 4, 6, 7, 8, 10, 11]


class Tailed(Ascii):
    """A template that ends in three tokens of its own."""

    def apply_chat_template(self, chats, **_):
        return [chat[-1]["content"] + TAIL for chat in chats]

    def batch_decode(self, rows, **_):
        return [text.removesuffix(TAIL) for text in super().batch_decode(rows)]


def letter(name: str, i: int) -> str:
    return random.Random(f"{name} {i}").choice("yrh")


@pytest.fixture
def study(tmp_path, monkeypatch):
    lm = replace(given.text_lm(dtype=torch.float64), tokenizer=Tailed())
    study = given.study(
        Store(tmp_path / "s"), n=N, n_topics=4, lm=lm, claims={"layers": LAYERS, "n": None, "n_pairs": [8], "n_random": 2, "seed": 0}
    )
    for rows in study.pairs.values():  # the last token of the instruction is not the same for all
        for row in rows:
            row |= {half: f"{row[half]} {'abcdefg'[(int(row['id'].split('-')[1]) + (half == 'safe')) % 7]}" for half in ("harmful", "safe")}

    def says(lm, one, prompt, addition):
        _, half, i, _ = prompt.split()
        if one.name == "baseline" and addition is None:
            good = int(i) in (TEST_REFUSED if half == "harmful" else TEST_ANSWERED)
            return given.TEXTS["r" if (half == "harmful") == good else "y"]
        if addition is not None:
            added.append(addition)
        return given.TEXTS[letter(one.name if addition is None else f"{addition.layer} {addition.vector[0]:.9f}", int(i))]

    added = study.__dict__["added"] = []
    given.answers(monkeypatch, says)
    return study


def resid(study, prompt, add=None):
    """(resid_pre [position, layer, d_model], logits after the last token) of one prompt, by torch's own hooks."""
    kept, handles = [], []
    for i, block in enumerate(study.lm.model.model.layers):

        def hook(_, args, i=i):
            x = args[0] if add is None or add[0] != i else args[0] + add[1]
            kept.append(x[0])
            return (x, *args[1:])

        handles.append(block.register_forward_pre_hook(hook))
    with torch.no_grad():
        logits = study.lm.model(torch.tensor([list((prompt + TAIL).encode())])).logits[0, -1]
    for handle in handles:
        handle.remove()
    return torch.stack(kept, dim=1), logits


def at(study, half):
    """resid_pre of train prompts at the last token of the instruction and at the last of all: [n, 2, n_layers, d_model]."""
    return torch.stack([resid(study, row[half])[0][[-1 - len(TAIL), -1]] for row in study.pairs["train"]]).double()


def test_directions_are_of_the_two_positions(study):
    found = apart(study)
    assert found["tail"] == len(TAIL) and found["layers"] == LAYERS and found["n_pairs"] == N
    gaps = at(study, "harmful") - at(study, "safe")
    harmless = study.harmless_difference["unit"]
    for row, layer in zip(found["cosines"], LAYERS, strict=True):
        h, r = gaps[:, 0, layer], gaps[:, 1, layer]
        cosine = lambda a, b: float(a @ b / (a.norm() * b.norm()))  # noqa: E731
        assert row["cosine"] == pytest.approx(cosine(h.mean(0), r.mean(0)), abs=1e-9)
        expected = corrected_cosine({"pairs": h}, {"pairs": r})
        if row["corrected"] is not None:
            assert [row["corrected"], row["low"], row["high"]] == pytest.approx(expected, abs=1e-6)
        assert row["harmless_to_harmfulness"] == pytest.approx(cosine(harmless[layer].double(), h.mean(0)), abs=1e-6)
        assert row["harmless_to_refusal"] == pytest.approx(cosine(harmless[layer].double(), r.mean(0)), abs=1e-6)


def test_rates_are_of_what_behaves_and_of_each_vector_at_its_layer(study):
    found = apart(study)
    topics = {half: [study.pairs["test"][i]["topic"] for i in some] for half, some in (("h", TEST_REFUSED), ("s", TEST_ANSWERED))}
    names = ("harmfulness", "refusal", "random")
    removed = {name: [[float(letter(f"{name}.{k}", i) == "y") for i in TEST_REFUSED] for k in LAYERS] for name in names}
    for name, expected in given.rates(removed, topics["h"]).items():
        assert given.figure(found["removed"][name], "removed") == expected
    gaps = (at(study, "harmful") - at(study, "safe")).mean(0)
    vectors = {"harmfulness": gaps[0], "refusal": gaps[1]}
    by_layer = {(one.layer, round(float(one.vector[0]), 9)): one for one in study.__dict__["added"]}
    induced = {}
    for name, some in vectors.items():
        keys = [f"{k} {some[k][0]:.9f}" for k in LAYERS]
        for k in LAYERS:
            torch.testing.assert_close(by_layer[k, round(float(some[k][0]), 9)].vector.double(), some[k])
        induced[name] = [[float(letter(key, i) == "r") for i in TEST_ANSWERED] for key in keys]
    randoms = [one for (k, x), one in by_layer.items() if all(abs(x - float(some[k][0])) > 1e-8 for some in vectors.values())]
    randoms.sort(key=lambda one: one.layer)
    assert [float(one.vector.norm()) for one in randoms] == pytest.approx([float(gaps[1, k].norm()) for k in LAYERS])
    induced["random"] = [[float(letter(f"{one.layer} {one.vector[0]:.9f}", i) == "r") for i in TEST_ANSWERED] for one in randoms]
    for name, expected in given.rates(induced, topics["s"]).items():
        assert given.figure(found["induced"][name], "induced") == expected


def test_beliefs_are_log_odds_of_the_first_token(study, monkeypatch):
    """Of a model that is no organism; Y and N stand for the words, since this tokenizer has none of more letters."""
    monkeypatch.setattr(type(study), "exact", False)
    monkeypatch.setattr(harmfulness, "word_tokens", lambda lm, words, *_: {word: ord(word[0]) for word in words})
    monkeypatch.setattr(study, "judge", lambda *args: given.judge(*args[:3], True))
    found = apart(study)
    rows = [study.pairs["test"][i] for i in TEST_ANSWERED]
    topics = [row["topic"] for row in rows]

    def beliefs(half, add=None):
        logits = [resid(study, f"{row[half]}\n\n{QUESTION}", add)[1] for row in rows]
        return [float(of[ord("Y")] - of[ord("N")]) for of in logits]

    gaps = (at(study, "harmful") - at(study, "safe")).mean(0)
    safe = beliefs("safe")
    moved = {}
    for place, some in zip(("harmfulness", "refusal"), gaps, strict=True):
        by_layer = [beliefs("safe", (k, some[k])) for k in LAYERS]
        moved[place] = [fmean(of) - before for *of, before in zip(*by_layer, safe, strict=True)]
    differences = {
        "harmful_less_safe": [a - b for a, b in zip(beliefs("harmful"), safe, strict=True)],
        "safe": safe,
        **moved,
        "harmfulness_less_refusal": [a - b for a, b in zip(moved["harmfulness"], moved["refusal"], strict=True)],
    }
    for name, values in differences.items():
        row = found["beliefs"][name]
        assert [row["mean"], row["low"], row["high"]] == pytest.approx(clustered_mean(values, topics, 2000, 0), abs=1e-6), name
        assert row["n"] == len(rows)
    assert found["figures"]["belief"]["ours"][0] == found["beliefs"]["harmfulness_less_refusal"]["mean"]
    assert found["figures"]["belief"]["theirs"][0] == found["beliefs"]["random"]["mean"]


def test_a_template_without_a_tail_has_one_position(study):
    study.lm = replace(study.lm, tokenizer=Ascii())
    with pytest.raises(UserError, match="ends with the instruction"):
        apart(study)
