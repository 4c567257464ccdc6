"""Downloads from a loopback server that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, etag, serve
from huggingface_hub import constants, hf_hub_download, snapshot_download
from loopback import listening
from safetensors.torch import load_file, save
from torch import arange

from refusal.io.errors import UserError
from refusal.lm import download
from refusal.lm.download import fetch

ROOT = Path(__file__).parents[2]
WEIGHTS = save({"a": arange(50_000).float()})
BLOB = etag("model.safetensors", WEIGHTS)
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"do_sample": false}',
}
CHECKPOINT = {**SMALL, "model.safetensors": WEIGHTS}
OTHERS = {
    ".gitattributes": b"*.safetensors lfs",
    "README.md": b"read me",
    "modeling_x.py": b"raise SystemExit('code was run')",
    "pytorch_model.bin": b"\x80\x04pickle",
    "consolidated.safetensors": WEIGHTS,
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"\x80\x04pickle",
}
# As a stage does it: the hub's address, cache and offline mode come from the environment, read when huggingface_hub is imported.
FETCH = """
from pathlib import Path
from huggingface_hub import constants
from refusal.lm.download import fetch
constants.DOWNLOAD_CHUNK_SIZE = 10_000
print(*fetch("lab/tiny", "v1.0", lambda folder: print("looked at", *sorted(p.name for p in folder.iterdir())), Path()))
"""


def start(hub: Hub, home: Path, **env: str) -> subprocess.Popen:
    """A download in a process of its own."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen([sys.executable, "-c", FETCH], env=clean | settings | env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with lab/tiny, at which huggingface_hub in this process is pointed, with an empty cache."""
    with serve(Hub({"lab/tiny": CHECKPOINT | OTHERS})) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_TOKEN_PATH": str(tmp_path / "no token"),
            "DOWNLOAD_CHUNK_SIZE": 10_000,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        yield hub


def get(model_id: str = "lab/tiny", revision: str = "v1.0", look=lambda folder: None) -> Path:
    return fetch(model_id, revision, look, Path())[0]


