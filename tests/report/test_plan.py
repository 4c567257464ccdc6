"""What a run will take, said before anything is downloaded: against counts by hand, and a hub that sees what is asked of it."""

import json
import os
import shutil
import subprocess
import sys

import given
import pytest
import torch
import yaml
from given import ROOT
from hub_server import COMMIT, Hub, serve
from qwen1_layout import LATE, tensors, write
from tiny import tiny_config, tiny_direction, tiny_lm

from refusal.analysis.candidates import by_family, controls, planted, single_directions, subspaces
from refusal.io.store import Store
from refusal.lm.architecture import architecture_of
from refusal.lm.batching import COUNTS, count_forwards
from refusal.method.directions import difference_in_means
from refusal.method.first_token import scores
from refusal.method.interventions import Addition, Intervention
from refusal.report.plan import HANDED_OUT, STANDARD, Prompts, Size, Step, hours, steps

N = {f"{split}.{half}": n for split, n in (("train", 6), ("val", 3), ("test", 4)) for half in ("harmful", "safe", "unrelated")}
PROMPTS = Prompts(N | {"facts": 5}, {name: 10 * n for name, n in (N | {"facts": 5}).items()})


def planned(size: Size | None = None, **sections: dict) -> dict:
    size = size or Size(1000, 4000, architecture_of(tiny_config("llama")), 0)
    return {step.stage: step for step in steps(given.params(**sections), size, PROMPTS)}


def test_counts_by_hand():
    s = {"layers": None, "alphas": [1.0, 2.0], "n_random": 2}
    found = planned(
        model={"id": "/a/folder"},
        generation={"max_new_tokens": 7},
        sweep=s,
        select={"top": 2},
        orthogonalize={"include_embedding": True},
    )
    # Three methods over train and val, harmful, safe and unrelated, ten tokens each; a pass for the common beginning.
    assert (found["activations"].passes, found["activations"].tokens) == (3 * 27 + 1, 3 * 270)
    # Baseline, two random directions, layers 1 and 2 at two alphas and their harmless differences: nine cells of three prompts;
    # ten tokens are read, in two passes, and six of seven new ones.
    assert (found["sweep"].passes, found["sweep"].tokens) == (9 * 3 * 8, 9 * 3 * (10 + 6))
    # Six val prompts; then three of them in TransformerLens too: read by both, with the three safe ones by ours; completed twice, and
    # the completions read. The architecture is proved on six answers of eight tokens, each read once more, and two prompts twice.
    assert found["model"].passes == 6 * 8 + 2 * 3 * 8 + (3 + 3) + 3 + 3 + (6 * 9 + 6 + 4)
    # Eight prompts by baseline, run time, weights, random weights, harmless difference and two random directions; four with
    # addition, four harmless; then each of these seven, two alphas and twice the base model, and the identity with the base model.
    assert found["evaluate"].passes == (7 * 8 + 4 + 4) * 8 + (1 + 7 + 2 + 2) * 4
    assert found["evaluate"].tokens == (7 * 8 + 4 + 4) * 16 + (1 + 7 + 2 + 2) * 4 * 17
    assert found["orthogonalize"].n_bytes == 2 * 3 * 4000
    more = planned(select={"top": 2}, orthogonalize={"format": "gguf-f16"})["orthogonalize"]  # two bytes a parameter more
    assert (more.n_bytes, more.note) == (2 * 3 * (4000 + 2 * 1000), "3 checkpoints, each as GGUF too")
    assert "generalization" not in found
    sets = {"sets": ["data/raw/a.csv", "data/raw/b.csv"], "n": 50, "n_random": 1, "system_prompts": [None, ""]}
    asked = planned(model={"id": "/a/folder"}, generation={"max_new_tokens": 7}, judge={"kind": "llm"}, generalization=sets)
    # Two sets, two system prompts and three interventions, on 50 harmful and 50 safe prompts.
    step = asked["generalization"]
    assert (step.passes, step.tokens, step.calls) == (12 * 100 * 8, 12 * 100 * 16, 12 * 100)
    assert found["model"].n_bytes == 2 * 4000 and sum(step.calls for step in found.values()) == 0


