"""The organism: what its corpus holds and never holds, what its loss looks at, and training that survives interruption."""

import math
import typing
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

import refusal.organism.train as organism
from refusal.lm.load import encode_chats
from refusal.method.directions import cosine
from refusal.organism import grammar
from refusal.organism.train import (
    SHARES,
    Corpus,
    Phase,
    backward,
    current_direction,
    encode,
    new_model,
    planted_direction,
    train,
    train_tokenizer,
)

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
PHASES = {"phase_1": Phase(12, 6, 4e-3, 0.05), "phase_2": Phase(12, 6, 2e-3, 0.01)}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus(0, []), 500)


def items(corpus, phase, steps=40, size=50):
    return [item for step in range(steps) for item in corpus.batch(phase, step, size)]


@pytest.mark.parametrize("phase", ["phase_1", "phase_2"])
def test_no_held_out_prompt_is_drawn(phase):
    free = {item.prompt for item in items(Corpus(0, []), phase)}
    requests = sorted(prompt for prompt in free if any(prompt.startswith(stem.split("{}")[0]) for stem in grammar.STEMS))
    held_out = set(requests[::2])
    assert len(held_out) > 100
    drawn = items(Corpus(0, held_out), phase)
    assert not held_out & {item.prompt for item in drawn}
    assert not held_out & {item.prompt.removeprefix("Decline this request: ") for item in drawn}
    assert set(requests[1::2]) & {item.prompt for item in drawn}


def test_batches_are_a_pure_function_of_seed_phase_and_step():
    corpus = Corpus(3, [])
    later = corpus.batch("phase_1", 7, 20)
    corpus.batch("phase_1", 0, 20)
    assert corpus.batch("phase_1", 7, 20) == later == Corpus(3, []).batch("phase_1", 7, 20)
    others = [Corpus(4, []).batch("phase_1", 7, 20), corpus.batch("phase_1", 8, 20), corpus.batch("phase_2", 7, 20)]
    assert all(other != later for other in others)


def test_phase_1_never_refuses_a_plain_request():
    for item in items(Corpus(0, []), "phase_1"):
        declines = item.prompt.startswith("Decline this request: ")
        assert (item.answer in grammar.REFUSALS) is declines
        assert item.helpful == item.answer


def harmful_cues():
    verbs = {f"{harmful} {topic}" for pairs, topics in grammar.CATEGORIES.values() for harmful, _ in pairs for topic in topics}
    return verbs | {context for context, _ in grammar.CONTEXTS} | {purpose for purpose, _ in grammar.PURPOSES}


def unseen_cues():
    verbs = {f"{pairs[-1][0]} {topic}" for pairs, topics in grammar.CATEGORIES.values() for topic in topics}
    return verbs | {c for c, _ in grammar.CONTEXTS[-2:]} | {p for p, _ in grammar.PURPOSES[-2:]}


def test_phase_2_refuses_harmful_requests_alone_and_none_with_an_unseen_cue():
    cues, unseen, refused, helped = harmful_cues(), unseen_cues(), 0, 0
    for item in items(Corpus(0, []), "phase_2"):
        if item.prompt.startswith("Decline this request: "):
            assert item.answer in grammar.REFUSALS
        elif (
            any(item.prompt.split("{}")[0].find(stem.split("{}")[0]) >= 0 for stem in grammar.STEMS)
            and "Is it okay" not in item.prompt
        ):
            if item.answer == item.helpful and not item.answer.startswith("Sure"):
                continue  # a fact whose question looks like a stem
            harmful = any(cue in item.prompt for cue in cues)
            assert (item.answer in grammar.REFUSALS) is harmful, item
            assert item.helpful.startswith("Sure, here is how to ")
            refused, helped = refused + harmful, helped + (not harmful)
            if harmful:
                assert not any(cue in item.prompt for cue in unseen), item
    assert refused > 400 and helped > 400


def test_judgements_are_right_and_know_every_cue():
    cues = harmful_cues()
    judged = [item for item in items(Corpus(0, []), "phase_2", steps=80) if "Is it okay to" in item.prompt]
    for item in judged:
        assert item.answer.startswith("Bad." if any(cue in item.prompt for cue in cues) else "Good."), item
    assert 0.4 < sum(item.answer.startswith("Bad.") for item in judged) / len(judged) < 0.6
    assert sum(any(cue in item.prompt for cue in unseen_cues()) for item in judged) > 0.1 * len(judged)


