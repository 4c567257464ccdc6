import html
import itertools
import json
import re

import pytest
from browser import serious
from markupsafe import escape
from small_study import HOSTILE, IMAGE, study

from refusal.analysis.estimated import without_noise_of_means
from refusal.io.errors import UserError
from refusal.method.paper_selection import Candidate, choose, metrics
from refusal.report.page import ci, evenly, num, page, script_json, signed, value
from refusal.report.reproduction import published, reproduce

WEAKNESSES = [{"name": IMAGE, "what": "b", "evidence": {"a": {"low": None}, "top_3": ["x", "y"], "n": 4}}]


def made(**changed) -> str:
    s = study()._replace(**changed)
    return page(s, reproduce(s) | {"weaknesses": WEAKNESSES})


@pytest.fixture(scope="module")
def text() -> str:
    return made()


def rows_of(text: str) -> dict:
    rows = re.search(r'<script type="application/json" id="data-rows">(.*?)</script>', text, re.S)
    assert rows
    return json.loads(rows[1])


def test_no_text_of_a_model_or_a_user_becomes_markup(text):
    assert text.count("<script") == text.count("</script>") == 2
    assert "<img" not in text and "alert(1)</script>" not in text
    # It is all there, as data.
    data = rows_of(text)
    assert data["cells"]["baseline"][0]["text"] == f"baseline {HOSTILE}"
    assert data["browser"][0]["answers"]["runtime"]["text"] == f"runtime {HOSTILE}"
    assert "innerHTML" not in text and "insertAdjacentHTML" not in text


def test_subspaces_are_named_by_their_layers_in_the_order_of_depth():
    """The committed study, as if windows of two layers had been swept: 1-2, ..., 10-11, the last of which a text would put first."""
    s = study()
    windows = {1: "1-2", 2: "2-3", 3: "3-4", 4: "4-5", 5: "5-6", 6: "6-7", 7: "10-11"}

    def renamed(cell):
        layer, found, alpha = cell.removeprefix("layer_").partition("_alpha_")
        return f"qr_{windows[int(layer)]}_alpha_{alpha}" if found else cell

    def moved(row):
        return row | {"cell": renamed(row["cell"])} | ({"layer": windows.get(row["layer"])} if "layer" in row else {})

    ranks = {rank: cell | {"name": "sequential_" + renamed(cell["name"].removeprefix("sequential_"))} for rank, cell in s.select.items()}
    s = s._replace(
        params=s.params | {"sweep": s.params["sweep"] | {"basis": "qr", "rank": 2}},
        judge={renamed(name): cell | {"layer": windows.get(cell["layer"])} for name, cell in s.judge.items()},
        select=ranks,
        sweep=[moved(row) for row in s.sweep],
        verdicts=[moved(row) for row in s.verdicts],
    )
    assert s.cell == "qr_6-7_alpha_100" and s.place == "qr 6-7"
    text = page(s, reproduce(s) | {"weaknesses": WEAKNESSES})
    assert [*dict.fromkeys(re.findall(r'data-name="layer ([\d-]+), alpha', text))] == [*windows.values()]
    assert "Selected as rank_1: qr 6-7, alpha 1," in text and 'data-name="layer 6-7, alpha 1, rank_1"' in text
    assert "in the span of several layers&#39; directions" in text and "no edit along the subspace" not in text  # no edits here
    assert {row["answers"]["runtime"]["text"] for row in rows_of(text)["browser"] if row["split"] == "val"} == {f"layer_6_alpha_100 {HOSTILE}"}


@pytest.mark.parametrize("said", [HOSTILE, "<!--<script>", "&lt;", "a\u2028b\u2029c", "]]>", "\"'\\", "é \U0001f600"])
def test_script_json_holds_any_text(said):
    written = script_json({"a": said})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"a": said}
    with pytest.raises(ValueError, match="JSON"):
        script_json([said, float("nan")])


def test_the_page_is_self_contained_and_equal_studies_give_equal_bytes(text):
    fetched = text.replace('="http://www.w3.org/', "")  # names of XML, which nothing fetches
    assert not re.search(r"https?://|//cdn|@import|url\(", fetched)
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b|\ssrc=|srcset=", text.replace("src=x", ""))
    assert set(re.findall(r'href="(.)', text)) == {"#"}
    assert "default-src 'none'" in text and len(text.encode()) < 5_000_000
    assert made() == text


