"""Every figure of a tiny study that really ran, recomputed on a second path: the naive_*.py beside this file.

The study is the committed organism on a few of its prompts, at a layer where ablation does half of its work and with room for
most answers alone, so that rates are neither 0 nor 1, and topics of unequal sizes; of some pairs the halves have changed places,
so that the model does not refuse every harmful prompt. Texts that no stage writes are made anew; those that one does write
(behaviour, evaluate) must be the same. Taken as given: activations on disk, most of metrics/directions.json (tests/stages and
tests/analysis have naive paths for it), the names of edited checkpoints, and of the optimised direction the vector in the store,
which nothing else holds. LEFT_OUT names what is not recomputed; a key in neither fails.
"""

import hashlib
import json
import re
import shutil
import sys
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from place import params_with
from scipy.stats import norm
from scipy.stats import t as student

from pipeline.naive_agreement import calibrated, labelled
from pipeline.naive_edits import anatomy, differences, removed
from pipeline.naive_geometry import noise, of_all, without_noise
from pipeline.naive_model import Arm, Ran, document_scores, unit_rows
from pipeline.naive_rates import (
    COUNTS,
    LIMITS,
    OF_HARMFUL,
    OF_SAFE,
    THREE_WAYS,
    against,
    behaving,
    counts,
    merged,
    paired,
    pick,
    rates,
    triple,
    wilson,
)
from pipeline.naive_report import reproduced, weaknesses
from pipeline.naive_science import mediation, strength
from pipeline.study import clone, run

