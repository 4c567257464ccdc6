"""The tables of docs/replication.md: the arms of the real study, and the write-up's statements with our figures beside them.

`make models` writes them between their marks; the prose around them is held to the same metrics by tests/test_replication.py.
Whether a statement replicates is decided here by a rule on intervals, so that new figures bring the words that go with them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from refusal.io.errors import UserError
from refusal.report.models import DASH, interval, table
from refusal.report.reproduction import by_layer
from refusal.report.study import Metrics

YES, PART, NO, OPEN = "yes", "in part", "no", "not decided"
NAMES = ("evaluate", "directions", "judge", "science", "benchmark", "reproduction")  # the metrics that are read
ARMS = {
    "baseline": "nothing",
    "runtime": "difference in means, layer {layer}",
    "orthogonalized": "the same in edited weights",
    "random": "random directions",
    "random_weights": "one in edited weights",
    "harmless": "difference of two harmless sets",
}
# Arms of the comparison of estimators, by their names there without the layer.
ESTIMATORS = {
    "unrelated": "difference in means, unrelated safe prompts, layer {layer}",
    "paired_svd": "first singular vector of the pairs' differences, layer {layer}",
    "lda": "Fisher's discriminant, layer {layer}",
    "logistic": "logistic regression, layer {layer}",
    "optimised": "direction by gradient",
}


class Statement(NamedTuple):
    """A statement of the write-up, its figure, ours, and whether it replicates: one of YES, PART, NO and OPEN."""

    text: str
    theirs: str
    ours: str
    outcome: str


def arms(m: Mapping[str, Metrics]) -> str:
    """Each arm on harmful test prompts: n, compliance, refusal, coherence, and compliance less the baseline's, paired; and of a
    study with long answers compliance in those."""
    e, science, long = m["evaluate"], m["science"], m.get("long_answers")
    names = {family: science["estimators"][family]["arm"] for family in ESTIMATORS if family in science["estimators"]}
    later = {arm: {"long": of["long"]} for arm, of in long["arms"].items()} if long else {}
    rows = [(words.format(layer=e["layer"]), e[arm] | later.get(arm, {})) for arm, words in ARMS.items()]
    rows += [(ESTIMATORS[family].format_map(science["arms"][arm]), science["arms"][arm]) for family, arm in names.items()]
    if best := science["verdict"]["best_subspace"]:
        rank = science["arms"][best]["rank"]
        rows.append((f"best subspace on val, rank {rank} (`{best}`)", science["arms"][best]))
        rows.append((f"random subspaces, rank {rank}", science["controls"][f"random_{rank}"]))
    cells = [
        [
            words,
            f"{row['n']}" + f" x {row['n_arms']}" * (row["n_arms"] > 1),
            *(interval(row, key) for key in ("compliance", "refusal", "coherence")),
            interval(row, "difference", "+.2f") if "difference" in row else DASH,
            *([interval(row["long"], "compliance") if "long" in row else DASH] if long else []),
        ]
        for words, row in rows
    ]
    columns = ("ablated", "n", "complies", "refuses", "coherence", "complies more than the baseline")
    more = (f"complies in {long['max_new_tokens']['long']} tokens, n = {long['n']}",) if long else ()
    return table(columns + more, cells)


BEYOND = "of these answered in full, ablated less random (lower limit)"  # shares of the prompts that the baseline refuses


def other_sets(generalization: Metrics) -> str:
    """The selected direction on sets that nothing was chosen on, with each system prompt: compliance, and the share of refusals
    removed beyond random directions, with its lower limit."""
    cells = []
    for name, of in generalization["sets"].items():
        for figure in of["figures"]:
            more = figure["evidence"]
            text = figure["system_prompt"]
            cells.append(
                [name, {None: "the template's", "": "empty"}.get(text, text), f"{figure['baseline']['n']}"]
                + [interval(figure[arm], "compliance") for arm in ("baseline", "ablated", "random")]
                + [interval(figure["ablated"], "difference", "+.2f"), f"{figure['n_refused']}"]
                + [DASH if more["above_random"] is None else f"{more['above_random']:.2f} ({more['above_random_low']:.2f})"]
            )
    columns = ("set", "system prompt", "n", "complies", "ablated", "random direction", "more than the baseline")
    return table((*columns, "the baseline refuses", BEYOND), cells)


def statements(m: Mapping[str, Metrics], published: Metrics) -> list[Statement]:
    """The write-up's statements that are about what this study measured, in the order of its pages."""
    return [Statement(*found) for part in (_separation, _batches, _ablation, _cost) for found in part(m, published)]


