"""docs/replication.md: its tables are what `make models` makes, and each number around them is in the committed figures."""

import json
import re
from pathlib import Path

import pytest
import yaml

from refusal.analysis.verdict import BETTER, FEWEST_REFUSED, MEDIATES
from refusal.io.errors import UserError
from refusal.io.params_file import overlaid
from refusal.judges.roles import OPENING
from refusal.report.models import KINDS, interval
from refusal.report.replication import NAMES, NO, OPEN, PART, YES, arms, filled, other_sets, statements
from refusal.report.reproduction import published
from stages import models

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / models.REPLICATION).read_text(encoding="utf-8")
MADE = (*NAMES, "model", "long_answers", "generalization")
REAL = {name: json.loads((ROOT / models.REAL / f"metrics/{name}.json").read_text(encoding="utf-8")) for name in MADE}
NUMBER = r"[+-]?\d+(?:\.\d+)?"
# What has digits and is no figure: names, the paper, the level of the intervals, and what the judge may say.
NAMED = r"Qwen[\d.]+-Coder-0\.5B-Instruct|Qwen-1\.8B-Chat|2024, arXiv 2406\.11717|4-bit|float32|95 %|0, 0\.5 or 1"


def prose() -> str:
    """The page without its tables, code and targets of links, in one line."""
    text = re.sub(r"<!-- (\w+).*?<!-- end -->", "", PAGE, flags=re.DOTALL)
    return " ".join(re.sub(r"(?m)^    .*$|\]\([^)]*\)", "", text).split())