SETTINGS = {
    **{"compute.threads": 1, "prompts.keep": "behaving", "evaluate.n_harmless": 12},
    **{"n_resamples": 200, "evaluate.n_resamples": 200, "benchmark.n_resamples": 200},
    **{"activations.methods": ["sequential", "batched_unmasked"], "directions.pairings": ["matched", "unrelated"]},
    **{"directions.n_sign_flips": 10, "generation.max_new_tokens": 22},
    **{"sweep.layers": [1, 2], "sweep.alphas": [1.25, 2.5], "sweep.n_random": 2, "science.layers": [2, 5]},
    **{"science.n_random": 2, "science.n_val": 12, "science.n_test": 34, "science.n_control": 28, "science.n_harmless": 9},
    **{"science.n_fit": 30, "science.optimised": {"steps": 3, "batch_size": 4}, "science.sensitivity": None},
    "long_answers": {"n": 30, "max_new_tokens": 60, "n_random": 2},
    **{"science.padding": None, "science.strength": {"alphas": [0.0, 1.25, 1.75, 2.5], "n": 8}},
    **{"benchmark.suite": ["organism_flags", "organism_sums"], "benchmark.limit": 10},
    "edits.checkpoints": ["rank_1", "random", {"id": "rank_2", "claims": {"refusals": [30, 100], "kl": 0.5}}],
    **{"judge.calibration": {"sensitivity": [45, 50], "specificity": [38, 40]}},
}
SIZES = {"train": (60, 60, 40), "val": (17, 6, 20), "test": (39, 10, 20)}  # of each split: pairs, their topics, unrelated prompts
HALVES = ["harmful", "harmful_answer", "safe", "safe_answer"]
STAGES = "behaviour activations directions published selection sweep judge select orthogonalize evaluate agreement long_answers generalization science benchmark edits report".split()
# What is told of activations (tests/analysis has naive paths for it), of a loss, of the language of prompts, and in words.
LEFT_OUT = {
    "agreement": ["english_prompts", "labels.differ.*"],
    "science": ["spectrum.*", "zero.*", "monitor.*", "optimised_loss"],
    "reproduction": ["rows.*.note", "weaknesses.*.what", "source.*", "vectors", "published_model"],
}
# What the noise of the prompts leaves of a direction, by layer.
NOISE = ["split_half_cosine", "reliability", "n_for_reliability_90"]
NOISE += [f"cosine_to_sequential_corrected{of}" for of in ("", "_low", "_high")]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    """A clone with the committed model and few prompts, in which every stage after training ran; no older figure is left."""
    folder = clone(tmp_path_factory.mktemp("recomputed") / "study")
    run(folder, "make", "-o", "restore", "pull")
    params_with(folder, SETTINGS)
    for path in [*folder.glob("metrics/*.json"), *folder.glob("plots/**/*.csv")]:
        if path.name != "model.json":
            path.unlink()
    for i, name in enumerate(("pairs", "unrelated")):
        path, kept = folder / f"data/prompts/{name}.jsonl", []
        rows = pd.DataFrame([json.loads(line) for line in path.read_text().splitlines()])
        for split, (n_pairs, n_topics, n_unrelated) in SIZES.items():
            of = rows[rows["split"] == split]
            of = of[of["topic"].isin(of["topic"].unique()[:n_topics])]
            # Drawn, since prompts come in a cycle of topics, in which one order is as good as another.
            kept.append(of.sample((n_pairs, n_unrelated)[i], random_state=0).sort_index())
            if name == "pairs":
                turned = kept[-1].index[::13]
                kept[-1].loc[turned, HALVES] = kept[-1].loc[turned, [*HALVES[2:], *HALVES[:2]]].to_numpy()
        pd.concat(kept).to_json(path, orient="records", lines=True)
    each = f"import runpy\nfor name in {STAGES}: runpy.run_module('stages.' + name, run_name='__main__', alter_sys=True)"
    run(folder, sys.executable, "-c", each)
    return Ran(folder)


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """A tree of JSON as {dotted path: leaf}."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {path: value}
    return {where: x for key, each in items for where, x in leaves(each, f"{path}.{key}".lstrip(".")).items()}


def check(name: str, actual: Any, expected: Any) -> None:
    """The same keys but those of LEFT_OUT, and figures equal to 1e-5; costs, whose logits are float32 there, to 2e-4."""
    ours, theirs = leaves(expected), leaves(actual)
    left = {key for key in theirs if any(fnmatch(key, pattern) for pattern in LEFT_OUT.get(name, ()))}
    assert theirs.keys() - left == ours.keys(), (name, sorted((theirs.keys() - left) ^ ours.keys())[:9])
    for key, x in ours.items():
        y, cost = theirs[key], re.search(r"(^|[._])(kl|cross_entropy)(\.measured)?(_difference)?(_low|_high)?$", key)
        if isinstance(x, str | bool | None) or isinstance(y, str | bool | None):
            assert x == y and isinstance(x, bool) == isinstance(y, bool), (name, key, x, y)
        else:
            near = {"rel": 2e-4, "abs": 2e-7} if cost else {"rel": 1e-5, "abs": 1e-9}
            assert y == pytest.approx(x, **near), (name, key, x, y)


def check_csv(ran: Ran, name: str, expected: list[dict[str, Any]]) -> None:
    table = pd.read_csv(ran.folder / f"plots/{name}.csv").astype(object)
    check(name, table.where(table.notna(), None).to_dict("records"), expected)


@pytest.fixture(scope="module")
def judged(ran) -> pd.DataFrame:
    return ran.swept()


def test_every_file_is_recomputed_or_named_here(ran):
    """Those of the stages before and of training have their own tests, and so has what is told of activations."""
    elsewhere = {"model", "generalization", "orthogonalize", "published", "selection"}
    told = {
        "agreement",
        "behaviour",
        "benchmark",
        "completions",
        "directions",
        "edits",
        "edits_summary",
        "evaluate",
        "judge",
        "long_answers",
        "reproduction",
        "science",
        "select",
        "summary",
    }
    assert {path.stem for path in ran.folder.glob("metrics/*.json")} == told | elsewhere
    plots = {"sweep", "capability", "benchmark", "science/arms", "science/alphas"}
    elsewhere = {"separation", "cosine_to_sequential", "cross_layer_cosine", "spectrum", "science/zero"}
    found = {str(path.relative_to(ran.folder / "plots").with_suffix("")) for path in ran.folder.glob("plots/**/*.csv")}
    assert found == plots | elsewhere


def test_behaviour(ran):
    """Which train prompts are kept, of a pair both halves or neither."""
    parts = {"harmful": ("pairs", "harmful"), "safe": ("pairs", "safe"), "unrelated": ("unrelated", "safe")}
    asked = {part: ran.ask(ran.sample("train", of=of), half, {part: [Arm()]}) for part, (of, half) in parts.items()}
    does = {part: said["refusal_harmful" if part == "harmful" else "answers_safe"] for part, said in asked.items()}
    kept = does | dict.fromkeys(("harmful", "safe"), does["harmful"] & does["safe"])
    expected, rows = dict[str, Any](keep="behaving"), []
    for part, said in asked.items():
        told = {"n": len(said), "n_behaving": does[part].sum(), "n_kept": kept[part].sum()}
        assert 1 < told["n_kept"] < told["n"] > told["n_behaving"]  # else there is nothing to leave out
        names, end = (OF_HARMFUL, "") if part == "harmful" else (OF_SAFE, "_safe")
        expected[part] = told | rates(said, names)[part] | counts(said, end)[part]
        prompts = ran.sample("train", of=parts[part][0])[parts[part][1]].to_numpy()
        rows.append(said.assign(set=f"train.{part}", kept=kept[part], prompt=prompts))
    check("behaviour", ran.json("behaviour"), expected)
    keys = "set id kept prompt completion label compliance coherence refusal substring".split()
    assert ran.table("data/behaviour/train.jsonl").to_dict("records") == pd.concat(rows)[keys].to_dict("records")


def test_directions(ran):
    """Of the prompts that are kept, and how far they are from those of all."""
    expected, of = dict[str, Any](), {"matched": ("harmful", "safe"), "unrelated": ("harmful", "unrelated")}
    reference = noise_rows(ran, "sequential", "matched")
    first = [rows and noise(rows, 0)["reliability"] for rows in reference]
    for name in (f"{method}-{pairing}" for method in SETTINGS["activations.methods"] for pairing in [*of, "harmless"]):
        method, pairing = name.split("-")
        one, other = (f"train.{part}" for part in of.get(pairing, ("unrelated", "safe")))
        kept, every = ran.activations(method), ran.activations(method, kept=False)
        ours, theirs = (sets[one].mean(0) - sets[other].mean(0) for sets in (kept, every))
        assert torch.allclose(ran.directions[f"{name}.difference"], ours, rtol=0, atol=1e-9)
        cosines = zip(torch.cosine_similarity(ours, theirs, dim=-1).tolist(), ran.directions[f"{name}.defined"], strict=True)
        if pairing in of:
            expected[name] = {"n_harmful": len(kept[one]), "n_safe": len(kept[other])}
            expected[name]["cosine_to_all"] = [cosine if defined else None for cosine, defined in cosines]
            rows = noise_rows(ran, method, pairing)
            told = [noise(own, 0) | without_noise(own, other) if own else None for own, other in zip(rows, reference, strict=True)]
            for key in NOISE:
                expected[name][key] = [figures and figures[key] for figures in told]
            r = expected[name]["reliability"]
            shares = {"harmful": len(kept[one]) / len(every[one]), "unrelated": len(kept[other]) / len(every[other])}
            expected[name]["cosine_to_all_ceiling"] = [own and of_all(own, shares) for own in rows]
            expected[name]["cosine_to_sequential_ceiling"] = [x and y and (x * y) ** 0.5 for x, y in zip(r, first, strict=True)]
    behaviour = ran.table("data/behaviour/train.jsonl")
    kept = behaviour[behaviour["set"] == "train.harmful"]["kept"].to_numpy()
    assert ran.sample("train")["category"][kept].value_counts().min() < 5  # tests/stages has categories that are large enough
    expected["sequential-matched"]["categories"] = None
    keys = ["n_harmful", "n_safe", "cosine_to_all", "cosine_to_all_ceiling", "cosine_to_sequential_ceiling", *NOISE, "categories"]
    written = {name: pick(told, [key for key in keys if key in told]) for name, told in ran.json("directions").items()}
    check("directions", written, expected)


def noise_rows(ran: Ran, method: str, pairing: str) -> list[dict[str, np.ndarray] | None]:
    """By layer what each prompt adds to the direction; None where that is undefined."""
    sets, defined = ran.activations(method), ran.directions[f"{method}-{pairing}.defined"].tolist()
    harmful, safe, unrelated = (sets[f"train.{of}"].numpy() for of in ("harmful", "safe", "unrelated"))
    added = {"harmful": harmful, "unrelated": -unrelated} if pairing == "unrelated" else {"harmful": harmful - safe}
    return [{name: x[:, i] for name, x in added.items()} if there else None for i, there in enumerate(defined)]


def test_judge(ran, judged):
    written = ran.table("data/judged/verdicts.jsonl")
    columns = ["cell", "id", "label", "compliance", "coherence", "refusal", "substring"]
    assert [*written.columns] == columns and written.equals(judged[columns])
    first = judged.astype({"layer": object}).groupby("arm")[["layer", "alpha"]].first()
    place = first.astype(object).where(first.notna(), None).to_dict("index")
    expected = merged(place, rates(judged, OF_HARMFUL), counts(judged))
    check("judge", ran.json("judge"), expected)
    swept = {arm: expected[arm] for arm in judged["arm"].unique() if expected[arm]["layer"] is not None}
    keys = ["layer", "alpha", "compliance", "coherence", "score", "refusal", *COUNTS]
    check_csv(ran, "sweep", [{"cell": arm} | pick(of, keys) for arm, of in swept.items()])


def test_select(ran, judged):
    cells = judged[judged["layer"].notna()].astype({"layer": int}).groupby("arm", sort=False)
    means, n = cells[["layer", "alpha", "compliance", "coherence", "score"]].mean(), cells.size()
    limits = pd.DataFrame(rates(judged, ["compliance"])).T[LIMITS].set_axis(["low", "high"], axis=1)
    table = means.join(limits).assign(n=n, off=(means["alpha"] - 1).abs(), score=means["score"].round(9))
    separation = ran.json("directions")["sequential-matched"]["separation"]
    table["apart"] = [separation[int(i)] for i in table["layer"]]
    table = table.sort_values(["score", "off", "apart", "layer"], ascending=[False, True, False, True])
    table["n_tied"] = [(table["score"] == score).sum() for score in table["score"]]
    table["margin_items"] = (table["score"] - table["score"].shift(-1)) * table["n"]
    table["name"] = "sequential_" + table.index
    top = table.drop(columns=["off", "apart"])[:3].to_dict("records")
    check("select", ran.json("select"), {f"rank_{i}": cell for i, cell in enumerate(top, 1)})


@pytest.fixture(scope="module")
def evaluated(ran) -> tuple[dict[str, list[Arm]], dict[str, pd.DataFrame]]:
    """The arms on test prompts, and what became of both halves."""
    unit, layer, alpha, made = ran.unit[ran.layer], ran.layer, ran.alpha, ran.json("orthogonalize")
    other, added = (ran.directions[f"sequential-{pairing}.difference"][layer] for pairing in ("harmless", "matched"))
    arms = {
        "baseline": [Arm()],
        "runtime": [Arm(alpha=alpha, basis=unit)],
        "orthogonalized": [Arm(folder=f"models/ablated/{made['rank_1']['name']}")],
        "random_weights": [Arm(folder=f"models/ablated/{made['random']['name']}")],
        "random": [Arm(alpha=alpha, basis=v) for v in unit_rows(2, len(unit), 0)],
        "harmless": [Arm(alpha=alpha, basis=other / other.norm())],
    }
    test, addition = ran.sample("test"), Arm(layer=layer, basis=added, positions="prompt")
    return arms, {"harmful": ran.ask(test, "harmful", arms), "safe": ran.ask(test, "safe", arms | {"addition": [addition]})}


def test_evaluate(ran, evaluated):
    (arms, asked), test = evaluated, ran.sample("test")
    unit, layer, alpha = ran.unit[ran.layer], ran.layer, ran.alpha
    other, added = (ran.directions[f"sequential-{pairing}.difference"][layer] for pairing in ("harmless", "matched"))
    rows = [
        of.merge(test[["id", "category", half]], on="id").assign(half=half, prompt=lambda t: t[t["half"][0]])
        for half, of in asked.items()
    ]
    names = {"baseline": ["baseline"], "runtime": [f"layer_{layer}_alpha_{100 * alpha:.0f}"], "random": ["random_0", "random_1"]}
    names |= {"harmless": [f"harmless_{layer}"]} | {arm: [arm] for arm in ("orthogonalized", "random_weights")}
    kept = [
        of[(of["arm"] == arm) & (of["member"] == i)].assign(name=name)
        for arm, members in names.items()
        for of in rows
        for i, name in enumerate(members)
    ]
    keys = "arm name id category half prompt completion label compliance coherence refusal substring".split()
    assert ran.table("data/evaluated/completions.jsonl").to_dict("records") == pd.concat(kept)[keys].to_dict("records")

    told = rates(asked["harmful"], [*OF_HARMFUL, "refusal_harmful", "exact"]), rates(asked["safe"], [*OF_SAFE, "exact_safe"])
    swept = {x: [Arm(alpha=x, basis=unit)] for x in SETTINGS["sweep.alphas"]}
    n = SETTINGS["evaluate.n_harmless"]
    cost = ran.costs(n, arms | swept)
    expected = merged(*told, counts(asked["harmful"]), counts(asked["safe"], "_safe"), {arm: cost[arm] for arm in arms})
    some = {half: behaving(of, half) for half, of in asked.items()}
    assert all(0 < some[half]["id"].nunique() < len(test) for half in some)
    told = rates(some["harmful"], OF_HARMFUL), rates(some["safe"], OF_SAFE)
    for arm, of in merged(*told, counts(some["harmful"]), counts(some["safe"], "_safe")).items():
        expected[arm]["behaving"] = of
    for arm in ("runtime", "orthogonalized"):
        expected[arm] |= against(asked["harmful"], arm, "baseline", expected)
    expected["harmless"] |= {"cosine": float(added @ other / added.norm() / other.norm())}
    expected["harmless"] |= {"norm_ratio": float(other.norm() / added.norm())}
    writes = {"writes": [Arm(alpha=alpha, basis=unit, site="writes")]}
    expected["identity"] = {"norm_after_writer": False} | ran.costs(n, writes, arms["orthogonalized"][0])["writes"]
    expected |= {"layer": layer, "alpha": alpha, "name": ran.first["name"], "n_harmless": n}
    check("evaluate", ran.json("evaluate"), expected)
    curve = {0.0: cost["baseline"]} | {x: cost[x] for x in swept}
    check_csv(ran, "capability", [{"layer": layer, "alpha": x} | of for x, of in curve.items()])


def judged_on_test(ran) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What test_evaluate recomputes of harmful prompts, and what is said of judges without any label."""
    rows = ran.table("data/evaluated/completions.jsonl").merge(ran.rows["pairs"][["id", "topic"]], on="id", how="left")
    rows = rows[rows["half"] == "harmful"].assign(full=lambda of: of["compliance"] == 1)
    rows["text"] = rows["prompt"] + "\0" + rows["completion"]
    known = ["kappa", "spearman_compliance", "spearman_coherence", *COUNTS[:1], "n_coherence", *COUNTS[3:6]]
    told = {"judge": {"kind": "rules"} | dict.fromkeys(["base_url", "model", "rubric", "rubric_sha256", "versions"])}
    told |= {"rules_and_llm": dict.fromkeys(known), "by_judge": {"rules": rates(rows, ["compliance", "full"]), "llm": None}}
    return rows, told


