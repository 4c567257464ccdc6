"""Logs of inspect: what a score means, epochs, what is left out; the comparison beside closed forms and a naive loop."""

import json
import math
import random
import zipfile
from pathlib import Path

import pytest
from inspect_files import sample, write_log
from scipy.stats import t

from refusal.analysis import inspect_logs
from refusal.analysis.inspect_logs import compare_logs, read_log
from refusal.io.errors import UserError

SUFFIXES = ("json", "eval")


def newcombe(base: list[float], edited: list[float]) -> tuple[float, float]:
    """Newcombe's method 10 with Wilson's limits at Student's quantile, of independent items."""
    n = len(base)
    z = t(n - 1).ppf(0.975)

    def wilson(k: float) -> tuple[float, float]:
        p = k / n
        centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)

    p, q = sum(edited) / n, sum(base) / n
    covariance = sum(a * b for a, b in zip(edited, base, strict=True)) / n - p * q
    if covariance > 0:
        covariance = max(0.0, covariance - 1 / (2 * n))
    phi = covariance / math.sqrt(p * (1 - p) * q * (1 - q))
    (pl, ph), (ql, qh) = wilson(sum(edited)), wilson(sum(base))

    def root(a: float, b: float) -> float:
        return math.sqrt(a * a - 2 * phi * a * b + b * b)

    return p - q - root(p - pl, qh - q), p - q + root(ph - p, q - ql)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_scorer_by_its_closed_form_and_a_naive_loop(tmp_path, suffix):
    rng = random.Random(0)
    columns = {}
    for scorer, (before, after) in {"match": (0.7, 0.4), "judge": (0.3, 0.35), "judge/strict": (0.5, 0.9)}.items():
        columns[scorer] = [[rng.random() < rate for _ in range(60)] for rate in (before, after)]
    paths = []
    for side, name in enumerate(("base", "edited")):
        rows = []
        for i in range(60):
            match, judge, strict = (columns[scorer][side][i] for scorer in columns)
            rows.append(sample(i, {"match": "C" if match else "I", "judge": [judge], "graded": {"strict": float(strict)}}))
        rng.shuffle(rows)
        paths.append(write_log(tmp_path / f"{name}.{suffix}", rows))
    table, notes = compare_logs(*map(read_log, paths))
    assert notes == [] and list(table) == ["match", "judge/0", "graded/strict"]
    expected_p = []
    for row, (base, edited) in zip(table.values(), columns.values(), strict=True):
        gained, lost = (sum(a and not b for a, b in zip(*two, strict=True)) for two in ((edited, base), (base, edited)))
        assert (row["n"], row["n_clusters"], row["n_gained"], row["n_lost"]) == (60, 60, gained, lost)
        assert (row["base"], row["edited"]) == (pytest.approx(sum(base) / 60), pytest.approx(sum(edited) / 60))
        tail = sum(math.comb(gained + lost, i) for i in range(min(gained, lost) + 1)) / 2 ** (gained + lost)
        expected_p.append(min(1.0, 2 * tail))  # McNemar: both tails of a fair coin
        assert row["p"] == pytest.approx(expected_p[-1])
        assert (row["difference_low"], row["difference_high"]) == pytest.approx(newcombe(base, edited))
    # Holm: each p times the number of those that are no less, and none below one before it.
    corrected = [max(min(1.0, p * sum(other >= p for other in expected_p)) for p in expected_p if p <= one) for one in expected_p]
    assert [row["p_holm"] for row in table.values()] == pytest.approx(corrected) and len(set(corrected)) > 1


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("value", "number"),
    [
        *[("C", 1), ("P", 0.5), ("I", 0), ("N", 0), (True, 1), (False, 0), (1, 1), (0.25, 0.25)],
        *[("yes", 1), ("No", 0), ("TRUE", 1), ("false", 0), ("0.75", 0.75)],
    ],
)
def test_what_a_value_means(tmp_path, suffix, value, number):
    """As inspect's value_to_float has it, whose documentation gives these."""
    log = read_log(write_log(tmp_path / f"log.{suffix}", [sample("a", {"s": value})]))
    assert log.scores == {"s": {"a": number}}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_epochs_are_one_item(tmp_path, suffix):
    """The mean over the epochs that are scored, in whichever order; a sample without any is left out, and counted."""
    values = {"a": ["C", "I", "C", "C"], "b": ["P", float("nan"), "I", "C"], "c": [float("nan")] * 4, "d": ["C"] * 4}
    rows = [sample(name, {"s": v}, epoch=e + 1) for name, of in values.items() for e, v in enumerate(of)]
    rows += [sample("e", None, epoch=e) for e in (1, 2, 3, 4)]  # an error in the sample
    base = read_log(write_log(tmp_path / f"base.{suffix}", list(reversed(rows))))
    assert base.scores == {"s": {"a": 0.75, "b": pytest.approx(0.5), "d": 1.0}} and set(base.asked) == set("abcde")
    edited = read_log(write_log(tmp_path / f"edited.{suffix}", [sample(name, {"s": "C"}) for name in "abcde"]))
    table, notes = compare_logs(base, edited)
    row = table["s"]
    assert (row["n"], row["n_gained"], row["n_lost"], row["p"], row["p_holm"]) == (3, 2, 0, None, None)
    assert row["difference"] == pytest.approx(1 - 2.25 / 3)
    assert notes == ["scorer s: 2 samples left out that it did not score in both"]