def quoted() -> list[str]:
    """Every sentence of the page that holds a number, made from the committed figures."""
    e, s, d = REAL["evaluate"], REAL["science"], REAL["directions"]["sequential-matched"]
    v, refused = s["verdict"], s["verdict"]["n_refused"]
    default = json.loads((ROOT / "metrics/evaluate.json").read_text(encoding="utf-8"))
    organisms = json.loads((ROOT / "metrics/organisms.json").read_text(encoding="utf-8"))
    arranged = [KINDS[name.split(".")[0]][1](o) for name, o in organisms.items() if KINDS[name.split(".")[0]][1]]
    planted = [interval(organisms[f"planted.{seed}"]["single"], "compliance") for seed in range(3)]
    p = overlaid(ROOT / "params.yaml", ROOT / f"{models.REAL}.yaml")
    settings, science, test = (
        {row["quantity"]: row["ours"] for row in REAL["reproduction"]["rows"]},
        p["science"],
        e["baseline"]["n"],
    )
    u, c, at = REAL["directions"]["sequential-unrelated"], d["categories"], e["layer"]
    corrected = interval({f"corrected{end}": u[f"cosine_to_sequential_corrected{end}"][at] for end in ("", "_low", "_high")}, "corrected")
    long = REAL["long_answers"]
    limits, asked, ablated = long["max_new_tokens"], long["arms"]["baseline"], long["arms"]["runtime"]
    one, two, of = s["estimators"]["unrelated"], s["estimators"]["paired_svd"], s["arms"]
    padded = {i: c for i, c in enumerate(REAL["directions"]["batched_unmasked-matched"]["cosine_to_sequential"]) if c is not None}
    deepest = min(padded, key=lambda i: padded[i])
    undecided = [
        f"{name}, empty: {'too few' if row['n_refused'] < FEWEST_REFUSED else f'lower limit below {MEDIATES:g}'}"
        for name, sets in REAL["generalization"]["sets"].items()
        for row in sets["figures"]
        if row["system_prompt"] == "" and not (row["evidence"]["mediates"] and row["n_refused"] >= FEWEST_REFUSED)
    ]
    labelled = len((ROOT / "data/labels/qwen2.5-coder-0.5b-instruct.jsonl").read_text(encoding="utf-8").splitlines())
    tokens, (alpha,) = p["generation"]["max_new_tokens"], p["sweep"]["alphas"]
    baseline, cells = REAL["judge"]["baseline"], [c for c in REAL["judge"].values() if c["layer"] is not None]
    works = [c["layer"] for c in cells if c["compliance_low"] > baseline["compliance_high"]]
    found = statements(REAL, published())
    number = {one.text.split(" ")[0]: i for i, one in enumerate(found, 1)}

    def those(wanted: str) -> str:
        return ", ".join(str(i) for i, one in enumerate(found, 1) if one.outcome == wanted)

    return [
        f"{settings['settings.n_pairs']} pairs of our own",
        f"{d['n_harmful']} train, {REAL['model']['n']} val, {test} test, without",
        f"the best of {len(d['layers'])} layers on val by compliance x coherence, at alpha {alpha:g};",
        f"each greedy answer of {tokens} tokens",
        f"{e['random']['n_arms']} random directions at the same sites",
        f"of at least {FEWEST_REFUSED} prompts that the baseline refuses",
        f"with a lower limit of {MEDIATES:g} or more",
        f"a compliance greater by more than {BETTER:g};",
        f"Of the {refused} prompts that the baseline refuses, {v['difference']['removed']:.2f} comply once the direction is ablated, "
        f"{v['difference']['above_random']:.2f} more than under random directions (lower limit {v['difference']['above_random_low']:.2f}): "
        f"the verdict is `{v['verdict']}`",
        f"from {interval(e['baseline'], 'refusal_safe')} to {interval(e['runtime'], 'refusal_safe')}; under random directions it is "
        f"{interval(e['random'], 'refusal_safe')}",
        f"With {limits['long']} tokens in place of {limits['short']}, on {long['n']} of these prompts, compliance is {interval(asked['long'], 'compliance')} "
        f"of the baseline and {interval(ablated['long'], 'compliance')} ablated, {interval(asked, 'compliance_difference', '+.2f')} and "
        f"{interval(ablated, 'compliance_difference', '+.2f')} against the short answers; under one random direction it is {interval(long['arms']['random']['long'], 'compliance')}",
        f"{asked['n_loops']} and {ablated['n_loops']} answers end in a loop that the short ones do not show",
        f"The rules read the first {OPENING} words; the stock phrases of a refusal, looked for in the whole text, stand in "
        f"{asked['short']['substring_refusal']:.2f} of the short and {asked['long']['substring_refusal']:.2f} of the long answers of the baseline, in "
        f"{ablated['short']['substring_refusal']:.2f} and {ablated['long']['substring_refusal']:.2f} of the ablated ones",
        f"a KL of {interval(e['runtime'], 'kl', '.3f')} nats a token, of random directions {interval(e['random'], 'kl', '.3f')}",
        f"of layer {one['layer']}, has cosine {one['cosine_rank_1']:.2f} with it, the first singular vector, of layer {two['layer']}, "
        f"{two['cosine_rank_1']:.2f}, and both restore compliance: {interval(of[one['arm']], 'compliance')} and "
        f"{interval(of[two['arm']], 'compliance')}",
        f"of the prompts that the baseline refuses {interval(e['harmless']['behaving'], 'compliance')} then comply, under random directions "
        f"{interval(e['random']['behaving'], 'compliance')}",
        f"a gain of 0.5 over the baseline, it would not meet (lower limit {e['runtime']['difference_low']:+.2f};",
        f"({'; '.join(undecided)})",
        f"Ours is deepest at layer {deepest}, theirs at layer {found[2].theirs.split()[-1]}",
        f"labels of {labelled} answers of this model",
        f"At layer {at} the directions from matched and from unrelated safe prompts have a cosine of {u['cosine_to_sequential'][at]:.2f}, "
        f"{corrected} without that noise",
        f"The directions of the {len(c['n'])} categories have a mean cosine of {c['mean_cosine'][at]:.2f}, where random groups of prompts as "
        f"large have {c['mean_cosine_null'][at]:.2f} [{c['mean_cosine_null_low'][at]:.2f}, {c['mean_cosine_null_high'][at]:.2f}]",
        f"**Replicates: {those(YES)}.**",
        f"**In part: {those(PART)}.**",
        f"**Does not: {those(NO)}.**",
        f"**Not decided: {those(OPEN)}.**",
        f"ablation already works from layer {min(works)} on",
        f"For {number['Matched']} a paired comparison",
        f"For {number['Benchmarks']} its seven tasks",
        f"for {number['Performance']} a sweep of greater alphas",
        f"compliance with {default['baseline']['n']} harmful test prompts from {interval(default['baseline'], 'compliance')} to "
        f"{interval(default['runtime'], 'compliance')}, random directions leave it at {interval(default['random'], 'compliance')}",
        f"Of {len(arranged)} organisms whose answer was arranged, {sum(arranged)} were found as arranged",
        f"its ablation restores {planted[0]}, {planted[1]} and {planted[2]} (",
        f"Answers of {tokens} tokens hardly show",
        f"{test} test prompts, one-line requests of our own. The model refuses {refused} of them",
        f"Estimators were compared at {len(science['layers'])} layers, chosen on {science['n_val']} val prompts; the gradient took "
        f"{science['optimised']['steps']} steps",
        f"at most {p['benchmark']['limit']} documents each",
        f"At {len(d['layers'])} layers a highest rate",
    ]


