"""A run that is killed at any moment and begun again ends as one that was left alone, and repeats nothing that was stored."""

import random

from pipeline.interruption import SIGNALS, interrupted, repeats, stage_seconds, watch_repeats
from pipeline.study import outputs, small
from refusal.io.store import Store


def test_repeats_are_noted_by_the_database_itself(tmp_path):
    path = tmp_path / "store.sqlite"
    watch_repeats(path)
    store = Store(path)
    for repeated in ((0, 0), (1, 1)):
        store.put("a", b"1")
        store.put("b", b'{"compliance": 1.0, "model": "m"}')
        assert repeats(path) == repeated and store.get("a") == b"1"


def test_five_kills(finished, tmp_path):
    seconds, rng = stage_seconds(finished[0]), random.Random(0)
    stages = sorted(rng.sample(list(seconds), 5), key=list(seconds).index)
    plan = list(zip(stages, [*SIGNALS[:3], "KILL group", "INT dvc"], strict=True))
    report = interrupted(lambda: small(tmp_path / "study"), outputs(finished[0]), seconds, plan, seed=0)
    assert report.kills >= 4, report  # a stage of a second may be over first
    assert report.repeated_forward_passes == 0 and report.differing_outputs == [], report
