"""Units of work on Ray: several nodes on this machine, whose workers, nodes and drivers are killed. The network stays off.

What a unit is is said by files: it notes in a log that it begins, and where a test wants it to wait, it waits for a file.
"""

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import tiny_direction, tiny_model, tiny_prompts

from refusal.io.errors import UserError
from refusal.io.params import Compute
from refusal.io.store import Store, key
from refusal.lm import engine
from refusal.lm.batching import COUNTS
from refusal.lm.load import LM, load_model, weights_hash
from refusal.method.activations import last_token_resid_pre, stored_resid_pre
from refusal.method.first_token import scores
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE, Addition, Intervention
from refusal.method.sweep import complete

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", engine.LOOPBACK: "0"}  # read when Ray is imported
import ray
from ray.cluster_utils import Cluster

LOCAL = Compute(threads=1, engine="local", address=None, workers=1, gpus_per_worker=0)
CODE = (last_token_resid_pre,)
NODE = {"object_store_memory": 80 << 20, "include_dashboard": False}


@pytest.fixture(scope="module")
def cluster():
    """A head without cores, where the driver is, and two nodes of one core."""
    here = Path(__file__).parent
    os.environ["PYTHONPATH"] = f"{here}{os.pathsep}{here.parent}"  # workers import the units of this file
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **NODE})
    for _ in range(2):
        started.add_node(num_cpus=1, **NODE)
    yield started
    engine.use(LOCAL)
    engine.dismiss()
    started.shutdown()
    del os.environ["PYTHONPATH"]


def on_ray(address: str, **more) -> Compute:
    return Compute(threads=1, engine="ray", address=address, **{"workers": 2, "gpus_per_worker": 0} | more)


@pytest.fixture
def remote(cluster):
    """Ray for one test, and back."""
    engine.use(on_ray(cluster.address))
    yield cluster
    engine.use(LOCAL)


def saved(folder: Path, kind: str, dtype: str = "float32") -> LM:
    tiny_model(kind).save_pretrained(folder)
    return LM(load_model(folder, dtype), None, weights_hash(folder), frozenset(), 0)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("checkpoint"), "qwen2")


def blobs(store: Store) -> dict[str, bytes]:
    return dict(store.connection.execute("SELECT key, value FROM blobs"))


def everything(lm: LM, store: Store) -> list:
    """All that is handed out, of one model: completions, run-time and edited, activations by each method, first tokens."""
    prompts, v = tiny_prompts((7, 3, 12, 7, 2, 9) * 6), tiny_direction(rows=5)
    acting = [Intervention(f"d{i}", v[i], 1.0, "resid_pre", layer=1) for i in range(4)]
    interventions = [BASELINE, *acting, Intervention("w", v[4], 1.0, "weights")]
    shared = [[5, 6, 7, *prompt] for prompt in prompts]
    found = [complete(lm, shared, interventions, Decoding(6, 4), store, "completions")]
    for method in ("sequential", "batched", "batched_unmasked"):
        batches = [shared[:9], shared[9:20], shared[20:]]
        found.append([rows.tolist() for rows in stored_resid_pre(lm, batches, method, store, method)])
    added = Addition(v[0], 1)
    found.append(scores(lm, shared[:8], shared[8:20], [(acting[0], added), (acting[1], added)], [3, 4], store))
    return found


@pytest.mark.parametrize(("kind", "dtype"), [("qwen2", "float32"), ("qwen3_moe", "bfloat16")])
def test_both_engines_store_the_same_bytes_under_the_same_keys(cluster, tmp_path, monkeypatch, kind, dtype):
    lm, put = saved(tmp_path / "checkpoint", kind, dtype), []
    here, there = Store(tmp_path / "here.sqlite"), Store(tmp_path / "there.sqlite")
    before = COUNTS.copy()
    engine.use(LOCAL)
    local, counted = everything(lm, here), COUNTS - before
    monkeypatch.setattr(ray, "put", lambda value, put=put, real=ray.put: put.append(value) or real(value))
    engine.use(on_ray(cluster.address))
    before = COUNTS.copy()
    assert everything(lm, there) == local
    assert len(blobs(there)) > 20 and blobs(there) == blobs(here)
    assert len(put) == 5  # prompts and interventions: once a call
    # What ran elsewhere is counted; each worker reads the common beginning of a call's prompts itself, as the driver does once.
    assert counted["passes"] <= (COUNTS - before)["passes"] <= counted["passes"] + 2
    monkeypatch.setattr(engine, "_employed", None)
    assert everything(lm, there) == local  # all is stored: nothing is asked of Ray
    engine.use(LOCAL)