def test_samples_that_ask_the_same_are_one_cluster(tmp_path):
    """Each question four times over: the interval is as wide as of a quarter of them, or wider."""
    rng = random.Random(1)
    outcomes = [("C" if rng.random() < 0.5 else "I", "C" if rng.random() < 0.8 else "I") for _ in range(40)]

    def width(n: int, copies: int, same: bool) -> float:
        logs = []
        for side, name in enumerate(("base", "edited")):
            rows = [
                sample(f"{i}-{c}", {"s": outcomes[i][side]}, input=f"{i}" if same else f"{i}-{c}")
                for i in range(n)
                for c in range(copies)
            ]
            logs.append(read_log(write_log(tmp_path / f"{name}.json", rows)))
        row = compare_logs(*logs)[0]["s"]
        assert row["n_clusters"] == (n if same else n * copies)
        return row["difference_high"] - row["difference_low"]

    assert width(40, 4, same=True) == pytest.approx(width(40, 1, same=True), rel=0.05)
    assert width(40, 4, same=False) < 0.6 * width(40, 4, same=True)


def test_messages_with_other_ids_ask_the_same(tmp_path):
    """inspect gives each message an id anew in every run."""
    logs = []
    for run in ("one", "two"):
        content = [{"type": "text", "text": "Hello", "id": f"{run}-part"}]
        messages = [{"role": "system", "content": "Be kind", "id": run}, {"role": "user", "content": content, "id": f"{run}-2"}]
        logs.append(read_log(write_log(tmp_path / f"{run}.json", [sample(1, {"s": 1}, input=messages, choices=["a", "b"])])))
    assert compare_logs(*logs)[0]["s"]["n"] == 1


def test_what_differs_or_is_left_out_is_said(tmp_path):
    many = {"s": "C", "only": 1, "long": 812, "void": float("nan")}
    base = read_log(write_log(tmp_path / "base.json", [sample(i, many) for i in range(5)], status="error"))
    edited = [sample(i, {"s": "I", "long": 3, "void": 0.5}) for i in range(2, 9)]
    other = read_log(write_log(tmp_path / "edited.eval", edited, status="started", task="other"))
    table, notes = compare_logs(base, other)
    assert list(table) == ["s"] and table["s"]["n"] == 3 and table["s"]["difference"] == -1
    assert notes == [
        f"{base.path}: its status is error: it is not complete",
        f"{other.path}: its status is started: it is not complete",
        "the tasks differ: toy and other",
        f"samples left out, since one side alone has them: 2 of {base.path}, 4 of {other.path}",
        "scorer only left out: no sample has it in both",
        "scorer long left out: sample 2 has a score beyond 0 and 1",
        "scorer void left out: no sample has it in both",
    ]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("value", ["A", "", "inf", "nan", "1,5", {"deep": ["C"]}])
def test_a_score_that_is_no_number_is_said(tmp_path, suffix, value):
    """inspect warns and takes 0 for it."""
    path = write_log(tmp_path / f"log.{suffix}", [sample("q-1", {"good": 1, "grade": value})])
    said = r"log\.\w+: sample q-1, scorer grade(/deep)?: .* is no number, nor one of C, P, I, N"
    with pytest.raises(UserError, match=said) as error:
        read_log(path)
    assert "\n" not in str(error.value)


def test_logs_of_other_questions_are_not_compared(tmp_path):
    base = read_log(write_log(tmp_path / "base.json", [sample(1, {"s": 1})]))
    for rows, said in (
        ([sample(2, {"s": 1})], r"no sample is in both .*base.json and .*other.json"),
        ([sample(1, {"s": 1}, input="Something else?")], r"other.json: sample 1 asks something else than in .*base.json"),
        ([sample(1, {"s": 1}, target="y")], r"sample 1 asks something else"),
        ([sample(1, {"u": 1})], r"no scorer of both .* can be compared; scorer s left out: .*; scorer u left out"),
    ):
        with pytest.raises(UserError, match=said):
            compare_logs(base, read_log(write_log(tmp_path / "other.json", rows)))


def zipped(path: Path, compression: int = zipfile.ZIP_STORED, **entries: str) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, text in entries.items():
            file.writestr(name.replace("_json", ".json").replace("__", "/"), text)
    return path


