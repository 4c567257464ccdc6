"""The whole study on models that are not the organism: one line of params.yaml changes the model, and everything else adapts.

Tiny random checkpoints in the upstream layout say nothing sensible, so what is tested is that every stage runs and that its
figures are defined or null.
"""

import json
import math

import pytest
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.study import change, copy, run, small, stages_run

# As Llama 3.2's: a system block with the day of the run, headers, and an end of turn that is not the end of text.
LLAMA = (
    "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% else %}{% set day = '26 Jul 2024' %}{% endif %}"
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ day }}\n\n<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}<|begin_of_text|>"
    "{% for m in messages %}<start_of_turn>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
SPECIALS = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
SPECIALS += ["<start_of_turn>", "<end_of_turn>"]


def checkpoint(folder, model_type: str, template: str, **overrides) -> None:
    """A random checkpoint with a byte-level tokenizer of its own, no padding token, and this chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator([], trainers.BpeTrainer(special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIALS[0], eos_token=SPECIALS[1], chat_template=template, model_max_length=512
    )
    tokenizer.save_pretrained(folder)
    tiny_model(
        model_type, vocab_size=len(tokenizer), max_position_embeddings=512, pad_token_id=None, **overrides
    ).save_pretrained(folder, max_shard_size="50KB")


ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    # As meta-llama/Llama-3.2-1B-Instruct: tied embeddings, grouped queries, scaled rotary positions.
    "llama_3_2": (
        "llama",
        LLAMA,
        {"tie_word_embeddings": True, "rope_parameters": ROPE | {"original_max_position_embeddings": 128}},
    ),
    "gemma_2": ("gemma2", GEMMA, {}),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_study_runs_on_another_model(tmp_path, name):
    model_type, template, overrides = MODELS[name]
    checkpoint(tmp_path / "source", model_type, template, **overrides)
    folder = tmp_path / "study"
    folder.mkdir()
    small(copy(folder))
    change(folder, "model", id=str(tmp_path / "source"))
    change(folder, "prompts", n_pairs=30, n_unrelated=30)
    change(folder, "activations", methods=["sequential", "batched"])
    change(folder, "benchmark", limit=2)
    until = "evaluate" if name == "gemma_2" else "report"  # what is its own is seen by then
    assert stages_run(run(folder, "dvc", "repro", until))[-1] == until

    metrics = {path.stem: json.loads(path.read_text()) for path in (folder / "metrics").glob("*.json")}
    assert metrics["model"]["facts_accuracy"] is None and metrics["model"]["n_parameters"] > 10_000
    # The last token of the template is the same for every prompt: layer 0 has no direction, for this model too.
    assert metrics["directions"]["sequential-matched"]["separation"][0] is None
    assert metrics["directions"]["batched-matched"]["cosine_to_sequential_min"] > 0.99999
    assert metrics["judge"]["baseline"]["n"] == 6 and metrics["evaluate"]["runtime"]["exact"] is None
    edited = metrics["orthogonalize"]["rank_1"]
    # Two writers a layer and the embedding; tied embeddings are untied where edited.
    assert edited["n_edited"] == 7 and edited["max_deviation"] < 1e-5
    config = json.loads((folder / "models/ablated" / edited["name"] / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    # Where a norm stands between writer and stream, weights and run time at `writes` are two interventions.
    identity = metrics["evaluate"]["identity"]
    assert identity["norm_after_writer"] is (name == "gemma_2")
    assert math.isfinite(identity["kl"]) and (identity["kl"] > 1e-4) is identity["norm_after_writer"]