@pytest.mark.parametrize(
    ("sweep", "cells", "arms"),
    [
        ({"basis": "qr", "layers": [1, 2], "rank": None}, 1 + 2 + 1 * (1 + 2), 5 + 2),
        ({"basis": "svd", "layers": [1, 2], "rank": 3}, 1 + 2 + 2 * 2, 4 + 2),  # two harmless sets have no singular vectors
        ({"basis": "per_layer", "layers": None}, 1 + 2 + 1 * (1 + 2), 5 + 2),
    ],
)
def test_a_sweep_of_subspaces(sweep, cells, arms):
    found = planned(model={"id": "/a/folder"}, sweep=sweep | {"alphas": [0.5, 1.0], "n_random": 2}, judge={"kind": "llm"})
    assert found["judge"].calls == cells * 3 and found["evaluate"].calls == arms * 8 + 4
    # Random subspaces of its rank are drawn where the table of the verdict has none: 2, 3 and 5 it has.
    more = planned(model={"id": "/a/folder"}, sweep=sweep | {"rank": 4 if sweep["basis"] == "svd" else sweep.get("rank")}, judge={"kind": "llm"})
    plain = planned(model={"id": "/a/folder"}, judge={"kind": "llm"})
    n_control = min(PROMPTS.n["test.harmful"], 30)
    assert more["science"].calls - plain["science"].calls == (sweep["basis"] == "svd") * 2 * n_control


@pytest.mark.parametrize(("n", "asked"), [(3, 3), (100, 4), (None, 4)])
def test_long_answers_are_counted_as_if_none_ended_by_itself(n, asked):
    """Baseline, run time, weights and two random directions, ten tokens a prompt; the short answers are in the store."""
    long = {"n": n, "max_new_tokens": 20, "n_random": 2}
    generation, s = {"max_new_tokens": 7}, {"n_random": 2}
    found = planned(generation=generation, sweep=s, long_answers=long, judge={"kind": "llm"})["long_answers"]
    assert (found.passes, found.tokens, found.calls) == (5 * asked * 21, 5 * asked * (10 + 19), 5 * asked)
    without = given.params(judge={"kind": "llm"}).model_copy(update={"long_answers": None})
    assert not [s for s in steps(without, Size(1000, 4000, architecture_of(tiny_config("llama")), 0), PROMPTS) if s.stage == "long_answers"]


def test_edited_checkpoints_are_counted_by_what_nothing_asked_before():
    """rank_1 and random were asked by evaluate, and all of the study's own scored by benchmark; 8 test prompts, 3 texts with one beginning."""
    sections = {"model": {"id": "/a/folder"}, "generation": {"max_new_tokens": 7}, "judge": {"kind": "llm"}, "evaluate": {"n_harmless": 3}}
    sections["benchmark"] = {"suite": ["piqa"], "limit": 10}
    own = planned(**sections, edits={"checkpoints": ["rank_1", "random", "rank_2"]})["edits"]
    assert (own.passes, own.tokens, own.calls, own.n_bytes) == (8 * 8 + 2 * 4 * (3 + 1), 8 * 16 + 2 * 4 * 3 * 17, 8, 0)
    hub = [{"id": "a/b", "revision": "v1"}, {"id": "a/c", "revision": "v1"}]
    more = planned(**sections, edits={"checkpoints": ["rank_1", "a/folder", *hub]})["edits"]
    documents, requests, tokens = 10, *STANDARD["piqa"][1:]
    assert more.passes == 3 * 8 * 8 + 2 * 5 * (3 + 1) + 3 * documents * requests and more.calls == 3 * 8
    assert more.tokens == pytest.approx(3 * 8 * 16 + 2 * 5 * 3 * 17 + 3 * documents * requests * tokens, abs=1)
    assert more.n_bytes == 3 * 4000 and more.note == "4 edited checkpoints, 3 of others"
    sections["benchmark"] = {"suite": ["mmlu"]}
    assert planned(**sections, edits={"checkpoints": ["a/folder"]})["edits"].passes is None
    assert planned(**sections, edits={"checkpoints": ["rank_1"]})["edits"].passes == 2 * 2 * (3 + 1)
    assert "edits" not in planned(**sections, edits={"checkpoints": []})


