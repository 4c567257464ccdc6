"""The page of variants: what `dvc exp show --json` says, laid beside each other with the intervals of each."""

import html
import json
import re

import pytest
from browser import serious
from test_page import IMAGE, study

from refusal.io.errors import UserError
from refusal.report.variants import ARMS, chart, flat, main, page, read, varied


def shown(rev, name=None, pairing="matched", threads=2, results=True, **more):
    params = {"sweep": {"pairing": pairing, "alphas": [1.0]}, "compute": {"threads": threads}}
    data = {"params": {"params.yaml": {"data": params}}, "metrics": {"summary.json": {"data": {"runtime_compliance": 0.5}}}}
    if not results:
        data["metrics"] = {}
    return {"rev": rev, "name": name, "data": data, "error": None, "experiments": None} | more


def evaluate(rev):
    return {arm: {**study().evaluate[arm], "n": 4} for arm in ARMS}


COMMITS = [
    shown("workspace"),
    shown("a" * 40, "main", experiments=[
        {"revs": [shown("b" * 40, IMAGE, "unrelated", threads=1)], "executor": {"state": "success"}, "name": None},
        {"revs": [shown("c" * 40, "waiting", "unrelated", results=False)], "executor": {"state": "queued"}, "name": None},
        {"revs": [shown("d" * 40, "broken", results=False, error={"type": "E", "msg": "m"})], "executor": None, "name": None},
    ]),
]  # fmt: skip


def test_each_variant_is_a_row_with_what_differs():
    found = read(COMMITS, evaluate)
    assert [(v.name, v.state, v.evaluate is not None) for v in found] == [
        ("main", "", True),  # the workspace is this commit
        (IMAGE, "", True),
        ("waiting", "queued", False),
        ("broken", "failed", False),
    ]
    assert varied(found) == ["sweep.pairing"]  # compute.threads determines no value
    running = read([*COMMITS, {"rev": "e" * 40, "name": "running", "data": None, "error": None, "experiments": None}], evaluate)
    assert varied(running) == ["sweep.pairing"] and "running" in page(running)
    text = page(found)
    assert "<img" not in text and html.escape(IMAGE).split()[0] in text
    assert text.count("<td>unrelated</td>") == 2 and "<td>queued</td>" in text and "<td>failed</td>" in text
    assert page(found) == text and not re.search(r"https?://|<script|\ssrc=", text.replace("src=x", ""))
    changed = [shown("workspace", pairing="unrelated"), *COMMITS[1:]]
    assert [v.name for v in read(changed, evaluate)][:2] == ["workspace", "main"]


def test_the_intervals_are_those_of_the_variant():
    text = str(chart(read(COMMITS, evaluate)[:1]))
    assert f"main, runtime: {1.0:.3f} [0.900, 1.000]" in text
    xs = [
        [float(x) for x in re.findall(r'x[12]="([\d.]+)"', line)]
        for line in re.findall(r'<line class="line s1"[^>]*x1="[^>]*>', text)
    ]
    assert [8 + 0.9 * 560, 8 + 560] in [sorted(pair) for pair in xs]


def test_nothing_to_compare_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="no variant has results yet; run `dvc repro`"):
        read([shown("workspace", results=False)], evaluate)
    with pytest.raises(UserError, match="gave no JSON"):
        main(tmp_path / "a.html", "evaluate.json", "ERROR: no")


def test_flat():
    assert flat({"a": {"b": {"c": 1}, "d": [1, {"e": 2}]}, "f": None}) == {"a.b.c": 1, "a.d": [1, {"e": 2}], "f": None}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1600])
def test_in_a_browser(opened, width, scheme):
    tab = opened(page(read(COMMITS, evaluate)), width, scheme)
    assert tab.said == [] and serious(tab) == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width


def test_the_command_reads_the_metrics_of_each_revision(tmp_path, monkeypatch, capsys):
    from pipeline.study import run

    monkeypatch.chdir(tmp_path)
    for command in ("git init -q", "git config user.name t", "git config user.email t@localhost"):
        run(tmp_path, *command.split())
    (tmp_path / "evaluate.json").write_text(json.dumps(evaluate("")))
    run(tmp_path, "git", "add", "-A")
    run(tmp_path, "git", "commit", "-qm", "a")
    rev = run(tmp_path, "git", "rev-parse", "HEAD").strip()
    (tmp_path / "evaluate.json").unlink()
    line = main(
        tmp_path / "report/a.html", "evaluate.json", json.dumps([shown("workspace", pairing="unrelated"), shown(rev, "main")])
    )
    assert line.endswith("a.html: 2 variants, 1 with results; they differ in sweep.pairing")
    assert "main, runtime: 1.000 [0.900, 1.000]" in (tmp_path / "report/a.html").read_text()
