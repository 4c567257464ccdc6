"""python tests/pipeline/soak.py [seed]: kill the study at fifty moments and more, and write metrics/soak.json (`make soak`).

Verdicts come from a chat-completions server on loopback, so that calls are counted too.
"""

import json
import random
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from api_server import serve, split, verdict  # noqa: E402
from place import params_with  # noqa: E402

from perf.workload import machine  # noqa: E402
from pipeline.interruption import LOCK, SIGNALS, interrupted, stage_seconds  # noqa: E402
from pipeline.study import outputs, run, small  # noqa: E402
from refusal.judges import rules  # noqa: E402
from stages import write_json  # noqa: E402

# Rounds of a kill in every stage, and of one after every stage as DVC writes its lock; SIGINTs, each in a study of its own, since
# DVC goes on after one.
ROUNDS, LOCKS, ALONE = 4, 5, 1


def main(seed: int) -> None:
    rng, started = random.Random(seed), time.monotonic()

    def reply(n: int, question: str) -> str:
        judged = rules.judge(*split(question))
        return verdict(judged.compliance, judged.coherence)

    with tempfile.TemporaryDirectory(prefix="soak-") as name, serve(reply) as server:

        def fresh(**changes: object) -> Path:
            folder = small(Path(tempfile.mkdtemp(dir=name)) / "study")
            params_with(folder, {"judge.kind": "llm", "endpoint.base_url": server.url, "endpoint.concurrency": 2} | changes)
            return folder

        alone = fresh()
        run(alone, "dvc", "repro")
        seconds = stage_seconds(alone)
        asked_alone = server.asked.copy()
        plan = [(stage, rng.choice(SIGNALS[:3])) for _ in range(ROUNDS) for stage in seconds]
        plan += [(stage, LOCK) for _ in range(LOCKS) for stage in seconds]
        plan += [(stage, "INT dvc") for stage in sorted(rng.sample(list(seconds), ALONE), key=list(seconds).index, reverse=True)]
        print(f"seed {seed}: {len(plan)} kills of a study of {sum(seconds.values()):.0f} s", flush=True)
        with tqdm(total=len(plan), unit="kill", mininterval=15) as bar:
            report = interrupted(fresh, outputs(alone), seconds, plan, seed, bar.update)
        same_questions = set(server.asked) == set(asked_alone)
        threaded = fresh(**{"compute.threads": 2})
        run(threaded, "dvc", "repro")
        one, two = outputs(alone), outputs(threaded)
    more = {
        "same_questions_asked": same_questions,
        "differ_on_two_threads": sorted(path for path in one if one[path] != two[path]),
        "seed": seed,
        "minutes": round((time.monotonic() - started) / 60, 1),
        "machine": machine(),
    }
    write_json(ROOT / "metrics/soak.json", vars(report) | more)
    print(json.dumps(vars(report)))


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