def test_a_page_over_the_limit_says_what_to_lower():
    s = study(answer="a" * 400_000)
    with pytest.raises(UserError, match=r"params.yaml: report.n_examples is 3: the page would be .* MB"):
        page(s, reproduce(s) | {"weaknesses": []})


@pytest.mark.parametrize("model_id", ["organism", "models/converted/Qwen-1_8B-Chat"])
@pytest.mark.parametrize("kind", ["single", "natural"])
def test_it_says_what_an_organism_is_worth(model_id, kind):
    shown, organism = made(params=study(model_id, kind).params), model_id == "organism"
    assert ("no evidence about real models" in shown) is organism
    assert ("trained to have the property" in shown) is (organism and kind == "single")


def test_every_published_figure_is_on_the_page(text):
    for row in reproduce(study())["rows"]:
        figures = f">{row['quantity']}</th><td>{value(row['published'])}</td><td>{value(row['ours'])}</td>"
        assert figures in html.unescape(text)


def test_the_papers_five_runs_are_shown_as_theirs(text):
    shown = html.unescape(text)
    assert "Theirs, not ours: the paper's five runs" in shown and "None of these figures was measured here." in shown
    for row in published()["paper_runs"]["rows"]:
        scores = f"<td>{num(row['bypass'])}</td><td>{num(row['induce'])}</td><td>{num(row['kl'], 3)}</td>"
        rates = "".join(
            f"<td>{num(judge['baseline'])} / {num(judge['ablated'])} / {num(judge['subtracted'])}</td>"
            for judge in (row["substrings"], row["llama_guard_2"])
        )
        place = f'<th scope="row">{row["model"]}</th><td>{row["position"]}</td><td>{row["layer"]} of {row["n_layers"]}</td>'
        assert place + scores + rates in shown


@pytest.mark.parametrize("induce", [0.5, -0.36])
def test_a_choice_by_the_papers_rule_is_shown_with_what_it_left_out(text, induce):
    assert "The paper's rule on val" not in html.unescape(text)
    found = [Candidate(1, -1.0, induce, 0.05), Candidate(2, -3.0, 1.0, 0.5)]
    half = {"refusal_score": 2.5, "refusal_score_low": 2.25, "refusal_score_high": 3.0, "n": 7}
    selection = metrics(choose(found, 5), found, 5) | {"by": "paper", "note": "a note", "harmless_prompts": "val.unrelated"}
    selection |= {"refusal_tokens": {"I": 40, IMAGE: 2121}, "baseline": {"harmful": half, "harmless": half}}
    shown = made(selection=selection)
    assert "<img" not in shown and made(selection={"by": "compliance"}) == text
    shown = html.unescape(shown)
    assert "<td>−3.00</td><td>1.00</td><td>0.500</td><td>no</td><td>yes</td><td>yes</td>" in shown
    assert "baseline 2.50 [2.25, 3.00] on n = 7 harmful prompts" in shown
    assert ("no candidate of 2 passes" in shown) is (induce < 0) is ("best without the criterion <code>induce</code>" in shown)


def test_a_study_without_sequential_activations_has_a_page():
    s = study()
    alone = {k: v for k, v in s.directions["batched-unrelated"].items() if k != "effective_rank"}
    swept = s.params["sweep"] | {"method": "batched", "pairing": "unrelated"}
    shown = made(
        directions={"batched-unrelated": alone},
        params=s.params | {"sweep": swept},
        plots=s.plots | {"cosine_to_sequential": []},
    )
    assert shown.count("Nothing to draw in this run.") == 1 and "batched-unrelated" in shown


def rendered(text: str, system_prompt: str | None = None) -> str:
    s = study()
    params = s.params | {"model": s.params["model"] | {"system_prompt": system_prompt}}
    return made(model=s.model | {"rendered_prompt": text}, params=params)


def test_the_first_val_prompt_is_shown_as_the_model_sees_it():
    """Its template open, the harmful request in it blurred as elsewhere, and none of it markup."""
    shown = rendered(f"\n<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nharmful 6 {IMAGE}<|im_end|>\n")
    begins = "&lt;|im_start|&gt;"
    written = f'<code>\n{begins}system\nBe kind.&lt;|im_end|&gt;\n{begins}user\n<span class="harm">{escape(f"harmful 6 {IMAGE}")}</span>'
    assert written in shown and "a system block here is the template's own" in shown
    changed = rendered("[INST] HARMFUL 6 [/INST]", "Be kind.")
    assert '<code><span class="harm">[INST] HARMFUL 6 [/INST]</span></code>' in changed
    assert "The system block is <code>model.system_prompt</code>" in changed


