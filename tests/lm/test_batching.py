"""Rows at once and replicas: out of memory halves a batch, threads share jobs, and neither changes a value.

Memory is a limit on the rows of a forward, set by the test.
"""

import threading
import time

import pytest
import torch
from tiny import PRE_NORM, tiny_direction, tiny_lm, tiny_model
from transformers import DynamicCache

from refusal.analysis.harmless_kl import answer_log_probs
from refusal.io.errors import UserError
from refusal.io.store import Store
from refusal.lm import batching
from refusal.lm.batching import COUNTS, count_forwards, job_slices, model_replicas
from refusal.lm.load import load_model
from refusal.method.activations import last_token_resid_pre
from refusal.method.generate import Decoding, generate
from refusal.method.interventions import BASELINE, Addition, Intervention
from refusal.method.sweep import complete

PROMPTS = [[5 + i, 9, 30 + i][: 1 + i % 3] * (1 + i % 4) for i in range(7)]
IDS = torch.tensor([[1, 7, 9, 30]])


@pytest.fixture(autouse=True)
def _nothing_learnt():
    batching._fits.clear()
    batching.BATCH_SIZES.clear()


@pytest.fixture(scope="module")
def lm():
    lm = tiny_lm("qwen2", stop={7, 11, 40, 41})
    count_forwards(lm.model.requires_grad_(False))
    return lm


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# --- Out of memory ---------------------------------------------------------------------------------------------------------


def limit(monkeypatch, model, rows: int, step: int = 0, error=torch.OutOfMemoryError) -> list[int]:
    """From forward `step` on, more than `rows` rows don't fit; the sizes tried."""
    tried: list[int] = []
    forward = model.model.forward

    def limited(*args, **kwargs):
        n = len(kwargs["input_ids"])
        tried.append(n)
        if n > rows and len(tried) > step:
            raise error("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", limited)
    return tried


