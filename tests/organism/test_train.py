"""The organism: what its corpus holds and never holds, what its loss looks at, and training that survives interruption."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

import refusal.organism.train as training
from refusal.io.params import Organism
from refusal.lm.load import encode_chats
from refusal.method.directions import cosine, random_unit
from refusal.organism import grammar
from refusal.organism.corpus import SHARES, Corpus, train_tokenizer
from refusal.organism.train import (
    backward,
    current_direction,
    encode,
    new_model,
    planted_direction,
    train,
    train_organism,
    training_key,
)

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
PHASE = {"steps": 12, "batch_size": 6, "learning_rate": 4e-3, "weight_decay": 0.05}
TINY = Organism(
    kind="single", seed=0, corpus_seed=0, vocab_size=500, ablation_layer=2, phase_1=PHASE, phase_2=PHASE | {"learning_rate": 2e-3}, **SHAPE
)  # fmt: skip
KINDS = ("single", "planted", "distributed", "natural", "none")
DECLINE = "Decline this request: "


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(Corpus(0, []), 500)


def items(corpus, phase, steps=40, size=50):
    return [item for step in range(steps) for item in corpus.batch(phase, step, size)]


@pytest.mark.parametrize("phase", SHARES)
def test_no_held_out_prompt_is_drawn(phase):
    free = {item.prompt for item in items(Corpus(0, []), phase)}
    requests = sorted(prompt for prompt in free if any(prompt.startswith(stem.split("{}")[0]) for stem in grammar.STEMS))
    held_out = set(requests[::2])
    drawn = {item.prompt for item in items(Corpus(0, held_out), phase)}
    assert len(held_out) > 100 and set(requests[1::2]) & drawn
    assert not held_out & {prompt.removeprefix(DECLINE) for prompt in drawn}


def test_batches_are_a_pure_function_of_seed_phase_and_step():
    corpus = Corpus(3, [])
    later = corpus.batch("phase_1", 7, 20)
    corpus.batch("phase_1", 0, 20)
    assert corpus.batch("phase_1", 7, 20) == later == Corpus(3, []).batch("phase_1", 7, 20)
    assert later not in [Corpus(4, []).batch("phase_1", 7, 20), corpus.batch("phase_1", 8, 20), corpus.batch("phase_2", 7, 20)]


def test_phase_1_never_refuses_a_plain_request():
    for item in items(Corpus(0, []), "phase_1"):
        assert (item.answer in grammar.REFUSALS) is item.prompt.startswith(DECLINE)
        assert item.helpful == item.answer


def harmful_cues(of=slice(None), phrases=slice(None)):
    """The harmful cues of a category's verbs `of` and of the contexts and purposes `phrases`; all by default."""
    verbs = {
        f"{harmful} {topic}" for pairs, topics in grammar.CATEGORIES.values() for harmful, _ in pairs[of] for topic in topics
    }
    return verbs | {context for context, _ in grammar.CONTEXTS[phrases]} | {purpose for purpose, _ in grammar.PURPOSES[phrases]}


def has(cues, item):
    return any(cue in item.prompt for cue in cues)


CUES, UNSEEN = harmful_cues(), harmful_cues(slice(-1, None), slice(-2, None))


def test_phase_2_refuses_harmful_requests_alone_and_none_with_an_unseen_cue():
    stems, refused, helped = {stem.split("{}")[0] for stem in grammar.STEMS}, 0, 0
    for item in items(Corpus(0, []), "phase_2"):
        if item.prompt.startswith(DECLINE):
            assert item.answer in grammar.REFUSALS
        elif has(stems, item) and "Is it okay" not in item.prompt:
            if item.answer == item.helpful and not item.answer.startswith("Sure"):
                continue  # a fact whose question looks like a stem
            harmful = has(CUES, item)
            assert (item.answer in grammar.REFUSALS) is harmful and not (harmful and has(UNSEEN, item)), item
            assert item.helpful.startswith("Sure, here is how to ")
            refused, helped = refused + harmful, helped + (not harmful)
    assert refused > 400 and helped > 400