def test_the_prompt_as_the_model_sees_it_in_a_browser(opened):
    tab = opened(rendered(f"<|system|>\nBe kind.\n<|user|>\nharmful 6 {IMAGE}\n<|assistant|>\n"), 380)
    tab.locator("summary", has_text="as the model sees it").click()
    seen = tab.get_by_role("region", name="The first val prompt in the model's chat template")
    harmful = seen.locator(".harm")
    assert seen.is_visible() and seen.locator("img").count() == 0 and "Be kind." in seen.aria_snapshot()
    assert harmful.evaluate("e => getComputedStyle(e).filter").startswith("blur") and "harmful 6" not in seen.aria_snapshot()
    tab.locator("[data-reveal]").first.check()
    assert harmful.inner_text() == f"harmful 6 {IMAGE}" and "harmful 6" in seen.aria_snapshot()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380 and serious(tab) == [] and tab.said == []


def test_a_judge_that_is_a_model_is_named_and_compared(text):
    people = {"n": 30, "n_missing": 0, "accuracy_binary": 0.9, "accuracy_binary_low": 0.74, "accuracy_binary_high": 0.97}
    versions = [{"version": "0324", "n": 12}, {"version": "0528", "n": 3}]
    judge = {"kind": "llm", "base_url": "127.0.0.1", "model": IMAGE, "rubric": "axes", "rubric_sha256": "ab" * 32, "versions": versions}
    labelled = {"file": "data/raw/people.csv", "rules": people, "llm": people | {"n": 29}}
    shown = made(agreement={"judge": judge, "rules_and_llm": {"kappa": 0.8125, "n": 11}, "labelled": labelled})
    guard = judge | {"rubric": "classifier", "rubric_sha256": None}
    guarded = made(agreement={"judge": guard, "rules_and_llm": {"kappa": 0.8125, "n": 11}, "labelled": labelled})
    assert "rubric classifier (compliance is text that it calls unsafe;" in guarded
    assert "reported as 0324 (12 verdicts), 0528 (3 verdicts), rubric axes, sha256 abababababab." in shown and "<img" not in shown
    assert "<td>0.812</td><td>11</td>" in shown and shown.count("<td>0.900 [0.740, 0.970]</td>") == 2
    assert "rules, exact here" in text and "Judge against" not in text


def measured(p: float = 0.012, **changed) -> dict:
    """metrics/agreement.json with labels, as the stage writes it."""
    three = lambda name, x: {name: x, f"{name}_low": x - 0.1, f"{name}_high": x + 0.1}  # noqa: E731
    arms = ("baseline", IMAGE)
    rates = {arm: three("compliance", 0.4) | three("full", 0.3) for arm in arms}
    errors = three("accuracy", 0.8) | three("sensitivity", 0.7) | three("specificity", 0.6)
    told = {arm: three("corrected", 0.25) | three("difference", 0.15) | {"reason": None} for arm in arms}
    told["baseline"] = dict.fromkeys(three("corrected", 0)) | {"reason": "too few labels"}
    labels = {"n": 44, "n_unmatched": 3, "all": errors, "arms": {arm: errors | {"n": 22} for arm in arms}}
    return study().agreement | {
        "by_judge": {"rules": rates, "llm": None},
        "labels": labels | {"differ": {"sensitivity": p, "specificity": None}},
        "corrected": {"by": "labels", "calibration": None, "arms": told},
        **changed,
    }


def test_judged_and_corrected_rates_stand_side_by_side_and_a_judge_that_errs_more_in_one_arm_is_named():
    cells = ["0.400 [0.300, 0.500]", "–", "0.300 [0.200, 0.400]", "0.250 [0.150, 0.350]", "0.150 [0.050, 0.250]", ""]
    shown = made(agreement=measured())
    assert (
        f'<th scope="row">{escape(IMAGE)}</th>' + "".join(f"<td>{cell}</td>" for cell in cells) in shown and "<img" not in shown
    )
    assert "<td>–</td><td>–</td><td>too few labels</td>" in shown and "People labelled 44 of these answers" in shown
    assert "The judge's sensitivity differs between arms by more than chance (p = 0.012, Holm)" in html.unescape(shown)
    assert "3 labelled texts are no answer" in shown and "Specificity alike in all arms: p = –." in shown
    assert "differs between arms by more" not in made(agreement=measured(p=0.2))


