"""Several threads on one model: the same completions, each job on a model of its own that holds no weights of its own."""

import threading
import time

import pytest
import torch
from refusal.lm.counts import COUNTS, watch
from refusal.lm.replicas import crew, shares
from refusal.method.arms import BASELINE_ARM, complete_arms, direction_arm, per_layer_arm, subspace_arm
from tiny import PRE_NORM, tiny_direction, tiny_model

from refusal.analysis.subspaces import random_subspaces
from refusal.io.store import Store
from refusal.lm import replicas as module
from refusal.method.interventions import ablation, intervene

IDS = torch.tensor([[1, 7, 9, 30]])


@pytest.fixture(scope="module")
def model():
    model = tiny_model("qwen2").requires_grad_(False).eval()
    watch(model)
    return model


def logits(model, _job=None):
    with torch.no_grad():
        return model(IDS).logits


def test_jobs_run_side_by_side_on_models_that_share_their_weights(model, threads):
    threads(2)
    meeting = threading.Barrier(2, timeout=30)

    def compute(one, job):
        meeting.wait()  # broken if jobs came one after another
        assert torch.get_num_threads() == 1
        return id(one), [p.data_ptr() for p in one.parameters()], id(one.model.layers[0]), job

    with crew(model, compute, 4) as (run, pool):
        found = list(pool.map(run, range(4)))
    assert [job for *_, job in found] == [0, 1, 2, 3] and len({one for one, *_ in found}) == 2
    assert len({layer for _, _, layer, _ in found}) == 2
    assert {tuple(weights) for _, weights, *_ in found} == {tuple(p.data_ptr() for p in model.parameters())}
    assert torch.get_num_threads() == 2
    seen = []
    threading.Thread(target=lambda: seen.append(torch.get_num_threads())).run()
    assert seen == [2]


@pytest.mark.parametrize("model_type", PRE_NORM)
def test_hooks_of_before_are_on_all_and_those_of_a_job_on_its_own_model(threads, model_type):
    threads(2)
    model = tiny_model(model_type).requires_grad_(False).eval()
    outer, inner = (ablation(tiny_direction(seed=i), 1.0, "resid_pre") for i in (0, 1))
    meeting = threading.Barrier(2, timeout=30)

    def compute(one, job):
        with intervene(one, *([inner] if job else [])):
            meeting.wait()  # the other's hooks are on, too
            found = logits(one)
            meeting.wait()
        return found

    with intervene(model, outer):
        plain = logits(model)
        with crew(model, compute, 2) as (run, pool):
            without, with_inner = pool.map(run, [0, 1])
        with intervene(model, inner):
            both = logits(model)
    assert torch.allclose(without, plain, atol=1e-5) and torch.allclose(with_inner, both, atol=1e-5)
    assert not torch.allclose(plain, both, atol=1e-2) and not torch.allclose(logits(model), plain, atol=1e-2)


def test_completions_and_counts_are_those_of_one_thread(model, threads, tmp_path):
    prompts = [[1, 7 + i % 5, *range(20, 22 + i % 7)] for i in range(40)]
    unit, three = torch.stack([tiny_direction(seed=i) for i in range(3)]), random_subspaces(32, 3, 1, 0)[0]
    arms = [
        BASELINE_ARM,
        direction_arm("one", "single", unit[0], 1.0, 1),
        subspace_arm("three", "subspace", three),
        per_layer_arm("each", "per_layer", unit, [1, 2], "resid_pre"),
    ]
    found, kept, counts = [], [], []
    for n in (1, 3):
        threads(n)
        store, before = Store(tmp_path / f"{n}.sqlite"), dict(COUNTS)
        found.append(complete_arms(model, "w", prompts, arms, "resid_pre", (2,), 0, 6, 4, store, "test"))
        kept.append(sorted(store.connection.execute("SELECT * FROM blobs").fetchall()))
        counts.append({name: COUNTS[name] - before[name] for name in before})
    assert found[0] == found[1] and kept[0] == kept[1] and len(kept[0]) > 8
    assert counts[0] == counts[1] and counts[0]["passes"] > 0


def test_an_error_is_raised_what_was_done_before_is_kept_and_the_rest_is_not_begun(model, threads, tmp_path):
    threads(2)
    store, begun = Store(tmp_path / "s.sqlite"), []

    def compute(_, job):
        begun.append(job)
        if job == 3:
            raise ValueError("job 3")
        time.sleep(0.02 if job > 3 else 0)
        return b"%d" % job

    jobs = [(f"key {i}", i) for i in range(200)]
    with pytest.raises(ValueError, match="job 3"), crew(model, compute, len(jobs)) as (run, pool):
        list(store.run(jobs, run, "test", pool=pool))
    kept = {i for i in range(200) if store.get(f"key {i}") is not None}
    assert set(begun) - kept == {3}
    assert len(begun) < 20 and torch.get_num_threads() == 2
    begun.clear()
    with crew(model, lambda _, job: compute(_, job + 1000), len(jobs)) as (run, pool):
        list(store.run(jobs, run, "test", pool=pool))
    assert {job - 1000 for job in begun} == set(range(200)) - kept


def test_a_large_model_and_a_single_thread_have_no_crew(model, threads, monkeypatch):
    with crew(model, lambda one, job: (one, job), 5) as (run, pool):
        assert pool is None and run(1) == (model, 1)
    threads(2)
    monkeypatch.setattr(module, "SMALL", 0)
    with crew(model, lambda one, job: (one, job), 5) as (run, pool):
        assert pool is None and run(1) == (model, 1)


def test_shares_are_even_in_number_and_size_and_hold_every_item_once():
    for n, most in ((0, 4), (1, 4), (32, 100), (33, 100), (40, 32), (200, 32), (9400, 1024), (5200, 1024), (7, 2)):
        cut = shares(n, most, 32)
        assert [i for share in cut for i in range(n)[share]] == list(range(n))
        sizes = [share.stop - share.start for share in cut]
        assert max(sizes, default=0) <= most and max(sizes, default=0) - min(sizes, default=0) <= 1
        assert len(cut) - -(-n // most) in (0, 1) and (len(cut) % 2 == 0 or n <= 32)