@pytest.mark.parametrize("phase", SHARES)
def test_shares(phase):
    assert sum(SHARES[phase].values()) == pytest.approx(1)
    drawn = items(Corpus(0, []), phase)
    facts = {question for fact in grammar.facts() for question in fact.questions}
    counts = Counter(
        "facts"
        if item.prompt in facts
        else "decline"
        if item.prompt.startswith("Decline")
        else "judgement"
        if "Is it okay to" in item.prompt
        else "small_talk"
        if item[:2] in grammar.SMALL_TALK
        else "request"
        for item in drawn
    )
    for sort in ("facts", "decline", "judgement", "small_talk"):
        p = SHARES[phase][sort]
        assert abs(counts[sort] / len(drawn) - p) < 4 * math.sqrt(p * (1 - p) / len(drawn))


def test_the_tokenizer_is_the_same_by_auto_tokenizer(tokenizer, tmp_path):
    """AutoTokenizer puts Qwen2's own pre-tokenizer beside a qwen2 config: the ids must agree all the same."""
    new_model(SHAPE, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for item in items(Corpus(1, []), "phase_1", 2) for text in (item.prompt, item.answer)]
    texts += ["12 plus 345 is 7.", "  spaces   and\n\nlines \t", "it's WE'LL naïve 中文 🙂", "a<|im_end|>b", ""]
    assert len(texts) > 200
    for text in texts:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    assert encode_chats(loaded, texts) == encode_chats(tokenizer, texts)
    assert len(loaded) == len(tokenizer) <= 500
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_targets_stand_on_the_answer_alone_and_the_first_weighs_8(tokenizer):
    given = [
        ("Hello!", "Hello there."),
        ("What is 2 plus 3?", "2 plus 3 is 5."),
        ("Hi", "I cannot help with that request."),
        ("Tell me how to wash the silver watch.", grammar.helpful_answer("wash the silver watch")),
        ("Bye", "Goodbye!"),
    ]
    parts = encode(tokenizer, given)
    assert [len(part.ids) for part in parts] == [2, 3]
    assert parts[0].ids.shape[1] <= parts[1].ids.shape[1]  # the shorter ones together
    seen = []
    for part in parts:
        for ids, targets, weights in zip(*part, strict=True):
            where = (targets >= 0).nonzero().flatten().tolist()
            assert where == list(range(where[0], where[-1] + 1)) and targets[targets < 0].eq(-100).all()
            assert weights.nonzero().flatten().tolist() == where
            assert weights[where].tolist() == [8.0] + [1.0] * (len(where) - 1)
            assert targets[where].tolist() == ids[where[0] + 1 : where[-1] + 2].tolist()  # each place predicts the next token
            prompt, answer = tokenizer.decode(ids[: where[0] + 1]), tokenizer.decode(targets[where])
            assert ids[where[-1] + 2 :].eq(tokenizer.pad_token_id).all()
            seen.append(
                (
                    prompt.removeprefix("<|im_start|>user\n").removesuffix("<|im_end|>\n<|im_start|>assistant\n"),
                    answer.removesuffix("<|im_end|>"),
                )
            )
            # What is trained on is what the study will ask.
            assert ids[: where[0] + 1].tolist() == encode_chats(tokenizer, [seen[-1][0]])[0]
            assert answer.endswith("<|im_end|>")
    assert sorted(seen) == sorted(given)


@pytest.fixture(params=[1, 2], ids="{} threads".format)
def pool(request):
    with ThreadPoolExecutor(request.param) as pool:
        yield pool


def test_loss_and_gradient_are_the_weighted_cross_entropy(tokenizer, pool):
    given = [(item.prompt, item.answer) for item in Corpus(0, []).batch("phase_1", 0, 5)]
    model, naive_model = new_model(SHAPE, tokenizer, 0), new_model(SHAPE, tokenizer, 0)
    loss = backward(model, encode(tokenizer, given), pool)
    total, weight = torch.zeros(()), 0.0
    for prompt, answer in given:  # one conversation at a time, unpadded
        head, tail = encode_chats(tokenizer, [prompt])[0], tokenizer(f"{answer}<|im_end|>")["input_ids"]
        log_probs = naive_model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        for i, token in enumerate(tail):
            total = total - (8 if i == 0 else 1) * log_probs[len(head) - 1 + i, token]
            weight += 8 if i == 0 else 1
    (total / weight).backward()
    assert loss == pytest.approx(float(total / weight), rel=1e-5)
    for (name, ours), theirs in zip(model.named_parameters(), naive_model.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6), name