def numbered(found: list[Statement]) -> str:
    """The statements as a table, numbered from 1, so that prose can point at them."""
    rows = [[str(i), *one] for i, one in enumerate(found, 1)]
    return table(("", "the write-up says", "theirs", "ours", "replicates"), rows)


Found = Iterator[tuple[str, str, str, str]]


def _at(arm: Metrics, layer: int) -> Metrics:
    """Cohen's d of val prompts at a layer, with its limits."""
    return {f"d{end}": arm[f"separation{end}"][layer] for end in ("", "_low", "_high")}


def _separation(m: Mapping[str, Metrics], published: Metrics) -> Found:
    found, last = m["directions"]["sequential-matched"], published["separation"]["little_or_none_layers"][1]
    peak, early = _at(found, found["peak_layer"]), _at(found, last)
    yield (
        f"Layers up to {last} hardly separate harmful from safe prompts",
        "no figure",
        f"d {interval(early, 'd')} at layer {last}, at most {interval(peak, 'd')}, layer {found['peak_layer']}",
        NO if early["d_high"] >= peak["d_low"] else PART if early["d_low"] > 0 else YES,
    )


def _batches(m: Mapping[str, Metrics], published: Metrics) -> Found:
    d, theirs = m["directions"], published["vectors"]["in_sample_peak"]
    one, padded = (_at(arm, arm["peak_layer"]) for arm in (d["sequential-matched"], d["batched_unmasked-matched"]))
    ratio = theirs["sequential"]["separation"] / theirs["batched"]["separation"]
    yield (
        "Prompts one at a time separate better than batches",
        f"d {theirs['sequential']['separation']} against {theirs['batched']['separation']}, in sample",
        f"d {interval(one, 'd')} against {interval(padded, 'd')}, padding attended to",
        YES if padded["d_high"] < one["d_low"] else NO if padded["d_low"] > one["d"] / ratio else OPEN,
    )
    cosines, masked = by_layer(published["cosine_sequential_batched"]), d["batched-matched"]["cosine_to_sequential_min"]
    ours = by_layer(d["batched_unmasked-matched"]["cosine_to_sequential"])
    (low, least), (layer, turned) = (min(c.items(), key=lambda item: item[1]) for c in (cosines, ours))
    yield (
        "Batching turns the direction in some layers",
        f"cosine {least:.2f} at layer {low}",
        f"{turned:.2f} at layer {layer} with padding attended to; masked at least {masked:.2f}",
        YES if turned < 0.9 < masked else NO,
    )


def _ablation(m: Mapping[str, Metrics], published: Metrics) -> Found:
    e, v, arms = m["evaluate"], m["science"]["verdict"], m["science"]["arms"]
    top, unrelated = (published["arms"][name][0] for name in ("sequential-matched", "sequential-unrelated"))
    decided = v["verdict"] != "undecided" and v["reason"] != "no_refusal"
    yield (
        "Ablating one direction makes the model comply",
        f"{top['compliance']:.2f}; baseline, random: no figure",
        f"{interval(e['baseline'], 'compliance')} to {interval(e['runtime'], 'compliance')}; "
        f"random {interval(e['random'], 'compliance')}",
        (YES if v["difference"]["mediates"] else NO) if decided else OPEN,
    )
    cells, n_layers = (
        [c for c in m["judge"].values() if c["layer"] is not None],
        len(m["directions"]["sequential-matched"]["norm"]),
    )
    works = sorted({c["layer"] for c in cells if c["compliance_low"] > m["judge"]["baseline"]["compliance_high"]})
    beyond = f"{len(works)} layers, {works[0]} to {works[-1]}" if works else "no layer"
    yield (
        "Those directions lie in mid-late layers",
        f"best: layer {top['layer']} of {published['settings']['n_layers']}",
        f"best: layer {e['layer']} of {n_layers}; beyond the baseline on val: {beyond}",
        NO if e["layer"] < n_layers / 2 or not works else YES if works[0] >= n_layers / 3 else PART,
    )
    mine, other = arms["rank_1"], m["science"]["estimators"]["unrelated"]
    ahead, behind = (a["compliance_low"] > b["compliance_high"] for a, b in ((mine, other), (other, mine)))
    yield (
        "Matched pairs do better than unrelated safe prompts",
        f"{top['compliance']:.3f} against {unrelated['compliance']:.3f}" + _same_cell(published),
        f"{interval(mine, 'compliance')} against {interval(other, 'compliance')}",
        YES if ahead else NO if behind else OPEN,
    )
    name, low = v["best_subspace"], v["subspace_above_single_low"]
    yield (
        "One direction is enough, no subspace is needed",
        "no figure for Qwen",
        f"`{name}` {interval(arms[name], 'compliance')}; less the best direction's, lower limit {low:+.2f}"
        if name
        else "none tried",
        {"single": YES, "subspace": NO}.get(v["verdict"], OPEN),
    )


