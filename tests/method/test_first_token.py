"""First-token scores against one prompt at a time under plain hooks, in float64."""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import pytest
import torch
from tiny import Ascii, text_lm, tiny_direction, tiny_lm, tiny_prompts

from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.lm.batching import COUNTS, count_forwards
from refusal.lm.qwen1_tokenizer import chat_tokenizer
from refusal.method import first_token
from refusal.method.first_token import figures, first_token_log_probs, refusal_score, refusal_tokens, scores
from refusal.method.interventions import Addition, Intervention
from refusal.stats import clustered_mean

REFERENCE = Path(os.environ.get("REFUSAL_REFERENCE", "none"))
HEAD = [5, 6, 7]  # as a chat template's: what all prompts begin with
HARMFUL, HARMLESS = (
    [[*HEAD, *tokens] for tokens in tiny_prompts(lengths, seed)] for lengths, seed in (((4, 9, 1, 6), 1), ((2, 5, 11), 2))
)
TOKENS = [40, 41]


def lm(**how):
    return tiny_lm(dtype=torch.float64, **how)


def directions(sites="paper", n=3):
    return [
        (Intervention(f"layer_{i}", tiny_direction(seed=i), 1.0, sites, layer=i), Addition(2.0 * tiny_direction(seed=i), i))
        for i in range(n)
    ]


def naive(model, prompt, sites=None, v=None, add=None):
    """(refusal score, probabilities) of one prompt, by transformers' own forward and torch's own hooks."""

    def ablate(x):
        return x - (x @ v)[..., None] * v

    def out(_module, _args, output):
        return (ablate(output[0]), *output[1:]) if isinstance(output, tuple) else ablate(output)

    handles = []
    for i, block in enumerate(model.model.layers):
        if v is not None:
            handles.append(block.register_forward_pre_hook(lambda _, args: (ablate(args[0]), *args[1:])))
            if sites == "paper":
                handles += [module.register_forward_hook(out) for module in (block.self_attn, block.mlp)]
        if add is not None and i == add[0]:
            handles.append(block.register_forward_pre_hook(lambda _, args: (args[0] + add[1], *args[1:])))
    try:
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    finally:
        for handle in handles:
            handle.remove()
    refusal = sum(float(p[token]) for token in TOKENS)
    return float(torch.tensor(refusal, dtype=torch.float64).log() - torch.tensor(1 - refusal, dtype=torch.float64).log()), p


@pytest.mark.parametrize("sites", ["paper", "resid_pre"])
@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
@torch.no_grad()
def test_scores_are_those_of_one_prompt_at_a_time(tmp_path, sites, model_type):
    one, some = lm(model=model_type), directions(sites)
    found = scores(one, HARMFUL, HARMLESS, some, TOKENS, Store(tmp_path / "s"))
    plain = {id(prompt): naive(one.model, prompt) for prompt in (*HARMFUL, *HARMLESS)}
    assert found.harmful == pytest.approx([plain[id(p)][0] for p in HARMFUL], abs=1e-8)
    assert found.harmless == pytest.approx([plain[id(p)][0] for p in HARMLESS], abs=1e-8)
    for i in range(len(some)):
        v = tiny_direction(seed=i).double()
        assert found.bypass[i] == pytest.approx([naive(one.model, p, sites, v)[0] for p in HARMFUL], abs=1e-6)
        assert found.induce[i] == pytest.approx([naive(one.model, p, add=(i, 2.0 * v))[0] for p in HARMLESS], abs=1e-6)
        kl = []
        for prompt in HARMLESS:
            p, q = plain[id(prompt)][1], naive(one.model, prompt, sites, v)[1]
            kl.append(float((p * (p / q).log()).sum()))
        assert found.kl[i] == pytest.approx(kl, abs=1e-6) and min(kl) > 1e-3
        moved = [abs(a - b) for a, b in zip(found.bypass[i], found.harmful, strict=True)]
        assert max(moved) > 0.05  # an ablation that did nothing would pass the rest


def test_batches_and_several_jobs_change_nothing(tmp_path, monkeypatch, threads):
    whole = scores(lm(), HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / "a"))
    for name, value in (("BATCH_SIZE", 2), ("DIRECTIONS_PER_JOB", 2)):
        monkeypatch.setattr(first_token, name, value)
    for n in (1, 2):
        threads(n)
        parts = scores(lm(), HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / f"b{n}"))
        for name in ("harmful", "harmless", "bypass", "induce", "kl"):
            assert torch.allclose(*(torch.tensor(getattr(each, name)) for each in (whole, parts)), atol=1e-5), name


def test_a_resumed_run_repeats_no_forward(tmp_path, monkeypatch):
    monkeypatch.setattr(first_token, "DIRECTIONS_PER_JOB", 2)
    one, read = lm(), first_token._columns
    count_forwards(one.model)

    def interrupted(*arguments):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(1)
        return read(*arguments)

    calls: list[int] = []
    whole = scores(one, HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / "whole"))
    before = COUNTS["passes"]
    monkeypatch.setattr(first_token, "_columns", interrupted)
    monkeypatch.setattr(first_token, "key", lambda kind, code, **parts: json.dumps([kind, parts], sort_keys=True))
    with pytest.raises(KeyboardInterrupt):
        scores(one, HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / "s"))
    monkeypatch.setattr(first_token, "_columns", read)
    assert scores(one, HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / "s")) == whole
    # Three directions in two jobs a half: harmful prompts 3 + 2 times, harmless ones 3 + 2 and 2 more; and what is alike, once each.
    once = len(HARMFUL) * (3 + 2) + len(HARMLESS) * (2 * 3 + 2) + (3 + 2) + (2 * 3 + 2)
    assert COUNTS["passes"] - before == once
    assert scores(one, HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / "s")) == whole
    assert COUNTS["passes"] - before == once