HEADER = json.dumps({"version": 2, "status": "success", "eval": {"task": "t"}})


def test_what_is_no_log_is_one_sentence(tmp_path):
    texts = {
        **{"empty": "", "half": '{"version": 2, "status"', "list": "[1]", "other": '{"model_type": "qwen2"}', "bytes": "\udcff"},
        **{"deep": "[" * 100_000, "rows": json.dumps(json.loads(HEADER) | {"samples": [1]})},
        "inputs": json.dumps(json.loads(HEADER) | {"samples": [sample(1, {"s": 1}, input=[{"role": "user"}])]}),
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_bytes(text.encode(errors="surrogateescape"))
        (tmp_path / f"{name}.eval").write_bytes(text.encode(errors="surrogateescape"))
    zipped(tmp_path / "no_header.eval", samples__a="{}")
    zipped(tmp_path / "bad_sample.eval", header_json=HEADER, samples__a_epoch_1_json="{")
    whole = write_log(tmp_path / "whole.eval", [sample(i, {"s": 1}) for i in range(9)]).read_bytes()
    (tmp_path / "cut.eval").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.eval").write_bytes(whole[:400] + bytes(200) + whole[600:])
    paths = [path for path in tmp_path.iterdir() if path.name != "whole.eval"]
    assert len(paths) == 2 * len(texts) + 4
    for path in paths:
        with pytest.raises(UserError, match=r": no log of inspect \(\w+: .*give a .eval file, or a .json of version 2") as error:
            read_log(path)
        assert "\n" not in str(error.value) and path.name in str(error.value), path


def test_other_versions_and_doubles_are_said(tmp_path):
    with pytest.raises(UserError, match=r"x.json: is of version 3, and 2 is read"):
        read_log(write_log(tmp_path / "x.json", [], version=3))
    for second in (sample(1, {"s": 1}), sample(1, {"s": 1}, epoch=2, input="Something else?")):
        with pytest.raises(UserError, match=r"sample 1 is there twice, or its epochs ask other things"):
            read_log(write_log(tmp_path / "x.json", [sample(1, {"s": 1}), second]))


def test_two_scorers_of_one_name_are_said(tmp_path):
    with pytest.raises(UserError, match=r"x.json: sample 1: two scorers give a/b"):
        read_log(write_log(tmp_path / "x.json", [sample(1, {"a": {"b": 1}, "a/b": 0})]))


def test_a_zip_that_grows_is_not_unpacked(tmp_path, monkeypatch):
    """A sample of 300 MB that takes 0.3 MB zipped; many that are too much together; a large JSON."""
    bomb = tmp_path / "bomb.eval"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("header.json", HEADER)
        with file.open("samples/a_epoch_1.json", "w") as entry:
            for _ in range(300):
                entry.write(bytes(2**20))
    assert bomb.stat().st_size < 2**20
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(UserError, match=r"bomb.eval: samples/a_epoch_1.json: 314572800 bytes, and 268435456 are read"):
        read_log(bomb)
    whole = write_log(tmp_path / "whole.eval", [sample(i, {"s": 1}) for i in range(9)])
    monkeypatch.setattr(inspect_logs, "MAX_TOTAL_BYTES", 1000)
    with pytest.raises(UserError, match=r"whole.eval: all samples: \d+ bytes, and 1000 are read"):
        read_log(whole)
    monkeypatch.setattr(inspect_logs, "MAX_JSON_BYTES", 100)
    with pytest.raises(UserError, match=r"whole.json: whole.json: \d+ bytes, and 100 are read"):
        read_log(write_log(tmp_path / "whole.json", [sample(1, {"s": 1})]))


def test_a_zip_that_lies_about_a_size_or_is_of_another_kind(tmp_path):
    row = json.dumps(sample("a", {"s": 1}))
    path = zipped(tmp_path / "lies.eval", zipfile.ZIP_DEFLATED, header_json=HEADER, samples__a_epoch_1_json=row)
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 24 : entry + 28] = (10).to_bytes(4, "little")  # the uncompressed size
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"lies.eval: no log of inspect \(BadZipFile"):
        read_log(path)
    data[entry + 10 : entry + 12] = (93).to_bytes(2, "little")  # Zstandard, which zipfile has from Python 3.14 on
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"lies.eval: (its zip is compressed|no log of inspect)"):
        read_log(path)


def test_no_name_in_a_zip_is_a_path(tmp_path):
    evil = {"samples__..__..__..__evil_epoch_1_json": json.dumps(sample("../../evil", {"s": 1}))}
    (tmp_path / "inner").mkdir()
    log = read_log(zipped(tmp_path / "inner/evil.eval", header_json=HEADER, **evil))
    assert log.scores == {"s": {"../../evil": 1.0}} and sorted(p.name for p in tmp_path.rglob("*")) == ["evil.eval", "inner"]