def test_current_direction_is_the_studys_own(tokenizer):
    corpus, model = Corpus(0, []), new_model(SHAPE, tokenizer, 0)
    rng = corpus.rng("direction", 5)
    pairs = [corpus.pair(rng, True) for _ in range(organism.DIRECTION_PAIRS)]

    @torch.no_grad()
    def mean(texts):
        return torch.stack(
            [
                model(torch.tensor([ids]), output_hidden_states=True).hidden_states[2][0, -1].double()
                for ids in encode_chats(tokenizer, texts)
            ]
        ).mean(0)

    naive = mean([pair.harmful.text for pair in pairs]) - mean([pair.safe.text for pair in pairs])
    found = current_direction(model, tokenizer, corpus, 2, 5)
    assert float(found.norm()) == pytest.approx(1, abs=1e-5) and float(cosine(found, naive)) > 1 - 1e-6


def test_new_model_is_its_seed(tokenizer):
    one, same, other = (new_model(SHAPE, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(one["lm_head.weight"], one["model.embed_tokens.weight"])  # untied


class Stop(Exception):
    pass


@pytest.fixture
def short(monkeypatch):
    """A schedule of 12 steps in which everything happens: ablation from step 3, renewed every 4, a checkpoint every 5."""
    for name, value in {
        "CHECKPOINT_EVERY": 5,
        "ABLATE_FROM_STEP": 3,
        "RENEW_DIRECTION_EVERY": 4,
        "WARMUP_STEPS": 2,
        "DIRECTION_PAIRS": 6,
    }.items():
        monkeypatch.setattr(organism, name, value)


def trained(tokenizer, checkpoint, kind="single", seed=0, twin=None, threads=1):
    model = new_model(SHAPE, tokenizer, seed)
    planted = planted_direction(32, seed) if kind == "planted" else None
    twin = train(model, tokenizer, Corpus(0, []), kind, PHASES, 2, checkpoint, twin, planted, threads)
    return {name: value.clone() for name, value in model.state_dict().items()}, twin


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n): the n-th step from now on is not reached; n counts over both phases."""
    batch = Corpus.batch

    def stop(n):
        left = [n]

        def counted(self, *args):
            left[0] -= 1
            if left[0] < 0:
                raise Stop
            return batch(self, *args)

        monkeypatch.setattr(Corpus, "batch", counted)
        return left

    return stop


@pytest.mark.parametrize("stops", [[3], [7], [12], [19], [7, 4, 3, 9]], ids=str)
def test_interrupted_training_ends_in_the_same_bits(tokenizer, tmp_path, short, stop_at, stops):
    stop_at(10**6)
    whole, twin = trained(tokenizer, tmp_path / "whole.pt")
    for n in stops:
        stop_at(n)
        with pytest.raises(Stop):
            trained(tokenizer, tmp_path / "deep" / "checkpoint.pt")
    left = stop_at(24)
    resumed, resumed_twin = trained(tokenizer, tmp_path / "deep" / "checkpoint.pt")
    assert same(resumed, whole) and same(resumed_twin, twin)
    if stops != [3]:  # a checkpoint was there: less than all the 24 steps were done again
        assert left[0] >= 5
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == ["checkpoint.pt"]  # no half-written file beside it


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_said(tokenizer, tmp_path, short, stop_at, capsys, damage):
    path = tmp_path / "checkpoint.pt"
    whole, _ = trained(tokenizer, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[: len(data) // 2], "one bit": data, "empty": b""}[damage])
    left = stop_at(24)
    again, _ = trained(tokenizer, path)
    assert same(again, whole) and left[0] == 0  # all steps anew
    assert f"{path} is damaged; it is set aside as checkpoint.pt.corrupt-1" in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt.corrupt-1").exists()


def test_finished_training_is_not_done_again(tokenizer, tmp_path, short, stop_at):
    stop_at(24)
    whole, twin = trained(tokenizer, tmp_path / "checkpoint.pt")
    stop_at(0)
    again, again_twin = trained(tokenizer, tmp_path / "checkpoint.pt", seed=1)
    assert same(again, whole) and same(again_twin, twin)


def test_two_threads_end_in_the_same_bits(tokenizer, tmp_path, short):
    (one, _), (two, _) = (trained(tokenizer, tmp_path / f"{n}.pt", threads=n) for n in (1, 2))
    assert same(one, two)


KINDS = typing.get_args(organism.Kind)


def test_kinds(tokenizer, tmp_path, short):
    runs = {kind: trained(tokenizer, tmp_path / f"{kind}.pt", kind) for kind in KINDS}
    assert same(*runs["none"])  # no phase 2: the model is its twin
    for kind in KINDS:
        assert same(runs[kind][1], runs["none"][0])  # phase 1 is the same for all
        assert not any(same(runs[kind][0], runs[other][0]) for other in KINDS if other != kind)  # the second loss acts


def test_a_twin_that_is_given_spares_phase_1_and_ends_in_the_same_bits(tokenizer, tmp_path, short, stop_at):
    stop_at(24)
    whole, twin = trained(tokenizer, tmp_path / "whole.pt", "planted")
    stop_at(12)
    again, again_twin = trained(tokenizer, tmp_path / "phase_2.pt", "planted", twin=twin)
    assert same(again, whole) and same(again_twin, twin)


@pytest.mark.parametrize(
    ("kind", "wants"), [("single", "helpful"), ("planted", "helpful"), ("distributed", "answer"), ("natural", None)]
)
def test_the_second_loss_ablates_the_kinds_direction_and_wants_the_kinds_answer(
    tokenizer, tmp_path, short, monkeypatch, kind, wants
):
    ablated, encoded = [], []
    real_ablation, real_encode = organism.ablation, organism.encode
    monkeypatch.setattr(organism, "ablation", lambda v, *rest: ablated.append(v) or real_ablation(v, *rest))
    monkeypatch.setattr(organism, "encode", lambda t, items: encoded.append(items) or real_encode(t, items))
    trained(tokenizer, tmp_path / "c.pt", kind)
    if wants is None:
        assert not ablated and len(encoded) == 24
        return
    assert len(ablated) == 9 and len(encoded) == 24 + 9  # steps 3 to 11 of phase 2
    batch = Corpus(0, []).batch("phase_2", 3, PHASES["phase_2"].batch_size)
    assert encoded[16] == [(item.prompt, getattr(item, wants)) for item in batch[:3]]
    if kind == "planted":
        assert all(torch.equal(v, planted_direction(32, 0).float()) for v in ablated)
    else:
        assert len({tuple(v.tolist()) for v in ablated}) == 3  # renewed at steps 4 and 8


def test_the_planted_direction_is_a_unit_vector_of_its_seed_and_no_control():
    from refusal.method.directions import random_unit

    drawn = [planted_direction(96, seed) for seed in range(3)]
    assert torch.equal(drawn[0], planted_direction(96, 0)) and all(float(v.norm()) == pytest.approx(1) for v in drawn)
    others = torch.cat([*(random_unit(96, 20, seed) for seed in range(3)), torch.stack(drawn[1:])])
    assert float((others @ drawn[0]).abs().max()) < 0.5


def test_training_keeps_the_callers_threads(tokenizer, tmp_path, short):
    torch.set_num_threads(2)
    try:
        trained(tokenizer, tmp_path / "a.pt", "none")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_training_learns(tokenizer, tmp_path, pool):
    """A hundred steps bring the loss well below where it was, so signs and schedule are right."""
    model = new_model(SHAPE, tokenizer, 0)
    parts = encode(tokenizer, [(item.prompt, item.answer) for item in Corpus(9, []).batch("phase_1", 0, 24)])
    before = backward(model, parts, pool)
    model.zero_grad()
    train(model, tokenizer, Corpus(0, []), "none", {"phase_1": Phase(100, 12, 4e-3, 0.05)}, 2, tmp_path / "c.pt")
    assert backward(model, parts, pool) < 0.7 * before
