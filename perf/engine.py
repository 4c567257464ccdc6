"""The Ray engine beside bare processes, on the workload of record: the same units of completions, a thread each.

- `ray 1`, `ray 2`: `complete` with one and with two workers, which have loaded the model already.
- `bare 1`, `bare 2`: one process, and two side by side, that compute the same units (each its share) with no Ray at all.

Two processes on one machine share the way to memory, so two workers are held to two bare processes, not to twice one.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from perf import workload
from perf.harness import Ratio, measure
from refusal.io.params import Compute
from refusal.io.store import Store
from refusal.lm import engine
from refusal.lm.load import LM, load_model, weights_hash
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE, Intervention
from refusal.method.sweep import complete

N_PROMPTS, DECODING, ROUNDS = 64, Decoding(max_new_tokens=32, batch_size=8), 3


class Share(Store):
    """Computes every n-th unit and gives nothing for the others, which another process computes."""

    def __init__(self, path: Path, first: int, n: int) -> None:
        super().__init__(path)
        self.first, self.n = first, n

    def run(self, jobs: Sequence[tuple[str, Any]], compute: Callable, label: str, *rest: Any, **named: Any) -> Iterator[bytes]:
        """As Store.run."""
        for i, (_, job) in enumerate(jobs):
            yield compute(job) if i % self.n == self.first else json.dumps([[]] * len(job.rows)).encode()


def answers(lm: LM, store: Store, n_prompts: int) -> dict[str, list[list[int]]]:
    """The completions of record: the baseline and a direction ablated."""
    v = workload.random_directions(1, lm.d_model)[0]
    acting = [BASELINE, Intervention("ablated", v, 1.0, "resid_pre")]
    return complete(lm, workload.prompts(n_prompts), acting, DECODING, store, "engine")


def loaded(folder: Path) -> LM:
    """A checkpoint of the workload, with no tokenizer."""
    return LM(load_model(folder), None, weights_hash(folder), frozenset(), workload.PAD_ID)  # type: ignore[arg-type]


def bare(folder: str, first: str, n: str, n_prompts: str) -> None:
    """A process that loads the model, says so, and does its share each time that a line comes."""
    torch.set_num_threads(1)
    lm = loaded(Path(folder))
    with tempfile.TemporaryDirectory() as place:
        print("ready", flush=True)
        for _ in sys.stdin:
            answers(lm, Share(Path(place) / "store.sqlite", int(first), int(n)), int(n_prompts))
            print("done", flush=True)


def run(
    console: Console, n_prompts: int = N_PROMPTS, rounds: int = ROUNDS, shape: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Measure, print, and return the scalars."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "checkpoint"
        (workload.model(shape=shape) if shape else workload.model()).save_pretrained(folder)
        try:
            found = _measured(console, folder, n_prompts, rounds)
        finally:
            engine.use(Compute(threads=1, engine="local", address=None, workers=1, gpus_per_worker=0))
            engine.dismiss()
            torch.set_num_threads(threads)
    efficiency, overhead = found.ratio("bare 2", "ray 2"), found.ratio("ray 1", "bare 1")
    console.print(found.table(f"{2 * n_prompts} completions, a thread each", "ray 2"))
    said = f"two workers at {efficiency} of two bare processes; one worker takes {overhead} of the time of one"
    console.print(said, highlight=False)
    return {"efficiency_of_two": _figures(efficiency), "time_of_one_over_bare": _figures(overhead)}


def _measured(console: Console, folder: Path, n_prompts: int, rounds: int) -> Any:
    lm, children = loaded(folder), []
    places = (folder.parent / f"store-{i}.sqlite" for i in range(1000))

    def child(first: int, n: int) -> subprocess.Popen:
        arguments = [sys.executable, "-m", "perf.engine", str(folder), str(first), str(n), str(n_prompts)]
        process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        children.append(process)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    def side_by_side(processes: Sequence[subprocess.Popen]) -> None:
        for process in processes:
            assert process.stdin is not None
            print("go", file=process.stdin, flush=True)
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "done\n"

    def on_ray(workers: int) -> Any:
        engine.use(Compute(threads=1, engine="ray", address=None, workers=workers, gpus_per_worker=0))
        return answers(lm, Store(next(places)), n_prompts)

    try:
        for _ in range(2):  # both workers load the model, before anything is timed
            on_ray(2)
        one, two = [child(0, 1)], [child(0, 2), child(1, 2)]
        return measure(
            {
                "ray 2": lambda: on_ray(2),
                "bare 2": lambda: side_by_side(two),
                "ray 1": lambda: on_ray(1),
                "bare 1": lambda: side_by_side(one),
            },
            console,
            rounds,
        )
    finally:
        for process in children:
            process.kill()
            process.wait()


def _figures(ratio: Ratio) -> dict[str, float]:
    return {"median": round(ratio.median, 3), "low": round(ratio.low, 3), "high": round(ratio.high, 3)}


if __name__ == "__main__":
    bare(*sys.argv[1:])
