"""params.yaml: the committed one loads, and every mistake is one sentence that names the file and the key."""

import copy
from pathlib import Path

import pytest
import yaml

from refusal.io.errors import UserError
from refusal.io.params import Params, load_params

COMMITTED = Path(__file__).parents[2] / "params.yaml"
REMOVED = object()


def test_the_committed_file_loads():
    params = load_params(COMMITTED)
    assert params.model_dump() == yaml.safe_load(COMMITTED.read_text(encoding="utf-8"))  # nothing converted, nothing added


def test_every_section_of_the_pipeline_is_there():
    assert set(Params.model_fields) == {
        "prompts",
        "model",
        "organism",
        "activations",
        "directions",
        "ablation",
        "sweep",
        "judge",
        "select",
        "orthogonalize",
        "evaluate",
        "science",
        "benchmark",
        "report",
        "compute",
    }


def changed(tmp_path, changes):
    """A params.yaml with the keys of `changes` (dotted) set or removed."""
    raw = copy.deepcopy(yaml.safe_load(COMMITTED.read_text(encoding="utf-8")))
    for dotted, value in changes.items():
        *sections, name = dotted.split(".")
        place = raw
        for section in sections:
            place = place[section]
        if value is REMOVED:
            del place[name]
        else:
            place[name] = value
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    return file


GRAMMAR = {"prompts.source": "grammar"}
BAD = [  # changes, the key that must be named, and what else must be said
    ({"sweep.alpha": 1.0}, "sweep.alpha", "not permitted"),
    ({"swep": {}}, "swep", "not permitted"),
    ({"sweep": REMOVED}, "sweep", "required"),
    ({"sweep.alphas": REMOVED}, "sweep.alphas", "required"),
    ({"sweep.alphas": ["1.0"]}, "sweep.alphas.0", "'1.0'"),
    ({"sweep.alphas": 1.0}, "sweep.alphas", "list"),
    ({"sweep.alphas": []}, "sweep.alphas", "at least 1"),
    ({"sweep.alphas": [0.5, 0.0]}, "sweep.alphas.1", "greater than 0"),
    ({"sweep.alphas": [-1.0]}, "sweep.alphas.0", "greater than 0"),
    ({"sweep.alphas": [float("nan")]}, "sweep.alphas.0", "nan"),
    ({"sweep.alphas": [11.0]}, "sweep.alphas.0", "less than or equal to 10"),
    ({"sweep.layers": [-1]}, "sweep.layers.0", "-1"),
    ({"sweep.layers": [1.5]}, "sweep.layers.0", "1.5"),
    ({"sweep.layers": "all"}, "sweep.layers", "'all'"),
    ({"sweep.n_random": True}, "sweep.n_random", "integer"),
    ({"sweep.batch_size": 0}, "sweep.batch_size", "greater than or equal to 1"),
    ({"sweep.batch_size": "128"}, "sweep.batch_size", "'128'"),
    ({"sweep.method": "parallel"}, "sweep.method", "'parallel'"),
    ({"sweep.pairing": "shuffled"}, "sweep.pairing", "'shuffled'"),  # a control: not swept
    ({"prompts.seed": -1}, "prompts.seed", "-1"),
    ({"prompts.near_duplicate": 0}, "prompts.near_duplicate", "greater than 0"),
    ({"prompts.splits.train": 0.7}, "prompts.splits", "add up to 1"),
    ({"prompts.splits": {"train": 0.6, "val": 0.4, "test": 0.0}}, "prompts.splits.test", "greater than 0"),
    ({"prompts.splits": {"train": 0.5, "val": 0.5}}, "prompts.splits.test", "required"),
    ({"prompts.n_pairs": None}, "prompts", "n_pairs must be a number"),
    ({"prompts.n_unrelated": None}, "prompts", "n_unrelated must be a number"),
    ({"prompts.source": None}, "prompts.source", "string"),
    ({"model.dtype": "float64"}, "model.dtype", "'float64'"),
    ({"model.device": "gpu"}, "model.device", "'gpu'"),
    ({"organism.kind": "double"}, "organism.kind", "'double'"),
    ({"organism.num_attention_heads": 5}, "organism", "multiple of num_attention_heads"),
    ({"organism.ablation_layer": 8}, "organism", "ablation_layer must be below"),
    ({"organism.phase_1.learning_rate": 0}, "organism.phase_1.learning_rate", "greater than 0"),
    ({"organism.phase_1.learning_rate": "4e-3"}, "organism.phase_1.learning_rate", "'4e-3'"),
    ({"activations.methods": []}, "activations.methods", "at least 1"),
    ({"activations.methods": ["batched"]}, "sweep.method", "activations.methods"),
    ({"directions.pairings": ["unrelated"]}, "sweep.pairing", "directions.pairings"),
    ({"ablation.kind": "affine", "ablation.sites": "writes"}, "ablation", "resid_pre alone"),
    ({"ablation.kind": "affine", "ablation.sites": "paper"}, "ablation", "resid_pre alone"),
    ({"ablation.sites": "resid_post"}, "ablation.sites", "'resid_post'"),
    ({"benchmark.suite": []}, "benchmark.suite", "must be organism, standard, or a list"),
    ({"benchmark.suite": "standrd"}, "benchmark.suite", "must be organism, standard, or a list"),
    ({"model.revision": "v1.0"}, "model", "revision must be null where id is organism"),
    ({"model.device": "gpu"}, "model.device", "pattern"),
    ({"benchmark.limit": 0}, "benchmark.limit", "greater than or equal to 1"),
    ({"orthogonalize.include_embedding": "yes"}, "orthogonalize.include_embedding", "'yes'"),
    ({"select.top": 0}, "select.top", "greater than or equal to 1"),
]


