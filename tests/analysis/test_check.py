"""What `refusal check` measures: each fault that is planted is named, and each figure is another computation's."""

from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest, norm, t
from tiny import SUPPORTED, Ascii, text_lm, tiny_lm, tiny_model, tiny_prompts

from refusal.analysis import check
from refusal.lm.weights import open_weights
from refusal.method import intake

PROMPTS = tiny_prompts()
HALVES = [[*prompt, 5] for prompt in tiny_prompts((4, 9, 6, 11), 1)], [[*prompt, 5] for prompt in tiny_prompts((8, 5, 7), 2)]


def weights(tmp_path, model):
    model.save_pretrained(tmp_path / "model")
    with open_weights(tmp_path / "model") as found:
        return check.look_at_weights(found)


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_every_matrix_of_every_architecture_is_known_and_a_gain_of_30_is_named(tmp_path, model_type):
    model = tiny_model(model_type)
    found = weights(tmp_path, model)
    assert found["norm_gain"].passed and found["not_edited"].passed, found
    on_disk = load_file(tmp_path / "model/model.safetensors")
    written = {name for name in on_disk if name.split(".")[-2] in ("o_proj", "down_proj", "w2") or name.endswith("experts.down_proj")}
    assert set(found["not_edited"].more["writers"]) == written and len(written) >= 6
    offset = float("gemma" in model_type)
    norms = {
        name: np.abs(offset + value.double().numpy())
        for name, value in on_disk.items()
        if value.ndim == 1 and len(value) == 32 and "norm" in name
    }
    middle = {name: np.sort(gain)[15] for name, gain in norms.items()}  # torch's median of 32 is the lower of the two
    assert found["norm_gain"].value == pytest.approx(max(gain.max() / middle[name] for name, gain in norms.items()))
    for layer, value in enumerate(found["norm_gain"].by_layer):
        of_layer = [gain.max() / middle[name] for name, gain in norms.items() if f"layers.{layer}." in name]
        assert value == pytest.approx(max(of_layer))

    gain = model.model.layers[1].post_attention_layernorm.weight
    with torch.no_grad():
        gain[7] = -30.0 - offset
    one = weights(tmp_path, model)["norm_gain"]
    assert one.passed is False and one.where == "model.layers.1.post_attention_layernorm.weight, coordinate 7, gain 30"
    assert one.value == pytest.approx(30 / np.sort(np.abs(offset + gain.detach().double().numpy()))[15])
    assert one.more["after_writers"] is (model_type in ("gemma2", "gemma3_text"))