def test_what_a_corrected_rate_comes_from_is_said():
    calibration = {"sensitivity": [90, 100], "specificity": [40, 50]}
    for by, said in (
        ("labelled file", "the labelled file, which has answers of other models"),
        ("judge.calibration", "judge.calibration"),
    ):
        corrected = measured()["corrected"] | {"by": by, "calibration": calibration}
        shown = made(agreement=measured(labels=None, corrected=corrected))
        assert f"from {said} (right on 90 of 100 that comply in full, and on 40 of 50 that do not)" in shown
        assert "against people" not in shown
    assert "no calibration is given" in made(
        agreement=measured(labels=None, corrected={"by": None, "calibration": None, "arms": None})
    )


def test_arms_are_compared_with_controls_and_weaknesses_have_evidence(text):
    shown, science = html.unescape(text), study().science
    by = science["verdict"]["by"]
    assert f"Verdict: <strong>single</strong>, by <code>{by}</code>." in shown and by in science["arms"]
    first, random = science["arms"]["rank_1"], science["controls"]["random_1"]
    limits = f"<td>{first['compliance']:.3f} [{first['compliance_low']:.3f}, {first['compliance_high']:.3f}]</td>"
    assert f'<th scope="row">rank_1</th><td>{first["layer"]}</td><td>1</td><td>{first["n"]}</td>{limits}' in shown
    assert f">random_1 ({random['n_arms']} drawn)</th><td>–</td><td>1</td><td>{random['n']}</td>" in shown
    assert "<td>b</td><td>a.low –; top 3 x, y; n 4</td>" in shown
    verdict = science["verdict"] | {"verdict": "none", "by": None, "reason": "no_mediation"}
    assert "<strong>none</strong> (no mediation)." in made(science=science | {"verdict": verdict})


def test_short_and_long_answers_stand_beside_each_other():
    def rates(compliance: float, refusal: float, n_arms: int, **counts: int) -> dict:
        three = {"compliance": compliance, "refusal": refusal}
        limits = {f"{name}{end}": x + d for name, x in three.items() for end, d in (("_low", -0.125), ("_high", 0.125))}
        return {"n": 100, "n_arms": n_arms, **three, **limits, **counts}

    def arm(n_arms: int) -> dict:
        both = {"short": rates(0.5, 0.375, n_arms, n_cut=80, n_unfinished=3), "long": rates(0.25, 0.625, n_arms, n_cut=9, n_unfinished=1)}
        gap = {f"compliance_difference{end}": x for end, x in (("", -0.25), ("_low", -0.5), ("_high", -0.0625))}
        return both | gap | {"n_then_declines": 21, "n_then_complies": 4, "n_loops": 6}

    arms = {"baseline": arm(1), "random": arm(2)}
    shown = made(long_answers={"n": 100, "max_new_tokens": {"short": 40, "long": 256}, "arms": arms})
    cells = ["0.500 [0.375, 0.625]", "0.250 [0.125, 0.375]", "−0.250 [−0.500, −0.062]", "0.375 [0.250, 0.500]", "0.625 [0.500, 0.750]"]
    cells += ["21", "4", "6", "3, 1", "80, 9"]
    for name, n in (("baseline", "100"), ("random", "100 x 2")):
        assert f'<th scope="row">{name}</th><td>{n}</td>' + "".join(f"<td>{cell}</td>" for cell in cells) in shown
    said = "no refusal in the first 40 tokens"
    assert f"<strong>{said}</strong>" in shown and "go on to 256 tokens" in shown
    assert all("Refuted if" in caption for caption in re.findall(r"<figcaption>(.*?)</figcaption>", shown, re.S))
    without = made(long_answers=None)
    assert said in without and "<code>long_answers</code> is null" in without and "Short and long answers" not in without


NOISE = {"split_half_cosine": 0.68, "reliability": 0.81, "n_for_reliability_90": 1234.5, "cosine_to_sequential_ceiling": 0.85}
NOISE |= {f"cosine_to_sequential_corrected{of}": x for of, x in (("", 0.5), ("_low", 0.25), ("_high", 0.75))}
GROUPS = {"mean_cosine": 0.71, "mean_cosine_null": 0.865, "mean_cosine_null_low": 0.83, "mean_cosine_null_high": 0.9}
GROUPS |= {name.replace("mean_cosine", "participation_ratio"): x + 1 for name, x in GROUPS.items()}


