"""Downloads from a loopback server that speaks the hub's protocol."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import COMMIT, Hub, etag, serve
from huggingface_hub import close_session, constants, hf_hub_download, snapshot_download
from loopback import listening
from safetensors.torch import load_file, save
from torch import arange

from refusal.io.errors import UserError
from refusal.lm import download, validate

ROOT = Path(__file__).parents[2]
WEIGHTS = save({"a": arange(50_000).float()})
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b'{"do_sample": false}',
}
CHECKPOINT = SMALL | {"model.safetensors": WEIGHTS}
NO_SAFETENSORS = {
    ".gitattributes": b"*.safetensors lfs",
    "README.md": b"read me",
    "modeling_x.py": b"raise SystemExit('code was run')",
    "pytorch_model.bin": b"\x80\x04pickle",
    "original/params.json": b"{}",
    "original/consolidated.00.pth": b"\x80\x04pickle",
}
OTHERS = NO_SAFETENSORS | {"consolidated.safetensors": WEIGHTS}
# In the cache, which is `hub` in the folder of a test.
SNAPSHOT, BLOBS = f"hub/models--lab--tiny/snapshots/{COMMIT}", "hub/models--lab--tiny/blobs"
PARTIAL = f"{BLOBS}/{etag('model.safetensors', WEIGHTS)}.incomplete"
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
    env |= {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.Popen([sys.executable, "-c", FETCH], env=env, cwd=ROOT, stdout=subprocess.PIPE, text=True)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub with lab/tiny, at which huggingface_hub in this process is pointed, with an empty cache."""
    with serve(Hub({"lab/tiny": CHECKPOINT | OTHERS})) as hub:
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub"),
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
    return download.fetch(model_id, revision, look, Path())[0]


def refused(says: str, *args) -> None:
    with pytest.raises(UserError) as caught:
        get(*args)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def ranges(hub: Hub) -> list[str | None]:
    """What was asked for of the weights, in order."""
    return [part for method, path, part in hub.requests if method == "GET" and path.endswith("model.safetensors")]


def test_what_a_checkpoint_needs_and_nothing_else_in_the_hubs_own_cache(hub, tmp_path):
    folder = tmp_path / SNAPSHOT
    output, _ = start(hub, tmp_path).communicate(timeout=120)
    looked = "looked at chat_template.jinja config.json generation_config.json tokenizer.json"
    assert output.splitlines() == [looked, f"{folder} {COMMIT}"]
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == CHECKPOINT
    assert set(hub.sent) - {""} == {*CHECKPOINT}
    # Offline nothing is asked for at all, and another program has it too.
    hub.requests.clear()
    output, _ = start(hub, tmp_path, HF_HUB_OFFLINE="1").communicate(timeout=120)
    assert output.splitlines()[-1] == f"{folder} {COMMIT}" and hub.requests == []
    assert snapshot_download("lab/tiny", revision="v1.0", local_files_only=True, allow_patterns=[*CHECKPOINT]) == str(folder)


def test_what_the_users_cache_holds_is_not_fetched_again(hub, tmp_path):
    for name in CHECKPOINT:
        hf_hub_download("lab/tiny", name, revision="v1.0")  # as transformers does: no listing is kept
    shared = tmp_path / "hub/blobs/ab/0123"  # where blobs lie that several repositories share
    shared.parent.mkdir(parents=True)
    own = (tmp_path / SNAPSHOT / "config.json").resolve().rename(shared)
    (tmp_path / BLOBS / etag("config.json", SMALL["config.json"])).symlink_to(own)
    hub.requests.clear()
    constants.HF_HUB_OFFLINE = True
    folder = get(look=validate.small_files)
    (folder / "model.safetensors").unlink()  # the link
    refused(f"{folder}/model.safetensors: not downloaded yet, and HF_HUB_OFFLINE is set: unset it")
    assert hub.requests == []
    constants.HF_HUB_OFFLINE = False
    assert get() == folder and (folder / "model.safetensors").read_bytes() == WEIGHTS and ranges(hub) == []
    hub.requests.clear()
    assert get() == folder
    assert [path for _, path, _ in hub.requests] == ["api/models/lab/tiny/revision/v1.0"]
    constants.ENDPOINT = "http://127.0.0.1:9"  # nobody there, and nobody needed
    assert get() == folder


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
        refused(f"names {name!r}, which the repository does not hold")