# Units that say what becomes of them.


def note(folder: Path, job: int, lm: LM) -> None:
    with (folder / "log").open("a") as file:
        file.write(f"{job} {os.getpid()} {id(lm.model)}\n")


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def value(job: int, lm: LM) -> bytes:
    return f"{job} {float(next(lm.model.parameters()).sum())}".encode()


def dies_once(folder: Path, lm: LM, job: int, progress) -> bytes:
    note(folder, job, lm)
    if job == 3 and not (folder / f"died {job}").exists():
        (folder / f"died {job}").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return value(job, lm)


def dies_always(lm: LM, job: int, progress) -> bytes:
    os.kill(os.getpid(), signal.SIGKILL)
    return b""


def fails(lm: LM, job: int, progress) -> bytes:
    if job == 2:
        raise UserError("params.yaml: a sentence of a unit")
    return b"fine"


def loses_its_node(folder: Path, lm: LM, job: int, progress) -> bytes:
    note(folder, job, lm)
    if job == 1 and not (folder / "node").exists():
        (folder / "node").write_text(ray.get_runtime_context().get_node_id())
        (folder / "node written").touch()
        wait_for(folder / "never")  # until its node is gone, and its process with that
    return value(job, lm)


def meets_another(folder: Path, lm: LM, job: int, progress) -> bytes:
    (folder / f"here {job}").touch()
    wait_for(folder / f"here {1 - job}")
    return value(job, lm)


def waits_to_be_killed(folder: Path, lm: LM, job: int, progress) -> bytes:
    note(folder, job, lm)
    if job >= 4:
        wait_for(folder / "killed")
    return value(job, lm)


def run(lm: LM, compute, n: int, store: Store) -> list[bytes]:
    jobs = [(key("test", (), job=job), job) for job in range(n)]
    with engine.hand_out(lm, compute, CODE, [job for _, job in jobs], store.done) as (one, pool):
        return [*store.run(jobs, one, "test", pool=pool)]


def logged(folder: Path) -> tuple[list[int], set[str], set[str]]:
    """(the units in order of their beginning, the processes, the models by process)."""
    rows = [line.split() for line in (folder / "log").read_text().splitlines()]
    return [int(job) for job, *_ in rows], {pid for _, pid, _ in rows}, {f"{pid} {model}" for _, pid, model in rows}


def test_a_worker_that_is_killed_costs_the_unit_in_its_hands(remote, lm, tmp_path, capfd):
    found = run(lm, partial(dies_once, tmp_path), 12, Store(tmp_path / "store.sqlite"))
    assert found == [value(job, lm) for job in range(12)]
    jobs, processes, models = logged(tmp_path)
    assert sorted(jobs) == sorted([*range(12), 3])
    assert len(processes) >= 2 and len(models) == len(processes)  # each has loaded the model once
    assert capfd.readouterr().err.count("a Ray worker is lost") == 1


def test_a_node_that_is_removed_costs_the_unit_in_its_hands_and_one_that_comes_takes_its_share(remote, lm, tmp_path):
    store, put = Store(tmp_path / "store.sqlite"), Store.put

    def put_and_remove(name: str, blob: bytes) -> None:
        put(store, name, blob)
        if not (tmp_path / "removed").exists():
            wait_for(tmp_path / "node written")
            lost = (tmp_path / "node").read_text()
            remote.remove_node(next(n for n in remote.worker_nodes if n.node_id == lost), allow_graceful=False)
            (tmp_path / "removed").touch()

    store.put = put_and_remove
    found = run(lm, partial(loses_its_node, tmp_path), 8, store)
    assert found == [value(job, lm) for job in range(8)] and len(remote.worker_nodes) == 1
    assert sorted(logged(tmp_path)[0]) == sorted([*range(8), 1])
    remote.add_node(num_cpus=1, **NODE)
    both = run(lm, partial(meets_another, tmp_path), 2, Store(tmp_path / "other.sqlite"))  # ends where there are two alone
    assert both == [value(0, lm), value(1, lm)]


def test_what_a_unit_raises_is_raised_here_and_the_rest_is_kept(remote, lm, tmp_path):
    store = Store(tmp_path / "store.sqlite")
    with pytest.raises(UserError, match=r"^params.yaml: a sentence of a unit$"):
        run(lm, fails, 3, store)
    assert set(blobs(store).values()) == {b"fine"}