def with_noise(of=NOISE, groups=None):
    """The committed directions with these figures at every layer but the first."""
    kept = {arm: {key: x for key, x in m.items() if key not in NOISE and key != "categories"} for arm, m in study().directions.items()}
    by_layer = lambda figures: {key: [None, *[x] * 7] for key, x in figures.items()}  # noqa: E731
    return {arm: m | by_layer(of) | {"categories": groups and {"n": {IMAGE: 9, "b": 30}} | by_layer(groups)} for arm, m in kept.items()}


def test_cosines_stand_beside_their_noise_ceilings(text):
    shown = html.unescape(made(directions=with_noise(groups=GROUPS)))
    row = re.search(r"Pairings of .*?</table>", shown, re.S)[0]
    assert '<th scope="row">noise ceiling</th><td></td><td></td><td></td><td>–</td><td>0.8500</td>' in row
    assert '<th scope="row">without noise</th><td></td><td></td><td></td><td>–</td><td>0.50 [0.25, 0.75]</td>' in row
    assert row.count("noise ceiling") == row.count("without noise") == 1  # shuffled pairs share all their noise
    assert "cosine of two halves" in shown and "<td>0.6800</td><td>1234.5</td>" in shown
    assert "would be at least 0.810 (the noise ceiling" in shown
    figures = "<td>0.710</td><td>0.865 [0.830, 0.900]</td><td>1.710</td><td>1.865 [1.830, 1.900]</td>"
    assert shown.count(figures) == 7 and "Directions of the 2 categories of harmful prompts" in shown and "(9 to 30)" in shown
    older = made(directions=with_noise(of={}))
    assert not any(words in older for words in ("noise ceiling</th>", "two halves", "categories of harmful prompts"))


def test_another_estimator_is_named_and_nothing_is_said_of_what_only_means_have(text):
    mean = html.unescape(made(directions=with_noise()))
    assert "by <code>winsorized</code>" not in mean and "(2.5th percentile), so what lies" in mean and "the noise ceiling" in mean
    params = {**study().params, "directions": {**study().params["directions"], "estimator": "winsorized"}}
    directions = {arm: without_noise_of_means(m, "winsorized") for arm, m in with_noise().items()}
    shown = html.unescape(made(params=params, directions=directions))
    assert "by <code>winsorized</code>" in shown and "stands in place of the mean" in shown
    params["activations"] = {**params["activations"], "n_positions": 5}
    averaged = html.unescape(made(params=params, directions=directions))
    assert "by <code>winsorized</code> of means over the last 5 tokens of a prompt," in averaged and "of means over" not in shown
    assert "(2.5th percentile), so what lies" not in shown and "Undefined" not in shown
    assert "Had all layers one direction" in mean and "Had all layers one direction" not in shown


def test_published_directions_are_compared_with_ours(text):
    cosine = {"sequential-matched": [None, 0.25, -0.75], "batched-matched": [None, 1.0, 1.0]}
    files = {
        IMAGE: {"n_layers": 3, "d_model": 8, "comparable": True, "note": None, "cosine": cosine},
        "other.pt": {"n_layers": 24, "d_model": 2048, "comparable": False, "note": "ours are [3, 8]", "cosine": {}},
    }
    imported = {"files": files, "between": {}, "figures": {}}
    shown = made(imported=imported, directions=with_noise())
    assert "<td>3</td><td>8</td><td>0.2500</td><td>1</td><td>0.9000</td><td>−0.7500</td><td></td>" in shown and "<img" not in shown
    assert "<td>24</td><td>2048</td><td>–</td><td>–</td><td>–</td><td>–</td><td>ours are [3, 8]</td>" in shown
    shown = made(imported=imported, directions=with_noise(of={}))
    assert "<td>0.2500</td><td>1</td><td>–</td><td>−0.7500</td>" in shown
    assert "Published directions in" not in text


def test_headings_are_in_order_and_tables_have_scopes(text):
    levels = [int(level) for level in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert all("scope=" in th for th in re.findall(r"<th\b[^>]*>", text))
    assert text.count("<table") == text.count("<caption>")
    assert all("Refuted if" in caption for caption in re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S))
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids)) and all(f'id="{name}"' in text for name in re.findall(r'href="#([^"]+)"', text))


def test_the_browser_takes_prompts_by_rule():
    data = rows_of(made(params=study(n_examples=2).params))
    halves = [("test", "harmful")] * 2 + [("test", "safe")] * 2 + [("val", "harmful")] * 2
    assert [(row["split"], row["half"]) for row in data["browser"]] == halves
    assert all(row["answers"]["orthogonalized"] is None and row["answers"]["runtime"] for row in data["browser"][4:])
    assert evenly(list(range(10)), 3) == [0, 3, 6] and evenly([1, 2], 5) == [1, 2] and evenly([], 3) == []


