"""Where units of work are computed: in this process, or by Ray's workers on one machine or many (`compute.engine`).

A unit is what the resume store keeps under one key: whoever cuts the work cuts it before it is said who computes it, so that both
engines have the same units, in the same order, on as many threads each, and the store can be begun by one and ended by the other.
With Ray this process is the driver. What all units of a call share (prompts, interventions, how they are decoded) goes to the
object store once, with the list of units; from then on a unit is its number. A worker is an actor: it loads the checkpoint once,
from the folder that the driver loaded it from, takes one unit at a time, and gives the bytes back to the driver, which alone
writes to the store. So a worker that is lost costs the unit in its hands; a driver that is killed takes its workers with it, and
the next one finds in the store all that was given back.
"""

from __future__ import annotations

import atexit
import gc
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import torch

from refusal.io.code import ROOT, code_of
from refusal.io.errors import UserError
from refusal.io.params import Compute
from refusal.lm.batching import BATCH_SIZES, COUNTS, is_replicated, model_replicas
from refusal.lm.load import LM, load_model, weights_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel

J_contra = TypeVar("J_contra", contravariant=True)
J = TypeVar("J")

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # 0: of all systems' Ray, to listen on loopback alone, as it does on these
TRIES = 3  # deaths after which the unit, or what it takes to begin, is at fault and not the worker
# What of this process's environment decides how a worker computes or whom it may ask.
ENVIRONMENT = ("HF_HUB_DISABLE_TELEMETRY", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")


class Work(Protocol[J_contra]):
    """What computes a unit: (the model, the unit, whom to tell how far it is) -> its value. To be pickled: without a model."""

    def __call__(self, lm: LM, job: J_contra, progress: Callable[[int], None], /) -> bytes: ...


_asked: Compute | None = None
_workers: _Workers | None = None
_lock = Lock()


def use(compute: Compute) -> None:
    """Have this process hand out its units as `compute` says. Raises UserError where that takes Ray and there is none."""
    global _asked
    if compute.engine == "ray" and find_spec("ray") is None:
        raise UserError("params.yaml: compute.engine: ray is not installed: run `pip install '.[ray]'`, or set engine: local")
    _asked = compute


@contextmanager
def hand_out(
    lm: LM, compute: Work[J], code: Sequence[Callable], jobs: Sequence[J], done: Callable[[int], None], replicas: bool = True
) -> Iterator[tuple[Callable[[J], bytes], Executor | None]]:
    """(what computes a unit of `jobs`, the threads to call it on; None where there is but this one), for `Store.run`.

    `code` names the functions behind the units' keys: a worker with another version of them is refused. `done` is told how far a
    unit is, where it is computed here. `replicas`: a small model's units run side by side (`model_replicas`), a thread each.
    """
    if _asked is not None and _asked.engine == "ray":
        yield from _remotely(lm, compute, code, jobs, replicas)
    elif replicas:

        def with_replica(model: PreTrainedModel, job: J) -> bytes:
            return compute(replace(lm, model=model), job, done)

        with model_replicas(lm.model, with_replica, len(jobs)) as here:
            yield here
    else:
        yield lambda job: compute(lm, job, done), None


@dataclass(frozen=True)
class _Model:
    """What a worker loads."""

    folder: str
    dtype: str
    device: str
    weights: str

    @classmethod
    def of(cls, lm: LM) -> _Model:
        device = "auto" if getattr(lm.model, "hf_device_map", None) else lm.model.device.type
        folder = Path(str(lm.model.name_or_path)).resolve()
        return cls(str(folder), str(lm.model.dtype).removeprefix("torch."), device, lm.weights)


@dataclass(frozen=True)
class _Units:
    """What goes to the object store. lm: all of an LM but its model. threads: torch's, of one unit."""

    lm: LM
    compute: Work
    code: Sequence[Callable]
    hash: str
    jobs: Sequence[Any]
    threads: int


def _remotely(
    lm: LM, compute: Work[J], code: Sequence[Callable], jobs: Sequence[J], replicas: bool
) -> Iterator[tuple[Callable[[J], bytes], Executor]]:
    assert _asked is not None
    threads = 1 if replicas and is_replicated(lm.model) else torch.get_num_threads()
    units = _Units(replace(lm, model=cast(Any, None)), compute, code, code_of(*code), jobs, threads)
    number = {id(job): i for i, job in enumerate(jobs)}
    pool = _Pool(_asked, _Model.of(lm), lm.model.device.type, units)

    def run(job: J) -> bytes:
        return pool.compute(number[id(job)])

    try:
        yield run, pool
    finally:
        pool.shutdown(cancel_futures=True)


class _Pool(ThreadPoolExecutor):
    """Threads that wait for a worker, and for its answer. Where every unit is stored none is submitted, and no Ray started."""

    def __init__(self, asked: Compute, model: _Model, device: str, units: _Units) -> None:
        super().__init__(asked.workers)
        self._asked, self._model, self._device, self._units = asked, model, device, units
        self._place: list[Any] = []  # of the units in the object store

    def submit(self, *call: Any, **named: Any) -> Future:
        if not self._place:
            # Here and not in a thread of the pool: what Ray starts dies with the thread that has started it.
            self._place.append(_employed(self._asked, self._device).put(self._units))
        return super().submit(*call, **named)

    def compute(self, number: int) -> bytes:
        return _employed(self._asked, self._device).compute(self._model, self._place, number)


def _employed(asked: Compute, device: str) -> _Workers:
    """This process's workers, who stay until it ends."""
    global _workers
    if _workers is None:
        _workers = _Workers(asked, device)
        atexit.register(dismiss)  # runs before Ray's own end, which was registered when Ray was imported
    return _workers


def dismiss() -> None:
    """End this process's workers, and the Ray that it has started for them."""
    global _workers
    if _workers is not None:
        _workers.close()
    _workers = None


class _Workers:
    """The driver's side: who is idle. A unit is given to a worker that is there, never to one that is still to come."""

    def __init__(self, asked: Compute, device: str) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")  # where nobody answers: not for six minutes
        if asked.address is None:
            os.environ.setdefault(LOOPBACK, "0")
        import ray

        if device != "cpu" and not asked.gpus_per_worker:
            raise UserError(
                f"params.yaml: compute.gpus_per_worker: a worker has no GPU, and the model is on {device}: set 1 or more"
            )
        self.ray, self.idle, self.closed = ray, SimpleQueue[Any](), False
        self._start(asked)
        needs = {"CPU": asked.threads, "GPU": asked.gpus_per_worker}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(all(node.get(kind, 0) >= n for kind, n in needs.items()) for node in nodes):
            ray.shutdown()
            raise UserError(
                f"params.yaml: compute: a worker takes {asked.threads} cores (threads) and {asked.gpus_per_worker} GPUs "
                f"(gpus_per_worker), and no node of the cluster has as many: it has {[dict(sorted(n.items())) for n in nodes]}"
            )
        self.actor: Any = ray.remote(num_cpus=asked.threads, num_gpus=asked.gpus_per_worker)(Worker)
        self.threads = [self._employ() for _ in range(asked.workers)]

    def _start(self, asked: Compute) -> None:
        kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        options: dict[str, Any] = {
            "runtime_env": {"env_vars": {**kept, "PYTHONPATH": path}},
            "log_to_driver": False,
            "logging_level": "error",
        }
        if asked.address is None:  # on this machine alone, whoever else listens
            options |= {"num_cpus": asked.workers * asked.threads, "include_dashboard": False}
        try:
            if asked.address not in (None, "auto"):  # Ray itself would wait for it for a minute
                host, port = asked.address.rsplit(":", 1)
                socket.create_connection((host, int(port)), timeout=10).close()
            self.ray.init(address=asked.address or "local", **options)
        except (OSError, RuntimeError, ValueError) as error:
            said = " ".join(str(error).split())[:200]
            raise UserError(
                f"params.yaml: compute.address: {asked.address}: Ray cannot be reached ({said}): start it there by `ray start "
                "--head`, or set null to have it started here"
            ) from error

    def _employ(self) -> Thread:
        thread = Thread(target=self._begin, daemon=True)
        thread.start()
        return thread

    def _begin(self) -> None:
        """One worker more, idle from when it is there: at once, or when a node has room for it."""
        said = ""
        for _ in range(TRIES):
            worker = self.actor.remote()
            try:
                self.ray.get(worker.ready.remote())
            except SystemExit:  # what Ray raises in a thread that waits as Ray ends
                return
            except self.ray.exceptions.RayError as error:
                if self.closed:
                    return
                said = " ".join(str(error).split())[-300:]
            else:
                self.idle.put(worker)
                return
        self.idle.put(UserError(f"params.yaml: compute.engine: a Ray worker ended {TRIES} times before it took any work: {said}"))

    def put(self, units: _Units) -> Any:
        return self.ray.put(units)

    def compute(self, model: _Model, place: list[Any], number: int) -> bytes:
        """The value of a unit, from whoever is idle first; from another where that one is lost.

        Raises what the unit raises, and UserError where it has lost TRIES workers.
        """
        for _ in range(TRIES):
            worker = self.idle.get()
            if isinstance(worker, Exception):
                self.idle.put(worker)  # for all who wait
                raise worker
            try:
                value, counts, sizes = self.ray.get(worker.compute.remote(model, place, number))
            except self.ray.exceptions.RayTaskError as error:
                self.idle.put(worker)
                raise error.cause from None
            except self.ray.exceptions.RayError as error:
                said = str(error).split("\n")[0]
                print(f"a Ray worker is lost ({said}); its unit is computed again, another takes its place", file=sys.stderr)
                self.ray.kill(worker)
                self._employ()
                continue
            self.idle.put(worker)
            with _lock:
                COUNTS.update(counts)
                for work, rows in sizes.items():
                    if BATCH_SIZES.get(work) != rows:
                        print(f"{work}: out of memory on a Ray worker, which goes on with {rows} rows at once", file=sys.stderr)
                BATCH_SIZES.update(sizes)
            return value
        raise UserError(
            f"params.yaml: compute: a unit of work has ended {TRIES} Ray workers one after another, as one does that takes more "
            "memory than there is: lower batch_size (of generation or of activations), or use fewer workers"
        )

    def close(self) -> None:
        self.closed = True
        self.ray.shutdown()
        for thread in self.threads:
            thread.join(timeout=10)


class Worker:
    """What runs in an actor: one checkpoint, and the units at hand."""

    def __init__(self) -> None:
        self.model: _Model | None = None
        self.loaded: Any = None
        self.place: str | None = None
        self.units: _Units | None = None

    def ready(self) -> None:
        """Set torch up as a stage does. Its threads are set with each unit."""
        from transformers.utils import logging

        torch.set_deterministic_debug_mode("warn")
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def compute(self, model: _Model, place: list[Any], number: int) -> tuple[bytes, dict[str, int], dict[str, int]]:
        """(a unit's value, what it adds to COUNTS, the sizes that it ran out of memory at)."""
        if self.place != place[0].hex():
            import ray

            self.units = None  # before the next come
            self.units, self.place = ray.get(place[0]), place[0].hex()
            if code_of(*self.units.code) != self.units.hash:
                raise UserError(
                    f"{ROOT} on a Ray worker holds other code, or other versions of packages, than where the stage runs: bring "
                    "both to one commit and one requirements.lock"
                )
        if self.model != model:
            self._load(model)
        assert self.units is not None
        torch.set_num_threads(self.units.threads)
        before = Counter(COUNTS)
        lm = replace(self.units.lm, model=self.loaded)
        value = self.units.compute(lm, self.units.jobs[number], lambda _: None)
        return value, {name: n - before[name] for name, n in COUNTS.items()}, dict(BATCH_SIZES)

    def _load(self, model: _Model) -> None:
        self.model = self.loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        folder = Path(model.folder)
        self.loaded = load_model(folder, model.dtype, model.device)
        if (found := weights_hash(folder)) != model.weights:
            raise UserError(
                f"{folder}: on a Ray worker these are other weights (SHA-256 {found[:12]}) than where the stage runs "
                f"({model.weights[:12]}): every node must reach one and the same folder (docs/cluster.md)"
            )
        self.model = model