def test_a_unit_that_kills_every_worker_ends_the_run_with_a_sentence(remote, lm, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "TRIES", 2)  # the third worker would take its time to start
    with pytest.raises(UserError, match=r"ended 2 Ray workers one after another.*batch_size"):
        run(lm, dies_always, 1, Store(tmp_path / "store.sqlite"))


def test_a_worker_with_other_weights_or_other_code_is_refused(remote, lm, tmp_path, monkeypatch):
    other = LM(lm.model, None, "another hash", lm.stop, lm.pad_id)
    with pytest.raises(UserError, match=r"on a Ray worker these are other weights .*one and the same folder"):
        run(other, fails, 1, Store(tmp_path / "store.sqlite"))
    monkeypatch.setattr(engine, "code_of", lambda *functions: "another hash")
    with pytest.raises(UserError, match=r"holds other code.*one commit"):
        run(lm, fails, 1, Store(tmp_path / "store.sqlite"))


def test_a_driver_that_is_killed_repeats_what_was_in_flight_alone(cluster, lm, tmp_path):
    engine.dismiss()  # the nodes are the other driver's
    script = (
        "import sys, torch; from pathlib import Path; from functools import partial; import test_engine as t\n"
        "folder, checkpoint, address = map(Path, sys.argv[1:])\n"
        "torch.set_num_threads(1); t.engine.use(t.on_ray(str(address)))\n"
        "lm = t.LM(t.load_model(checkpoint), None, t.weights_hash(checkpoint), frozenset(), 0)\n"
        "t.run(lm, partial(t.waits_to_be_killed, folder), 10, t.Store(folder / 'store.sqlite'))\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests", root / "tests/lm")))}
    arguments = [sys.executable, "-c", script, str(tmp_path), str(lm.model.name_or_path), cluster.address]
    driver = subprocess.Popen(arguments, env=environment)
    store = Store(tmp_path / "store.sqlite")
    while len(blobs(store)) < 4 or len(logged(tmp_path)[0]) < 6:  # four are stored, two at work
        assert driver.poll() is None
        time.sleep(0.05)
    driver.kill()
    driver.wait()
    (tmp_path / "killed").touch()
    engine.use(on_ray(cluster.address))
    found = run(lm, partial(waits_to_be_killed, tmp_path), 10, store)
    engine.use(LOCAL)
    assert found == [value(job, lm) for job in range(10)]
    assert sorted(logged(tmp_path)[0]) == sorted([*range(10), 4, 5])


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"address": "127.0.0.1:9"}, r"compute.address: 127.0.0.1:9: Ray cannot be reached .*or set null to have it started here"),
        ({"address": "nowhere"}, r"compute.address: nowhere: Ray cannot be reached"),
        ({"workers": 1, "threads": 3}, r"compute: a worker takes 3 cores .*no node of the cluster has as many"),
        ({"workers": 1, "gpus_per_worker": 2}, r"and 2 GPUs .*no node of the cluster has as many"),
    ],
)
def test_a_cluster_that_is_not_there_and_what_no_node_has_are_said(cluster, lm, tmp_path, asked, sentence):
    engine.dismiss()
    engine.use(on_ray(cluster.address).model_copy(update=asked))
    with pytest.raises(UserError, match=sentence):
        run(lm, fails, 1, Store(tmp_path / "store.sqlite"))
    engine.use(LOCAL)


def test_without_ray_a_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    engine.use(LOCAL)
    with pytest.raises(UserError, match=r"compute.engine: ray is not installed: run `pip install '\.\[ray\]'`"):
        engine.use(on_ray("auto"))


def test_threads_of_a_unit_are_those_of_a_local_one(lm, threads):
    """A small model's unit takes one thread where jobs run side by side, and torch's elsewhere."""
    threads(2)
    seen = []
    engine.use(LOCAL)
    for replicas in (True, False):
        with engine.hand_out(lm, lambda lm, job, p: str(torch.get_num_threads()).encode(), CODE, [0, 1], print, replicas) as (one, pool):
            seen.append([*(pool.map(one, [0, 1]) if pool else map(one, [0, 1]))])
    assert seen == [[b"1", b"1"], [b"2", b"2"]]
    units = []
    engine.use(on_ray("auto"))
    for replicas in (True, False):
        with engine.hand_out(lm, fails, CODE, [0, 1], print, replicas) as (_, pool):
            units.append(pool._units.threads)
    engine.use(LOCAL)
    assert units == [1, 2]