def differing(sentence: str, text: str) -> str:
    """What a text says in place of a sentence: which numbers are others, where it has the same words."""
    words = re.escape(re.sub(NUMBER, "@", sentence)).replace("@", f"({NUMBER})")
    if not (said := re.search(words, text)):
        return f"nowhere in {models.REPLICATION}: {sentence!r}"
    wrong = [
        f"{one} and not {other}" for one, other in zip(re.findall(NUMBER, sentence), said.groups(), strict=True) if one != other
    ]
    return f"{models.REPLICATION}: the metrics say {', '.join(wrong)} in {said[0]!r}"


def test_each_sentence_with_a_number_is_that_of_the_committed_figures():
    text = prose()
    wrong = [differing(sentence, text) for sentence in quoted() if sentence not in text]
    assert not wrong, "\n".join(wrong)


def test_no_number_is_without_a_figure():
    text = prose()
    for sentence in sorted(quoted(), key=len, reverse=True):
        text = text.replace(sentence, "")
    text = re.sub(rf"{NAMED}|`[^`]*`", "", text)
    assert re.findall(r".{0,40}\d.{0,20}", text) == []


def test_a_number_that_differs_is_named():
    said = differing("restores 1.00 [0.84, 1.00] of -12", "it restores 0.91 [0.80, 1.00] of -12 prompts")
    assert said.endswith("the metrics say 1.00 and not 0.91, 0.84 and not 0.80 in 'restores 0.91 [0.80, 1.00] of -12'")
    assert differing("of 12 prompts", "of twelve prompts").startswith("nowhere in ")


