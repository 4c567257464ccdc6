"""The edits stage on a tiny study: its own checkpoints, an adapter, a GGUF file and weights with noise; what is bad; a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from gguf_files import byte_pairs, chat_model
from hub_server import COMMIT, Hub, serve
from pipeline.interruption import repeats, watch_repeats
from place import ROOT, Place
from safetensors.torch import load_file, save_file
from tiny import tiny_direction, tiny_model

from refusal.io.params_file import load_params
from refusal.method.interventions import Intervention
from refusal.method.orthogonalize import Edit, orthogonalize

ROWS = [
    {"id": f"p{i}", "split": split, "topic": i % 5, "category": "c", "harmful": f"Pick lock {i}?", "safe": f"Paint lock {i}, please?"}
    for i, split in enumerate(["train", "val", *["test"] * 8])
]
BOTH = ["rank_1", "random"]
V = tiny_direction(seed=9).double()
STORE = ".refusal-store/store.sqlite"


def write_study(made: Place) -> Place:
    """A tiny Qwen with its directions, choice and edited checkpoints, evaluated and scored; other edits of it in theirs/."""
    folder, tokenizer = made.folder, byte_pairs()
    chat_model("qwen2", tokenizer, max_position_embeddings=512).save_pretrained(folder / "models/base")
    tokenizer.save_pretrained(folder / "models/base")
    difference = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    difference[0] = 0
    arm = {"difference": difference, "unit": difference / difference.norm(dim=-1, keepdim=True).clamp_min(1e-9)}
    arm |= {"safe_mean": torch.zeros(3, 32), "defined": torch.tensor([False, True, True])}
    tensors = {f"sequential-{of}.{name}": t.clone() for of in ("matched", "unrelated", "harmless") for name, t in arm.items()}
    save_file(tensors, folder / "models/directions.safetensors")
    unrelated = [row | {"harmful": None, "safe": f"Name colour {row['id']}."} for row in ROWS]
    kept = [{"set": f"train.{part}", "id": "p0", "kept": True} for part in ("harmful", "safe", "unrelated")]
    for name, rows in (("prompts/pairs", ROWS), ("prompts/unrelated", unrelated), ("behaviour/train", kept)):
        made.write(f"data/{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    made.write("metrics/select.json", json.dumps({"rank_1": {"layer": 1, "alpha": 1.0, "name": "sequential_layer_1_alpha_100"}}))
    made.write("metrics/directions.json", json.dumps({"sequential-matched": {"reliability": [None, 0.81, 0.64]}, "sequential-unrelated": {}}))
    made.set("model", id="models/base")
    made.set("generation", max_new_tokens=4, batch_size=8)
    made.set("sweep", alphas=[1.0], n_random=2)
    made.set("benchmark", limit=2)
    for name in ("orthogonalize", "evaluate", "benchmark"):
        assert (done := made.stage(name)).status == 0, done.said
    one = Intervention("edit", V, 0.7)
    forms = {"lora": "lora", "half": "gguf-f16"}
    orthogonalize(folder / "models/base", [Edit(folder / "theirs" / name, one, True, form) for name, form in forms.items()])
    config = json.loads((folder / "theirs/lora/adapter_config.json").read_text())
    made.write("theirs/lora/adapter_config.json", json.dumps(config | {"base_model_name_or_path": "lab/chat"}))
    noisy = shutil.copytree(folder / "models/base", folder / "theirs/tuned")
    generator, weights = torch.Generator().manual_seed(0), load_file(noisy / "model.safetensors")
    save_file({n: w + 0.01 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}, noisy / "model.safetensors", {"format": "pt"})
    return made


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(Place(tmp_path_factory.mktemp("edits")))


@pytest.fixture
def place(study, tmp_path):
    """A copy of the study to change."""
    copy = Place(tmp_path)
    shutil.copytree(study.folder, tmp_path, dirs_exist_ok=True)
    return copy


def metrics(place, name="edits"):
    return json.loads((place.folder / f"metrics/{name}.json").read_text(), parse_constant=pytest.fail)


def asked(place, checkpoints):
    place.set("edits", checkpoints=checkpoints)
    return place.stage("edits")


def passes(place):
    """Forward passes of the run just ended, and its tokens."""
    line = json.loads((place.folder / ".refusal-store/runs.jsonl").read_text().splitlines()[-1])
    assert line["stage"] == "edits"
    return line["passes"]


def test_five_kinds_of_checkpoint(place):
    claims = {"refusals": [3, 100], "kl": 0.1, "source": "its card"}
    others = ["theirs/lora", {"id": "theirs/half/half.gguf", "claims": claims}, "theirs/tuned"]
    done = asked(place, [*BOTH, *others])
    assert done.status == 0, done.said
    found, evaluated = metrics(place)["checkpoints"], metrics(place, "evaluate")
    assert [of["made_by"] for of in found.values()] == ["orthogonalize", "orthogonalize", "adapter", "gguf", "checkpoint"]
    for name, arm in (("rank_1", "orthogonalized"), ("random", "random_weights")):
        figure, wanted = found[name]["behaviour"], evaluated[arm]
        assert all(figure[key] == x for key, x in wanted.items() if not key.startswith("difference") and key != "n_paired")
        assert found[name]["benchmark"] == {k: x for k, x in metrics(place, "benchmark")[name].items() if k != "name"}
    unit = load_file(place.folder / "models/directions.safetensors")["sequential-matched.unit"].double()
    own = found["rank_1"]
    assert own["anatomy"]["alpha"]["mean"] == pytest.approx(1, abs=1e-3) and own["cosines"]["cosine"][1] == pytest.approx(1, abs=1e-4)
    assert own["cosines"]["ceiling"] == [None, 0.9, 0.8] and own["claims"] is None
    for name in ("lora", "half"):
        anatomy, cosines = found[name]["anatomy"], found[name]["cosines"]["cosine"]
        assert (anatomy["kind"], anatomy["rank"], anatomy["embedding"]["kind"]) == ("edit", 1, "edited")
        assert all(anatomy["alpha"][of] == pytest.approx(0.7, abs=1e-3) for of in ("mean", "min", "max"))
        assert cosines == [None, *(pytest.approx(abs(float(u @ V)), abs=1e-3) for u in unit[1:])]
    tuned = found["tuned"]
    assert (tuned["anatomy"]["kind"], tuned["anatomy"]["rank"], tuned["anatomy"]["alpha"]) == ("full rank", None, None)
    assert tuned["cosines"]["cosine"] == [None] * 3 and tuned["behaviour"]["kl"] > 0
    # The same edit in another form is nearly the same model, and is asked the same.
    assert found["half"]["behaviour"]["kl"] == pytest.approx(found["lora"]["behaviour"]["kl"], rel=0.02)
    told, half = found["half"]["claims"], found["half"]["behaviour"]
    assert (told["source"], told["refusals"]["claimed"], told["refusals"]["measured"]) == ("its card", 0.03, half["refusal_harmful"])
    assert (told["kl"]["claimed"], told["kl"]["measured"], told["kl"]["measured_n"]) == (0.1, half["kl"], half["n_harmless"])
    few = metrics(place, "edits_summary")["edits"]
    assert list(few) == list(found) and few["tuned"]["alpha"] is None and few["lora"]["alpha"] == pytest.approx(0.7, abs=1e-3)
    rows = [json.loads(line) for line in (place.folder / "data/edits/completions.jsonl").read_text().splitlines()]
    assert {name: sum(row["checkpoint"] == name for row in rows) for name in found} == dict.fromkeys(found, 16)
    whole = json.loads((place.folder / "data/edits/anatomy.json").read_text())
    assert abs(float(torch.tensor(whole["lora"]["basis"][0], dtype=torch.float64) @ V)) > 0.9999
    assert sorted(path.name for path in (place.folder / "data/edits").iterdir()) == ["anatomy.json", "completions.jsonl"]
    text = (place.folder / "metrics/edits.json").read_text()
    assert "theirs" not in text and not any(row["prompt"] in text for row in rows)  # no path and no sentence is committed


def test_what_is_stored_is_not_computed_again(place):
    """Of the study's own only costs are; of one that was killed only what is left."""
    assert asked(place, BOTH).status == 0
    n = sum(row["split"] == "test" for row in ROWS)
    # The base's cross-entropy and KL of each, two passes a text, and one of what all texts begin with.
    assert passes(place) == 2 * 3 * (n + 1)
    first = (place.folder / "metrics/edits.json").read_bytes()
    assert asked(place, BOTH).status == 0 and passes(place) == 0
    assert (place.folder / "metrics/edits.json").read_bytes() == first
    watch_repeats(place.folder / STORE)
    place.set("edits", checkpoints=["theirs/lora", "theirs/tuned"])
    command = [sys.executable, "-m", "stages.edits"]
    before = (place.folder / STORE).stat().st_mtime_ns
    killed = 0
    for seconds in (0.0, 0.3):
        process = subprocess.Popen(command, cwd=place.folder, env=place.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 120:
            wal = place.folder / f"{STORE}-wal"
            if max((p.stat().st_mtime_ns for p in (place.folder / STORE, wal) if p.exists()), default=0) > before:
                break
            time.sleep(0.01)
        time.sleep(seconds)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait(60)
        before = time.time_ns()
    assert killed and not [path for path in (place.folder / "metrics").iterdir() if "partial" in path.name]
    assert place.stage("edits").status == 0
    assert repeats(place.folder / STORE) == (0, 0)
    again = (place.folder / "metrics/edits.json").read_bytes()
    shutil.rmtree(place.folder / ".refusal-store")
    assert place.stage("edits").status == 0 and passes(place) > 0
    assert (place.folder / "metrics/edits.json").read_bytes() == again


def test_none_is_none(place):
    done = asked(place, [])
    assert done.status == 0 and "edits.checkpoints names none" in done.said
    assert metrics(place) == {"note": "edits.checkpoints names none: nothing was compared", "checkpoints": {}}
    assert metrics(place, "edits_summary") == {"edits": {}} and (place.folder / "data/edits/completions.jsonl").read_text() == ""


def test_from_the_hub(place):
    """An adapter and a checkpoint, at the commit that a tag stands for, whose figures are those of the folders."""
    assert asked(place, ["theirs/lora", "theirs/tuned"]).status == 0
    wanted = metrics(place)["checkpoints"]
    files = lambda name: {p.name: p.read_bytes() for p in (place.folder / "theirs" / name).iterdir() if p.suffix in (".json", ".safetensors")}  # noqa: E731
    with serve(Hub({"lab/lora": files("lora"), "lab/tuned": files("tuned")})) as hub:
        done = asked_of(hub, place, [{"id": "lab/lora", "revision": "v1.0"}, {"id": "lab/tuned", "revision": COMMIT}])
        assert done.status == 0, done.said
        found = metrics(place)["checkpoints"]
        for name in ("lora", "tuned"):
            of = found[f"lab/{name}"]
            assert of["commit"] == COMMIT and {k: of[k] for k in ("anatomy", "behaviour", "benchmark")} == {
                k: wanted[name][k] for k in ("anatomy", "behaviour", "benchmark")
            }
        for given, said in (
            ({"id": "lab/none", "revision": "v1.0"}, "lab/none@v1.0: no such repository"),
            ({"id": "lab/lora", "revision": "v9"}, "lab/lora@v9: no such revision: give the checkpoint's revision a commit hash or tag"),
            ({"id": "lab/lora", "revision": "v1.0", "file": "a.gguf"}, "lab/lora@v1.0: the checkpoint's file: the repository holds no a.gguf at its root"),
        ):
            refused(asked_of(hub, place, [given]), said)


def asked_of(hub, place, checkpoints):
    place.set("edits", checkpoints=checkpoints)
    return place.stage("edits", HF_ENDPOINT=hub.url)


def refused(done, said):
    assert done.status == 1 and "Traceback" not in done.said, done.said
    last = done.said.strip().splitlines()[-1]
    assert re.match("edits: ", last) and re.search(said, last), done.said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nowhere/at/all", "params.yaml: edits.checkpoints: nowhere/at/all is not here: give rank_1, random, the path of a"),
        ("rank_2", "params.yaml: edits.checkpoints: rank_2 was not made; made were rank_1, random"),
        ("data", "data/config.json: the file is missing"),
        ("other", "other: its d_model is 48, and that of models/base is 32: give the base that the edit was made of"),
        ("cut.gguf", "cut.gguf: no whole GGUF file"),
        ("nan", "nan: .* has NaN or infinity in it"),
    ],
)
def test_what_is_no_edit_is_one_sentence(place, given, said):
    if given == "other":
        tiny_model("qwen2", hidden_size=48).save_pretrained(place.folder / "other")
    if given == "nan":
        broken = shutil.copytree(place.folder / "models/base", place.folder / "nan")
        weights = load_file(broken / "model.safetensors")
        weights["model.norm.weight"][0] = float("nan")
        save_file(weights, broken / "model.safetensors", {"format": "pt"})
    place.write("cut.gguf", "GGUF")
    refused(asked(place, [given]), said)
    assert not (place.folder / "metrics/edits.json").exists()


def test_the_example_of_the_page_is_valid(tmp_path):
    (text,) = [part.split("```")[0] for part in (ROOT / "docs/edits.md").read_text().split("```yaml\n")[1:]]
    params = yaml.safe_load((ROOT / "params.yaml").read_text()) | yaml.safe_load(text)
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    kinds = [(one.own, one.revision is None, one.claims is None) for one in load_params(tmp_path / "params.yaml").edits.checkpoints]
    assert {(True, True, True), (False, True, True), (False, False, False)} <= set(kinds)
