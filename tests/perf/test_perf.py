"""The benchmarks measure the right thing: arms agree with each other, and the harness with arithmetic. No times here."""

import csv
import io
import json
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tiny import tiny_model
from torch.utils.flop_counter import FlopCounterMode

from perf import engine, extraction, growth, harness, orthogonalize, workload
from perf.__main__ import merge
from refusal.io.files import csv_text
from refusal.io.store import Store

QUIET = Console(quiet=True)


def test_the_workload_is_that_of_record():
    prompts = workload.prompts()
    assert len(prompts) == 256 and prompts == workload.prompts() and prompts[:5] == workload.prompts(5)
    assert {len(p) for p in prompts} <= set(range(20, 61)) and min(map(len, prompts)) == 20 and max(map(len, prompts)) == 60
    assert len({tuple(p[:12]) for p in prompts}) == 1 and len({p[12] for p in prompts}) > 200
    one, two = (workload.model().model.layers[3].mlp.down_proj.weight for _ in range(2))
    assert torch.equal(one, two)
    assert 125e6 < sum(p.numel() for p in workload.model().parameters()) < 135e6


def test_the_bound_is_a_forwards_products_with_weights():
    """Against torch's own count of a forward's operations, less those of attention."""
    model, ids = tiny_model("qwen2"), torch.randint(3, 90, (5, 7))
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(ids)
    with FlopCounterMode(display=False) as bound:
        workload.matrix_products(model, 35, 16, 3, 35)
    products = {"aten.mm", "aten.addmm"}
    count = {
        name: sum(n for op, n in c.get_flop_counts()["Global"].items() if str(op) in products)
        for name, c in (("f", forward), ("b", bound))
    }
    assert count["b"] == count["f"] > 0


def test_ratios_are_taken_round_by_round_and_arms_take_turns():
    turns = []
    found = harness.measure({"a": lambda: turns.append("a"), "b": lambda: turns.append("b") or 7}, QUIET, rounds=3)
    assert turns == ["a", "b"] * 3 and found.values == {"a": None, "b": 7}
    found.seconds = {"a": [1.0, 6.0, 10.0], "b": [2.0, 3.0, 4.0]}
    assert (found.median("a"), found.ratio("a", "b")) == (6.0, harness.Ratio(2.0, 0.5, 2.5))


def test_peak_memory_is_what_an_arm_held_at_most():
    def held() -> None:
        kept = torch.ones(25_000_000)
        time.sleep(0.1)
        del kept

    found = harness.measure({"held": held, "none": lambda: time.sleep(0.1)}, QUIET, rounds=1)
    assert 95 < found.peak_mb["held"] < 130 and found.peak_mb["none"] < 20
    code = "import time; kept = bytearray(b'1' * 200_000_000); time.sleep(0.3); print('done')"
    output, seconds, peak = harness.in_subprocess(["-c", code])
    assert output == "done\n" and seconds > 0.3 and 200 < peak < 700
    with pytest.raises(subprocess.CalledProcessError):
        harness.in_subprocess(["-c", "raise SystemExit(3)"])


def test_sections_are_merged_and_another_machines_are_taken_out(tmp_path):
    path = tmp_path / "metrics" / "perf.json"
    assert merge(path, {"cpu": "one"}, "sweep", {"ratio": 2.0}) == []
    assert merge(path, {"cpu": "one"}, "extraction", {"ratio": 3.0}) == []
    assert list(json.loads(path.read_text())) == ["machine", "extraction", "sweep"]
    assert merge(path, {"cpu": "two"}, "sweep", {"ratio": 1.0}) == ["extraction"]
    assert json.loads(path.read_text()) == {"machine": {"cpu": "two"}, "sweep": {"ratio": 1.0}}


def test_an_unknown_section_is_one_sentence():
    done = subprocess.run([sys.executable, "-m", "perf", "speed"], capture_output=True, text=True)
    assert done.returncode == 2 and "no section speed: choose among extraction," in done.stderr and "Traceback" not in done.stderr


def test_all_ways_of_extraction_find_the_same(tmp_path):
    model, ids = tiny_model("qwen2"), [[7, 8, 9, *tokens] for tokens in ([5, 6], [4], [3, 2, 1, 5], [5, 6, 7])]
    bridge = extraction.bridge_of(model, tmp_path / "bridge")
    expected = extraction.sequential(model, ids)
    for method in ("sequential", "batched"):
        assert (extraction.ours(model, ids, tmp_path, method) - expected).abs().max() < 1e-5
    assert (extraction.padded(model, ids) - expected).abs().max() < 1e-5 and extraction.padded(model, ids).dtype == torch.float64
    assert (bridge(ids) - expected).abs().max() < 1e-5


def test_all_ways_of_editing_write_the_same(tmp_path, monkeypatch):
    for name, value in (("D_MODEL", 64), ("WIDTH", 96), ("VOCAB", 128), ("HEADS", 4)):
        monkeypatch.setattr(orthogonalize, name, value)
    source = orthogonalize.synthetic(tmp_path / "source", 3, shard_bytes=60_000)
    assert len(list(source.glob("*.safetensors"))) > 3
    read = lambda folder: {n: t for path in folder.glob("*.safetensors") for n, t in load_file(path).items()}  # noqa: E731
    orthogonalize.copy(source, tmp_path / "copy")
    assert {p.name: p.read_bytes() for p in source.iterdir()} == {p.name: p.read_bytes() for p in (tmp_path / "copy").iterdir()}
    report = orthogonalize.ours(source, tmp_path / "ours")
    orthogonalize.reload(source, tmp_path / "reload")
    ours, usual, before = read(tmp_path / "ours"), read(tmp_path / "reload"), read(source)
    assert report.n_edited == 7 and set(ours) == set(usual) == set(before)
    for name in ours:
        assert (ours[name].float() - usual[name].float()).abs().max() < 1e-3, name
        assert torch.equal(ours[name], before[name]) == (name not in report.residuals)


def test_growth_has_a_row_for_each_size_and_says_what_doubles():
    points = growth.measure("prompts", {n: lambda n=n: time.sleep(n / 500) for n in (2, 4, 8, 16, 32)}, QUIET, 1)
    assert [(p["n"], p["factor"]) for p in points] == [(2, 1), (4, 2), (8, 4), (16, 8), (32, 16)]
    for point, seconds, peak in zip(points, (1, 2, 4, 8, 17), (10, 11, 10, 10, 12), strict=True):
        point |= {"seconds": seconds, "peak_mb": peak}
    assert growth.scalars(points) == {"prompts_last_doubling": 2.125, "prompts_peak_mb_growth": 2}
    assert [row["seconds"] for row in csv.DictReader(io.StringIO(csv_text(points)))] == ["1", "2", "4", "8", "17"]
    assert growth.table(points).row_count == 5


def test_bare_processes_share_the_units_that_ray_is_given(tmp_path):
    """Each unit is computed by one of them, and together they give what one store does."""
    lm = workload.lm(workload.model(shape=(32_000, 24, 48, 2, 2)))
    whole = engine.answers(lm, Store(tmp_path / "whole.sqlite"), 40)
    shares = [engine.answers(lm, engine.Share(tmp_path / f"{i}.sqlite", i, 2), 40) for i in range(2)]
    for name, rows in whole.items():
        for i, tokens in enumerate(rows):
            assert sorted(share[name][i] for share in shares) == [[], tokens] and len(tokens) == 32
    assert 0.3 < sum(bool(row) for row in shares[0]["baseline"]) / 40 < 0.7