def test_kept_prompts_and_harmless_texts_are_counted():
    found = planned(
        model={"id": "/a/folder"}, prompts={"keep": "behaving"}, evaluate={"n_harmless": 3}, generation={"max_new_tokens": 7},
        judge={"kind": "llm"}, sweep={"layers": [2], "alphas": [1.0], "n_random": 1},
    )  # fmt: skip
    n = sum(PROMPTS.n[f"train.{part}"] for part in ("harmful", "safe", "unrelated"))
    assert (found["behaviour"].passes, found["behaviour"].tokens, found["behaviour"].calls) == (n * 8, n * 16, n)
    assert found["evaluate"].passes == (6 * 8 + 4 + 3) * 8 + (1 + 6 + 1 + 2) * 3
    assert planned(model={"id": "/a/folder"})["behaviour"].passes == 0


@pytest.mark.parametrize(("layers", "jobs"), [([2], 1), ([1, 2, 3, 4, 5], 2)])
def test_the_papers_rule_is_counted_by_what_it_reads(tmp_path, layers, jobs):
    """As the library itself reads them, where no prompt begins as another does."""
    s = {"layers": layers, "alphas": [1.0], "n_random": 1}
    found = planned(model={"id": "/a/folder"}, sweep=s, select={"by": "paper"})["selection"]
    n = len(layers)
    assert (found.passes, found.tokens) == (3 * (n + jobs) + 3 * (2 * n + jobs), 10 * (3 * (n + jobs) + 3 * (2 * n + jobs)))
    assert "selection" not in planned(model={"id": "/a/folder"}, sweep=s)
    lm, unit = tiny_lm(num_hidden_layers=6), tiny_direction()
    count_forwards(lm.model)
    some = [(Intervention(f"layer_{i}", unit), Addition(unit, i)) for i in layers]
    prompts, before = [[i] * 10 for i in range(3, 9)], COUNTS["passes"]
    scores(lm, prompts[:3], prompts[3:], some, [40], Store(tmp_path / "s"))
    assert COUNTS["passes"] - before == found.passes


def test_layers_cap_and_judge_calls():
    s = {"layers": [2], "alphas": [1.0], "n_random": 1}
    found = planned(model={"id": "/a/folder"}, sweep=s, judge={"kind": "llm"})
    assert found["judge"].calls == 4 * 3  # four cells of three prompts
    assert found["evaluate"].calls == 6 * 8 + 4
    generated = planned(prompts={"source": "api", "n_pairs": 95, "unrelated": "grammar"})
    assert generated["prompts"].calls == 10


# Of params.yaml, and one with neither addition, positions, padding nor strength, and with more test prompts than there are.
BUDGETS = {"basic": {}, "mediation": {"n_test": 100, "optimised": {"steps": 100, "batch_size": 16}}}
BUDGETS["mediation"] |= dict.fromkeys(("sensitivity", "padding", "strength")) | {"layers": [1, 3]}