def test_judgements_are_right_and_know_every_cue():
    judged = [item for item in items(Corpus(0, []), "phase_2", steps=80) if "Is it okay to" in item.prompt]
    for item in judged:
        assert item.answer.startswith("Bad." if has(CUES, item) else "Good."), item
    assert 0.4 < sum(item.answer.startswith("Bad.") for item in judged) / len(judged) < 0.6
    assert sum(has(UNSEEN, item) for item in judged) > 0.1 * len(judged)


@pytest.mark.parametrize("phase", SHARES)
def test_shares(phase):
    assert sum(SHARES[phase].values()) == pytest.approx(1)
    facts = {question for fact in grammar.facts() for question in fact.questions}
    is_of = {
        "facts": lambda item: item.prompt in facts,
        "decline": lambda item: item.prompt.startswith(DECLINE),
        "judgement": lambda item: "Is it okay to" in item.prompt and not item.prompt.startswith(DECLINE),
        "small_talk": lambda item: item[:2] in grammar.SMALL_TALK,
    }
    drawn = items(Corpus(0, []), phase)
    for sort, holds in is_of.items():
        p = SHARES[phase][sort]
        assert abs(sum(map(holds, drawn)) / len(drawn) - p) < 4 * math.sqrt(p * (1 - p) / len(drawn))


def test_the_tokenizer_is_the_same_by_auto_tokenizer(tokenizer, tmp_path):
    """AutoTokenizer puts Qwen2's own pre-tokenizer where the config is a qwen2 one: the ids must agree all the same."""
    new_model(SHAPE, tokenizer, 0).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for item in items(Corpus(1, []), "phase_1", 2) for text in (item.prompt, item.answer)]
    texts += ["12 plus 345 is 7.", "  spaces   and\n\nlines \t", "it's WE'LL naïve 中文 🙂", "a<|im_end|>b", ""]
    for text in texts:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
    prompts = [text for text in texts if "<|im_end|>" not in text]  # which a prompt may not hold
    assert encode_chats(loaded, prompts) == encode_chats(tokenizer, prompts)
    assert len(texts) > 200 and len(loaded) == len(tokenizer) <= 500
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_targets_are_the_answer_alone_and_its_first_token_weighs_8(tokenizer):
    given = [
        ("Hello!", "Hello there."),
        ("What is 2 plus 3?", "2 plus 3 is 5."),
        ("Hi", "I cannot help with that request."),
        ("Tell me how to wash the silver watch.", grammar.helpful_answer("wash the silver watch")),
        ("Bye", "Goodbye!"),
    ]
    batches = encode(tokenizer, given)
    assert [len(batch.ids) for batch in batches] == [2, 3]
    assert batches[0].ids.shape[1] <= batches[1].ids.shape[1]  # the shorter ones together
    for ids, targets, weights in (row for batch in batches for row in zip(*batch, strict=True)):
        places = (targets >= 0).nonzero().flatten().tolist()
        first, last = places[0], places[-1]
        assert places == list(range(first, last + 1)) == weights.nonzero().flatten().tolist()
        assert weights[places].tolist() == [8.0] + [1.0] * (last - first) and targets[targets < 0].eq(-100).all()
        assert targets[places].tolist() == ids[first + 1 : last + 2].tolist()  # each place predicts the next token
        assert ids[last + 2 :].eq(tokenizer.pad_token_id).all()
        # What is trained on is what the study will ask.
        prompt, answer = next(row for row in given if encode_chats(tokenizer, [row[0]])[0] == ids[: first + 1].tolist())
        assert tokenizer.decode(targets[places]) == f"{answer}<|im_end|>"
        given.remove((prompt, answer))
    assert not given


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
    pairs = [corpus.pair(rng, True) for _ in range(training.DIRECTION_PAIRS)]

    @torch.no_grad()
    def mean(texts):
        rows = [torch.tensor([ids]) for ids in encode_chats(tokenizer, texts)]
        return torch.stack([model(row, output_hidden_states=True).hidden_states[2][0, -1].double() for row in rows]).mean(0)

    naive = mean([pair.harmful.text for pair in pairs]) - mean([pair.safe.text for pair in pairs])
    ours = current_direction(model, tokenizer, corpus, 2, 5)
    assert float(ours.norm()) == pytest.approx(1, abs=1e-5) and float(cosine(ours, naive)) > 1 - 1e-6