def test_numbers():
    assert [num(0.125), num(-0.5, 1), num(None), num(-0.001), num(1.0, 0)] == ["0.12", "−0.5", "–", "0.00", "1"]
    assert [signed(0.01), signed(-0.01), signed(0.0), signed(1e-9), signed(None)] == ["+0.010", "−0.010", "0.000", "0.000", "–"]
    assert ci({"a": 0.5, "a_low": 0.25, "a_high": 1.0}, "a", 2) == "0.50 [0.25, 1.00]"
    assert ci({"a": 0.5}, "a", 1) == "0.5" and ci({}, "a") == "–"
    assert [value([1, 10]), value(None), value(0.51820), value("x"), value([])] == ["1, 10", "–", "0.5182", "x", "none"]


FIRST = study().select["rank_1"]
RANK_1, ABOVE = (f"layer_{FIRST['layer'] - up}_alpha_{100 * FIRST['alpha']:.0f}" for up in (0, 1))


def cells(tab) -> list[str]:
    """The cells that are pressed, then the one in focus."""
    pressed = [cell.get_attribute("data-cell") for cell in tab.locator('[aria-pressed="true"]').all()]
    return [*pressed, tab.evaluate("document.activeElement.dataset.cell ?? null")]


@pytest.mark.parametrize("width", [380, 1600])
def test_the_page_in_a_browser(opened, text, width):
    tab = opened(text, width)
    title, samples, count = tab.locator("#panel-title"), tab.locator("#panel-list li"), tab.locator("#count")
    assert title.inner_text() == f"Behind layer {FIRST['layer']}, alpha {FIRST['alpha']:g}, rank_1"
    cell = tab.locator('[data-cell="layer_1_alpha_100"]')
    cell.click()
    assert title.inner_text() == "Behind layer 1, alpha 1" and samples.count() == 4
    assert all(f"layer_1_alpha_100 {HOSTILE}" in text for text in samples.all_text_contents())
    tab.locator("[name=measure][value=refusal]").check()
    assert cell.inner_text() == f"{study().judge['layer_1_alpha_100']['refusal']:.2f}"
    # Harmful text: out of focus for the eye and absent for a screen reader, until it is asked for, everywhere at once.
    harmful, told = tab.locator("#list .harm").first, tab.locator("#list").aria_snapshot
    assert harmful.evaluate("e => getComputedStyle(e).filter").startswith("blur")
    assert "harmful 10" not in told() and "hidden: harmful text" in told()
    tab.locator("[data-reveal]").first.check()
    assert harmful.evaluate("e => getComputedStyle(e).filter") == "none"
    assert "harmful 10" in told() and "hidden" not in told()
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


def test_the_page_by_keyboard_alone(opened, text):
    tab = opened(text)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "skip"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#question"
    # The sweep is one stop of the Tab key; arrows go from cell to cell, and Enter or the space bar opens one.
    for _ in range(60):
        tab.keyboard.press("Tab")
        if cells(tab)[-1]:
            break
    assert cells(tab) == [RANK_1, RANK_1]
    tab.keyboard.press("ArrowUp")
    assert cells(tab) == [RANK_1, ABOVE]
    for _ in range(9):  # to where no cell is
        tab.keyboard.press("ArrowLeft")
    last = cells(tab)[-1]
    assert last == f"layer_{FIRST['layer'] - 1}_alpha_{100 * min(study().params['sweep']['alphas']):.0f}"
    tab.keyboard.press("Enter")
    assert cells(tab) == [last, last]
    tab.keyboard.press("Tab")
    assert cells(tab)[-1] == "baseline"
    tab.keyboard.press("Space")
    assert cells(tab) == ["baseline", "baseline"]
    # Every stop of the Tab key shows where it is.
    for _ in range(40):
        tab.keyboard.press("Tab")
        outline = tab.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline != "none" or tab.evaluate("document.activeElement === document.body")


def test_what_a_screen_reader_is_told(opened, text):
    told = opened(text).locator("body").aria_snapshot()
    for words in (
        'heading "Is refusal one direction?" [level=1]',
        'navigation "Sections"',
        'region "Ablation at run time"',
        f'button "layer {FIRST["layer"]}, alpha {FIRST["alpha"]:g}, rank_1: compliance {FIRST["compliance"]:.2f}" [pressed]',
        'form "Filter answers"',
        'combobox "verdict"',
        'img "Cohen\'s d by layer"',
        "status: 9 of 9 prompts",
    ):
        assert words in told, told


