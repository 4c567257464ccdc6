"""What is proved of a model before anything rests on it: every architecture passes, and each fault that is planted is refused."""

import pytest
import torch
from tiny import NORM_AFTER, OTHERS, SUPPORTED, tiny_direction, tiny_lm, tiny_model, tiny_prompts
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from refusal.io.errors import UserError
from refusal.lm.stream import stream_of
from refusal.method import intake
from refusal.method.activations import last_token_resid_pre
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import Addition, Intervention
from refusal.method.orthogonalize import Edit, orthogonalize

PROMPTS = tiny_prompts((7, 3, 12, 2, 9))
EVERY = [*SUPPORTED, *OTHERS]
RECURRENT = ["falcon_h1", "qwen3_5_text", "qwen3_next"]
FUSED = ["deepseek_v3", "gpt_oss", "llama4_text", "qwen3_next"]


def alone(model, prompt, n):
    """transformers' own greedy continuation of one prompt, in its own cache."""
    options = {"do_sample": False, "max_new_tokens": n, "eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.0}
    return model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), **options)[
        0, len(prompt) :
    ].tolist()


@pytest.mark.parametrize("model_type", EVERY)
def test_every_architecture_passes_and_says_what_edited_weights_are(model_type):
    lm = tiny_lm(model_type)
    found = intake.prove(lm, PROMPTS, "m").figures
    assert found["outcome"] == ("ablate only" if model_type in NORM_AFTER else "ablate and orthogonalize")
    assert 0 < found["sums"]["gap"] < intake.ROUNDINGS and 0 < found["edits"]["gap"] < 1e-5
    assert found["n_tokens"] == found["n_same"] == 8 * len(PROMPTS)
    stated = {"granite": [0.22, 12.0], "falcon_h1": [0.5, 0.7, 1.0, 5.0]}
    assert found["multipliers"] == stated.get(model_type, [1.0])
    # A batch whose rows leave and enter, against transformers' generate of each prompt by itself.
    assert generate(lm, PROMPTS, Decoding(8, 3)) == [alone(lm.model, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("model_type", OTHERS)
def test_ablation_at_writes_is_the_checkpoint_that_was_written(model_type, tmp_path):
    """Through the files: every expert's output, biases, transposed and renamed tensors, an embedding that is untied."""
    model, v = tiny_model(model_type), tiny_direction()
    model.save_pretrained(tmp_path / "base")
    (report,) = orthogonalize(tmp_path / "base", [Edit(tmp_path / "edited", Intervention("v", v, 1.0))])
    assert report.max_residual < 1e-6
    auto = type(model)
    edited, info = auto.from_pretrained(tmp_path / "edited", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "mismatched_keys", "unexpected_keys")), info
    ids = torch.tensor([PROMPTS[2]])
    with torch.inference_mode(), Intervention("v", v, 1.0, "writes").on(model):
        ablated = model(ids).logits
    with torch.inference_mode():
        gap = float((edited.eval()(ids).logits - ablated).abs().max() / ablated.std())
    assert (gap > 0.05) if model_type in NORM_AFTER else (gap < 1e-4), gap
    names = stream_of(model).architecture.writers
    for name, parameter in edited.named_parameters():
        if name in names:  # of every expert by itself
            along = torch.tensordot(parameter.detach(), v, dims=([parameter.ndim + names[name]], [0]))
            assert along.abs().max() < 1e-5, name
        elif name != stream_of(model).architecture.embedding_name:
            assert torch.equal(parameter, model.get_parameter(name)), name


@pytest.mark.parametrize("model_type", FUSED)
def test_experts_are_edited_one_by_one(model_type, tmp_path):
    """With the norms of rows kept, which is no sum over experts: each against a loop over them."""
    model, v = tiny_model(model_type), tiny_direction()
    model.save_pretrained(tmp_path / "base")
    orthogonalize(tmp_path / "base", [Edit(tmp_path / "edited", Intervention("v", v, 1.0), norms="rows")])
    edited, architecture = type(model).from_pretrained(tmp_path / "edited"), stream_of(model).architecture
    for name, n in architecture.n_experts.items():
        before, after = model.get_parameter(name).detach(), edited.get_parameter(name).detach()
        for e in range(n):
            w = before[e] if architecture.writers[name] == -2 else before[e].T
            rows = w / w.norm(dim=1, keepdim=True)
            expected = rows - torch.outer(v, v @ rows)
            expected *= w.norm(dim=1, keepdim=True) / expected.norm(dim=1, keepdim=True)
            torch.testing.assert_close(after[e] if architecture.writers[name] == -2 else after[e].T, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", ["prompt", "last_prompt_token", "all"])
@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_models_under_interventions_of_their_own_are_each_prompt_alone(model_type, positions):
    """Rows of unlike lengths under unlike directions, with an addition, against a loop of whole forwards without a cache."""
    lm, v = tiny_lm(model_type), tiny_direction(rows=2)
    arms = [Intervention("a", v[0], 1.0, "paper"), Intervention("b", v[1], 0.5, "paper")]
    added = Addition(3 * tiny_direction(seed=5), 1, positions)
    rows = [0, 1, 1, 0, 1]
    found = generate(lm, PROMPTS, Decoding(5, 3), arms, rows, added)
    for prompt, row, answer in zip(PROMPTS, rows, found, strict=True):
        tokens = list(prompt)
        for _ in range(5):
            last = slice(len(prompt) - 1, len(prompt)) if positions == "last_prompt_token" else slice(0, None)
            where = slice(0, len(prompt)) if positions == "prompt" else last

            def add(_module, args, where=where):
                changed = args[0].clone()
                changed[:, where] += added.vector
                return (changed, *args[1:])

            with arms[row].on(lm.model), torch.inference_mode():
                handle = stream_of(lm.model).blocks(lm.model)[1].register_forward_pre_hook(add)
                tokens.append(int(lm.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
                handle.remove()
        assert answer == tokens[len(prompt) :]


@pytest.mark.parametrize("method", ["sequential", "batched"])
@pytest.mark.parametrize("model_type", [*RECURRENT, "qwen2_5_vl", "llama4_text"])
def test_activations_are_transformers_hidden_states(model_type, method):
    lm = tiny_lm(model_type)
    ids = [[5, 6, *prompt] for prompt in PROMPTS]  # of one beginning
    found = last_token_resid_pre(lm, ids, method)
    for prompt, rows in zip(ids, found, strict=True):
        hidden = lm.model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[: lm.n_layers]
        torch.testing.assert_close(rows, torch.stack([one[0, -1] for one in hidden]), rtol=1e-4, atol=1e-4)


def test_positions_added_beside_the_embedding_are_refused_with_layer_and_gap():
    config = CONFIG_MAPPING["gpt2"](vocab_size=96, n_embd=32, n_layer=2, n_head=4)
    lm = tiny_lm(AutoModelForCausalLM.from_config(config).eval())
    with pytest.raises(UserError, match=r"^m: gpt2: layer 0: the stream is not the sum .* off by [\d.e+]+ roundings of float32"):
        intake.prove(lm, PROMPTS, "m")


def test_a_layer_that_adds_more_is_refused_by_its_number():
    lm = tiny_lm("llama")
    lm.model.model.layers[2].register_forward_hook(lambda _m, _a, out: out * 1.001)
    with pytest.raises(UserError, match=r"m: llama: layer 2: .* and 4 are allowed: use another model"):
        intake.prove(lm, PROMPTS, "m")


def test_a_writer_that_was_missed_or_gated_leaves_ablation_alone(monkeypatch):
    """A gate that scales coordinates unalike, behind the writer: sums hold, edited weights are another thing."""
    lm = tiny_lm("llama")
    gate = torch.linspace(0.5, 1.5, 32)
    lm.model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _a, out: out * gate)
    found = intake.prove(lm, PROMPTS, "m")
    assert found.outcome == "ablate only" and found.edits[1] > 0.1 and max(found.edits[0], found.edits[2]) < 1e-5
    # And the wrong writer, as a wrong guess of structure would name it.
    lm = tiny_lm("qwen3")
    writers = stream_of(lm.model).architecture.writers
    monkeypatch.delitem(writers, "model.layers.0.self_attn.o_proj.weight")
    monkeypatch.setitem(writers, "model.layers.0.self_attn.q_proj.weight", -2)
    assert intake.prove(lm, PROMPTS, "m").edits[0] > 0.1


def test_a_model_that_takes_its_padding_for_text_is_refused(monkeypatch):
    """A recurrent one, run as if all that it carried were keys and values: rows that are padded and come and go."""
    lm = tiny_lm("qwen3_next")
    monkeypatch.setattr(
        "refusal.method.recurrent.left_pad", lambda ids, pad: (padded(ids), torch.ones(len(ids), max(map(len, ids)), dtype=torch.long))
    )
    with pytest.raises(UserError, match=r"m: qwen3_next: prompt \d, token \d: a batch chooses another token than the prompt alone"):
        intake.prove(lm, PROMPTS, "m")


def padded(ids):
    width = max(map(len, ids))
    return torch.tensor([[0] * (width - len(row)) + list(row) for row in ids])


def test_stop_tokens_and_half_precision():
    lm = tiny_lm("llama", dtype=torch.bfloat16)
    found = intake.prove(lm, PROMPTS, "m")
    assert found.outcome == "ablate and orthogonalize" and 1e-4 < max(found.edits) < intake.EDITED[torch.bfloat16]
    first = generate(tiny_lm("llama"), PROMPTS, Decoding(8, 5))
    stopping = tiny_lm("llama", stop=[first[0][2]])
    found = intake.prove(stopping, PROMPTS, "m")
    assert found.n_tokens == found.n_same < 8 * len(PROMPTS)