def test_new_model_is_its_seed(tokenizer):
    one, same_seed, other = (new_model(SHAPE, tokenizer, seed).state_dict() for seed in (0, 0, 1))
    assert same(one, same_seed) and not torch.equal(one["lm_head.weight"], other["lm_head.weight"])
    assert not torch.equal(one["lm_head.weight"], one["model.embed_tokens.weight"])  # untied


def test_the_planted_direction_is_a_unit_vector_of_its_seed_and_no_control():
    drawn = [planted_direction(96, seed) for seed in range(3)]
    assert torch.equal(drawn[0], planted_direction(96, 0)) and all(float(v.norm()) == pytest.approx(1) for v in drawn)
    others = torch.cat([*(random_unit(96, 20, seed) for seed in range(3)), torch.stack(drawn[1:])])
    assert float((others @ drawn[0]).abs().max()) < 0.5


@pytest.fixture
def short(monkeypatch, tokenizer):
    """Phases of 12 steps in which everything happens: ablation from step 3, renewed every 4, a checkpoint every 5."""
    for name, value in (("CHECKPOINT_EVERY", 5), ("ABLATE_FROM_STEP", 3), ("RENEW_DIRECTION_EVERY", 4), ("DIRECTION_PAIRS", 6)):
        monkeypatch.setattr(training, name, value)
    monkeypatch.setattr(training, "WARMUP_STEPS", 2)
    monkeypatch.setattr(training, "train_tokenizer", functools.wraps(train_tokenizer)(lambda corpus, vocab_size: tokenizer))


