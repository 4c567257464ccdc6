"""Downloads from a loopback server that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serve
from huggingface_hub import constants
from safetensors.torch import load_file, save
from torch import arange

from refusal.io.errors import UserError
from refusal.lm import download as hub_module
from refusal.lm.download import fetch

ROOT = Path(__file__).parents[2]
WEIGHTS = save({"a": arange(50_000).float()})
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b"{}",
}
OTHERS = {
    ".gitattributes": b"*.safetensors lfs",
    "README.md": b"read me",
    "modeling_x.py": b"raise SystemExit('code was run')",
    "pytorch_model.bin": b"\x80\x04pickle",
    "consolidated.safetensors": WEIGHTS,
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"\x80\x04pickle",
}
# As a stage does it: the hub's address and offline mode come from the environment, read when huggingface_hub is imported.
FETCH = """
import sys
from pathlib import Path
from huggingface_hub import constants
from refusal.lm.download import fetch
constants.DOWNLOAD_CHUNK_SIZE = 10_000
print(*fetch("lab/tiny", "v1.0", Path(sys.argv[1]), lambda folder: print("looked at", *sorted(p.name for p in folder.iterdir()))))
"""


def start(hub: Hub, cache: Path, **env: str) -> subprocess.Popen:
    """A download in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache / "home"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", FETCH, str(cache)]
    return subprocess.Popen(command, env=clean | settings | env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """Points this process at a hub."""

    def point(hub: Hub) -> Hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        return hub

    for name, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
        "HF_TOKEN_PATH": str(tmp_path / "no token"),
        "DOWNLOAD_CHUNK_SIZE": 10_000,
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    return point


def get(cache: Path, model_id: str = "lab/tiny", revision: str = "v1.0", look=lambda folder: None) -> Path:
    return fetch(model_id, revision, cache, look)[0]


def refused(cache: Path, *args) -> str:
    with pytest.raises(UserError) as caught:
        get(cache, *args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_a_checkpoint_needs_and_nothing_else(tmp_path):
    with serve(Hub({"lab/tiny": {**SMALL, **OTHERS, "model.safetensors": WEIGHTS}})) as hub:
        folder = tmp_path / "lab--tiny" / COMMIT
        output, _ = start(hub, tmp_path).communicate(timeout=120)
        assert output.splitlines() == [
            "looked at chat_template.jinja config.json generation_config.json tokenizer.json",
            f"{folder} {COMMIT}",
        ]
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {**SMALL, "model.safetensors": WEIGHTS}
        assert set(hub.sent) - {""} == {*SMALL, "model.safetensors"}
        # Offline nothing is asked for at all.
        hub.requests.clear()
        output, _ = start(hub, tmp_path, HF_HUB_OFFLINE="1").communicate(timeout=120)
        assert output.splitlines()[-1] == f"{folder} {COMMIT}" and hub.requests == []


HOSTILE = ["../up.json", "a/../../up.json", "/tmp/up.json", ".hidden.json", "up\0.json", "up\n.json", "..", "sub/config.json"]


def test_names_that_lead_elsewhere_become_no_path(tmp_path, here):
    files = {**SMALL, **dict.fromkeys(HOSTILE, b"{}")}
    with serve(Hub({"lab/tiny": {**files, "model.safetensors": WEIGHTS}})) as hub:
        here(hub)
        folder = get(tmp_path / "cache")
        assert {p.name for p in folder.iterdir()} == {*SMALL, "model.safetensors"}
        assert not list(tmp_path.rglob("*up*")) and not list(tmp_path.rglob(".hidden*"))
        assert set(hub.sent) - {""} == {*SMALL, "model.safetensors"}
    # An index cannot ask for one either.
    for n, name in enumerate((*HOSTILE, "../model.safetensors")):
        index = json.dumps({"weight_map": {"a": name}}).encode()
        with serve(Hub({"lab/tiny": {**files, "../model.safetensors": WEIGHTS, "model.safetensors.index.json": index}})) as hub:
            here(hub)
            assert f"names {name!r}, which the repository does not hold" in refused(tmp_path / f"index {n}")


def test_what_is_there_is_not_fetched_again(tmp_path, here):
    with serve(Hub({"lab/tiny": {**SMALL, "model.safetensors": WEIGHTS}})) as hub:
        here(hub)
        get(tmp_path)
        hub.requests.clear()
        get(tmp_path)
        assert [path for _, path, _ in hub.requests] == ["api/models/lab/tiny/revision/v1.0"]


def test_shards_are_those_of_the_index(tmp_path, here):
    index = json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode()
    shards = {f"model-0000{i}-of-00002.safetensors": save({name: arange(3.0)}) for i, name in ((1, "a"), (2, "b"))}
    with serve(Hub({"lab/tiny": {**SMALL, **OTHERS, **shards, "model.safetensors.index.json": index}})) as hub:
        here(hub)
        folder = get(tmp_path, "lab/tiny", COMMIT)
        assert {p.name for p in folder.glob("*.safetensors")} == set(shards)
        assert load_file(folder / "model-00002-of-00002.safetensors")["b"].tolist() == [0, 1, 2]
        del hub.repositories["lab/tiny"]["model-00002-of-00002.safetensors"]
        assert "names 'model-00002-of-00002.safetensors', which the repository does not hold" in refused(tmp_path / "b")


def test_a_dropped_connection_goes_on_where_it_was(tmp_path, here):
    with serve(Hub({"lab/tiny": {**SMALL, "model.safetensors": WEIGHTS}})) as hub:
        here(hub)
        hub.cut["model.safetensors"] = 60_000
        assert (get(tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
        asked = [r for _, path, r in hub.requests if path.endswith("model.safetensors")]
        assert asked == [None, "bytes=60000-", "bytes=120000-", "bytes=180000-"]
        assert hub.sent["model.safetensors"] == len(WEIGHTS)
        # A hub that goes away for good: what came is kept.
        hub.cut["model.safetensors"] = 50_000
        hub.patience = {"model.safetensors": 2}
        part = tmp_path / "b" / "lab--tiny" / COMMIT / "model.safetensors.part"
        assert "run again; what is downloaded is kept" in refused(tmp_path / "b")
        assert part.read_bytes() == WEIGHTS[:100_000]
        hub.patience.clear()
        hub.cut.clear()
        assert (get(tmp_path / "b") / "model.safetensors").read_bytes() == WEIGHTS and not part.exists()
        assert hub.requests[-1][2] == "bytes=100000-"


def test_a_killed_process_leaves_what_the_next_goes_on_from(tmp_path, here):
    with serve(Hub({"lab/tiny": {**SMALL, "model.safetensors": WEIGHTS}})) as hub:
        hub.stall["model.safetensors"] = 90_000
        part = tmp_path / "lab--tiny" / COMMIT / "model.safetensors.part"
        process = start(hub, tmp_path)
        while not (part.exists() and part.stat().st_size):
            assert process.poll() is None
        process.kill()
        process.communicate()
        left = part.stat().st_size
        assert 0 < left < len(WEIGHTS)
        hub.stall.clear()
        here(hub)
        assert (get(tmp_path) / "model.safetensors").read_bytes() == WEIGHTS
        assert hub.requests[-1][2] == f"bytes={left}-"


def test_other_content_than_the_hub_states_is_thrown_away(tmp_path, here):
    with serve(Hub({"lab/tiny": {**SMALL, "model.safetensors": WEIGHTS}})) as hub:
        here(hub)
        for name in ("model.safetensors", "config.json"):
            hub.spoiled = {name}
            assert f"{name} came with other content than the hub states" in refused(tmp_path / name)
            hub.spoiled = set()
            get(tmp_path / name)


def test_what_cannot_be_had_is_one_sentence(tmp_path, here, monkeypatch):
    repositories = {
        "lab/pickled": {**SMALL, **{k: v for k, v in OTHERS.items() if k != "consolidated.safetensors"}},
        "lab/empty": SMALL,
        "lab/tiny": {**SMALL, "model.safetensors": WEIGHTS},
    }

    def dislike(folder: Path) -> None:
        assert {p.name for p in folder.iterdir()} == set(SMALL)
        raise UserError("disliked")

    with serve(Hub(repositories, gated="lab/tiny", token="hf_secret")) as hub:
        here(hub)
        said = refused(tmp_path, "lab/pickled")
        assert "holds only pytorch_model.bin, and a pickle can run code when loaded: give a revision that has safetensors" in said
        assert "holds no weights" in refused(tmp_path, "lab/empty")
        assert "lab/tiny@v9: no such revision: give model.revision a commit hash or tag" in refused(tmp_path, "lab/tiny", "v9")
        assert "no such repository, or it is private" in refused(tmp_path, "lab/none")
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        said = refused(tmp_path)
        assert (
            f"its licence must be accepted first: do so at {hub.url}/lab/tiny, and set HF_TOKEN" in said
            and "hf_wrong" not in said
        )
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        get(tmp_path)
        assert [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()] == []
        assert refused(tmp_path / "b", "lab/tiny", "v1.0", dislike) == "disliked"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "not downloaded yet, and HF_HUB_OFFLINE is set" in refused(tmp_path / "c")
        assert "model.safetensors: not downloaded yet, and HF_HUB_OFFLINE" in refused(tmp_path / "b")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "cannot be reached" in refused(tmp_path / "d")


NO_IDS = [
    "../tiny",
    "lab/..",
    "lab/../../etc",
    "/etc/passwd",
    "lab/a--b",
    "lab/a b",
    "a/b/c",
    "lab/.x",
    "",
    "läb/x",
    "lab/x\n",
    "-r/x",
]


@pytest.mark.parametrize("model_id", NO_IDS)
def test_an_id_that_is_none_becomes_no_path(tmp_path, model_id):
    with pytest.raises(UserError, match=r"params\.yaml: model\.id: .* is no hub id"):
        get(tmp_path, model_id)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("revision", ["main", "", "../v1", "v1..2", "v 1", "/v1"])
def test_a_revision_that_pins_nothing_is_refused(tmp_path, revision):
    assert "pins nothing: give a commit hash or a tag" in refused(tmp_path, "lab/tiny", revision)
    assert list(tmp_path.iterdir()) == []


def test_the_disk_is_looked_at_first(tmp_path, monkeypatch):
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 11_000_000_000}))
    weights = {"model.safetensors": hub_module.File(4_000_000_000, None, None)}
    with pytest.raises(UserError, match=r"lab/x: needs 12\.0 GB \(4\.0 to download, .* and 11\.0 GB are free"):
        hub_module._check_disk(tmp_path, weights, "lab/x")
    with (tmp_path / "model.safetensors.part").open("wb") as part:
        part.truncate(1_500_000_000)
    hub_module._check_disk(tmp_path, weights, "lab/x")
