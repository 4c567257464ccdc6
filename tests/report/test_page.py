import html
import itertools
import json
import re

import pytest
from browser import serious

from refusal.io.errors import UserError
from refusal.report.charts import Point, Series, lines, ticks
from refusal.report.page import Study, ci, evenly, num, page, script_json, signed, value
from refusal.report.reproduction import published, reproduce

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
    cells = [
        ("baseline", None, 0.0),
        ("random_0", None, 1.0),
        ("harmless_1", None, 1.0),
        ("layer_1_alpha_100", 1, 1.0),
        ("layer_2_alpha_100", 2, 1.0),
    ]
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
        for arm, x in (("baseline", 0.0), ("runtime", 1.0), ("orthogonalized", 1.0), ("random", 0.0), ("harmless", 0.0))
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
        "harmless": {"layer": None, "alpha": 1.0, **_rates(0.0)},
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
        reproduction=reproduce(published(), model_id, "sequential-matched", {}, directions, judge, select, benchmark)
        | {"weaknesses": [{"name": IMAGE, "what": "b", "evidence": {"a": {"low": None}, "top_3": ["x", "y"], "n": 4}}]},
        agreement={
            "judge": {"kind": "rules", "base_url": None, "model": None, "rubric_sha256": None, "versions": None},
            "rules_and_llm": {"kappa": None, "n": None},
            "labelled": {"file": None, "rules": None, "llm": None},
        },
        imported={"files": {}, "between": {}, "figures": {}},
        science={
            "level": "basic",
            "sites": "resid_pre",
            "verdict": {"verdict": "single", "reason": None, "by": "rank_1", "best_single": "rank_1", "best_subspace": "svd_2"},
            "arms": {
                "baseline": _rates(0.0) | {"layer": None, "rank": 0, "p_holm": 1.0, "cosine_rank_1": None} | _mean("kl", 0.0),
                "rank_1": _rates(1.0) | {"layer": 2, "rank": 1, "p_holm": 0.002, "cosine_rank_1": 1.0} | _mean("kl", 0.01),
            },
            "controls": {"random_1": _rates(0.0) | {"rank": 1, "n_arms": 3} | _mean("kl", 0.02)},
        },
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
    with pytest.raises(UserError, match=r"params.yaml: report.n_examples is 3: the page would be .* MB"):
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
    text = page(s._replace(directions=directions, params=params, reproduction=reproduction | {"weaknesses": []}))
    assert "Nothing to draw in this run." in text and "batched-unrelated" in text


def test_a_judge_that_is_a_model_is_named_and_compared():
    people = {"n": 30, "n_missing": 0, "accuracy_binary": 0.9, "accuracy_binary_low": 0.74, "accuracy_binary_high": 0.97}
    agreement = {
        "judge": {
            "kind": "llm",
            "base_url": "http://127.0.0.1:1",
            "model": IMAGE,
            "rubric_sha256": "ab" * 32,
            "versions": [{"version": "0324", "n": 12}],
        },
        "rules_and_llm": {"kappa": 0.8125, "n": 11},
        "labelled": {"file": "data/raw/people.csv", "rules": people, "llm": people | {"n": 29}},
    }
    text = page(study()._replace(agreement=agreement))
    assert "reported as 0324 (12 verdicts), rubric sha256 abababababab" in text and "<img" not in text
    assert "<td>0.812</td><td>11</td>" in text and text.count("<td>0.900 [0.740, 0.970]</td>") == 2
    offline = page(study())
    assert "rules, exact here" in offline and "Judge beside" not in offline


def test_arms_stand_beside_their_controls_and_weaknesses_beside_evidence():
    text = html.unescape(page(study()))
    assert "Verdict: <strong>single</strong>, by <code>rank_1</code>." in text
    assert "<td>2</td><td>1</td><td>4</td><td>1.000 [0.900, 1.000]</td><td>–</td><td>0.0020</td>" in text
    assert ">random_1 (3 drawn)</th><td>–</td><td>1</td><td>4</td><td>0.000 [0.000, 0.100]</td>" in text
    assert "<td>b</td><td>a.low –; top 3 x, y; n 4</td>" in text
    s = study()
    none = s.science | {"verdict": s.science["verdict"] | {"verdict": "none", "by": None, "reason": "no_mediation"}}
    assert "<strong>none</strong> (no mediation)." in page(s._replace(science=none))


def test_published_directions_stand_beside_ours():
    files = {
        IMAGE: {
            "n_layers": 3,
            "d_model": 8,
            "comparable": True,
            "note": None,
            "cosine": {"sequential-matched": [None, 0.25, -0.75], "batched-matched": [None, 1.0, 1.0]},
        },
        "other.pt": {
            "n_layers": 24,
            "d_model": 2048,
            "comparable": False,
            "note": "ours are [3, 8]: another model",
            "cosine": {},
        },
    }
    text = page(study()._replace(imported={"files": files, "between": {}, "figures": {}}))
    assert "<td>3</td><td>8</td><td>0.2500</td><td>1</td><td>−0.7500</td><td></td>" in text and "<img" not in text
    assert "<td>24</td><td>2048</td><td>–</td><td>–</td><td>–</td><td>ours are [3, 8]: another model</td>" in text
    assert "Published directions in" not in page(study())


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


def cells(tab) -> list[str]:
    """The cells that are pressed, then the one in focus."""
    pressed = [cell.get_attribute("data-cell") for cell in tab.locator('[aria-pressed="true"]').all()]
    return [*pressed, tab.evaluate("document.activeElement.dataset.cell ?? null")]