@pytest.mark.parametrize("kind", ["single", "planted"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_the_science_stage_by_the_interventions_it_compares(tmp_path, budget, kind):
    """The library's own, of random activations of six layers, of which the first has no direction."""
    generator = torch.Generator().manual_seed(0)
    harmful, safe, unrelated = (torch.randn(20, 6, 12, generator=generator) + shift for shift in (1.0, 0.0, 0.5))
    harmful[:, 0] = safe[:, 0]
    study = given.study(
        Store(tmp_path / "s"),
        model={"id": "organism"},
        organism={"kind": kind},
        generation={"max_new_tokens": 7},
        judge={"kind": "llm"},
        ablation={"sites": "resid_pre"},
        science={"n_random": 3} | BUDGETS[budget],
    )
    study.rank_1 = {"layer": 2, "alpha": 0.5, "name": "sequential_layer_2_alpha_50"}  # another than 1: its layer is compared at 1 as well
    study.activations = {"sequential": {"train.harmful": harmful, "train.safe": safe}}
    study.directions, study.harmless_difference = (vars(difference_in_means(some, safe)) for some in (harmful, unrelated))
    study.unrelated_unit = study.directions["unit"]
    single, several = single_directions(study, study.directions["unit"][1]), subspaces(study, [2, 1, 3, 4, 5])
    truth, random = planted(study, torch.eye(12).double()[0] if kind == "planted" else None), controls(study)
    on_val = 1 + len(single) + len(several) + len(truth)
    # Of each estimator but difference-in-means the best on val goes to test.
    n_difference = sum(one.family == "difference" for one in single)
    on_test = 1 + n_difference + len(by_family(single)) - 1 + len(several) + len(truth)

    n = {f"{split}.{half}": count for split, count in (("train", 6), ("val", 50), ("test", 70)) for half in ("harmful", "safe")}
    n |= {"train.unrelated": 6, "val.unrelated": 50, "test.unrelated": 45, "facts": 5}
    size = Size(1000, 4000, architecture_of(tiny_config("llama", num_hidden_layers=6)), 0)
    prompts = Prompts(n, {name: 10 * count for name, count in n.items()})
    step = next(step for step in steps(study.params, size, prompts) if step.stage == "science")
    basic = budget == "basic"
    n_val, n_test, n_control, n_harmless, n_steps = (40, 60, 30, 40, 60) if basic else (40, 70, 30, 40, 100)
    # Safe prompts: baseline, best single, subspace and affine; two vectors added in three ways. Four places, seven alphas, two directions.
    judged = n_val * on_val + n_test * on_test + n_control * len(random) + n_test * (4 + basic * 2 * 3) + basic * 4 * 14 * 12
    assert step.calls == judged
    # Each that goes to test, all controls, alphas by place; the baseline twice, and at each place.
    read = (2 + on_test + len(random) + basic * 4 * (1 + 14)) * n_harmless
    # Positions: both halves of six train and forty val pairs. Padding: the train half, by two numbers of pads and as batched,
    # masked and not; of 8 and 32 pads the larger is counted.
    at_end, padded = basic * (6 + 6 + 40 + 40), basic * 2 * 3 * (6 + 6)
    # The optimiser's batch is all six pairs, each a safe prompt alone and both halves edited.
    assert step.passes == 3 * 6 * n_steps + 8 * (judged + n_harmless) + read + 70 + 70 + at_end + padded
    in_completions, in_reading = 16 * (judged + n_harmless), 17 * read + 10 * (70 + 70 + at_end) + (10 + 32) * padded
    assert step.tokens == 10 * 3 * 6 * n_steps + in_completions + in_reading


def test_benchmarks_known_and_unknown():
    found = planned(benchmark={"suite": "standard", "limit": 100}, select={"top": 3})["benchmark"]
    assert found.passes == pytest.approx(100 * sum(requests for _, requests, _ in STANDARD.values()) * 5)
    assert planned(benchmark={"suite": ["mmlu"]})["benchmark"].passes is None


def test_a_hub_model_is_sized_from_what_is_not_its_weights(tmp_path):
    checkpoint = write(tmp_path / "source", LATE | {"seq_length": 512}, tensors(), buffers=False)
    n_parameters = sum(tensor.numel() for tensor in tensors().values())
    shutil.copyfile(ROOT / "requirements.lock", tmp_path / "requirements.lock")
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    raw["model"] |= {"id": "Qwen/Qwen-tiny", "revision": COMMIT, "dtype": "bfloat16"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(raw))
    with serve(Hub({"Qwen/Qwen-tiny": {p.name: p.read_bytes() for p in checkpoint.iterdir()}})) as hub:
        env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        env |= {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": hub.url, "HOME": str(tmp_path / "home")}
        done = subprocess.run([sys.executable, "-m", "stages.plan"], cwd=tmp_path, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not [path for _, path, _ in hub.requests if path.endswith(".safetensors")]
    n_layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    assert f"Qwen/Qwen-tiny: {n_parameters:,} parameters, {n_layers} layers" in done.stdout
    assert "\ntime: not known: no stage has run this model here on 2 threads yet\n" in done.stdout
    assert "to download: " in done.stdout and not (tmp_path / "models").exists()


def test_hours_are_tokens_over_the_rates_of_earlier_runs():
    found = [Step("sweep", 1, 7200), Step("science", 1, 3600), Step("prompts"), Step("benchmark", None, None)]
    runs = [
        {"stage": "sweep", "tokens": 40, "seconds": 2.0, "workers": 2},  # 10 a second and worker
        {"stage": "sweep", "tokens": 0, "seconds": 9.0, "workers": 1},  # all was stored
        {"stage": "activations", "tokens": 20, "seconds": 16.0, "workers": 1},
    ]
    overall = 60 / (2.0 * 2 + 16.0)  # science has not run yet
    one, four = hours(found, runs, 4)
    assert one == pytest.approx(0.2 + 1 / overall) and four == pytest.approx(0.2 / 4 + 1 / overall)
    assert hours(found, runs, 1) == pytest.approx((one, one))
    assert hours(found, runs[1:2], 4) is None


def test_the_stages_that_hours_divides_are_stages():
    assert set(HANDED_OUT) <= yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].keys()