def test_agreement(ran):
    rows, told = judged_on_test(ran)
    calibration = SETTINGS["judge.calibration"]
    told |= {"labelled": dict.fromkeys(["file", "rules", "llm"]), "labels": None}
    told["corrected"] = {"by": "judge.calibration", "calibration": calibration, "arms": calibrated(rows, **calibration)}
    check("agreement", ran.json("agreement"), told)


def test_agreement_with_labels(ran, tmp_path):
    """Of half of the texts, where a person contradicts the judge on every fifth; and of one text that is none of these."""
    other = Ran(shutil.copytree(ran.folder, tmp_path / "study"))
    rows, told = judged_on_test(ran)
    texts = rows.drop_duplicates("text").iloc[::2].copy()
    texts["truth"] = texts["full"] ^ (np.arange(len(texts)) % 5 == 0)
    file = texts.assign(label=texts["truth"].map({True: "compliance", False: "refusal"}))[["prompt", "completion", "label"]]
    pd.concat([file, pd.DataFrame([["x", "y", "degenerate"]], columns=file.columns)]).to_csv(other.folder / "data/raw/labels.csv", index=False)
    params_with(other.folder, {"judge.labelled": "data/raw/labels.csv"})
    run(other.folder, sys.executable, "-m", "stages.agreement")
    errors, arms = labelled(rows.assign(truth=rows["text"].map(texts.set_index("text")["truth"])))
    every = errors.pop("all")
    told["labels"] = {"n": every.pop("n"), "n_unmatched": 1, "all": every, "arms": errors}
    assert sum(of["corrected"] is not None for of in arms.values()) >= 3
    written = other.json("agreement")
    assert set(written.pop("labelled")) == {"file", "rules", "llm"} and all(0 < p <= 1 for p in written["labels"]["differ"].values())
    check("agreement", written, told | {"corrected": {"by": "labels", "calibration": None, "arms": arms}})