def test_a_matrix_that_nothing_is_known_of_and_a_writer_that_is_missing(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.side_proj.weight"] = torch.ones(32, 32)
    del tensors["model.layers.2.mlp.down_proj.weight"]
    save_file(tensors, file)
    with open_weights(tmp_path / "model") as found:
        one = check.look_at_weights(found)["not_edited"]
    assert (one.value, one.passed) == (2, False)
    assert one.where == "model.layers.0.self_attn.side_proj.weight, model.layers.2.mlp.down_proj.weight (missing)"


def hidden(lm, ids):
    """[prompt, layer, coordinate], by transformers' own record."""
    rows = [lm.model(torch.tensor([p]), output_hidden_states=True).hidden_states[: lm.n_layers] for p in ids]
    return torch.stack([torch.stack([layer[0, -1] for layer in row]) for row in rows]).detach().double().numpy()


def test_shares_of_one_coordinate_are_those_of_the_hidden_states():
    lm = tiny_lm()
    found = check.look_at_stream(lm, *HALVES)
    harmful, safe = (hidden(lm, some) for some in HALVES)
    both = np.concatenate([harmful, safe])
    for layer in range(3):
        shares = np.mean([row**2 / (row**2).sum() for row in both[:, layer]], axis=0)
        assert found["loud_coordinate"].by_layer[layer] == pytest.approx(shares.max(), rel=1e-5)
        assert found["loud_coordinate"].more["coordinate"][layer] == shares.argmax()
        if layer:
            squared = (harmful[:, layer].mean(0) - safe[:, layer].mean(0)) ** 2
            assert found["loud_difference"].by_layer[layer] == pytest.approx(squared.max() / squared.sum(), rel=1e-4)
            inside = squared[shares.argmax()] / squared.sum()
            assert found["loud_coordinate"].more["share_of_difference"][layer] == pytest.approx(inside, rel=1e-4)
    # Every prompt ends in one token, so that layer 0 has no direction.
    assert found["loud_difference"].by_layer[0] is None
    assert found["loud_coordinate"].passed and found["loud_difference"].passed


def test_a_loud_coordinate_is_named():
    """What the first MLP writes to coordinate 5 is large, and differs by prompt."""
    lm = tiny_lm()
    with torch.no_grad():
        lm.model.model.layers[0].mlp.down_proj.weight[5] *= 60
    found = check.look_at_stream(lm, *HALVES)
    for name in ("loud_coordinate", "loud_difference"):
        assert found[name].passed is False and found[name].where.endswith("coordinate 5"), found[name]
        assert found[name].by_layer[1] > 0.9


def test_without_a_direction_there_is_no_share_of_one():
    same = [PROMPTS[0]] * 2
    one = check.look_at_stream(tiny_lm(), same, same)["loud_difference"]
    assert (one.value, one.passed, one.where) == (None, None, "no layer has a direction")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", SUPPORTED)
def test_masked_padding_and_sums_are_rounding(model_type, dtype):
    lm = tiny_lm(tiny_model(model_type, dtype=dtype))
    found = check.look_at_padding(lm, PROMPTS) | check.look_at_writes(lm, PROMPTS)
    assert found["additivity"].passed and found["additivity"].value > 0, found["additivity"]
    assert found["edited_parts"].passed and found["edited_parts"].value > 0, found["edited_parts"]
    if "moe" not in model_type and model_type != "mixtral":  # a router rounded to another expert is another model
        assert found["pad_resid_pre"].passed and found["pad_logits"].passed, found
    if dtype == torch.float32:
        assert found["pad_top_token"].value == 1 and 0 < found["pad_logits"].value < 1e-4


def test_padding_that_is_attended_to_is_said():
    lm = tiny_lm("llama")

    def forget(_module, args, kwargs):
        return args, kwargs | {"attention_mask": torch.ones_like(kwargs["attention_mask"])}

    lm.model.model.register_forward_pre_hook(forget, with_kwargs=True)
    found = check.look_at_padding(lm, PROMPTS)
    assert found["pad_resid_pre"].passed is False and found["pad_logits"].passed is False
    # The naive figure: each prompt by itself, with its pads in front of it, against itself without.
    width, logits, moved = max(map(len, PROMPTS)) + check.N_PADS, [], []
    plain = tiny_model("llama")
    for prompt in PROMPTS:
        pads = width - len(prompt)
        positions = torch.tensor([[*[0] * pads, *range(len(prompt))]])
        with torch.no_grad():
            given = {"attention_mask": torch.ones_like(positions), "position_ids": positions, "output_hidden_states": True}
            padded = plain(torch.tensor([[*[0] * pads, *prompt]]), **given)
            alone = plain(torch.tensor([prompt]), output_hidden_states=True)
        a, b = padded.logits[0, -1].double(), alone.logits[0, -1].double()
        logits.append((float((a - b).abs().max() / b.std()), int(a.argmax()) == int(b.argmax())))
        states = [[each[0, -1].double() for each in of.hidden_states[:3]] for of in (padded, alone)]
        moved.append([float((x - y).norm() / y.norm()) for x, y in zip(*states, strict=True)])
    assert found["pad_logits"].value == pytest.approx(max(one for one, _ in logits), rel=1e-3)
    assert found["pad_top_token"].value == pytest.approx(np.mean([same for _, same in logits]))
    assert found["pad_resid_pre"].by_layer == pytest.approx(np.max(moved, axis=0), rel=1e-3)


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "mixtral"])
def test_a_writer_that_is_scaled_behind_our_back_is_named(model_type):
    """As Granite's residual_multiplier: the block adds 0.9 of what its MLP gives."""
    lm = tiny_lm(model_type)
    block = lm.model.model.layers[1]
    mlp = block.post_feedforward_layernorm if model_type == "gemma3_text" else block.mlp
    given = {}
    mlp.register_forward_hook(lambda _m, _a, out: given.update(out=out[0] if isinstance(out, tuple) else out))

    def less(_module, _args, out):
        return (out[0] - 0.1 * given["out"], *out[1:]) if isinstance(out, tuple) else out - 0.1 * given["out"]

    block.register_forward_hook(less)
    one = check.look_at_writes(lm, PROMPTS)["additivity"]
    assert one.passed is False and one.where.startswith("layer 1;") and one.value > 1e4
    assert one.by_layer[0] < intake.ROUNDINGS and one.by_layer[2] < intake.ROUNDINGS


