import html
import itertools
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from refusal.errors import RefusalError
from refusal.report.charts import Point, Series, lines, ticks
from refusal.report.page import Study, ci, evenly, num, page, script_json, signed, value
from refusal.reproduction import published, reproduce

HOSTILE = "</script><script>alert(1)</script>"
IMAGE = "<img src=x onerror=\"alert('ran')\">"


def _mean(name: str, x: float) -> dict:
    return {name: x, f"{name}_low": max(0.0, x - 0.1), f"{name}_high": min(1.0, x + 0.1)}


def _rates(compliance: float) -> dict:
    return {
        **_mean("compliance", compliance),
        **_mean("coherence", 1.0),
        **_mean("score", compliance),
        **_mean("refusal", 1 - compliance),
        "n": 4,
        "n_empty": 0,
        "n_degenerate": 0,
    }


def _arm(cosine: float) -> dict:
    by_layer = [None, 0.5, 2.0]
    return {
        "n_harmful": 6,
        "n_safe": 6,
        "n_val": 4,
        "layers": [1, 2],
        "peak_layer": 2,
        "peak_separation": 2.0,
        "separation": by_layer,
        "separation_low": [None, 0.4, 1.5],
        "separation_high": [None, 0.6, 2.5],
        "separation_in_sample": [None, 0.7, 2.2],
        "cosine_to_sequential": [None, cosine, cosine],
        "cosine_to_sequential_min": cosine,
        "bootstrap_cosine_low": [None, 0.9, 0.95],
        "norm": [None, 1.0, 3.0],
        "cross_layer_cosine": [[None] * 3, [None, 1.0, -0.25], [None, -0.25, 1.0]],
        "effective_rank": [None, 2.0, 1.1],
    }


