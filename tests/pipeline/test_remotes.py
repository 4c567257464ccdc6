"""Sharing results: one member of a lab pushes, another pulls and repeats nothing. A folder, S3 and ssh, the last two over loopback.

The endpoints speak the real protocols: moto's server for S3, Debian's sshd for ssh.
"""

import hashlib
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import boto3
import pytest
from faulty_line import faulty_line
from moto.server import ThreadedMotoServer
from place import ROOT, params_with
from safetensors.torch import load_file, save_file

from pipeline.study import commit, digests, metrics, outputs, run, stages_run, surroundings

BUCKET, STORED = "lab-bucket", "study/files/md5"


@pytest.fixture(scope="module")
def lab(study, tmp_path_factory):
    """The study of the member who has run it, its results committed."""
    folder = tmp_path_factory.mktemp("lab") / "lab"
    shutil.copytree(study[0], folder, symlinks=True)
    run(folder, "dvc", "repro")
    commit(folder)
    return folder


def clone(lab: Path, folder: Path) -> Path:
    """Another member's checkout: what is in Git, and nothing else."""
    run(lab, "git", "clone", "-q", str(lab), str(folder))
    return folder


def share(lab: Path, url: str, **settings: str) -> None:
    """What the README says a member does to share: a remote, committed with its settings, and a push."""
    run(lab, "dvc", "remote", "add", "--force", "-d", "storage", url)
    for name, value in {"verify": "true", **settings}.items():  # else a file that is cut off alone is kept, cut off
        run(lab, "dvc", "remote", "modify", "storage", name, value)
    run(lab, "git", "commit", "-qam", f"remote {url}")
    run(lab, "dvc", "push")


def files(folder: Path) -> dict[str, str]:
    return digests(folder, "data", "models", "report")


def nothing_runs(folder: Path, *options: str) -> None:
    again = run(folder, "dvc", "repro", *options)
    assert stages_run(again) == [] and "up to date" in again


def pulled_repeats_nothing(lab: Path, folder: Path) -> None:
    other = clone(lab, folder)
    run(other, "dvc", "pull")
    assert files(other) == files(lab)
    nothing_runs(other)


def test_a_folder_and_what_a_partial_pull_spares(lab, tmp_path):
    share(lab, str(tmp_path / "storage"))
    pulled_repeats_nothing(lab, tmp_path / "whole")

    other = clone(lab, tmp_path / "other")
    run(other, "dvc", "pull", "models/base")
    assert {Path(name).parts[:2] for name in files(other)} == {("data", "claims.yaml"), ("data", "labels"), ("data", "published"), ("data", "raw"), ("models", "base")}
    nothing_runs(other, "--allow-missing")
    # A variant goes on from there: --pull brings in what its first stage reads, and nothing is trained.
    params_with(other, {"sweep.method": "batched"})
    ran = stages_run(run(other, "dvc", "repro", "--allow-missing", "--pull", "select"))
    assert ran[0] in ("selection", "sweep") and not {"prompts", "model", "activations", "directions"} & set(ran)
    assert not (other / "models/twin").exists()


def test_a_clone_without_another_remote_names_what_the_repositorys_own_does_not_hold(lab, tmp_path):
    bare = clone(lab, tmp_path / "bare")
    shutil.copyfile(ROOT / ".dvc/config", bare / ".dvc/config")
    said = run(bare, "dvc", "pull", ok=False)
    assert outputs(lab)["models/directions.safetensors"] in said and "Traceback" not in said