@pytest.mark.parametrize(
    ("changes", "key", "said"), BAD, ids=[" ".join(changes) + f" {i}" for i, (changes, _, _) in enumerate(BAD)]
)
def test_a_mistake_is_one_sentence_naming_file_and_key(tmp_path, changes, key, said):
    file = changed(tmp_path, changes)
    with pytest.raises(UserError) as error:
        load_params(file)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and key in message and said in message
    assert "\n" not in message and "pydantic" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"sweep.alphas": [1.0, 1.0]},
        {"sweep.layers": [3, 3]},
        {"sweep.alphas": [0.751, 0.75]},  # both cells would be named alpha_75, and one checkpoint would overwrite the other
    ],
    ids=str,
)
def test_two_cells_of_one_name_are_refused(tmp_path, changes):
    with pytest.raises(UserError, match=r"sweep"):
        load_params(changed(tmp_path, changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"prompts.source": "data/raw/pairs.csv", "prompts.n_pairs": None},
        {"sweep.alphas": [1]},
        {"sweep.layers": [3, 4]},
        {"activations.methods": ["sequential"]},
        {"ablation.kind": "affine"},
        {"ablation.sites": "writes"},
        {"benchmark.limit": 10},
        {"prompts.splits": {"train": 0.7, "val": 0.2, "test": 0.1}},
        {"model.device": "cuda:1"},
        {"model.system_prompt": "Be kind."},
    ],
    ids=str,
)
def test_sensible_settings_load(tmp_path, changes):
    load_params(changed(tmp_path, changes))


def test_several_mistakes_are_all_told(tmp_path):
    with pytest.raises(UserError) as error:
        load_params(changed(tmp_path, {"sweep.alphas": ["1"], "judge.kind": "mood", "report": REMOVED}))
    assert all(key in str(error.value) for key in ("sweep.alphas.0", "judge.kind", "report"))


@pytest.mark.parametrize(
    "content", [None, b"", b"- a\n- b\n", b"a: [1\n", b"\xff\xfe", b"a: !!python/object/apply:os.getcwd []\n"]
)
def test_a_file_that_is_no_parameters(tmp_path, content):
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_params(file)
    assert str(error.value).startswith(f"{file}: ") and "\n" not in str(error.value)
