"""Two models on the same documents: rates, the paired difference, McNemar's exact test, Holm's correction."""

import json
from math import comb
from pathlib import Path

import pytest

from refusal.analysis.samples import compare_samples, read_samples
from refusal.io.errors import UserError
from refusal.stats import paired_difference


def write(
    folder: Path, task: str, scores: list[float], metric: str = "acc", date: str = "_2026-01-01T10-00-00.5", **fields
) -> Path:
    """A file as `lm_eval --log_samples` names and fills it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"doc_id": i, "doc": {"q": i}, "doc_hash": f"{i}", "filter": "none", metric: s} | fields for i, s in enumerate(scores)
    ]
    path = folder / f"samples_{task}{date}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    return path


def scores(gained: int, lost: int, both: int, neither: int) -> tuple[list[float], list[float]]:
    """The base's and the other's, with as many documents of each kind."""
    kinds = [(0.0, 1.0)] * gained + [(1.0, 0.0)] * lost + [(1.0, 1.0)] * both + [(0.0, 0.0)] * neither
    return [a for a, _ in kinds], [b for _, b in kinds]


def exact(gained: int, lost: int) -> float:
    """Two-sided: both tails of a fair coin's tosses."""
    n, k = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(comb(n, i) for i in range(k + 1)) / 2**n)


def test_each_task_by_its_closed_form(tmp_path):
    counts = {"arc_easy": (2, 11, 40, 7), "boolq": (5, 5, 20, 10), "open_book_qa": (0, 6, 30, 4), "piqa": (0, 0, 9, 3)}
    for task, each in counts.items():
        for name, values in zip(("base", "edited"), scores(*each), strict=True):
            write(tmp_path / name / "some__model", task, values)
    table = compare_samples(read_samples(tmp_path / "base"), read_samples(tmp_path / "edited"))
    assert list(table) == sorted(counts)
    for task, (gained, lost, both, neither) in counts.items():
        row, n = table[task], gained + lost + both + neither
        assert (row["n"], row["n_gained"], row["n_lost"]) == (n, gained, lost)
        assert row["base"] == pytest.approx((lost + both) / n) and row["edited"] == pytest.approx((gained + both) / n)
        assert row["difference"] == pytest.approx((gained - lost) / n)
        assert row["difference_low"] < row["difference"] < row["difference_high"]
        assert row["p"] == pytest.approx(exact(gained, lost))
    # Holm: the least p times 4, the next times 3 ...; none below the one before.
    p = {task: exact(*each[:2]) for task, each in counts.items()}
    assert table["arc_easy"]["p_holm"] == pytest.approx(4 * p["arc_easy"])
    assert table["open_book_qa"]["p_holm"] == pytest.approx(max(3 * p["open_book_qa"], 4 * p["arc_easy"]))
    assert table["boolq"]["p_holm"] == table["piqa"]["p_holm"] == 1.0


def test_equal_documents_are_one_cluster(tmp_path):
    """Each document twice: as wide as if it were there once, nearly, and wider than as twice as many."""
    base, edited = scores(4, 20, 30, 10)

    def width(copies: int, same: bool) -> float:
        paths = []
        for name, values in (("base", base), ("edited", edited)):
            rows = [
                {"doc_id": i * copies + c, "doc_hash": f"{i}" if same else f"{i}-{c}", "filter": "none", "acc": s}
                for i, s in enumerate(values)
                for c in range(copies)
            ]
            path = tmp_path / f"{name}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            paths.append(path)
        (row,) = compare_samples({"t": read_samples(paths[0])["base"]}, {"t": read_samples(paths[1])["edited"]}).values()
        return row["difference_high"] - row["difference_low"]

    assert width(2, True) == pytest.approx(width(1, True), rel=0.02) and width(2, False) < 0.75 * width(2, True)
    low_high = paired_difference(edited, base, [f"{i}" for i in range(64)], 0.5)[1:]
    assert width(1, True) == pytest.approx(low_high[1] - low_high[0])


def test_acc_norm_comes_first_and_the_first_of_two_filters(tmp_path):
    rows = [
        {"doc_id": i, "doc": {}, "doc_hash": f"{i}", "filter": name, "acc": 0.0, "acc_norm": 1.0 if name == "a" else 0.25}
        for name in ("a", "b")
        for i in range(3)
    ]
    path = tmp_path / "samples_t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_samples(path)["t"].scores == [1.0, 1.0, 1.0]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[3:]))
    table = compare_samples(read_samples(path), read_samples(path))
    assert table["t"]["p"] is None and table["t"]["p_holm"] is None and table["t"]["base"] == 0.25


def test_what_is_no_comparison_is_said(tmp_path):
    base = write(tmp_path / "base", "t", [1.0, 0.0, 1.0])
    other = read_samples(write(tmp_path / "other", "u", [1.0, 0.0]))
    with pytest.raises(UserError, match=r"no task is in both: the base has t, the other u"):
        compare_samples(read_samples(base), other)
    with pytest.raises(UserError, match=r"documents are not those of .*samples_t.*--limit"):
        compare_samples(read_samples(base), read_samples(write(tmp_path / "short", "t", [1.0, 0.0])))
    with pytest.raises(UserError, match=r"documents are not those of"):
        compare_samples(read_samples(base), read_samples(write(tmp_path / "hash", "t", [1.0, 0.0, 1.0], doc_hash="x")))
    with pytest.raises(UserError, match=r"no samples of lm-eval with doc_id and acc"):
        read_samples(write(tmp_path / "words", "t", [1.0], metric="exact_match"))
    with pytest.raises(UserError, match=r"a doc_id is there twice"):
        read_samples(write(tmp_path / "twice", "t", [1.0, 0.0], doc_id=3))
    write(tmp_path / "base", "t", [1.0], date="_2026-01-02T10-00-00.5")
    with pytest.raises(UserError, match=r"is of the task t too"):
        read_samples(tmp_path / "base")
    for text in ("", "no\n", "[1]\n"):
        (tmp_path / "samples_x.jsonl").write_text(text)
        with pytest.raises(UserError, match=r"samples_x.jsonl: no samples"):
            read_samples(tmp_path / "samples_x.jsonl")