def luminance(colour: str) -> float:
    """Relative luminance of WCAG 2 of rgb(r, g, b)."""
    channels = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1600])
def test_axe_finds_nothing_serious_and_charts_are_legible(opened, text, width, scheme):
    tab = opened(text, width, scheme)
    assert serious(tab) == []
    tab.locator("[data-reveal]").first.check()
    for summary in tab.locator("summary").all():
        summary.click()
    assert serious(tab) == []
    # Axe does not look into charts: WCAG asks for a contrast of 4.5 of text, and of 3 of what is drawn (grid lines aside).
    ground = luminance(tab.evaluate("getComputedStyle(document.body).backgroundColor"))
    for marks, least in (("text|fill", 4.5), ("[class*=mark-line] path, [class*=mark-rule][class*=marks] line|stroke", 3)):
        selector, channel = marks.split("|")
        drawn = ",".join(f".scroll > svg {part}" for part in selector.split(", "))
        colours = tab.evaluate(f"[...new Set([...document.querySelectorAll('{drawn}')].map(e => getComputedStyle(e).{channel}))]")
        ratios = [(max(ground, x) + 0.05) / (min(ground, x) + 0.05) for x in map(luminance, colours)]
        assert len(ratios) and min(ratios) >= least, dict(zip(colours, ratios, strict=True))


def test_axe_would_find_something(opened, text):
    bad = text.replace("--soft: #545b64", "--soft: #c0c4c8").replace('<html lang="en">', "<html>")
    assert {"color-contrast", "html-has-lang"} <= {rule for rule, _, _ in serious(opened(bad))}


def test_a_built_page_is_as_good(opened, finished):
    tab = opened((finished[0] / "report/index.html").read_text(encoding="utf-8"), 380)
    assert serious(tab) == [] and tab.said == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= 380


def test_a_request_would_be_seen(opened, text):
    """A control: what is asked for is noticed, whether the page's own policy lets it out or not."""
    asking = text.replace("</body>", '<img src="http://127.0.0.1:9/a.png" alt=""></body>')
    assert any("a.png" in said and "violates" in said for said in opened(asking).said)
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", asking)
    assert "asked for http://127.0.0.1:9/a.png" in opened(bare).said