def study(model_id: str = "organism", kind: str = "single", n_examples: int = 3, answer: str = HOSTILE) -> Study:
    """A small study with hostile text wherever text of a model or a user enters."""
    pairs = [
        {
            "id": f"pair-{i}",
            "split": split,
            "category": IMAGE if i % 2 else "fraud",
            "topic": "a",
            "seen": bool(i % 2),
            "harmful": f"harmful {i} {IMAGE}",
            "safe": f"safe {i} {HOSTILE}",
        }
        for i, split in enumerate(["train"] * 6 + ["val"] * 4 + ["test"] * 4)
    ]
    cells = [("baseline", None, 0.0), ("random_0", None, 1.0), ("layer_1_alpha_100", 1, 1.0), ("layer_2_alpha_100", 2, 1.0)]
    sweep = [
        {
            "cell": cell,
            "layer": layer,
            "alpha": alpha,
            "id": row["id"],
            "prompt": row["harmful"],
            "completion": f"{cell} {answer}",
        }
        for cell, layer, alpha in cells
        for row in pairs
        if row["split"] == "val"
    ]
    verdict = {"label": "compliance", "compliance": 1.0, "coherence": 1.0, "refusal": False, "substring": False}
    evaluated = [
        {"arm": arm, "half": half, "prompt": row[half], "completion": f"{arm} {answer}", **row, **verdict}
        for arm in ("baseline", "runtime", "orthogonalized")
        for half in ("harmful", "safe")
        for row in pairs
        if row["split"] == "test"
    ]
    evaluated[0] |= {"label": "refusal", "compliance": 0.0}
    arms = {
        arm: _rates(x)
        | _mean("refusal_harmful", 1 - x)
        | _mean("refusal_safe", 0.0)
        | _mean("exact", x)
        | _mean("kl", 0.01)
        | {"difference": x, "difference_low": x, "difference_high": x}
        for arm, x in (("baseline", 0.0), ("runtime", 1.0), ("orthogonalized", 1.0), ("random", 0.0))
    }
    select = {
        "rank_1": {
            "layer": 2,
            "alpha": 1.0,
            "compliance": 1.0,
            "low": 0.9,
            "high": 1.0,
            "coherence": 1.0,
            "n": 4,
            "n_tied": 1,
            "name": "x",
        }
    }
    directions = {"sequential-matched": _arm(1.0), "batched_unmasked-matched": _arm(0.9), "sequential-shuffled": _arm(1.0)}
    judge = {
        "baseline": {"layer": None, "alpha": 0.0, **_rates(0.0)},
        "random": {"layer": None, "alpha": 1.0, **_rates(0.0)},
        "layer_1_alpha_100": {"layer": 1, "alpha": 1.0, **_rates(0.25)},
        "layer_2_alpha_100": {"layer": 2, "alpha": 1.0, **_rates(1.0)},
    }
    task = {"facts": {"score": 0.9, "low": 0.8, "high": 1.0, "n": 10}}
    difference = {"difference": -0.01, "difference_low": -0.02, "difference_high": 0.0}
    benchmark = {
        "baseline": {"name": "base", "average": 0.9, "tasks": task},
        "rank_1": {"name": "x", "average": 0.89, "tasks": task, **difference},
    }
    params = {
        "model": {"id": model_id},
        "organism": {"kind": kind},
        "prompts": {"source": "grammar"},
        "ablation": {"sites": "resid_pre"},
        "sweep": {"method": "sequential", "pairing": "matched", "n_random": 1},
        "judge": {"kind": "rules"},
        "orthogonalize": {"include_embedding": True},
        "report": {"n_examples": n_examples},
    }
    return Study(
        params=params,
        pairs=pairs,
        unrelated=[{"id": "unrelated-0", "safe": "hello"}],
        sweep=sweep,
        verdicts=[{"cell": row["cell"], "id": row["id"], **verdict} for row in sweep],
        evaluated=evaluated,
        capability=[{"alpha": a, **_mean("kl", a / 10), **_mean("cross_entropy", 0.2)} for a in (0.0, 1.0, 2.5)],
        model={"n_parameters": 1000, "n": 4, "refusal_harmful": 1.0, "refusal_safe": 0.0, "twin_refusal_harmful": None},
        directions=directions,
        judge=judge,
        select=select,
        orthogonalize={"rank_1": {"name": "x", "alpha": 1.0, "n_edited": 7, "max_residual": 1e-8, "max_deviation": 1e-8}},
        evaluate=arms | {"layer": 2, "alpha": 1.0, "n_harmless": 4, "addition": _mean("refusal_safe", 0.9) | {"n": 4}},
        benchmark=benchmark,
        reproduction=reproduce(published(), model_id, "sequential-matched", {}, directions, judge, select, benchmark),
        versions={"torch": "1"},
        hashes={"metrics/judge.json": "0" * 64},
    )