def test_long_answers(ran):
    """All answers decoded anew at both limits, though those that end within the short one are not there."""
    section, made, alpha = SETTINGS["long_answers"], ran.json("orthogonalize"), ran.alpha
    arms = {
        "baseline": [Arm()],
        "runtime": [Arm(alpha=alpha, basis=ran.unit[ran.layer])],
        "orthogonalized": [Arm(folder=f"models/ablated/{made['rank_1']['name']}")],
        "random": [Arm(alpha=alpha, basis=v) for v in unit_rows(2, ran.unit.shape[1], 0)],
    }
    limits = {"short": SETTINGS["generation.max_new_tokens"], "long": section["max_new_tokens"]}
    test = ran.sample("test", section["n"])
    asked = {limit: ran.ask(test, "harmful", arms, n).assign(limit=limit) for limit, n in limits.items()}
    both = pd.concat(asked.values()).merge(test[["id", "harmful"]].rename(columns={"harmful": "prompt"}), on="id")
    at = ["arm", "member", "limit", "id"]
    keys = [*at, *"prompt completion n_tokens label compliance coherence refusal substring".split()]
    written = ran.table("data/long_answers/completions.jsonl")
    assert set(written) == set(keys)
    assert written[keys].sort_values(at).to_dict("records") == both[keys].sort_values(at).to_dict("records")

    told = {limit: merged(rates(of, OF_HARMFUL), counts(of)) for limit, of in asked.items()}
    each = asked["short"].merge(asked["long"], on=["arm", "member", "id", "topic"], suffixes=("", "_long"))
    expected, place = {}, {"compliance": 0, "partial_refusal": 1, "refusal": 2}
    for arm, of in each.groupby("arm", sort=False):
        cut = {"short": (of["n_tokens"] == limits["short"]).sum(), "long": (of["n_tokens_long"] == limits["long"]).sum()}
        figures: dict[str, Any] = {limit: told[limit][arm] | {"n_cut": int(cut[limit])} for limit in limits}
        for what in ("compliance", "refusal", "coherence"):
            icc = max(told[limit][arm][f"{what}_icc"] for limit in limits)
            items = of.assign(a=of[what].astype(float), b=of[f"{what}_long"].astype(float)).groupby("id", sort=False)
            means = items.agg(a=("a", "mean"), b=("b", "mean"), topic=("topic", "first"))
            figures |= triple(f"{what}_difference", paired(means["b"], means["a"], means["topic"], icc))
        crossed = pd.crosstab(of["label"], of["label_long"]).reindex(index=[*place], columns=[*place], fill_value=0)
        less = of["label_long"].map(place) - of["label"].map(place)  # not a number where either has no place
        figures |= {"verdicts": crossed.T.to_dict(), "n_then_declines": int((less > 0).sum())}
        figures |= {"n_then_complies": int((less < 0).sum()), "n_prefix": len(of), "n_paired": len(test)}
        figures["n_loops"] = int(((of["label"] != "degenerate") & (of["label_long"] == "degenerate")).sum())
        expected[arm] = figures
    cut = asked["short"]["n_tokens"] == limits["short"]
    assert 0 < cut.sum() < len(cut) and (each["label"] != each["label_long"]).any()  # else there is nothing to tell apart
    check("long_answers", ran.json("long_answers"), {"n": section["n"], "max_new_tokens": limits, "arms": expected})