@pytest.mark.parametrize("width", [380, 1600])
def test_the_page_in_a_browser(opened, width):
    tab = opened(page(study()), width)
    title, samples, count = tab.locator("#panel-title"), tab.locator("#panel-list li"), tab.locator("#count")
    assert title.inner_text() == "Behind layer 2, alpha 1, rank_1"
    cell = tab.locator('[data-cell="layer_1_alpha_100"]')
    cell.click()
    assert title.inner_text() == "Behind layer 1, alpha 1" and samples.count() == 4
    assert all(f"layer_1_alpha_100 {HOSTILE}" in text for text in samples.all_text_contents())
    tab.locator("[name=measure][value=refusal]").check()
    assert cell.inner_text() == "0.75"
    # Harmful text: out of focus for the eye and absent for a screen reader, until it is asked for, everywhere at once.
    harmful = tab.locator("#list .harm").first
    assert harmful.evaluate("e => getComputedStyle(e).filter").startswith("blur")
    assert (
        "harmful 10" not in tab.locator("#list").aria_snapshot()
        and "hidden: harmful text" in tab.locator("#list").aria_snapshot()
    )
    tab.locator("[data-reveal]").first.check()
    assert harmful.evaluate("e => getComputedStyle(e).filter") == "none"
    assert "harmful 10" in tab.locator("#list").aria_snapshot() and "hidden" not in tab.locator("#list").aria_snapshot()
    assert all(box.is_checked() for box in tab.locator("[data-reveal]").all())
    # Filters: by split, half, category, and the verdict of one arm or any.
    assert count.inner_text() == "9 of 9 prompts"
    for chosen, left in (
        ({"split": "test"}, 6),
        ({"half": "safe"}, 3),
        ({"half": "", "category": "fraud"}, 4),
        ({"category": "", "arm": "baseline", "verdict": "refusal"}, 1),
        ({"arm": "runtime"}, 0),
    ):
        for name, value_ in chosen.items():
            tab.locator(f"[name={name}]").select_option(value_)
        assert count.inner_text() == f"{left} of {left} prompts", chosen
    assert tab.locator("#list img, #list script, #panel-list img, #panel-list script").count() == 0
    assert tab.evaluate("[innerWidth, document.documentElement.scrollWidth - document.documentElement.clientWidth]") == [width, 0]
    tab.wait_for_timeout(300)
    assert tab.said == []


def test_the_page_by_keyboard_alone(opened):
    tab = opened(page(study()))
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#question"
    # The sweep is one stop of the Tab key; arrows go from cell to cell, and Enter or the space bar opens one.
    for _ in range(60):
        tab.keyboard.press("Tab")
        if cells(tab)[-1]:
            break
    assert cells(tab) == ["layer_2_alpha_100", "layer_2_alpha_100"]
    tab.keyboard.press("ArrowUp")
    assert cells(tab) == ["layer_2_alpha_100", "layer_1_alpha_100"]
    tab.keyboard.press("ArrowLeft")  # no cell there
    tab.keyboard.press("Enter")
    assert cells(tab) == ["layer_1_alpha_100", "layer_1_alpha_100"]
    assert tab.locator("#panel-title").inner_text() == "Behind layer 1, alpha 1"
    tab.keyboard.press("Tab")
    assert cells(tab)[-1] == "baseline"
    tab.keyboard.press("Space")
    assert cells(tab) == ["baseline", "baseline"]
    # Every stop of the Tab key shows where it is.
    for _ in range(40):
        tab.keyboard.press("Tab")
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or tab.evaluate("document.activeElement === document.body")


def test_what_a_screen_reader_is_told(opened):
    tab = opened(page(study()))
    told = tab.locator("body").aria_snapshot()
    for words in (
        'heading "Is refusal one direction?" [level=1]',
        'navigation "Sections"',
        'region "Ablation at run time"',
        'button "layer 2, alpha 1, rank_1: compliance 1.00" [pressed]',
        'form "Filter answers"',
        'combobox "verdict"',
        'img "Cohen\'s d by layer"',
        "status: 9 of 9 prompts",
    ):
        assert words in told, told


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1600])
def test_axe_finds_nothing_serious(opened, width, scheme):
    tab = opened(page(study()), width, scheme)
    assert serious(tab) == []
    tab.locator("[data-reveal]").first.check()
    for summary in tab.locator("summary").all():
        summary.click()
    assert serious(tab) == []


def test_axe_would_find_something(opened):
    text = page(study()).replace("--soft: #545b64", "--soft: #c0c4c8").replace('<html lang="en">', "<html>")
    assert {"color-contrast", "html-has-lang"} <= {rule for rule, _, _ in serious(opened(text))}


def test_a_built_page_is_as_good(opened, finished):
    text = (finished[0] / "report/index.html").read_text(encoding="utf-8")
    tab = opened(text, 380)
    assert serious(tab) == [] and tab.said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380


def test_a_request_would_be_seen(opened):
    """A control: what is asked for is noticed, whether the page's own policy lets it out or not."""
    asking = page(study()).replace("</body>", '<img src="http://127.0.0.1:9/a.png" alt=""></body>')
    assert any("a.png" in said and "violates" in said for said in opened(asking).said)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", asking)
    assert "asked for http://127.0.0.1:9/a.png" in opened(bare).said