def test_shards_are_those_of_the_index(hub, tmp_path):
    shards = {f"model-0000{i}-of-00002.safetensors": save({name: arange(3.0)}) for i, name in ((1, "a"), (2, "b"))}
    index = json.dumps({"weight_map": dict(zip("ab", shards, strict=True))}).encode()
    hub.repositories["lab/tiny"] = SMALL | OTHERS | shards | {"model.safetensors.index.json": index}
    folder = get("lab/tiny", COMMIT)
    assert {p.name for p in folder.glob("*.safetensors")} == set(shards)
    assert load_file(folder / "model-00002-of-00002.safetensors")["b"].tolist() == [0, 1, 2]
    del hub.repositories["lab/tiny"]["model-00002-of-00002.safetensors"]
    constants.HF_HUB_CACHE = str(tmp_path / "b")
    refused("names 'model-00002-of-00002.safetensors', which the repository does not hold")


def test_a_dropped_connection_goes_on_where_it_was(hub, tmp_path):
    hub.cut["model.safetensors"] = 60_000
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges(hub) == [None, "bytes=60000-", "bytes=120000-", "bytes=180000-"]
    assert hub.sent["model.safetensors"] == len(WEIGHTS)


def test_a_hub_that_goes_away_for_good_leaves_what_the_next_run_goes_on_from(hub, tmp_path):
    hub.cut["model.safetensors"], hub.patience["model.safetensors"] = 50_000, 2
    refused("run again; what is downloaded is kept")
    assert (tmp_path / PARTIAL).read_bytes() == WEIGHTS[:100_000]
    hub.patience.clear()
    hub.cut.clear()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS and not (tmp_path / PARTIAL).exists()
    assert ranges(hub)[-1] == "bytes=100000-"


def test_a_killed_process_leaves_what_the_next_run_goes_on_from(hub, tmp_path):
    hub.stall["model.safetensors"] = 90_000
    partial = tmp_path / PARTIAL
    process = start(hub, tmp_path)
    while not (partial.exists() and partial.stat().st_size):
        assert process.poll() is None
    process.kill()
    process.communicate()
    left = partial.stat().st_size
    assert 0 < left < len(WEIGHTS)
    hub.stall.clear()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    assert ranges(hub)[-1] == f"bytes={left}-"


def test_two_runs_at_once_download_once(hub):
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: get(), range(2))
    assert first == second and hub.sent["model.safetensors"] == len(WEIGHTS)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_other_content_than_the_hub_states_is_thrown_away(hub, name):
    hub.spoiled, looked = {name}, []
    refused(f"{name}: its content is not what the hub states, so it is deleted: run again", "lab/tiny", "v1.0", looked.append)
    assert len(looked) == (name != "config.json")  # what is looked at is checked before
    hub.spoiled = set()
    path = get() / name
    # Damage in the cache is seen too.
    path.resolve().write_bytes(b"x" * path.stat().st_size)
    constants.HF_HUB_OFFLINE = True
    refused(f"{path}: its content is not what the hub states")
    assert not path.exists()


@pytest.mark.parametrize("n_bytes", [100, len(WEIGHTS) + 1])
def test_a_partial_file_of_other_content_or_too_long_is_not_kept(hub, tmp_path, n_bytes):
    (tmp_path / BLOBS).mkdir(parents=True)
    (tmp_path / PARTIAL).write_bytes(b"x" * n_bytes)
    if n_bytes < len(WEIGHTS):
        refused("its content is not what the hub states")
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS


def test_what_cannot_be_had_is_one_sentence(hub, tmp_path, monkeypatch):
    hub.repositories |= {"lab/pickled": SMALL | NO_SAFETENSORS, "lab/empty": SMALL}
    hub.gated, hub.token = "lab/tiny", "hf_secret"
    says = "holds only pytorch_model.bin, and a pickle can run code when loaded: give a revision that has safetensors"
    refused(says, "lab/pickled")
    refused("holds no weights", "lab/empty")
    refused("lab/tiny@v9: no such revision: give model.revision a commit hash or tag", "lab/tiny", "v9")
    for revision in ("v1.0", COMMIT):
        refused("no such repository, or it is private", "lab/none", revision)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(f"its licence must be accepted first: do so at {hub.url}/lab/tiny, and set HF_TOKEN to your token")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    get()
    assert [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()] == []


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_a_proxy_that_cannot_be_used_is_named(hub, monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    monkeypatch.delenv("NO_PROXY", raising=False)
    close_session()
    refused("the proxy that ALL_PROXY or HTTPS_PROXY names cannot be used", "lab/tiny", "v1.0")
    close_session()


def test_offline_what_is_missing_is_named(hub, tmp_path):
    def dislike(folder: Path) -> None:
        assert {p.name for p in folder.iterdir()} == set(SMALL)
        raise UserError("disliked")

    refused("disliked", "lab/tiny", "v1.0", dislike)
    assert "model.safetensors" not in hub.sent
    constants.HF_HUB_OFFLINE = True
    offline = "and HF_HUB_OFFLINE is set: unset it"
    refused(f"model.safetensors: not downloaded yet, {offline}")
    (tmp_path / SNAPSHOT / "tokenizer.json").unlink()
    refused(f"missing (tokenizer.json), {offline}")
    constants.HF_HUB_CACHE = str(tmp_path / "empty")
    for revision in (COMMIT, "v1.0"):
        refused(f"lab/tiny@{revision}: not downloaded yet, {offline}", "lab/tiny", revision)


@pytest.mark.parametrize(
    ("status", "body", "says"),
    [
        (None, b"", "http://127.0.0.1:9 cannot be reached (ConnectError): run again"),
        (500, b"", "the hub answered 500: run again later; what is downloaded is kept"),
        (200, b"<html>", "does not answer as a hub does (JSONDecodeError): check HF_ENDPOINT"),
        (200, b'{"id": "lab/tiny"}', "does not answer as a hub does (AssertionError): check HF_ENDPOINT"),
        (200, b'{"id": "lab/tiny", "sha": "../../../etc"}', "does not answer as a hub does (ValueError): check HF_ENDPOINT"),
    ],
)
def test_a_hub_that_is_not_there_or_none_is_one_sentence(hub, status, body, says):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

    with listening(Handler) as url:
        constants.ENDPOINT = url if status else "http://127.0.0.1:9"
        refused(says)


NO_IDS = ["../tiny", "lab/..", "lab/../../etc", "/etc/passwd", "lab/a--b", "lab/a b", "a/b/c", "lab/.x", "", "läb/x", "lab/x\n"]
BAD = [(model_id, "v1.0", "is no hub id: give <owner>/<name>") for model_id in (*NO_IDS, "-r/x")]
BAD += [("lab/tiny", r, "pins nothing: give a commit hash or a tag") for r in ("main", "", "../v1", "v1..2", "v 1", "/v1")]


@pytest.mark.parametrize(("model_id", "revision", "says"), BAD)
def test_what_is_no_id_or_pins_nothing_becomes_no_path(hub, tmp_path, model_id, revision, says):
    refused(says, model_id, revision)
    assert list(tmp_path.iterdir()) == [] and hub.requests == []


def test_the_disk_is_looked_at_first(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    refused("lab/tiny: needs 0.0 GB under ")
    assert "model.safetensors" not in hub.sent
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: SimpleNamespace(free=11 * 10**9))
    folder, sizes = tmp_path / SNAPSHOT, (4 * 10**9, 8 * 10**9)  # to download, and of the copies
    with pytest.raises(UserError, match=r"needs 12\.0 GB under .* \(in all 4\.0 GB to .*, and 8\.0 GB .* 11\.0 GB are free"):
        download._check_disk("lab/x", folder, tmp_path, *sizes)
    download._check_disk("lab/x", folder, Path("/proc"), *sizes)  # another disk
    with (tmp_path / PARTIAL).open("wb") as partial:
        partial.truncate(1_500_000_000)
    download._check_disk("lab/x", folder, tmp_path, *sizes)