def test_the_tables_are_those_of_the_committed_figures(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert models.replication(PAGE) == PAGE, f"run `make models` and commit {models.REPLICATION}"


def test_the_words_between_the_numbers_hold():
    e, arms_of = REAL["evaluate"], REAL["science"]["arms"]
    estimators = {family: arms_of[found["arm"]] for family, found in REAL["science"]["estimators"].items()}
    direction = arms_of["rank_1"]
    for name in ("lda", "logistic", "optimised"):
        assert estimators[name]["difference_high"] < direction["difference_low"], f"{name} restores less"
    for name in ("unrelated", "paired_svd"):
        assert estimators[name]["compliance_high"] >= direction["compliance_low"], f"{name} restores compliance too"
    assert e["runtime"]["refusal_safe_high"] < e["baseline"]["refusal_safe_low"], "refusal of safe prompts falls too"
    assert e["harmless"]["compliance_low"] < e["baseline"]["compliance"] < e["harmless"]["compliance_high"], "it leaves compliance"
    geometry, unrelated = (REAL["directions"][f"sequential-{pairing}"] for pairing in ("matched", "unrelated"))
    assert unrelated["cosine_to_sequential_corrected_high"][e["layer"]] < 0.9, "two directions"
    of_groups = {name: values[e["layer"]] for name, values in geometry["categories"].items() if name != "n"}
    assert 0.5 < of_groups["mean_cosine"] < of_groups["mean_cosine_null_low"], "categories differ, and share most"
    assert REAL["directions"]["batched-matched"]["cosine_to_sequential_min"] > 0.9999, "with a mask nothing is left"
    assert e["layer"] >= len(REAL["directions"]["sequential-matched"]["norm"]) / 2, "the best layer lies late"
    matched, unrelated = (
        {(cell["layer"], cell["alpha"]): cell["compliance"] for cell in published()["arms"][f"sequential-{pairing}"]}
        for pairing in ("matched", "unrelated")
    )
    ((cell, theirs),) = [(cell, rate) for cell, rate in matched.items() if cell in unrelated]
    assert theirs < unrelated[cell], "the order is reversed"
    assert len([row for row in published()["across_models"]["rows"] if row["sufficient"] == "no"]) == 2, "two Llamas"


def test_it_is_short():
    assert 700 <= len(prose().split()) <= 1200


def changed(**changes):
    """The figures of the real study with some of them replaced, by their way there."""
    figures = json.loads(json.dumps(REAL))
    for way, value in changes.items():
        *above, key = way.split("__")
        place = figures
        for name in above:
            place = place[name.replace("_matched", "-matched")]
        place[key] = value
    return figures


def outcome(n, **changes):
    return statements(changed(**changes), published())[n - 1].outcome


def test_the_last_column_follows_its_rules():
    def early(low: float, high: float) -> str:
        """The outcome where Cohen's d at layer 10 has these limits."""
        arm = REAL["directions"]["sequential-matched"]
        lows, highs = [*arm["separation_low"]], [*arm["separation_high"]]
        lows[10], highs[10] = low, high
        at = "directions__sequential_matched__separation"
        return outcome(1, **{f"{at}_low": lows, f"{at}_high": highs})

    assert (early(-0.1, 0.2), early(0.1, 0.2), early(0.1, 1.5)) == (YES, PART, NO)
    assert outcome(2, directions__batched_unmasked_matched__separation_high=[0.1] * 24) == YES
    assert outcome(2, directions__batched_unmasked_matched__separation_low=[0.1] * 24) == OPEN
    assert outcome(3, directions__batched_matched__cosine_to_sequential_min=0.5) == NO
    assert outcome(4, science__verdict__difference__mediates=False) == NO
    assert outcome(4, science__verdict__verdict="undecided") == outcome(4, science__verdict__reason="no_refusal") == OPEN
    assert outcome(5, evaluate__layer=11) == NO
    assert outcome(5, judge__baseline__compliance_high=0.95) == YES and outcome(5, judge__baseline__compliance_high=1.0) == NO
    assert outcome(6, science__estimators__unrelated__compliance_high=0.5) == YES
    assert outcome(6, science__arms__rank_1__compliance_high=0.5) == NO
    assert [outcome(7, science__verdict__verdict=verdict) for verdict in ("subspace", "none", "undecided")] == [NO, OPEN, OPEN]
    assert outcome(8, evaluate__orthogonalized__difference_low=-0.1) == outcome(8, evaluate__orthogonalized__compliance=0.8) == NO
    theirs = dict.fromkeys(published()["settings"]["benchmark_tasks"])
    assert outcome(9, benchmark__baseline__tasks=theirs, benchmark__rank_1__difference_low=-0.006) == YES
    assert outcome(9, benchmark__baseline__tasks=theirs, benchmark__rank_1__difference_low=-0.007) == OPEN
    assert outcome(9, benchmark__rank_1__difference_low=-0.006) == OPEN  # of other tasks
    assert outcome(10, judge__layer_1_alpha_100__alpha=2.0) == NO
    fell = [{"quantity": "alpha_drop_off", "ours": 2.0}]
    assert outcome(10, judge__layer_1_alpha_100__alpha=2.0, reproduction__rows=fell) == YES


def test_every_arm_of_the_table_by_hand():
    lines = arms(REAL).splitlines()
    random, subspace = (
        next(line for line in lines if line.startswith(f"| {name}")) for name in ("random directions", "best subspace")
    )
    r = REAL["evaluate"]["random"]
    rates = [f"{r[key]:.2f} [{r[f'{key}_low']:.2f}, {r[f'{key}_high']:.2f}]" for key in ("compliance", "refusal", "coherence")]
    long = REAL["long_answers"]["arms"]["random"]["long"]
    rates += ["–", f"{long['compliance']:.2f} [{long['compliance_low']:.2f}, {long['compliance_high']:.2f}]"]
    assert random == f"| random directions | {r['n']} x {r['n_arms']} | {' | '.join(rates)} |"
    best = REAL["science"]["arms"][REAL["science"]["verdict"]["best_subspace"]]
    assert f"rank {best['rank']}" in subspace
    assert subspace.endswith(f"| {best['difference']:+.2f} [{best['difference_low']:+.2f}, {best['difference_high']:+.2f}] | – |")
    without = changed(science__verdict__best_subspace=None)
    assert len(arms(without).splitlines()) == len(lines) - 2
    assert statements(without, published())[6].ours == "none tried"


def test_every_set_and_system_prompt_is_a_line_by_hand():
    sets = REAL["generalization"]["sets"]
    _, _, *lines = other_sets(REAL["generalization"]).splitlines()
    assert len(lines) == sum(len(of["figures"]) for of in sets.values()) >= 6
    line = next(line for line in lines if line.startswith("| jailbreakbench | empty |"))
    (figure,) = (one for one in sets["jailbreakbench"]["figures"] if one["system_prompt"] == "")
    removed = round(figure["evidence"]["removed"] * figure["n_refused"])
    assert f"| {figure['n_refused']} | " in line and removed <= figure["n_refused"] <= figure["baseline"]["n"]
    for arm in ("baseline", "ablated", "random"):
        low, rate, high = (figure[arm][f"compliance{end}"] for end in ("_low", "", "_high"))
        assert f"| {rate:.2f} [{low:.2f}, {high:.2f}] |" in line


def test_compliance_in_long_answers_stands_in_a_column_of_its_own():
    long = {"compliance": 0.25, "compliance_low": 0.125, "compliance_high": 0.5}
    made = {"n": 100, "max_new_tokens": {"short": 32, "long": 256}, "arms": {"runtime": {"long": long}}}
    lines, before = arms(REAL | {"long_answers": made}).splitlines(), arms(REAL | {"long_answers": None}).splitlines()
    assert before == arms({name: REAL[name] for name in NAMES}).splitlines() and "tokens" not in before[0]
    added = [line.removeprefix(old.removesuffix(" |")) for line, old in zip(lines, before, strict=True)]
    assert added[:2] == [" | complies in 256 tokens, n = 100 |", " | --- |"]
    (at,) = (i for i, line in enumerate(lines) if line.startswith("| difference in means, layer") and "unrelated" not in line)
    assert added[at] == " | 0.25 [0.12, 0.50] |" and {*added[2:at], *added[at + 1 :]} == {" | – |"}


def test_a_table_has_one_place():
    text = "a\n<!-- x: made -->\n\nold\n<!-- end -->\nb\n<!-- y -->\n\n<!-- end -->\n"
    assert (
        filled(text, {"x": "new\n", "y": "z\n"})
        == "a\n<!-- x: made -->\n\nnew\n\n<!-- end -->\nb\n<!-- y -->\n\nz\n\n<!-- end -->\n"
    )
    for wrong in (text.replace("<!-- end -->", ""), text + text, ""):
        with pytest.raises(UserError, match="no one place for the table x"):
            filled(wrong, {"x": "new\n"})


def test_the_overlay_is_that_of_the_committed_study():
    """The settings that the page quotes are those the figures were made with."""
    locked = yaml.safe_load((ROOT / models.REAL / "dvc.lock").read_text(encoding="utf-8"))["stages"]["science"]["params"][
        "params.yaml"
    ]
    p = overlaid(ROOT / "params.yaml", ROOT / f"{models.REAL}.yaml")
    assert {name: p[name] for name in ("generation", "science")} == {name: locked[name] for name in ("generation", "science")}
