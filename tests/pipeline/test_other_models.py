"""The whole study on models that are not the organism: one line of params.yaml changes the model, and everything else adapts.

Tiny random checkpoints in the upstream layout say nothing sensible, so what is tested is that every stage runs and that its
figures are defined or null.
"""

import json
import math

import pytest
from checkpoints import GEMMA, LLAMA, byte_level
from place import params_with

from pipeline.study import metrics, run, small, stages_run

ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ROPE |= {"original_max_position_embeddings": 128}


# As meta-llama/Llama-3.2-1B-Instruct: tied embeddings, grouped queries, scaled rotary positions. Of Gemma what is its own is
# seen by evaluate.
@pytest.mark.parametrize(
    ("model_type", "template", "overrides", "until"),
    [("llama", LLAMA, {"tie_word_embeddings": True, "rope_parameters": ROPE}, "report"), ("gemma2", GEMMA, {}, "evaluate")],
    ids=["llama_3_2", "gemma_2"],
)
def test_the_study_runs_on_another_model(tmp_path, model_type, template, overrides, until):
    byte_level(tmp_path / "source", model_type, template, **overrides)
    folder = small(tmp_path / "study")
    prompts = {"prompts.n_pairs": 30, "prompts.n_unrelated": 30, "activations.methods": ["sequential", "batched"]}
    params_with(folder, prompts | {"model.id": str(tmp_path / "source"), "benchmark.limit": 2})
    assert stages_run(run(folder, "dvc", "repro", until))[-1] == until

    model, directions, evaluated = (metrics(folder, name) for name in ("model", "directions", "evaluate"))
    assert model["facts_accuracy"] is None and model["n_parameters"] > 10_000
    # The last token of the template is the same for every prompt: layer 0 has no direction, for this model too.
    assert directions["sequential-matched"]["separation"][0] is None
    assert directions["batched-matched"]["cosine_to_sequential_min"] > 0.99999
    assert metrics(folder, "judge")["baseline"]["n"] == 6 and evaluated["runtime"]["exact"] is None
    edited = metrics(folder, "orthogonalize")["rank_1"]
    # Two writers a layer and the embedding; tied embeddings are untied where edited.
    assert edited["n_edited"] == 7 and edited["max_deviation"] < 1e-5
    config = json.loads((folder / "models/ablated" / edited["name"] / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    # Where a norm stands between writer and stream, weights and run time at `writes` are two interventions.
    identity = evaluated["identity"]
    assert identity["norm_after_writer"] is (model_type == "gemma2")
    assert math.isfinite(identity["kl"]) and (identity["kl"] > 1e-4) is identity["norm_after_writer"]
