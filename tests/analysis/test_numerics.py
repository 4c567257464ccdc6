"""Where numbers run out: overflow, equal prompts, one layer, fewer prompts than a rank wants. Figures, null or a sentence."""

import json
import re
import sys
from pathlib import Path

import given
import pytest
import torch
from checkpoints import LLAMA, byte_level, word_level
from place import Place
from safetensors.torch import load_file, save_file
from tiny import tiny_lm, tiny_model

from refusal.analysis.candidates import controls
from refusal.analysis.estimators import lda
from refusal.analysis.subspaces import paired_svd
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.lm.load import LM
from refusal.method.activations import collect, last_token_resid_pre
from refusal.method.directions import difference_in_means, read_directions, select_directions
from refusal.method.generate import Decoding, generate


def scaled(factor: float, dtype: torch.dtype) -> LM:
    """A model whose weights any dtype holds and whose MLPs give out numbers that float16 does not."""
    model = tiny_model("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mlp" in name:
                parameter.mul_(factor)
    return tiny_lm(model.to(dtype))


IDS = [[1, 5, 9], [1, 6], [1, 7, 8, 11]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_forward_pass_that_overflows_gives_no_completion_and_no_activation(tmp_path, dtype):
    tame, wild = (scaled(factor, dtype) for factor in (1, 300))
    assert generate(tame, IDS, Decoding(4)) and last_token_resid_pre(tame, IDS, "sequential").isfinite().all()
    store, path = Store(tmp_path / "store.sqlite"), tmp_path / "a.safetensors"
    if dtype != torch.float16:  # as far as float32 reaches, bfloat16 does
        assert all(len(tokens) == 4 for tokens in generate(wild, IDS, Decoding(4)))
        collect(wild, {"all": IDS}, "sequential", 2, store, path)
        return
    with pytest.raises(UserError, match=r"params\.yaml: model\.dtype: .* in float16: set bfloat16 or float32"):
        generate(wild, IDS, Decoding(4))
    with pytest.raises(UserError, match=r"model\.dtype"):
        collect(wild, {"all": IDS}, "sequential", 2, store, path)
    assert not path.exists()
    assert store.connection.execute("SELECT count(*) FROM blobs").fetchone() == (0,)  # no faulty value to be found later


def test_nan_in_one_row_of_many_is_seen():
    lm = tiny_lm("llama", stop=[11])
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[11, 3] = torch.nan
    with pytest.raises(UserError, match=r"NaN or infinity in float32"):
        generate(lm, IDS, Decoding(3))
    assert generate(lm, IDS[:2], Decoding(1))


def test_whitening_where_nothing_varies_is_the_difference_and_no_singular_matrix():
    harmful, safe = torch.tensor([[3.0, 4.0, 0.0]]), torch.zeros(1, 3)
    assert lda(harmful, safe).tolist() == pytest.approx([0.6, 0.8, 0.0])
    assert lda(harmful.repeat(4, 1), safe.repeat(4, 1)).tolist() == pytest.approx([0.6, 0.8, 0.0])
    # Its limit: spread that goes to nothing, the same in every direction.
    spread = 1e-4 * torch.cat([torch.eye(3), -torch.eye(3)]).double()
    assert lda(harmful + spread, safe + spread).tolist() == pytest.approx([0.6, 0.8, 0.0])


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_rank_larger_than_the_data_is_refused_and_says_how_many_pairs_there_are(n):
    rows = torch.randn(n, 8, generator=torch.Generator().manual_seed(0))
    assert len(paired_svd(rows, torch.zeros(n, 8), n)) == n
    with pytest.raises(UserError, match=rf"the {n} paired differences span fewer than {n + 1} .*prompts\.n_pairs"):
        paired_svd(rows, torch.zeros(n, 8), n + 1)


def test_unrelated_prompts_that_are_the_safe_ones_are_no_control(tmp_path):
    study = given.study(Store(tmp_path / "s"))
    safe = torch.randn(6, 3, 32, generator=torch.Generator().manual_seed(0))
    study.harmless_difference = vars(difference_in_means(safe + 1, safe))
    assert controls(study)[0].name == "harmless_difference"
    study.harmless_difference = vars(difference_in_means(safe.flip(0), safe))
    with pytest.raises(UserError, match=r"prompts\.unrelated: .* layer 1 .* give other safe prompts"):
        controls(study)


def one_layer(folder: Path) -> None:
    byte_level(folder, "llama", LLAMA, num_hidden_layers=1)


def unknown_words(folder: Path) -> None:
    """To whose tokenizer every word but ten letters is the same, and so is the end of every prompt."""
    tiny_model("llama", vocab_size=96).save_pretrained(folder)
    config = (folder / "config.json").read_text()
    word_level(folder, "{% for m in messages %}{{ m['content'] }}{% endfor %} a b")
    (folder / "config.json").write_text(config)


def three_layers(folder: Path) -> None:
    byte_level(folder, "llama", LLAMA)


def study(place: Place, model, *stages: str, n_pairs: int = 15) -> list[str]:
    """What each stage of a small study on this model says last, up to the first that fails."""
    folder = place.folder
    model(folder / "checkpoint")
    (folder / "data/raw").mkdir()
    for section, values in {
        "model": {"id": "checkpoint"},
        "prompts": {"n_pairs": n_pairs, "n_unrelated": n_pairs},
        "generation": {"max_new_tokens": 4},
        "long_answers": {"max_new_tokens": 8},
        "directions": {"n_resamples": 20, "n_sign_flips": 20},
        "activations": {"methods": ["sequential"]},
        "sweep": {"alphas": [1.0], "n_random": 1},
        "select": {"top": 1},
        "evaluate": {"n_resamples": 20},
    }.items():
        place.set(section, **values)
    # One process for all of them: what a stage costs here is its imports.
    run = "import runpy, sys\nnames, sys.argv[1:] = sys.argv[1:], []\n"
    place.write("run.py", run + "for name in names:\n    runpy.run_module(f'stages.{name}', run_name='__main__')\n")
    output = place.run(sys.executable, "run.py", *stages).said
    assert "Traceback" not in output, output
    return [line.removeprefix("run: ") for line in output.splitlines() if line.startswith("run: ")]


STAGES = ("prompts", "model", "behaviour", "activations", "directions", "sweep")


@pytest.mark.parametrize("model", [one_layer, unknown_words])
def test_a_model_to_which_harmful_and_safe_prompts_are_equal_has_null_figures_and_no_sweep(tmp_path, model):
    said = study(Place(tmp_path), model, *STAGES)
    assert len(said) == 6 and "none at any layer: harmful and safe prompts come out the same" in said[4]
    assert re.match(r"no layer has a direction.* set another model\.id or prompts\.source in params\.yaml", said[5])
    figures = json.loads((tmp_path / "metrics/directions.json").read_text(), parse_constant=pytest.fail)["sequential-matched"]
    assert figures["layers"] == [] and figures["peak_layer"] is None and set(figures["separation"]) == {None}
    assert not load_file(tmp_path / "models/directions.safetensors")["sequential-matched.unit"].any()


def test_one_prompt_a_split_has_figures_or_null_and_never_nan(tmp_path):
    """One pair to fit on, one to choose on, one to test on: effects without a spread are null, rates have their intervals."""
    stages = (*STAGES, "judge", "select", "orthogonalize", "evaluate", "agreement", "long_answers")
    place = Place(tmp_path)
    said = study(place, three_layers, *stages, n_pairs=3)
    assert len(said) == len(stages) and "no separation: too few val prompts for a spread" in said[4]
    for path in sorted((tmp_path / "metrics").glob("*.json")):
        json.loads(path.read_text(), parse_constant=pytest.fail)  # NaN and infinity, which JSON has no word for
    for path in sorted((tmp_path / "plots").rglob("*.csv")):
        assert not re.search(r"(^|,)-?(nan|inf)(,|$)", path.read_text(), re.M), path
    figures = json.loads((tmp_path / "metrics/evaluate.json").read_text())
    assert all(
        0 <= figures[arm]["compliance_low"] < figures[arm]["compliance_high"] <= 1 for arm in ("runtime", "orthogonalized")
    )


def test_directions_of_another_model_and_files_that_are_none_are_named(tmp_path):
    place = Place(tmp_path)
    three_layers(tmp_path / "models/base")
    arm = dict.fromkeys(("unit", "difference", "safe_mean"), torch.eye(4)[:3]) | {"defined": torch.ones(3).bool()}
    path = tmp_path / "models/directions.safetensors"
    tensors = {f"sequential-{pairing}.{name}": t.clone() for pairing in ("matched", "harmless") for name, t in arm.items()}
    save_file(tensors, path)
    status, output = place.stage("sweep")
    assert status == 1 and "Traceback" not in output
    assert "the direction has 4 components and the model's residual stream 32: use a direction of this model" in output
    assert select_directions(read_directions(path), "sequential", "matched").keys() == arm.keys()
    with pytest.raises(UserError, match=r"there are no directions batched-matched: run `dvc repro directions`"):
        select_directions(tensors, "batched", "matched")
    path.write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match=r"models/directions\.safetensors: cannot be read .*: delete it and run `dvc repro`"):
        read_directions(path)
