"""The resume store: kill it anywhere, run it again, and nothing is computed twice or wrongly."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest
from place import ROOT

from refusal.io.code import code_of
from refusal.io.files import rounded
from refusal.io.progress import progress
from refusal.io.store import Store, key


def test_put_and_get(tmp_path):
    store = Store(tmp_path / "deep" / "store.sqlite")
    assert store.get("a") is None
    store.put("a", b"\x00one")
    store.put("b", b"")
    store.put("a", b"two")  # a key already there keeps its value
    assert store.get("a") == b"\x00one" and store.get("b") == b""
    assert Store(tmp_path / "deep" / "store.sqlite").get("a") == b"\x00one"


@pytest.fixture
def path(tmp_path):
    """A store of fifty values, closed."""
    store = Store(tmp_path / "store.sqlite")
    for i in range(50):
        store.put(f"key {i}", f"value {i}".encode() * 100)
    store.connection.close()
    return store.path


def damage(path, how="pages overwritten"):
    content = path.read_bytes()
    assert len(content) > 10 * 4096
    path.write_bytes(
        {
            "no database": b"this is no database " * 3000,
            "cut in half": content[: len(content) // 2],
            "pages overwritten": content[:4096] + b"\xa5" * (len(content) - 4096),
        }[how]
    )


def test_a_damaged_blob_is_dropped_and_said(path, capsys):
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE blobs SET value = ? WHERE key = 'key 7'", (b"value 8",))
    connection.close()
    store = Store(path)
    assert store.get("key 7") is None
    said = capsys.readouterr().err
    assert "key 7" in said and "damaged" in said and str(path) in said
    assert store.get("key 7") is None and capsys.readouterr().err == ""  # said once: the row is gone
    assert store.get("key 8") == b"value 8" * 100
    store.put("key 7", b"new")
    assert store.get("key 7") == b"new"


@pytest.mark.parametrize("how", ["no database", "cut in half", "pages overwritten"])
def test_a_corrupted_file_is_set_aside_and_said_and_its_values_computed_again(path, capsys, how):
    damage(path, how)
    store, computed = Store(path), []
    jobs = [(f"key {i}", i) for i in range(50)]
    assert list(store.run(jobs, lambda i: computed.append(i) or b"%d" % i, "test")) == [b"%d" % i for i in range(50)]
    said = capsys.readouterr().err
    assert said.count("is corrupted (") == 1 and "store.sqlite.corrupt-1" in said and computed == list(range(50))
    store.connection.close()
    store = Store(path)
    assert store.get("key 49") == b"49"
    store.connection.close()
    path.write_bytes(b"this is no database " * 500)
    Store(path)
    assert {file.name for file in path.parent.glob("*.corrupt-*")} == {
        f"store.sqlite.corrupt-{n}" for n in (1, 2)
    }  # both are kept


def test_a_file_that_goes_bad_between_get_and_put_is_set_aside_too(path, capsys):
    store = Store(path)
    assert store.get("key 51") is None
    store.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(path)
    store.connection.execute("PRAGMA shrink_memory")
    store.put("key 51", b"new")
    assert store.get("key 51") == b"new" and "store.sqlite.corrupt-1" in capsys.readouterr().err


def test_the_second_process_to_meet_a_damaged_file_leaves_the_new_one_alone(path, capsys):
    damage(path)
    first, second = Store(path), Store(path)
    assert first.get("key 1") is None
    first.put("key 1", b"again")
    assert second.get("key 1") == b"again" and capsys.readouterr().err.count("is corrupted (") == 1
    assert [file.name for file in path.parent.glob("*.corrupt-*")] == ["store.sqlite.corrupt-1"]


def test_run_keeps_the_order_and_computes_only_what_is_missing(tmp_path):
    store, computed = Store(tmp_path / "store.sqlite"), []

    def compute(i):
        computed.append(i)
        return b"%d" % i

    jobs = [(f"key {i}", i) for i in (3, 1, 2)]
    assert list(store.run(jobs[:2], compute, "test")) == [b"3", b"1"]
    assert list(store.run([*jobs, ("key 1", 1)], compute, "test")) == [b"3", b"1", b"2", b"1"]
    assert computed == [3, 1, 2]


def test_a_failing_job_keeps_what_was_done_before_it(tmp_path):
    def compute(i):
        if i == 2:
            raise RuntimeError("stop")
        return b"%d" % i

    jobs = [(f"key {i}", i) for i in range(4)]
    with pytest.raises(RuntimeError, match="stop"):
        list(Store(tmp_path / "store.sqlite").run(jobs, compute, "test"))
    store = Store(tmp_path / "store.sqlite")
    assert [store.get(name) for name, _ in jobs] == [b"0", b"1", None, None]


def test_the_bar_counts_what_jobs_tell_of_themselves(tmp_path, monkeypatch):
    bars = []

    class Bar(nullcontext):
        def __init__(self, total, *_):
            self.total, self.n, self.shown = total, 0, []
            bars.append(self)

        def __enter__(self):
            return self

        def update(self, n):
            self.n += n
            self.shown.append(self.n)

    monkeypatch.setattr("refusal.io.store.progress", Bar)
    store = Store(tmp_path / "store.sqlite")
    store.put("key 10", b"stored")

    def compute(size):
        for done in (1, 3, 2):  # begun anew after 3
            store.done(done)
        return b""

    list(store.run([(f"key {n}", n) for n in (4, 10, 5)], compute, "test", size=lambda n: n))
    store.done(9)  # of nothing
    assert bars[0].total == 19 and bars[0].shown == [1, 3, 2, 4, 14, 15, 17, 16, 19]


SCRIPT = """
import sys, time
from pathlib import Path
from refusal.io.store import Store, key
folder, first, last, pause = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])