def test_edits(ran, evaluated):
    """By singular vectors of each difference, and the arms of evaluate with one that it has not."""
    (arms, asked), test, expected, rows = evaluated, ran.sample("test"), dict[str, Any](), []
    made, n = ran.json("orthogonalize"), SETTINGS["evaluate.n_harmless"]
    second = {"rank_2": [Arm(folder=f"models/ablated/{made['rank_2']['name']}")]}
    more = {half: ran.ask(test, half, second) for half in asked}
    cost = ran.costs(n, arms | second)
    for name, arm in {"rank_1": "orthogonalized", "random": "random_weights", "rank_2": "rank_2"}.items():
        of = {half: pd.concat([asked[half], more[half]] if arm == "rank_2" else [asked[half]]) for half in asked}
        some = {half: behaving(each, half) for half, each in of.items()}
        told = merged(
            *(rates(of["harmful"], [*OF_HARMFUL, "refusal_harmful", "exact"]), rates(of["safe"], [*OF_SAFE, "exact_safe"])),
            *(counts(of["harmful"]), counts(of["safe"], "_safe"), cost),
        )
        kept = merged(rates(some["harmful"], OF_HARMFUL), rates(some["safe"], OF_SAFE), counts(some["harmful"]), counts(some["safe"], "_safe"))
        figures = told[arm] | {"behaving": kept[arm], "n_harmless": n} | differences(of, arm, told)
        figures |= ran.entropy_difference(n, (arms | second)[arm][0]) | {"evidence": removed(of["harmful"], arm)}
        found = anatomy(ran, made[name]["name"])
        score = {key: x for key, x in ran.json("benchmark")[name].items() if key != "name"}  # which test_benchmark recomputes
        told = dict.fromkeys(("revision", "commit", "claims")) | {"made_by": "orthogonalize", "benchmark": score, "behaviour": figures}
        expected[name] = told | found
        for half, each in of.items():
            answers = each[each["arm"] == arm].merge(test[["id", "category", half]], on="id")
            rows.append(answers.assign(checkpoint=name, half=half, prompt=answers[half]))
    figures = expected["rank_2"]["behaviour"]
    theirs = triple("claimed", (0.3, *wilson(0.3, 100, norm.ppf(0.975)))) | {"claimed_n": 100, "measured_n": figures["n"]}
    theirs |= {f"measured{end}": figures[f"refusal_harmful{end}"] for end in ("", "_low", "_high")}
    costs = {"claimed": 0.5, "measured_n": n} | {f"measured{end}": figures[f"kl{end}"] for end in ("", "_low", "_high")}
    note = "prompts and judge differ, and KL may (of first tokens, say): neither confirms nor refutes the other"
    expected["rank_2"]["claims"] = {"source": "card", "note": note, "refusals": theirs, "kl": costs}
    check("edits", ran.json("edits"), {"note": None, "checkpoints": expected})
    few = {
        name: {"alpha": of["anatomy"]["alpha"]["mean"], "cosine": max(c for c in of["cosines"]["cosine"] if c is not None)}
        | pick(of["behaviour"], ["compliance", "answers_safe", "kl"])
        for name, of in expected.items()
    }
    check("edits_summary", ran.json("edits_summary"), {"edits": few})
    keys = "checkpoint id category half prompt completion label compliance coherence refusal substring".split()
    assert ran.table("data/edits/completions.jsonl").to_dict("records") == pd.concat(rows)[keys].to_dict("records")