def rows_of(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data-rows">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_no_text_of_a_model_or_a_user_becomes_markup():
    text = page(study())
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text and "alert(1)</script>" not in text
    # It is all there, as data.
    data = rows_of(text)
    assert data["cells"]["baseline"][0]["text"] == f"baseline {HOSTILE}"
    assert data["browser"][0]["answers"]["runtime"]["text"] == f"runtime {HOSTILE}"
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text


@pytest.mark.parametrize("text", [HOSTILE, "<!--<script>", "&lt;", "a\u2028b\u2029c", "]]>", "\"'\\", "é \U0001f600"])
def test_script_json_holds_any_text(text):
    made = script_json({"a": text})
    assert not set("<>&\u2028\u2029") & set(made)
    assert json.loads(made) == {"a": text}


def test_script_json_refuses_nan():
    with pytest.raises(ValueError, match="JSON"):
        script_json([float("nan")])


def test_the_page_is_self_contained():
    text = page(study())
    assert not re.search(r"https?://|//cdn|@import|url\(", text)
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b|\ssrc=|srcset=", text.replace("src=x", ""))
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert "default-src 'none'" in text and len(text.encode()) < 5_000_000


def test_equal_studies_give_equal_bytes():
    assert page(study()) == page(study())


def test_a_page_over_the_limit_says_what_to_lower():
    with pytest.raises(RefusalError, match=r"params.yaml: report.n_examples is 3: the page would be .* MB"):
        page(study(answer="a" * 400_000))


def test_it_says_what_an_organism_is_worth():
    assert "trained to have the property" in page(study()) and "no evidence about real models" in page(study())
    natural = page(study(kind="natural"))
    assert "trained to have the property" not in natural and "no evidence about real models" in natural
    assert "no evidence about real models" not in page(study(model_id="models/converted/Qwen-1_8B-Chat"))


def test_every_published_figure_is_on_the_page():
    s = study()
    text = html.unescape(page(s))
    for row in s.reproduction["rows"]:
        assert f">{row['quantity']}</th><td>{value(row['published'])}</td><td>{value(row['ours'])}</td>" in text


def test_a_study_without_sequential_activations_has_a_page():
    s = study()
    directions = {"batched-unrelated": {k: v for k, v in _arm(1.0).items() if k != "effective_rank"}}
    params = s.params | {"sweep": {"method": "batched", "pairing": "unrelated", "n_random": 1}}
    reproduction = reproduce(published(), "organism", "batched-unrelated", {}, directions, s.judge, s.select, s.benchmark)
    text = page(s._replace(directions=directions, params=params, reproduction=reproduction))
    assert "Nothing to draw in this run." in text and "batched-unrelated" in text


def test_headings_are_in_order_and_tables_have_scopes():
    text = page(study())
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all("scope=" in th for th in re.findall(r"<th\b[^>]*>", text))
    assert text.count("<table") == text.count("<caption>")
    assert all("Refuted if" in caption for caption in re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and all(f'id="{name}"' in text for name in re.findall(r'href="#([^"]+)"', text))


def test_the_browser_takes_prompts_by_rule():
    data = rows_of(page(study(n_examples=2)))
    assert [(row["split"], row["half"]) for row in data["browser"]] == [
        *[("test", "harmful")] * 2,
        *[("test", "safe")] * 2,
        *[("val", "harmful")] * 2,
    ]
    assert all(row["answers"]["orthogonalized"] is None and row["answers"]["runtime"] for row in data["browser"][4:])
    assert evenly(list(range(10)), 3) == [0, 3, 6] and evenly([1, 2], 5) == [1, 2] and evenly([], 3) == []


def test_numbers():
    assert [num(0.125), num(-0.5, 1), num(None), num(-0.001), num(1.0, 0)] == ["0.12", "−0.5", "–", "0.00", "1"]
    assert [signed(0.01), signed(-0.01), signed(0.0), signed(1e-9), signed(None)] == ["+0.010", "−0.010", "0.000", "0.000", "–"]
    assert ci({"a": 0.5, "a_low": 0.25, "a_high": 1.0}, "a", 2) == "0.50 [0.25, 1.00]"
    assert ci({"a": 0.5}, "a", 1) == "0.5" and ci({}, "a") == "–"
    assert [value([1, 10]), value(None), value(0.51820), value("x"), value([])] == ["1, 10", "–", "0.5182", "x", "none"]


def test_ticks_span_the_data():
    for low, high in [(0, 1), (0.95, 1.0), (-3, 40), (0.0, 0.0), (2.0, 2.0), (0, 1e-6)]:
        made = ticks(low, high)
        assert made[0] <= low and made[-1] >= high and 1 < len(made) < 15


def test_lines_draws_one_point_and_none_and_escapes():
    assert "Nothing to draw" in lines("t", "x", "y", [Series("a", 0, [])])
    made = lines(IMAGE, "x", "y", [Series(IMAGE, 0, [Point(1, 0.0)]), Series("b", 1, [Point(1, 0.0, 0.0, 0.0)])])
    assert "<img" not in made and "nan" not in made


BEFORE = """<script>
window.problems = [];
window.alert = (text) => problems.push("alert " + text);
addEventListener("error", (event) => problems.push(event.message));
addEventListener("securitypolicyviolation", (event) => problems.push("asked for " + event.blockedURI));
console.error = console.warn = (text) => problems.push(String(text));
</script>"""
AFTER = """<script>
(() => {
  const all = (query) => [...document.querySelectorAll(query)], one = (query) => document.querySelector(query);
  const press = (key) => document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const set = (name, value) => {
    const select = one(`[name=${name}]`);
    select.value = value;
    select.dispatchEvent(new Event("change", { bubbles: true }));
  };
  const seen = { opened: one("#panel-title").textContent };
  const cell = one('[data-cell="layer_1_alpha_100"]');
  cell.click();
  seen.title = one("#panel-title").textContent;
  seen.pressed = all('[aria-pressed="true"]').map((button) => button.dataset.cell);
  seen.samples = all("#panel-list li").map((item) => item.textContent);
  cell.focus();
  press("ArrowDown");
  seen.focus = document.activeElement.dataset.cell;
  seen.stops = all("#sweep button").filter((button) => button.tabIndex === 0).length;
  one('[name=measure][value=refusal]').click();
  seen.refusal = cell.textContent;
  seen.blurred = getComputedStyle(one(".harm")).filter;
  seen.hidden = one("#list .harm").getAttribute("aria-hidden");
  one("[data-reveal]").click();
  seen.shown = getComputedStyle(one(".harm")).filter;
  seen.unhidden = one("#list .harm").getAttribute("aria-hidden");
  seen.count = one("#count").textContent;
  set("split", "test");
  set("arm", "baseline");
  set("verdict", "refusal");
  seen.refusals = one("#count").textContent;
  set("split", "");
  set("verdict", "");
  seen.markup = all("#list img, #list script, #panel-list img, #panel-list script").length;
  seen.requests = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.width = [innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth];
  setTimeout(() => parent.postMessage(JSON.stringify({ ...seen, problems }), "*"), 300);
})();
</script>"""
FRAME = """<!doctype html><iframe src="page.html" width="%d" height="900" style="border:0"></iframe><pre id="seen"></pre>
<script>addEventListener("message", (event) => { document.getElementById("seen").textContent = event.data; });</script>"""


@pytest.mark.parametrize("width", [380, 1600])
def test_the_page_in_a_browser(tmp_path: Path, width: int):
    chromium = shutil.which("chromium")
    if not chromium:
        pytest.skip("chromium is not installed")
    text = page(study())
    text = text.replace("<title>", f"{BEFORE}<title>", 1).replace("</body>", f"{AFTER}</body>")
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    (tmp_path / "frame.html").write_text(FRAME % width, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update"
    command = [
        chromium,
        *flags.split(),
        "--disable-sync",
        "--window-size=1700,1000",
        f"--user-data-dir={tmp_path / 'profile'}",
        "--virtual-time-budget=8000",
        "--dump-dom",
        (tmp_path / "frame.html").as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="seen">(.+?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert seen["problems"] == [] and seen["requests"] == [] and seen["markup"] == 0
    assert seen["opened"] == "Behind layer 2, alpha 1, rank_1" and seen["title"] == "Behind layer 1, alpha 1"
    assert seen["pressed"] == ["layer_1_alpha_100"] and seen["focus"] == "layer_2_alpha_100" and seen["stops"] == 1
    assert len(seen["samples"]) == 4 and all(f"layer_1_alpha_100 {HOSTILE}" in sample for sample in seen["samples"])
    assert seen["refusal"] == "0.75"
    assert seen["blurred"].startswith("blur") and seen["shown"] == "none"
    assert seen["hidden"] == "true" and seen["unhidden"] is None
    assert (seen["count"], seen["refusals"]) == ("9 of 9 prompts", "1 of 1 prompts")
    assert seen["width"] == [width, 0]