@pytest.mark.parametrize("method", ["batched", "batched_unmasked"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_activations(lm, monkeypatch, capsys, method, error):
    whole = last_token_resid_pre(lm, PROMPTS, method)
    tried = limit(monkeypatch, lm.model, 2, error=error)
    assert (last_token_resid_pre(lm, PROMPTS, method) - whole).abs().max() < 1e-5
    assert tried == [7, 3, 1, 1, 1, 1, 1, 1, 1] and batching.BATCH_SIZES == {"activations": 1}
    tried.clear()
    last_token_resid_pre(lm, PROMPTS, method)
    assert max(tried) == 1  # what did not fit is not tried again
    assert capsys.readouterr().err.splitlines()[0] == "activations: out of memory with 7 rows at once, going on with 3"


@pytest.mark.parametrize("step", [0, 1, 4])
def test_generation_with_a_direction_a_row_and_an_addition(lm, monkeypatch, step):
    alphas = (1.0, 0.0, 1.5, 1.0, 0.5, 2.0, 1.0)
    ours = [Intervention(str(i), v, a) for i, (v, a) in enumerate(zip(tiny_direction(rows=7), alphas, strict=True))]

    def run():
        return generate(lm, PROMPTS, Decoding(12), ours, addition=Addition(3 * tiny_direction(seed=1), 1))

    whole = run()
    assert len({len(c) for c in whole}) > 1  # some end early, so rows leave before and after memory runs out
    limit(monkeypatch, lm.model, 3, step)
    assert run() == whole


def test_log_probabilities(lm, monkeypatch):
    rows = list(zip(PROMPTS, [[3, 4], [5], [6, 7, 8], [9], [10, 11], [12], [13]], strict=True))
    whole = answer_log_probs(lm, rows)
    limit(monkeypatch, lm.model, 3)
    for ours, theirs in zip(answer_log_probs(lm, rows), whole, strict=True):
        assert (ours - theirs).abs().max() < 1e-4


def test_one_row_that_does_not_fit_is_one_sentence_and_other_errors_pass(lm, monkeypatch):
    limit(monkeypatch, lm.model, 0)
    with pytest.raises(UserError, match=r"memory runs out at a single row of generation: use bfloat16, or device: auto"):
        generate(lm, PROMPTS, Decoding(3))
    limit(monkeypatch, lm.model, 0, error=lambda _: RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        last_token_resid_pre(lm, PROMPTS, "batched")


def test_device_auto_gives_the_same_model(lm, tmp_path):
    lm.model.save_pretrained(tmp_path)
    auto = tiny_lm(load_model(tmp_path, device="auto"))
    assert torch.equal(logits(auto.model), logits(lm.model))
    assert torch.equal(last_token_resid_pre(auto, PROMPTS, "batched"), last_token_resid_pre(lm, PROMPTS, "batched"))


# --- batch_size: auto ------------------------------------------------------------------------------------------------------


def test_auto_fills_half_of_what_the_weights_leave_and_is_printed_and_noted(lm, monkeypatch, capsys):
    assert batching.rows_at_once(7, lm.model, 1, "sweep") == 7 and not batching.BATCH_SIZES  # a number is taken
    cache = DynamicCache()
    with torch.no_grad():
        lm.model(torch.full((1, 64), 5), past_key_values=cache, use_cache=True)
    kept = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) * batching.ROW_TOKENS // 64
    row = kept + 4 * 9 * lm.model.config.vocab_size  # and the logits
    weights, rows = sum(p.nbytes for p in lm.model.parameters()), {}
    for room in (10**7, 10**8, 10**12):
        monkeypatch.setattr(batching, "device_memory", lambda _, room=room: weights + 2 * room)
        rows[room] = batching.rows_at_once("auto", lm.model, 9, "sweep")
        assert rows[room] * row <= room
        assert capsys.readouterr().err == f"sweep: batch_size auto is {rows[room]} rows here\n"
        assert {"sweep.batch_size": rows[room]} == batching.BATCH_SIZES
    assert 1 <= rows[10**7] < rows[10**8] < rows[10**12] == batching.MAX_ROWS
    assert all(n & (n - 1) == 0 for n in rows.values())
    monkeypatch.setattr(batching, "device_memory", lambda _: 1000)
    with pytest.raises(UserError, match=r"params\.yaml: sweep\.batch_size: auto finds no room for a single row"):
        batching.rows_at_once("auto", lm.model, 1, "sweep")


# --- Replicas --------------------------------------------------------------------------------------------------------------


def test_jobs_run_side_by_side_on_replicas_that_share_their_weights(lm, threads):
    threads(2)
    meeting = threading.Barrier(2, timeout=30)

    def compute(replica, job):
        meeting.wait()  # broken if jobs came one after another
        assert torch.get_num_threads() == 1
        return job, replica, replica.model.layers[0], [p.data_ptr() for p in replica.parameters()]

    with model_replicas(lm.model, compute, 4) as (run, pool):
        jobs, replicas, blocks, weights = zip(*pool.map(run, range(4)), strict=True)
    assert jobs == (0, 1, 2, 3) and len(set(replicas)) == len(set(blocks)) == 2 and lm.model in replicas
    assert all(pointers == [p.data_ptr() for p in lm.model.parameters()] for pointers in weights)
    assert torch.get_num_threads() == 2
    seen = []
    threading.Thread(target=lambda: seen.append(torch.get_num_threads())).run()
    assert seen == [2]


@pytest.mark.parametrize("model_type", PRE_NORM)
def test_hooks_of_before_are_on_all_and_those_of_a_job_on_its_own_replica(threads, model_type):
    threads(2)
    model = tiny_model(model_type).requires_grad_(False)
    outer, inner = (Intervention(str(i), tiny_direction(seed=i)) for i in (0, 1))
    meeting = threading.Barrier(2, timeout=30)

    def compute(replica, intervention):
        with intervention.on(replica):
            meeting.wait()  # the other's hooks are on, too
            result = logits(replica)
            meeting.wait()
        return result

    with outer.on(model):
        plain = logits(model)
        with model_replicas(model, compute, 2) as (run, pool):
            without, with_inner = pool.map(run, [BASELINE, inner])
        with inner.on(model):
            nested = logits(model)
    assert torch.allclose(without, plain, atol=1e-5) and torch.allclose(with_inner, nested, atol=1e-5)
    assert not torch.allclose(plain, nested, atol=1e-2) and not torch.allclose(logits(model), plain, atol=1e-2)


def test_completions_and_counts_are_those_of_one_thread(lm, threads, tmp_path):
    prompts = [[1, 7 + i % 5, *range(20, 22 + i % 7)] for i in range(40)]
    unit = torch.linalg.qr(tiny_direction(rows=3).T)[0].T
    interventions = [
        BASELINE,
        Intervention("one", unit[0]),
        Intervention("three", unit),
        Intervention("each", torch.stack([0 * unit[:1], unit[1:2], unit[2:3]])),
    ]
    completions, kept, counts = [], [], []
    for n in (1, 3):
        threads(n)
        store, before = Store(tmp_path / f"{n}.sqlite"), dict(COUNTS)
        completions.append(complete(lm, prompts, interventions, Decoding(6, 4), store, "test"))
        kept.append(sorted(store.connection.execute("SELECT * FROM blobs").fetchall()))
        counts.append({name: COUNTS[name] - before[name] for name in before})
    assert completions[0] == completions[1] and kept[0] == kept[1] and len(kept[0]) > 8
    assert counts[0] == counts[1] and counts[0]["tokens"] > counts[0]["passes"] > 0


def test_an_error_is_raised_what_was_done_before_is_kept_and_the_rest_is_not_begun(lm, threads, tmp_path):
    threads(2)
    store, begun = Store(tmp_path / "s.sqlite"), []

    def compute(_, job):
        begun.append(job)
        if job == 3:
            raise ValueError("job 3")
        time.sleep(0.02 if job > 3 else 0)
        return b"%d" % job

    jobs = [(f"key {i}", i) for i in range(200)]
    with pytest.raises(ValueError, match="job 3"), model_replicas(lm.model, compute, len(jobs)) as (run, pool):
        list(store.run(jobs, run, "test", pool=pool))
    kept = {i for i in range(200) if store.get(f"key {i}") is not None}
    assert set(begun) - kept == {3}
    assert len(begun) < 20 and torch.get_num_threads() == 2
    begun.clear()
    with model_replicas(lm.model, lambda _, job: compute(_, job + 1000), len(jobs)) as (run, pool):
        list(store.run(jobs, run, "test", pool=pool))
    assert {job - 1000 for job in begun} == set(range(200)) - kept


@pytest.mark.parametrize(("n_threads", "below"), [(1, 10**7), (2, 0)])
def test_a_large_model_and_a_single_thread_have_no_replicas(lm, threads, monkeypatch, n_threads, below):
    threads(n_threads)
    monkeypatch.setattr(batching, "REPLICATED_BELOW", below)
    with model_replicas(lm.model, lambda model, job: (model, job), 5) as (run, pool):
        assert pool is None and run(1) == (lm.model, 1)


def test_job_slices_are_even_in_number_and_size_and_hold_every_item_once():
    for n, most in ((0, 4), (1, 4), (32, 100), (33, 100), (40, 32), (200, 32), (9400, 1024), (5200, 1024), (7, 2)):
        slices = job_slices(n, most, 32)
        assert [i for one in slices for i in range(n)[one]] == list(range(n))
        sizes = [one.stop - one.start for one in slices]
        assert max(sizes, default=0) <= most and max(sizes, default=0) - min(sizes, default=0) <= 1
        assert len(slices) - -(-n // most) in (0, 1) and (len(slices) % 2 == 0 or n <= 32)