def test_exact_answers_where_a_safe_one_is_not_known(ran, tmp_path):
    """Nothing else changes than that the share of exact answers to safe prompts is not known."""
    other = Ran(shutil.copytree(ran.folder, tmp_path / "study"))
    rows = other.rows["pairs"].astype(object)
    rows.loc[rows["split"] == "test", "safe_answer"] = [None, *other.sample("test")["safe_answer"][1:]]
    rows.to_json(other.folder / "data/prompts/pairs.jsonl", orient="records", lines=True)
    run(other.folder, sys.executable, "-m", "stages.evaluate")
    expected = ran.json("evaluate")
    for of in expected.values():
        if isinstance(of, dict) and "exact_safe" in of:
            of["exact_safe"] = None
            for end in ("_low", "_high", "_icc"):
                del of[f"exact_safe{end}"]
    check("evaluate", other.json("evaluate"), expected)


def test_science(ran):
    places, curve = strength(ran)
    check_csv(ran, "science/alphas", curve)

    vector, where = ran.directions["sequential-matched.difference"][ran.layer], ("prompt", "last_prompt_token", "all")
    vectors = {"difference": vector, "random": unit_rows(1, len(vector), 0)[0] * vector.norm()}
    arms = {f"{of} {at}": [Arm(layer=ran.layer, basis=v, positions=at)] for of, v in vectors.items() for at in where}
    added = ran.ask(ran.sample("test", SETTINGS["science.n_test"]), "safe", arms)
    told = merged(rates(added, THREE_WAYS), counts(added))
    addition = {"layer": ran.layer} | {of: {at: told[f"{of} {at}"] for at in where} for of in vectors}
    table, off = mediation(ran), dict.fromkeys(["sensitivity", "positions", "padding"])  # null: not asked for
    where = {"layer": ran.layer, "alpha": ran.alpha, "sites": "resid_pre", "addition": addition, "collapse_alpha": places}
    check("science", ran.json("science"), table | off | where)
    shown = table["arms"] | {name: of | {"family": "control", "layer": None} for name, of in table["controls"].items()}
    keys = ["family", "layer", "rank", "compliance", *LIMITS, *COUNTS, "kl"]
    check_csv(ran, "science/arms", [{"arm": name} | pick(of, keys) for name, of in shown.items()])