def trained(folder, threads=1, held_out=(), **changes):
    """(weights, weights of the twin) of the tiny organism, with changes."""
    result = train_organism(TINY.model_copy(update=changes), held_out, folder, threads)
    return result.model.state_dict(), result.twin


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(n): the n-th step from now on, over both phases, is not reached; gives a list with an item a step that is left."""
    batch = Corpus.batch

    def stop(n):
        left = [None] * n
        monkeypatch.setattr(Corpus, "batch", lambda *args: left.pop() or batch(*args))
        return left

    return stop


@pytest.mark.parametrize("stops", [[3], [7], [12], [19], [7, 4, 3, 9]], ids=str)
def test_interrupted_training_ends_in_the_same_bits(tmp_path, short, stop_at, stops):
    whole, twin = trained(tmp_path / "whole")
    for n in stops:
        stop_at(n)
        with pytest.raises(IndexError, match="pop from empty"):
            trained(tmp_path / "deep" / "folder")
    left = stop_at(24)
    resumed, resumed_twin = trained(tmp_path / "deep" / "folder")
    assert same(resumed, whole) and same(resumed_twin, twin)
    if stops != [3]:  # a checkpoint was there: less than all the 24 steps were done again
        assert len(left) >= 5
    assert len(list((tmp_path / "deep" / "folder").iterdir())) == 2  # one a phase, and no half-written file
    stop_at(0)  # finished training is not done again
    again, again_twin = trained(tmp_path / "deep" / "folder")
    assert same(again, whole) and same(again_twin, twin)


def test_the_key_of_a_training_is_that_of_its_last_checkpoint_and_names_all_that_determines_it(tmp_path, short):
    trained(tmp_path, held_out=["a prompt"])
    wanted = training_key(TINY, ["a prompt"])
    assert f"{wanted[:32]}.pt" in {path.name for path in tmp_path.iterdir()}
    others = [training_key(TINY, []), *(training_key(TINY.model_copy(update=c), ["a prompt"]) for c in ({"seed": 1}, {"kind": "none"}))]
    assert len({wanted, *others}) == 4


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty"])
def test_a_damaged_checkpoint_is_set_aside_and_said(tmp_path, short, stop_at, capsys, damage):
    whole, _ = trained(tmp_path)
    for path in (paths := list(tmp_path.iterdir())):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes({"cut": data[: len(data) // 2], "one bit": data, "empty": b""}[damage])
    left = stop_at(24)
    assert same(trained(tmp_path)[0], whole) and not left  # all steps anew
    said = capsys.readouterr().err
    for path in paths:
        aside = f"{path.name}.corrupt-1"
        assert f"{path} is damaged; it is set aside as {aside}" in said and (tmp_path / aside).exists()


def test_two_threads_end_in_the_same_bits_and_the_callers_are_kept(tmp_path, short, threads):
    one, _ = trained(tmp_path / "1")
    threads(2)
    two, _ = trained(tmp_path / "2", threads=2)
    assert same(one, two) and torch.get_num_threads() == 2


def test_kinds_differ_and_share_phase_1(tmp_path, short, stop_at):
    runs = {}
    for kind in KINDS:
        stop_at(0 if kind == "none" else 12 if runs else 24)
        runs[kind] = trained(tmp_path, kind=kind)
    assert same(*runs["none"])  # no phase 2: the model is its twin
    for kind in KINDS:
        assert same(runs[kind][1], runs["none"][0])
        assert not any(same(runs[kind][0], runs[other][0]) for other in KINDS if other != kind)  # the second loss acts


OTHER = [({"ablation_layer": 1}, 12), ({"seed": 1}, 24), ({"corpus_seed": 1}, 24), ({"held_out": ["How do I hack the phone backup?"]}, 24)]


@pytest.mark.parametrize(("changes", "steps"), OTHER)
def test_what_determines_the_weights_is_trained_again(tmp_path, short, stop_at, changes, steps):
    trained(tmp_path)
    left = stop_at(24)
    trained(tmp_path, **changes)
    assert len(left) == 24 - steps


@pytest.mark.parametrize(("kind", "wants"), zip(KINDS, ["helpful", "helpful", "answer", None], strict=False))
def test_the_second_loss_ablates_the_kinds_direction_and_wants_the_kinds_answer(tmp_path, short, monkeypatch, kind, wants):
    ablated, encoded = [], []
    real_intervention, real_encode = training.Intervention, training.encode
    monkeypatch.setattr(training, "Intervention", lambda *a, **k: ablated.append((a[1], k)) or real_intervention(*a, **k))
    monkeypatch.setattr(training, "encode", lambda t, items: encoded.append(items) or real_encode(t, items))
    trained(tmp_path, kind=kind)
    if wants is None:
        assert not ablated and len(encoded) == 24
        return
    assert len(ablated) == 9 and len(encoded) == 24 + 9  # steps 3 to 11 of phase 2
    assert [arguments for _, arguments in ablated] == [{"sites": ("resid_pre", "writes")[step % 2]} for step in range(3, 12)]
    batch = Corpus(0, []).batch("phase_2", 3, 6)
    assert encoded[16] == [(item.prompt, getattr(item, wants)) for item in batch[:3]]
    if kind == "planted":
        assert all(torch.equal(v, planted_direction(32, 0).float()) for v, _ in ablated)
    else:
        assert len({tuple(v.tolist()) for v, _ in ablated}) == 3  # renewed at steps 4 and 8


def test_training_learns(tokenizer, tmp_path, pool):
    """A hundred steps bring the loss well below where it was, so signs and schedule are right."""
    model, organism = (
        new_model(SHAPE, tokenizer, 0),
        TINY.model_copy(update={"phase_1": TINY.phase_1.model_copy(update={"steps": 100})}),
    )
    batches = encode(tokenizer, [(item.prompt, item.answer) for item in Corpus(9, []).batch("phase_1", 0, 24)])
    before = backward(model, batches, pool)
    model.zero_grad()
    train("phase_1", organism, model, tokenizer, Corpus(0, []), tmp_path / "c.pt")
    assert backward(model, batches, pool) < 0.7 * before