def refused(*args) -> str:
    with pytest.raises(UserError) as caught:
        get(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ranges(hub: Hub) -> list[str | None]:
    """What was asked for of the weights, in order."""
    return [part for method, path, part in hub.requests if method == "GET" and path.endswith("model.safetensors")]


def test_what_a_checkpoint_needs_and_nothing_else_in_the_hubs_own_cache(hub, tmp_path):
    folder = tmp_path / "hub/models--lab--tiny/snapshots" / COMMIT
    output, _ = start(hub, tmp_path).communicate(timeout=120)
    assert output.splitlines() == [
        "looked at chat_template.jinja config.json generation_config.json tokenizer.json",
        f"{folder} {COMMIT}",
    ]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == CHECKPOINT
    assert set(hub.sent) - {""} == {*CHECKPOINT}
    # Offline nothing is asked for at all, and transformers finds the same cache.
    hub.requests.clear()
    output, _ = start(hub, tmp_path, HF_HUB_OFFLINE="1").communicate(timeout=120)
    assert output.splitlines()[-1] == f"{folder} {COMMIT}" and hub.requests == []
    assert snapshot_download("lab/tiny", revision="v1.0", cache_dir=tmp_path / "hub", local_files_only=True, allow_patterns=[*CHECKPOINT]) == str(folder)


def test_what_the_users_cache_holds_is_not_fetched_again(hub):
    for name in CHECKPOINT:
        hf_hub_download("lab/tiny", name, revision="v1.0")  # as transformers does: no listing is kept
    hub.requests.clear()
    constants.HF_HUB_OFFLINE = True
    folder = get()
    (folder / "model.safetensors").unlink()  # the link
    assert f"{folder}/model.safetensors: not downloaded yet, and HF_HUB_OFFLINE is set: unset it" in refused()
    assert hub.requests == []
    constants.HF_HUB_OFFLINE = False
    assert get() == folder and (folder / "model.safetensors").read_bytes() == WEIGHTS and ranges(hub) == []
    hub.requests.clear()
    assert get() == folder
    assert [path for _, path, _ in hub.requests] == ["api/models/lab/tiny/revision/v1.0"]


HOSTILE = ["../up.json", "a/../../up.json", "/tmp/up.json", ".hidden.json", "up\0.json", "up\n.json", "..", "sub/config.json"]


def test_names_that_lead_elsewhere_become_no_path(hub, tmp_path):
    hub.repositories["lab/tiny"] = CHECKPOINT | dict.fromkeys(HOSTILE, b"{}")
    assert {p.name for p in get().iterdir()} == {*CHECKPOINT}
    assert not list(tmp_path.rglob("*up*")) and not list(tmp_path.rglob(".hidden*"))
    assert set(hub.sent) - {""} == {*CHECKPOINT}
    # An index cannot ask for one either.
    for n, name in enumerate((*HOSTILE, "../model.safetensors")):
        index = json.dumps({"weight_map": {"a": name}}).encode()
        hub.repositories["lab/tiny"] = SMALL | {name: WEIGHTS, "model.safetensors.index.json": index}
        constants.HF_HUB_CACHE = str(tmp_path / f"index {n}")
        assert f"names {name!r}, which the repository does not hold" in refused()


def test_shards_are_those_of_the_index(hub, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": save({name: arange(3.0)}) for i, name in ((1, "a"), (2, "b"))}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    hub.repositories["lab/tiny"] = SMALL | OTHERS | shards | {"model.safetensors.index.json": index}
    folder = get("lab/tiny", COMMIT)
    assert {p.name for p in folder.glob("*.safetensors")} == set(shards)
    assert load_file(folder / "model-00002-of-00002.safetensors")["b"].tolist() == [0, 1, 2]
    del hub.repositories["lab/tiny"]["model-00002-of-00002.safetensors"]
    constants.HF_HUB_CACHE = str(tmp_path / "b")
    assert "names 'model-00002-of-00002.safetensors', which the repository does not hold" in refused()


def test_a_dropped_connection_goes_on_where_it_was(hub, tmp_path):
    hub.cut["model.safetensors"] = 60_000
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges(hub) == [None, "bytes=60000-", "bytes=120000-", "bytes=180000-"]
    assert hub.sent["model.safetensors"] == len(WEIGHTS)
    # A hub that goes away for good: what came is kept.
    constants.HF_HUB_CACHE = str(tmp_path / "b")
    hub.cut["model.safetensors"], hub.patience["model.safetensors"] = 50_000, 2
    assert "run again; what is downloaded is kept" in refused()
    partial = tmp_path / f"b/models--lab--tiny/blobs/{BLOB}.incomplete"
    assert partial.read_bytes() == WEIGHTS[:100_000]
    hub.patience.clear()
    hub.cut.clear()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS and not partial.exists()
    assert ranges(hub)[-1] == "bytes=100000-"


def test_a_killed_process_leaves_what_the_next_goes_on_from(hub, tmp_path):
    hub.stall["model.safetensors"] = 90_000
    partial = tmp_path / f"hub/models--lab--tiny/blobs/{BLOB}.incomplete"
    process = start(hub, tmp_path)
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
    process.kill()
    process.communicate()
    left = partial.stat().st_size
    assert 0 < left < len(WEIGHTS)
    hub.stall.clear()
    constants.HF_HUB_CACHE = str(tmp_path / "hub")
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges(hub)[-1] == f"bytes={left}-"


def test_two_at_once_download_once(hub):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: get(), range(2))
    assert first == second and hub.sent["model.safetensors"] == len(WEIGHTS)


@pytest.mark.parametrize("left", [b"x" * 100, b"x" * (len(WEIGHTS) + 1)])
def test_a_partial_file_of_other_content_or_too_long_is_not_kept(hub, tmp_path, left):
    partial = tmp_path / f"cache/models--lab--tiny/blobs/{BLOB}.incomplete"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(left)
    if len(left) < len(WEIGHTS):
        assert "its content is not what the hub states" in refused()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_content_than_the_hub_states_is_thrown_away(hub, name):
    hub.spoiled = {name}
    looked: list[Path] = []
    assert f"{name}: its content is not what the hub states, so it is deleted: run again" in refused("lab/tiny", "v1.0", looked.append)
    assert len(looked) == (name != "config.json")  # what is looked at is checked
    hub.spoiled = set()
    path = get() / name
    # Damage in the cache is seen, and offline too.
    path.resolve().write_bytes(b"x" * path.stat().st_size)
    constants.HF_HUB_OFFLINE = True
    assert f"{path}: its content is not what the hub states" in refused() and not path.exists()


def test_what_cannot_be_had_is_one_sentence(hub, tmp_path, monkeypatch):
    hub.repositories["lab/pickled"] = SMALL | {k: v for k, v in OTHERS.items() if k != "consolidated.safetensors"}
    hub.repositories["lab/empty"] = SMALL
    hub.gated, hub.token = "lab/tiny", "hf_secret"
    said = refused("lab/pickled")
    assert "holds only pytorch_model.bin, and a pickle can run code when loaded: give a revision that has safetensors" in said
    assert "holds no weights" in refused("lab/empty")
    assert "lab/tiny@v9: no such revision: give model.revision a commit hash or tag" in refused("lab/tiny", "v9")
    assert "no such repository, or it is private" in refused("lab/none")
    assert "no such repository, or it is private" in refused("lab/none", COMMIT)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    said = refused()
    assert f"its licence must be accepted first: do so at {hub.url}/lab/tiny, and set HF_TOKEN" in said and "hf_wrong" not in said
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get()
    assert [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()] == []


def test_without_the_hub_it_says_so(hub, tmp_path):
    def dislike(folder: Path) -> None:
        assert {p.name for p in folder.iterdir()} == set(SMALL)
        raise UserError("disliked")

    assert refused("lab/tiny", "v1.0", dislike) == "disliked"
    assert "model.safetensors" not in hub.sent
    offline = "and HF_HUB_OFFLINE is set: unset it"
    constants.HF_HUB_OFFLINE = True
    assert f"model.safetensors: not downloaded yet, {offline}" in refused()
    (tmp_path / "cache/models--lab--tiny/snapshots" / COMMIT / "tokenizer.json").unlink()
    said = refused()
    assert said.startswith("lab/tiny@v1.0: ") and "missing (tokenizer.json)" in said and offline in said
    for revision in (COMMIT, "v1.0"):
        constants.HF_HUB_CACHE = str(tmp_path / revision)
        assert f"lab/tiny@{revision}: not downloaded yet, {offline}" in refused("lab/tiny", revision)
    constants.HF_HUB_OFFLINE = False
    constants.ENDPOINT = "http://127.0.0.1:9"
    assert "http://127.0.0.1:9 cannot be reached (ConnectError): run again" in refused()


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (500, b"", "the hub answered 500: run again later; what is downloaded is kept"),
        (200, b"<html>", "does not answer as a hub does (JSONDecodeError): check HF_ENDPOINT"),
        (200, b'{"id": "lab/tiny"}', "does not answer as a hub does (AssertionError): check HF_ENDPOINT"),
        (200, b'{"id": "lab/tiny", "sha": "../../../etc"}', "does not answer as a hub does (ValueError): check HF_ENDPOINT"),
    ],
)
def test_what_is_no_hub_is_one_sentence(hub, status, body, says):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    with listening(Handler) as constants.ENDPOINT:
        assert says in refused()