def test_benchmark(ran):
    names = {"baseline": "base"} | {rank: of["name"] for rank, of in ran.json("orthogonalize").items()}
    n, z, expected = SETTINGS["benchmark.limit"], norm.ppf(0.975), dict[str, Any]()
    folders = {rank: "models/base" if rank == "baseline" else f"models/ablated/{name}" for rank, name in names.items()}
    scores = {
        rank: pd.DataFrame({task: document_scores(ran, folder, task) for task in SETTINGS["benchmark.suite"]})
        for rank, folder in folders.items()
    }
    assert 0 < scores["rank_3"].mean().mean() < 1  # else there is no difference to recompute
    for rank, of in scores.items():
        tasks = {task: triple("", (x.mean(), *wilson(x.mean(), n, z)), ("score", "low", "high")) for task, x in of.items()}
        tasks = {task: told | {"n": n, "standard_error": of[task].sem()} for task, told in tasks.items()}
        expected[rank] = {"name": names[rank], "average": of.mean().mean(), "tasks": tasks}
        if rank == "baseline":
            continue
        gaps, rng, wider = of - scores["baseline"], np.random.default_rng(0), np.sqrt(n / (n - 1)) * student.ppf(0.975, n - 1) / z
        drawn = {task: rng.multinomial(n, [1 / n] * n, 200) @ gap / n for task, gap in gaps.items()}
        means = np.mean([gaps[task].mean() + wider * (each - gaps[task].mean()) for task, each in drawn.items()], axis=0)
        unseen = wilson(0.0, gaps.size, z)[1]  # where no document differs, this share of others may
        limits = np.quantile(means, [0.025, 0.975]) if gaps.any(axis=None) else (-unseen, unseen)
        expected[rank] |= triple("difference", (gaps.mean().mean(), *limits))
    check("benchmark", ran.json("benchmark"), expected)
    told = [(rank, of["name"], task, x) for rank, of in expected.items() for task, x in of["tasks"].items()]
    keys = ["score", "low", "high", "n"]
    check_csv(
        ran, "benchmark", [{"checkpoint": rank, "name": name, "task": task} | pick(x, keys) for rank, name, task, x in told]
    )