def _same_cell(published: Metrics) -> str:
    """Their matched and unrelated compliance at the first layer and alpha that both tables have."""
    matched, unrelated = (
        {(c["layer"], c["alpha"]): c["compliance"] for c in published["arms"][f"sequential-{pairing}"]}
        for pairing in ("matched", "unrelated")
    )
    both = [cell for cell in matched if cell in unrelated]
    return "".join(f"; both at layer {i}, alpha {a:g}: {matched[i, a]:.3f} against {unrelated[i, a]:.3f}" for i, a in both[:1])


def _cost(m: Mapping[str, Metrics], published: Metrics) -> Found:
    e, b = m["evaluate"], m["benchmark"]
    run, edited = e["runtime"], e["orthogonalized"]
    same = run["compliance_low"] <= edited["compliance"] <= run["compliance_high"] and edited["difference_low"] > 0
    yield (
        "Edited weights do what ablation at run time does",
        "no figure",
        f"{interval(edited, 'compliance')} and {interval(run, 'compliance')}",
        YES if same else NO,
    )
    theirs = published["arms"]["sequential-matched"][0]["benchmark"] - published["benchmark_baseline"]
    comparable = set(b["baseline"]["tasks"]) == set(published["settings"]["benchmark_tasks"])
    yield (
        "Benchmarks suffer little",
        f"{theirs:+.3f} on seven tasks",
        f"{interval(b['rank_1'], 'difference', '+.3f')} on {'the same' if comparable else 'other'} tasks; "
        f"random {interval(b['random'], 'difference', '+.3f')}",
        YES if comparable and b["rank_1"]["difference_low"] > 2 * theirs else OPEN,  # no loss beyond twice theirs
    )
    alphas = sorted({cell["alpha"] for cell in m["judge"].values() if cell["layer"] is not None})
    (fall,) = (row["ours"] for row in m["reproduction"]["rows"] if row["quantity"] == "alpha_drop_off")
    enough = max(alphas) >= published["alpha_drop_off"]
    yield (
        "Performance drops sharply at greater alpha",
        f"beyond {published['alpha_drop_off']:g}",
        f"swept: alpha {', '.join(f'{alpha:g}' for alpha in alphas)}" + (f"; drops at {fall:g}" if fall else ""),
        (YES if fall else NO) if enough else OPEN,
    )


def filled(text: str, blocks: Mapping[str, str]) -> str:
    """A page with each block between its `<!-- name -->` and the next `<!-- end -->`. Raises UserError where marks are missing.

    A second table of the same name, or none, is an error too.
    """
    for name, block in blocks.items():
        parts = re.split(rf"(<!-- {name}\b[^\n]*-->\n\n)(?:(?!<!--).)*(<!-- end -->)", text, flags=re.DOTALL)
        if len(parts) != 4:
            raise UserError(
                f"docs/replication.md: no one place for the table {name}; put <!-- {name} --> and <!-- end --> around it"
            )
        before, begin, end, after = parts
        text = f"{before}{begin}{block}\n{end}{after}"
    return text