NO_IDS = ["../tiny", "lab/..", "lab/../../etc", "/etc/passwd", "lab/a--b", "lab/a b", "a/b/c", "lab/.x", "", "läb/x", "lab/x\n", "-r/x"]  # fmt: skip
NO_REVISIONS = ["main", "", "../v1", "v1..2", "v 1", "/v1"]
BAD = [(m, "v1.0", r"params\.yaml: model\.id: .* is no hub id") for m in NO_IDS]
BAD += [("lab/tiny", r, r"params\.yaml: model\.revision: .* pins nothing: give a commit hash or a tag") for r in NO_REVISIONS]


@pytest.mark.parametrize(("model_id", "revision", "says"), BAD)
def test_no_id_and_nothing_pinned_become_no_path(hub, tmp_path, model_id, revision, says):
    with pytest.raises(UserError, match=says):
        get(model_id, revision)
    assert list(tmp_path.iterdir()) == [] and hub.requests == []


def test_the_disk_is_looked_at_first(hub, tmp_path, monkeypatch):
    n = len(WEIGHTS)
    free = [3 * n - 1]
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    monkeypatch.chdir(tmp_path)
    assert "lab/tiny: needs 0.0 GB under" in refused() and "model.safetensors" not in hub.sent
    (tmp_path / f"cache/models--lab--tiny/blobs/{BLOB}.incomplete").write_bytes(WEIGHTS[:1])
    get()
    free[0] = 0  # nothing is downloaded
    get()