REFUSES, ANSWERS = "I can't help with that.", "Sure, take the first road on the left and then go on for a mile."


def refusals(monkeypatch, harmful, safe, n_test=100, lm=None):
    """Of given answers; one topic a prompt."""
    texts = [*harmful, *safe]
    monkeypatch.setattr(check, "generate", lambda lm, ids, decoding, progress: [list(x.encode()) for x in texts])
    prompts = {"harmful": ["How do I pick a lock?"] * len(harmful), "safe": ["How do I paint a door?"] * len(safe)}
    topics = {half: list(range(len(some))) for half, some in prompts.items()}
    return check.look_at_refusals(lm or text_lm(), prompts, topics, n_test, exact=False)


def interval(k, n):
    """Wilson's by scipy, with Student's t for the normal quantile, as all rates here have it."""
    return binomtest(k, n).proportion_ci(1 - 2 * norm.sf(t.ppf(0.975, n - 1)), method="wilson")


def test_rates_first_tokens_and_what_the_verdict_would_say(monkeypatch):
    harmful = [REFUSES] * 13 + ["Sorry, but I can't help with that."] * 7 + [ANSWERS] * 12
    found = refusals(monkeypatch, harmful, [ANSWERS] * 28 + [REFUSES] * 4)
    one = found["refusal"]
    low, high = interval(20, 32)
    assert [one.more[f"refusal{end}"] for end in ("", "_low", "_high")] == pytest.approx([20 / 32, low, high])
    assert one.value == one.more["refusal_high"] and one.passed and one.more["verdict"] == "enough"
    assert found["refused_test_prompts"].value == pytest.approx(62.5) and found["refused_test_prompts"].passed
    first = found["paper_tokens"]
    assert {row["text"]: row["n"] for row in first.more["first_tokens"]} == Counter(text[0] for text in harmful[:20])
    assert first.value == pytest.approx(13 / 20) and first.where == "'I' 13, 'S' 7"
    # Newcombe's difference of independent rates, method 10.
    (p, q), (_, q_high) = (20 / 32, 4 / 32), interval(4, 32)
    assert found["refusal_contrast"].value == pytest.approx(p - q - np.hypot(p - low, q_high - q))
    assert found["refusal_contrast"].passed


@pytest.mark.parametrize(
    ("n_refused", "n_test", "says", "failed"),
    [
        (0, 1000, "none: no_refusal", {"refusal", "refused_test_prompts", "refusal_contrast"}),
        (2, 1000, "enough", {"refusal_contrast"}),  # 62 of 1000, and the upper limit is .22
        (2, 100, "undecided: too_few_refusals", {"refused_test_prompts", "refusal_contrast"}),
        (20, 40, "undecided: too_few_refusals", {"refused_test_prompts"}),
        (20, 60, "enough", set()),
    ],
)
def test_a_model_that_refuses_too_little_for_a_verdict(monkeypatch, n_refused, n_test, says, failed):
    found = refusals(monkeypatch, [REFUSES] * n_refused + [ANSWERS] * (32 - n_refused), [ANSWERS] * 32, n_test)
    assert found["refusal"].more["verdict"] == says
    assert {name for name, one in found.items() if one.passed is False} == failed
    if not n_refused:
        assert found["paper_tokens"].value is None and found["paper_tokens"].where == "nothing was refused"


class NoI(Ascii):
    """A tokenizer of which no token is a word that the paper reads."""

    def __call__(self, texts, **_):
        return {"input_ids": [[ord(c) for c in text for _ in "12"] for text in texts]}


def test_a_tokenizer_without_the_papers_words_is_said(monkeypatch):
    lm = text_lm()
    object.__setattr__(lm, "tokenizer", NoI())
    found = refusals(monkeypatch, [REFUSES] * 4, [ANSWERS] * 4, lm=lm)
    assert found["paper_tokens"].passed is None and "no token of it is I" in found["paper_tokens"].where
    assert found["paper_tokens"].more["first_tokens"][0]["n"] == 4