@pytest.fixture
def s3(monkeypatch):
    """An S3 server on loopback with a bucket: (its port, boto3's client)."""
    for name, value in {"AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key", "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
    client.create_bucket(Bucket=BUCKET)
    yield port, client
    empty(client)
    client.delete_bucket(Bucket=BUCKET)
    server.stop()


def keys(client) -> list[str]:
    return [entry["Key"] for entry in client.list_objects_v2(Bucket=BUCKET).get("Contents", [])]


def empty(client) -> None:
    for key in keys(client):
        client.delete_object(Bucket=BUCKET, Key=key)


def objects(client) -> dict[str, bytes]:
    """What lies in the bucket, by DVC's hash of it."""
    read = {key: client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys(client) if key.startswith(STORED)}
    named = {"".join(key.split("/")[-2:]).removesuffix(".dir"): data for key, data in read.items()}
    assert all(hashlib.md5(data).hexdigest() == name for name, data in named.items())
    return named


def test_s3_over_a_line_that_works_and_one_that_fails(lab, tmp_path, s3, monkeypatch):
    port, client = s3
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with faulty_line(port, seed=0) as line:
        share(lab, f"s3://{BUCKET}/study", endpointurl=line.url)
        wanted = objects(client)
        assert len(wanted) > 10
        pulled_repeats_nothing(lab, tmp_path / "whole")
        for path in (lab / ".dvc/config", lab / "dvc.lock"):
            assert "AWS_SECRET" not in path.read_text() and "secret_access_key" not in path.read_text()
        empty(client)

        def in_the_end(folder: Path, command: str, which: str, said: str) -> None:
            """Over a line that fails all of these requests, which is said, and then over one that fails a fifth of all."""
            line.rate, line.which = 1.0, which
            output = run(folder, "dvc", command, ok=False)
            assert said in output and "Traceback" not in output
            line.rate, line.which = 0.2, ""
            again = (subprocess.run(["dvc", command], cwd=folder, env=surroundings(folder)).returncode for _ in range(6))
            assert 0 in again  # no further than the first that ends well

        in_the_end(lab, "push", f"PUT /{BUCKET}/{STORED}/", "failed to upload")
        assert objects(client) == wanted
        other, digest = clone(lab, tmp_path / "other"), outputs(lab)["models/directions.safetensors"]
        in_the_end(other, "pull", f"GET /{BUCKET}/{STORED}/{digest[:2]}/{digest[2:]}", digest)
        assert files(other) == files(lab) and stages_run(run(other, "dvc", "repro")) == []
        assert min(line.fates[fate] for fate in ("dropped", "500", "cut", "passed")) > 5, line.fates


def test_what_a_partial_push_lacks_is_named(lab, tmp_path, s3):
    port, client = s3
    share(lab, f"s3://{BUCKET}/study", endpointurl=f"http://127.0.0.1:{port}")
    # By its hash: DVC names no path here, and dvc.lock tells which it is.
    kept = files(lab)
    gone = {name: kept[name] for name in ("models/directions.safetensors", "report/index.html")}
    assert outputs(lab).items() >= gone.items()
    for digest in gone.values():
        client.delete_object(Bucket=BUCKET, Key=f"{STORED}/{digest[:2]}/{digest[2:]}")
    other = clone(lab, tmp_path / "other")
    said = run(other, "dvc", "pull", ok=False)
    assert all(digest in said for digest in gone.values()) and "Traceback" not in said
    assert all(kept[name] == data for name, data in files(other).items()) and not gone.keys() & files(other).keys()


@pytest.fixture
def sshd(tmp_path):
    """An sshd on loopback with a key of its own: (port, key file)."""
    command = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if command is None:
        pytest.skip("sshd is not installed (Debian: openssh-server)")
    home = tmp_path / "ssh"
    home.mkdir(mode=0o700)
    for name in ("host", "user"):
        run(tmp_path, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(home / name))
    shutil.copyfile(home / "user.pub", home / "authorized_keys")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (home / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {home}/host\nAuthorizedKeysFile {home}/authorized_keys\n"
        f"PidFile {home}/pid\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nSubsystem sftp internal-sftp\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd's own, where root runs it
    log = home / "log"
    with subprocess.Popen([command, "-D", "-E", str(log), "-f", str(home / "config")], start_new_session=True) as process:
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield port, home / "user"
        process.kill()


def test_ssh(lab, tmp_path, sshd):
    port, key = sshd
    folder, user = tmp_path / "storage", run(tmp_path, "id", "-un").strip()
    share(lab, f"ssh://{user}@127.0.0.1{folder}", port=str(port), keyfile=str(key))
    assert sum(path.is_file() for path in folder.rglob("*")) > 10
    pulled_repeats_nothing(lab, tmp_path / "other")


def test_published_vectors_are_imported_from_a_git_repository_and_compared(lab, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    run(theirs, "git", "init", "-q")
    ours = load_file(lab / "models/directions.safetensors")["sequential-matched.unit"]
    save_file({"unit": -ours}, theirs / "vectors.safetensors")
    run(theirs, "git", "add", "-A")
    run(theirs, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qm", "vectors")

    other = clone(lab, tmp_path / "other")
    shutil.copytree(lab / ".dvc/cache", other / ".dvc/cache", dirs_exist_ok=True)
    run(other, "dvc", "checkout")
    run(other, "dvc", "import", str(theirs), "vectors.safetensors", "-o", "data/published/vectors.safetensors")
    assert stages_run(run(other, "dvc", "repro"))[0] == "published"
    cosine = metrics(other, "published")["files"]["vectors.safetensors:unit"]["cosine"]
    assert set(cosine) >= {"sequential-matched", "sequential-unrelated", "batched-matched"}
    layer_0, *others = cosine["sequential-matched"]
    assert layer_0 is None and others == [pytest.approx(-1)] * len(others)
    assert (other / "data/published/vectors.safetensors.dvc").is_file()
