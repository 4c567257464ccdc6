"""The page of variants: what `dvc exp show --json` says, compared with the intervals of each."""

import html
import json
import re

import pytest
from browser import serious
from small_study import IMAGE, study

from refusal.io.errors import UserError
from refusal.report.variants import flat, main, page, read, varied


def shown(rev, name=None, pairing="matched", threads=2, results=True, **more):
    params = {"sweep": {"pairing": pairing, "alphas": [1.0]}, "compute": {"threads": threads}}
    metrics = {"summary.json": {"data": {"runtime_compliance": 0.5}}} if results else {}
    data = {"params": {"params.yaml": {"data": params}}, "metrics": metrics}
    return {"rev": rev, "name": name, "data": data, "error": None, "experiments": None} | more


def evaluate(rev):
    return study().evaluate


COMMITS = [
    shown("workspace"),
    shown("a" * 40, "main", experiments=[
        {"revs": [shown("b" * 40, IMAGE, "unrelated", threads=1)], "executor": {"state": "success"}, "name": None},
        {"revs": [shown("c" * 40, "waiting", "unrelated", results=False)], "executor": {"state": "queued"}, "name": None},
        {"revs": [shown("d" * 40, "broken", results=False, error={"type": "E", "msg": "m"})], "executor": None, "name": None},
    ]),
]  # fmt: skip


def test_each_variant_is_a_row_with_what_differs():
    variants = read(COMMITS, evaluate)
    assert [(v.name, v.state, v.evaluate is not None) for v in variants] == [
        ("main", "", True),  # the workspace is this commit
        (IMAGE, "", True),
        ("waiting", "queued", False),
        ("broken", "failed", False),
    ]
    assert varied(variants) == ["sweep.pairing"]  # compute.threads determines no value
    running = read([*COMMITS, {"rev": "e" * 40, "name": "running", "data": None, "error": None, "experiments": None}], evaluate)
    assert varied(running) == ["sweep.pairing"] and "running" in page(running)
    text = page(variants)
    assert "<img" not in text and html.escape(IMAGE).split()[0] in text
    assert text.count("<td>unrelated</td>") == 2 and "<td>queued</td>" in text and "<td>failed</td>" in text
    assert page(variants) == text
    assert not re.search(r"https?://|<script|\ssrc=", text.replace("src=x", "").replace('="http://www.w3.org/', ""))
    changed = [shown("workspace", pairing="unrelated"), *COMMITS[1:]]
    assert [v.name for v in read(changed, evaluate)][:2] == ["workspace", "main"]


def test_the_intervals_are_those_of_the_variant():
    """On an axis of 420 px, by arm: a rule from the lower to the upper limit, and a mark at the rate."""
    rates = study().evaluate
    rates["runtime"] |= {"compliance": 0.75, "compliance_low": 0.5, "compliance_high": 0.875}
    text = page(read(COMMITS[:1], lambda rev: rates))
    rules = re.findall(r'<line transform="translate\(([\d.]+),[\d.]+\)" x2="(-?[\d.]+)" y2="0" stroke="#4c78a8"', text)
    limits = [sorted((float(x) / 420, (float(x) + float(wide)) / 420)) for x, wide in rules]
    arms = [rates[arm] for arm in ("baseline", "runtime", "orthogonalized", "random", "random_weights", "harmless")]
    assert limits == [pytest.approx([arm["compliance_low"], arm["compliance_high"]]) for arm in arms]
    marks = re.findall(r'<path transform="translate\(([\d.]+),[\d.]+\)"[^>]* fill="#4c78a8"', text)
    assert [float(x) / 420 for x in marks][:6] == pytest.approx([arm["compliance"] for arm in arms])


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


def test_the_command_reads_the_metrics_of_each_revision(tmp_path, monkeypatch):
    from pipeline.study import run

    monkeypatch.chdir(tmp_path)
    for command in ("git init -q", "git config user.name t", "git config user.email t@localhost"):
        run(tmp_path, *command.split())
    (tmp_path / "evaluate.json").write_text(json.dumps(evaluate("")))
    run(tmp_path, "git", "add", "-A")
    run(tmp_path, "git", "commit", "-qm", "a")
    rev = run(tmp_path, "git", "rev-parse", "HEAD").strip()
    (tmp_path / "evaluate.json").unlink()
    commits = json.dumps([shown("workspace", pairing="unrelated"), shown(rev, "main")])
    line = main(tmp_path / "report/a.html", "evaluate.json", commits)
    assert line.endswith("a.html: 2 variants, 1 with results; they differ in sweep.pairing")
    n, rate = (study().evaluate["runtime"][key] for key in ("n", "compliance"))
    assert re.search(rf">main</th>.*<td>{rate:.3f} \[.*<td>{n}</td>", (tmp_path / "report/a.html").read_text())