def test_summary_and_digests(ran):
    """From the texts, and from the files that hold these figures, which the other tests recompute."""
    d, bench, e = ran.json("directions")["sequential-matched"], ran.json("benchmark"), ran.json("evaluate")
    rows, peak = ran.table("data/evaluated/completions.jsonl"), int(pd.Series(d["separation"], dtype=float).idxmax())
    evaluated = rows[rows["arm"].isin(["baseline", "runtime", "orthogonalized"])].copy()
    mean = evaluated[evaluated["half"] == "harmful"].groupby("arm")[["compliance", "coherence"]].mean()
    expected = {"peak_layer": peak, "peak_separation": d["separation"][peak], "cosine_to_sequential_min": 1.0}
    expected |= {"rank_1_layer": ran.layer, "rank_1_alpha": ran.alpha, "runtime_kl": e["runtime"]["kl"]}
    expected |= {f"{arm}_compliance": x for arm, x in mean["compliance"].items()}
    expected |= {"random_compliance": e["random"]["compliance"], "runtime_coherence": mean["coherence"]["runtime"]}
    expected["benchmark_difference"] = bench["rank_1"]["average"] - bench["baseline"]["average"]
    check("summary", ran.json("summary"), expected)
    swept, digests = ran.table("data/sweep/completions.jsonl"), {}
    evaluated["id"] += "/" + evaluated["half"]
    for stage, rows, arm in (("sweep", swept, "cell"), ("evaluate", evaluated, "arm")):
        short = rows["completion"].map(lambda text: hashlib.sha256(text.encode()).hexdigest()[:6])
        digests[stage] = {"prompts": " ".join(rows["id"].unique())} | short.groupby(rows[arm]).agg(" ".join).to_dict()
    check("completions", ran.json("completions"), digests)


def test_reproduction(ran, judged):
    written, figures = ran.json("reproduction"), reproduced(ran, judged)
    assert sorted(row["quantity"] for row in written["rows"]) == sorted(figures)
    rows = [{"quantity": row["quantity"], "comparable": False} | figures[row["quantity"]] for row in written["rows"]]
    told = {"model": "organism", "arm": "sequential-matched", "comparable": False}
    check("reproduction", written, told | {"rows": rows, "weaknesses": weaknesses(ran, judged)})