def compute(i):
    with (folder / "computed").open("a") as file:
        file.write(f"{i}\\n")
    time.sleep(pause)
    return b"%d" % i * 1000

jobs = [(key("job", (), i=i), i) for i in range(first, last)]
values = list(Store(folder / "store.sqlite").run(jobs, compute, "test"))
assert values == [b"%d" % i * 1000 for i in range(first, last)]
"""


def start(folder, first, last, pause):
    command = [sys.executable, "-c", SCRIPT, str(folder), str(first), str(last), str(pause)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)


def finish(process):
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()


def computed(folder):
    file = folder / "computed"
    return [int(line) for line in file.read_text().split()] if file.exists() else []


def test_kill_9_in_the_middle_loses_at_most_the_job_at_hand(tmp_path):
    for wanted in (5, 12):
        process = start(tmp_path, 0, 30, 0.05)
        while len(computed(tmp_path)) < wanted:
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    finish(start(tmp_path, 0, 30, 0))
    runs = computed(tmp_path)
    assert set(runs) == set(range(30)) and len(runs) <= 30 + 2  # the jobs that the two kills met, and no other
    assert sorted(runs[-10:]) == list(range(20, 30))


def test_two_processes_write_at_once(tmp_path):
    for process in [start(tmp_path, 0, 150, 0.002), start(tmp_path, 50, 200, 0.002)]:
        finish(process)
    assert set(computed(tmp_path)) == set(range(200))
    store = Store(tmp_path / "store.sqlite")
    assert all(store.get(key("job", (), i=i)) == b"%d" % i * 1000 for i in range(200))


def test_a_key_hashes_every_part():
    base = {"weights": "abc", "alpha": 1.0, "rows": [[1, 2], [3]], "addition": None}
    changed = (
        {"weights": "abd"},
        {"alpha": 1.0000001},
        {"rows": [[1], [2, 3]]},
        {"rows": [[3], [1, 2]]},
        {"addition": 0},
        {"more": 1},
    )
    keys = [
        key("completions", (code_of,), **base),
        key("cost", (code_of,), **base),
        key("completions", (key,), **base),
        key("completions", (), **base),
        key("completions", (code_of, rounded), **base),
        key("completions", (code_of,), **{name: value for name, value in base.items() if name != "alpha"}),
        *(key("completions", (code_of,), **base | change) for change in changed),
    ]
    assert len(set(keys)) == len(keys)
    # The order of arguments says nothing, nor that of functions.
    assert key("completions", (code_of,), **dict(reversed(base.items()))) == keys[0]
    assert key("completions", (rounded, code_of), **base) == keys[4]


def test_a_key_is_the_same_in_another_process():
    script = "from refusal.io.store import key; print(key('a', (), b={'x': 1.5, 'c': ['é', None]}))"
    said = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True).stdout
    assert said.strip() == key("a", (), b={"c": ["é", None], "x": 1.5})


def bar(monkeypatch, capsys, total: int, unit: str, steps: int, seconds: float) -> str:
    """What a bar of `total` says on stderr over so many steps of so many seconds."""
    clock = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    with progress(total, "work", unit) as shown:
        for _ in range(steps):
            clock[0] += seconds
            shown.update(total // steps)
    return capsys.readouterr().err


@pytest.mark.parametrize(("steps", "seconds", "lines"), [(5, 0.1, 0), (5, 0.8, 1), (40, 1.0, 3)])
def test_a_bar_in_a_log_file_is_a_line_an_update(monkeypatch, capsys, steps, seconds, lines):
    said = bar(monkeypatch, capsys, steps, "step", steps, seconds)
    assert "\r" not in said and len(said.splitlines()) == lines
    if lines:
        assert said.endswith("\n") and said.splitlines()[-1].startswith(f"work: 100%|##########| {steps}/{steps} [")
    assert lines < 2 or re.match(r"work: +3\d%.* 15/40 \[00:15<00:25, +1\.00step/s\]$", said.splitlines()[0])


@pytest.mark.parametrize(("seconds", "shown"), [(0.2, False), (2.0, True)])
def test_a_bar_on_a_terminal_stays_in_its_line(monkeypatch, capsys, seconds, shown):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    said = bar(monkeypatch, capsys, 2_000_000, "B", 2, seconds)
    if shown:
        assert said.startswith("\r") and said.count("\n") == 1 and "work: 100%" in said and "2.00M/2.00M" in said
    else:
        assert said == ""