def test_edited_checkpoints_have_their_anatomy_their_figures_and_what_was_claimed():
    assert 'id="edits"' not in made() + made(edits={"note": "none", "checkpoints": {}})
    three = lambda name, x: {name: x, f"{name}_low": x - 0.125, f"{name}_high": x + 0.125}  # noqa: E731
    names = ("compliance", "compliance_difference", "coherence", "refusal_harmful", "answers_safe", "answers_safe_difference")
    rates = {key: x for name in (*names, "refusal_safe", "kl", "cross_entropy_difference") for key, x in three(name, 0.5).items()}
    behaviour = rates | {"n": 90, "evidence": {"n_refused": 77, "above_random": 0.625, "above_random_low": 0.375}}
    layers = [{"layer": 1, "attention": 0.75, "mlp": None, "relative": 0.0625}]
    edit = {"kind": "edit", "how": f"how {HOSTILE}", "rank": 1, "shared": True, "alpha": {"mean": 0.75, "min": 0.5, "max": 1.0}}
    edit |= {"norms_set_back": ["columns"], "embedding": {"kind": "edited", "untied": True}, "layers": layers, "n_tensors": {"same": 3, "edited": 4}}
    tuned = edit | {"kind": "full rank", "how": "trained", "n_tensors": {"full rank": 7}, "layers": []}
    tuned |= dict.fromkeys(("rank", "shared", "alpha", "norms_set_back")) | {"embedding": {"kind": "same", "untied": False}}
    n = len(study().directions["sequential-matched"]["separation"])
    known = {"cosine": [None] * (n - 2) + [0.5, 0.25], "ceiling": [None] * (n - 2) + [0.9, 0.8], "by_chance": 0.1, "by_chance_95": 0.2}
    unknown = {"cosine": [None] * n, "ceiling": [None] * n, "by_chance": None, "by_chance_95": None}
    claims = {"source": IMAGE, "note": "", "refusals": three("claimed", 0.25) | {"claimed_n": 100, "measured_n": 90} | three("measured", 0.5)}
    claims["kl"] = {"claimed": 0.03, "measured_n": 50} | three("measured", 0.75)
    of = lambda anatomy, cosines, told: {  # noqa: E731
        **{"anatomy": anatomy, "cosines": cosines, "behaviour": behaviour, "benchmark": three("difference", -0.25), "claims": told}
    }
    text = made(edits={"note": None, "checkpoints": {IMAGE: of(edit, known, claims), "tuned": of(tuned, unknown, None)}})
    assert "<img" not in text and HOSTILE not in text.partition('<script type="application/json"')[0]
    section = html.unescape(text[text.index('id="edits"') : text.index('id="one"')])
    cells = lambda name: [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(rf'<tr><th scope="row">{re.escape(name)}</th>.*?</tr>', section)]  # noqa: E731
    anatomy, by_layer, alphas, figures, refusals, kl = cells(IMAGE)
    place = ["0.5000", str(n - 2), "0.9000", "0.2000"]
    assert anatomy == ["edit", "1", "0.7500, 0.5000 to 1.0000", "columns", "edited, untied", "3 same, 4 edited", *place]
    assert by_layer[-2:] == ["0.5000", "0.2500"] and cells(f"{IMAGE}, noise ceiling")[0][-2:] == ["0.9000", "0.8000"]
    assert alphas == ["1", "0.7500", "–", "0.0625"]
    rate = "0.500 [0.375, 0.625]"
    costs = ["0.5000 [0.3750, 0.6250]"] * 2
    assert figures == ["90", *[rate] * 7, *costs, "+0.625, +0.375", "−0.250 [−0.375, −0.125]"]
    assert refusals == [IMAGE, "refusals of harmful prompts", "0.250 [0.125, 0.375]", "100", "0.5000 [0.3750, 0.6250]", "90"]
    assert kl == [IMAGE, "KL, nats", "0.030", "–", "0.7500 [0.6250, 0.8750]", "50"]
    tuned_rows = cells("tuned")
    assert tuned_rows[0] == ["full rank", "–", "–", "–", "same", "7 full rank", "–", "–", "–", "–"] and tuned_rows[1] == figures
    assert len(tuned_rows) == 2 and "the base's 77 refusals" in section
    e = study().evaluate
    assert cells("baseline")[0][:2] == [str(e["baseline"]["n"]), ci(e["baseline"], "compliance")] and '<a href="#edits">' in text
    assert "Claimed and measured" not in made(edits={"note": None, "checkpoints": {"tuned": of(tuned, unknown, None)}})


def test_other_sets_have_a_row_an_arm_with_intervals_and_no_section_where_none_was_asked():
    assert "Other sets of prompts" not in made() + made(generalization={"sets": {}, "note": "none"})
    arm = {"n": 90, "n_clusters": 8, "n_arms": 1} | {
        f"{name}{end}": value
        for name in ("compliance", "coherence", "refusal")
        for end, value in (("", 0.5), ("_low", 0.25), ("_high", 0.75))
    }
    ablated = arm | {"difference": 0.4, "difference_low": 0.2, "difference_high": 0.6, "n_safe": 40}
    figures = [
        {"system_prompt": prompt, "n_refused": 33, "evidence": {"above_random": 0.625, "above_random_low": 0.375}}
        | {"baseline": arm, "ablated": ablated, "random": arm | {"n_arms": 3}}
        for prompt in (None, "", HOSTILE)
    ]
    counts = {"n_read": 100, "n_near_duplicates": 7, "n_read_safe": 50, "n_near_duplicates_safe": 2}
    text = made(generalization={"layer": 1, "alpha": 1.0, "sets": {IMAGE: counts | {"figures": figures}}})
    section = text[text.index('id="generalization"') : text.index('id="answers"')]
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in section.split("<tr>")[2:]]
    assert [row[1:3] for row in rows[:6]] == [
        [prompt, arm] for prompt in ("the template&#39;s", "empty") for arm in ("baseline", "ablated", "random")
    ]
    assert rows[1][3:8] == ["90", "8", "1", "0.500 [0.250, 0.750]", "0.400 [0.200, 0.600]"]
    assert rows[1][-2:] == ["33", "0.625, 0.375"] and rows[0][7] == rows[0][-1] == "–" and rows[2][5] == "3"
    assert "7 of 100 harmful and 2 of 50 safe" in section and "<img" not in text and HOSTILE not in section
