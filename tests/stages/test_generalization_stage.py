"""The generalization stage on a tiny model: nothing asked, a set with overlap, other system prompts, a copy from REAL_SETS."""

import hashlib
import json
import sqlite3

import pandas as pd
import pytest
import torch
from checkpoints import LLAMA, arm_of, byte_level
from place import Place
from safetensors.torch import save_file

ROWS = [
    {"id": f"p{i}", "split": split, "topic": i, "category": "c", "harmful": f"Pick lock {i}?", "safe": f"Paint lock {i}, please?"}
    for i, split in enumerate(["train", "val", "test"])
]
# The first is a train prompt of the study; the second is of no category.
SET = 'prompt,category\npick lock 0,theft\nForge a stamp,\nSteal a "bicycle",theft\nRead a diary,other\n'


@pytest.fixture
def place(tmp_path):
    """A place with a tiny checkpoint, directions of its layers 1 and 2, and a choice made of them."""
    made = Place(tmp_path)
    byte_level(tmp_path / "models/base", "llama", LLAMA)
    arm = arm_of(torch.randn(3, 32, generator=torch.Generator().manual_seed(0)))
    pairings = ("matched", "unrelated", "harmless")
    tensors = {f"sequential-{pairing}.{name}": t.clone() for pairing in pairings for name, t in arm.items()}
    save_file(tensors, tmp_path / "models/directions.safetensors")
    unrelated = [row | {"harmful": None, "safe": f"Name colour {row['id']}."} for row in ROWS]
    kept = [{"set": f"train.{part}", "id": "p0", "kept": True} for part in ("harmful", "safe", "unrelated")]
    for name, rows in (("prompts/pairs", ROWS), ("prompts/unrelated", unrelated), ("behaviour/train", kept)):
        made.write_rows(f"data/{name}.jsonl", rows)
    made.write("metrics/select.json", json.dumps({"rank_1": {"layer": 1, "alpha": 1.0, "name": "sequential_layer_1_alpha_100"}}))
    made.write("data/raw/set.csv", SET)
    made.set("model", id="models/base")
    made.set("generation", max_new_tokens=4, batch_size=8)
    made.set("generalization", n_random=2)
    return made


def metrics(place):
    return json.loads((place.folder / "metrics/generalization.json").read_text(), parse_constant=pytest.fail)


def stored(place):
    with sqlite3.connect(place.folder / ".refusal-store/store.sqlite") as store:
        tables = [name for (name,) in store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return sum(store.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables)


def test_without_sets_nothing_is_computed(place):
    done = place.stage("generalization")
    assert done.status == 0 and "none was asked for" in done.said and metrics(place)["sets"] == {}
    assert "none was asked for" in metrics(place)["note"] and not (place.folder / ".refusal-store/store.sqlite").exists()
    assert (place.folder / "data/generalization/completions.jsonl").read_text() == ""


def test_a_set_is_asked_under_each_system_prompt_without_what_the_study_has(place):
    place.set("generalization", sets=["data/raw/set.csv"])
    assert (done := place.stage("generalization")).status == 0, done.said
    n = stored(place)
    place.set("generalization", system_prompts=[None, "Be brief."])
    assert (done := place.stage("generalization")).status == 0, done.said
    assert stored(place) == 2 * n > 0  # other tokens, other keys; the first prompt's are found again
    found = metrics(place)["sets"]["set"]
    assert (found["n_read"], found["n_near_duplicates"], found["n_read_safe"]) == (4, 1, 0)
    lines = (place.folder / "data/generalization/completions.jsonl").read_text().splitlines()
    rows = pd.DataFrame([json.loads(line) for line in lines])
    assert set(rows["prompt"]) == {"Forge a stamp", 'Steal a "bicycle"', "Read a diary"} and len(rows) == 2 * 4 * 3
    for figure, prompt in zip(found["figures"], (None, "Be brief."), strict=True):
        assert figure["system_prompt"] == prompt and ("Be brief." in figure["template"]) is (prompt is not None)
        of = rows[rows["system_prompt"].isna() if prompt is None else rows["system_prompt"] == prompt]
        arms = {"baseline": ["baseline"], "ablated": ["layer_1_alpha_100"], "random": ["random_0", "random_1"]}
        for arm, names in arms.items():
            some = of[of["intervention"].isin(names)]
            for what in ("compliance", "coherence", "refusal"):
                assert figure[arm][what] == pytest.approx(some[what].astype(float).mean(), abs=1e-6)
            assert (figure[arm]["n"], figure[arm]["n_clusters"], figure[arm]["n_arms"]) == (3, 3, len(names))
        assert figure["n_refused"] == of[of["intervention"] == "baseline"]["refusal"].sum()
    completions = [[*some["completion"]] for _, some in rows.groupby(rows["system_prompt"].notna())]
    assert completions[0] != completions[1]
    text = (place.folder / "metrics/generalization.json").read_text()
    assert not any(prompt in text for prompt in set(rows["prompt"]))  # figures are committed, sentences are not


def test_a_set_by_hash_comes_from_a_folder_of_copies_and_never_into_data_raw(place):
    (place.folder / "data/raw/set.csv").rename(place.folder / "elsewhere")
    place.write("copies/any name", SET)
    one = {"file": "data/raw/set.csv", "sha256": hashlib.sha256(SET.encode()).hexdigest()}
    place.set("generalization", sets=[one])
    done = place.stage("generalization")
    assert done.status == 1 and "generalization: data/raw/set.csv: no such file, and no url to fetch it from: put" in done.said
    assert (done := place.stage("generalization", REAL_SETS="copies")).status == 0, done.said
    assert metrics(place)["sets"]["set"]["n_near_duplicates"] == 1 and not (place.folder / "data/raw/set.csv").exists()
    place.write("data/raw/set.csv", SET + "Another,\n")
    done = place.stage("generalization", REAL_SETS="copies")
    assert done.status == 1 and "Traceback" not in done.said and "data/raw/set.csv: its SHA-256 is" in done.said


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"sets": ["set.csv"]}, "generalization.sets: set.csv is not in data/raw/"),
        ({"sets": [{"file": "data/raw/a.csv", "url": "https://a.b/c"}]}, "url needs sha256, the hash of the file that is meant"),
        ({"sets": ["data/raw/a.csv", "data/raw/a.json"]}, "two sets are files of one name"),
        ({"sets": [{"file": "data/raw/a.csv", "sha256": "abc"}]}, "generalization.sets.0.sha256"),
        ({"system_prompts": ["a", "a"]}, "generalization.system_prompts: duplicate value"),
    ],
)
def test_bad_parameters_are_one_sentence(place, section, said):
    place.set("generalization", **section)
    done = place.stage("generalization")
    assert done.status == 1 and said in done.said and "Traceback" not in done.said and done.said.count("\n") == 1