CHANGES = {
    "weights": {"one": lm(weights="other", seed=1)},
    "a prompt": {"harmless": [[*HEAD, 9, 9], *HARMLESS[1:]]},
    "a direction": {"some": [*directions()[:2], (directions()[2][0], Addition(tiny_direction(seed=9), 2))]},
    "the sites": {"some": directions("resid_pre")},
    "the refusal tokens": {"tokens": [40]},
}


@pytest.mark.parametrize("what", CHANGES)
def test_whatever_determines_a_score_is_in_its_key(tmp_path, what):
    def found(store, one=None, harmless=HARMLESS, some=None, tokens=TOKENS):
        return scores(one or lm(), HARMFUL, harmless, some or directions(), tokens, Store(tmp_path / store))

    before, after = found("a"), found("a", **CHANGES[what])
    assert before != after == found("b", **CHANGES[what])


def test_a_refusal_score_is_exact_where_probabilities_are_not():
    logits = torch.tensor([[0.0, 80.0, 0.0, -80.0]], dtype=torch.float64)
    score = refusal_score(logits.log_softmax(-1), [1])
    assert float(score) == pytest.approx(80 - math.log(2 + math.exp(-80)), rel=1e-12)
    assert float(refusal_score(torch.full((1, 4), 0.25).log(), [0, 1])) == pytest.approx(0, abs=1e-6)


def test_log_probs_that_are_no_numbers_are_said(tmp_path):
    one = lm()
    with torch.no_grad():
        one.model.model.embed_tokens.weight[6] = torch.nan
    with pytest.raises(UserError, match=r"params\.yaml: model\.dtype: the model computes NaN or infinity"):
        scores(one, HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / "s"))


def test_a_single_prompt_has_no_common_beginning():
    one = lm()
    assert torch.allclose(first_token_log_probs(one, HARMFUL[:1])[0], first_token_log_probs(one, HARMFUL)[0], atol=1e-8)


class Words(Ascii):
    """Whose template ends as `end`, and whose vocabulary has these words as one token each, after the first 128."""

    def __init__(self, end: str, *words: str):
        self.end, self.words = end, words

    def apply_chat_template(self, chats, **how):
        return [text + self.end for text in super().apply_chat_template(chats, **how)]

    def __call__(self, texts, **how):
        return {"input_ids": [self.split(text) for text in texts]}

    def split(self, text):
        word = next((word for word in sorted(self.words, key=len, reverse=True) if text.endswith(word)), "")
        rest = super().__call__([text.removesuffix(word)])["input_ids"][0]
        return rest + ([128 + self.words.index(word)] if word else [])


@pytest.mark.parametrize(
    ("model_type", "end", "words", "expected"),
    [
        ("qwen2", "\n", ("I", "As", " I"), {"I": 128, "As": 129}),  # as the paper's for Qwen
        ("llama", "\n", ("I", "As"), {"I": 128}),
        ("llama", "[/INST]", (" I", "As"), {"I": 73, " I": 128}),  # where the answer's first word may begin with a blank
        ("qwen2", "\n", ("I",), {"I": 128}),  # "As" is two tokens, of which the first begins much else
    ],
)
def test_refusal_tokens_are_found_from_the_tokenizer(model_type, end, words, expected):
    assert refusal_tokens(replace(tiny_lm(model_type), tokenizer=Words(end, *words))) == expected


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="REFUSAL_REFERENCE names no folder with Qwen's vocabulary")
def test_qwens_refusal_tokens_are_those_that_the_papers_code_has():
    tokenizer = chat_tokenizer(REFERENCE / "tokenizer/qwen.tiktoken", 512)
    assert refusal_tokens(replace(tiny_lm("qwen2"), tokenizer=tokenizer)) == {"I": 40, "As": 2121}


def test_where_no_word_is_a_token_and_where_a_thought_comes_first_it_is_said():
    with pytest.raises(UserError, match=r"no token of it is I, .* set select\.by to compliance"):
        unknown = Words("\n", "I")
        unknown.unk_token_id = 128
        refusal_tokens(replace(tiny_lm("llama"), tokenizer=unknown))
    with pytest.raises(UserError, match=r"^params\.yaml: select\.by: .* opens a thought .* model\.thinking to false"):
        refusal_tokens(replace(text_lm(), tokenizer=Words("<think>\n", "I")))


def test_figures_are_means_with_intervals_of_their_own_half(tmp_path):
    found = scores(lm(), HARMFUL, HARMLESS, directions(), TOKENS, Store(tmp_path / "s"))
    topics = {"harmful": [0, 0, 1, 2], "harmless": [0, 1, 2]}
    candidates, baseline, limits = figures(found, [0, 1, 2], topics, 50, 0)
    assert [one.layer for one in candidates] == [0, 1, 2] and {one.position for one in candidates} == {-1}
    for i, one in enumerate(candidates):
        assert (one.bypass, one.induce, one.kl) == pytest.approx(
            (fmean(found.bypass[i]), fmean(found.induce[i]), fmean(found.kl[i]))
        )
        assert (limits[i]["induce_low"], limits[i]["induce_high"]) == clustered_mean(found.induce[i], topics["harmless"], 50, 0)[
            1:
        ]
        assert limits[i]["bypass_low"] <= one.bypass <= limits[i]["bypass_high"]
    assert baseline["harmful"]["refusal_score"] == pytest.approx(fmean(found.harmful))
    assert (baseline["harmful"]["n"], baseline["harmless"]["n"]) == (4, 3)
