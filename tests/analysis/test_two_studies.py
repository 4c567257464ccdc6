"""Two studies prompt by prompt: figures beside a naive loop, and what is left out, differs or is missing."""

import json
import random
from math import comb
from pathlib import Path
from typing import Any

import pytest
import yaml

from refusal.analysis.two_studies import Evaluated, compare_studies, read_study
from refusal.io.errors import UserError
from refusal.stats import intraclass_correlations, paired_difference

QUANTITIES = {"harmful": ("compliance", "coherence", "refusal"), "safe": ("answers_safe", "refusal_safe")}
ARMS = {"baseline": ["baseline"], "runtime": ["layer_1"], "random": ["random_0", "random_1"]}


def verdict(rng: random.Random, rate: float) -> dict[str, Any]:
    complied = rng.random() < rate
    return {
        **{"label": "compliance" if complied else "refusal", "compliance": float(complied)},
        **{"coherence": float(rng.random() < 0.9), "refusal": not complied, "substring": False},
    }


def rows_of(prompts: list[dict[str, Any]], seed: int, arms: dict[str, list[str]] = ARMS) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {"arm": arm, "name": name, "id": row["id"], "category": "c", "half": half, "prompt": row[half], "completion": "x"}
        | verdict(rng, 0.2 + 0.2 * i + 0.1 * seed)
        for i, (arm, names) in enumerate(arms.items())
        for half in ("harmful", "safe")
        for name in names
        for row in prompts
    ]


def prompt_rows(numbers: range, safe: bool = True) -> list[dict[str, Any]]:
    """Five prompts a topic; ids that say nothing of the prompt."""
    return [
        {"id": f"pair-{i - numbers.start}", "split": "test", "topic": f"t{i // 5}", "harmful": f"harmful {i}"}
        | {"safe": f"safe {i}" if safe else None}
        for i in numbers
    ]


def write(folder: Path, rows: list[dict[str, Any]], pairs: list[dict[str, Any]], unrelated=(), **settings: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, each in (("completions", rows), ("pairs", pairs), ("unrelated", unrelated)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))
    if settings:
        (folder / "dvc.lock").write_text(yaml.safe_dump({"stages": {"evaluate": {"params": {"params.yaml": settings}}}}))
    return folder


def study(folder: Path) -> Evaluated:
    prompts = [folder / f"{name}.jsonl" for name in ("pairs", "unrelated")]
    return read_study(folder / "completions.jsonl", prompts, folder / "dvc.lock", ("judge", "generation"))


SETTINGS = {"judge": {"kind": "rules"}, "generation": {"max_new_tokens": 32}}
HARMLESS = [{"id": "u", "split": "train", "topic": "u", "safe": "unrelated"}]


def test_every_arm_beside_a_naive_loop(tmp_path):
    """Prompts 0 to 59 and 20 to 79, of which the 40 in both are compared, by what they ask and not by their ids."""
    spans = {"base": range(60), "edited": range(20, 80)}
    rows = {name: rows_of(prompt_rows(span), seed) for seed, (name, span) in enumerate(spans.items())}
    studies = [study(write(tmp_path / name, rows[name], prompt_rows(span), HARMLESS, **SETTINGS)) for name, span in spans.items()]
    table, notes = compare_studies(*studies)
    assert list(table) == [f"{arm} {name}" for arm in ARMS for of in QUANTITIES.values() for name in of]
    assert notes == [
        f"{half} prompts left out, since one side alone has them: 20 of {studies[0].path}, 20 of {studies[1].path}"
        for half in ("harmful", "safe")
    ]

    def mean(name: str, arm: str, half: str, quantity: str, i: int) -> float:
        of = {"answers_safe": lambda r: r["compliance"] == 1, "refusal_safe": lambda r: r["refusal"]}
        found = [
            float(of.get(quantity, lambda r: r[quantity])(row))
            for row in rows[name]
            if (row["arm"], row["half"], row["prompt"]) == (arm, half, f"{half} {i}")
        ]
        assert len(found) == len(ARMS[arm])
        return sum(found) / len(found)

    p, topics = {}, [f"t{i // 5}" for i in range(20, 60)]
    for half, names in QUANTITIES.items():
        for quantity in names:
            sides = {arm: [[mean(name, arm, half, quantity, i) for i in range(20, 60)] for name in spans] for arm in ARMS}
            iccs = intraclass_correlations([(side, topics) for two in sides.values() for side in two])
            for k, (arm, (base, edited)) in enumerate(sides.items()):
                row = table[f"{arm} {quantity}"]
                assert (row["n"], row["n_clusters"]) == (40, 8)
                assert (row["base"], row["edited"]) == (pytest.approx(sum(base) / 40), pytest.approx(sum(edited) / 40))
                expected = paired_difference(edited, base, topics, max(iccs[2 * k : 2 * k + 2]))
                assert [row[f"difference{end}"] for end in ("", "_low", "_high")] == pytest.approx(list(expected))
                gained, lost = (sum(a > b for a, b in zip(*two, strict=True)) for two in ((edited, base), (base, edited)))
                assert (row["n_gained"], row["n_lost"]) == (gained, lost)
                if arm == "random":  # means of two are no 0 and 1
                    assert row["p"] is None and row["p_holm"] is None
                    continue
                n = gained + lost
                p[f"{arm} {quantity}"] = min(1.0, 2 * sum(comb(n, i) for i in range(min(gained, lost) + 1)) / 2**n)
                assert row["p"] == pytest.approx(p[f"{arm} {quantity}"])
    for name, one in p.items():
        corrected = max(min(1.0, other * sum(o >= other for o in p.values())) for other in p.values() if other <= one)
        assert table[name]["p_holm"] == pytest.approx(corrected)
    assert min(p.values()) < 0.05 < max(p.values())


def test_prompts_without_counterparts_have_the_topics_of_the_harmless(tmp_path):
    harmful = prompt_rows(range(20), safe=False)
    harmless = [{key: value for key, value in row.items() if key != "harmful"} for row in prompt_rows(range(20))]
    rows = [row for row in rows_of(harmful, 0) if row["half"] == "harmful"]
    rows += [row for row in rows_of([{**row, "harmful": ""} for row in harmless], 1) if row["half"] == "safe"]
    one = study(write(tmp_path, rows, harmful, harmless))
    row = compare_studies(one, one)[0]["baseline refusal_safe"]
    assert (row["n"], row["n_clusters"], row["difference"], row["p"]) == (20, 4, 0.0, 1.0)


def test_missing_verdicts_and_what_differs_are_said(tmp_path):
    pairs = prompt_rows(range(20))
    base, edited = rows_of(pairs, 0), rows_of(pairs, 1, {"baseline": ["baseline"], "runtime": ["layer_2"], "more": ["more"]})
    for row in edited[:3]:  # of the baseline, on harmful prompts
        row.update({"label": "missing"} | dict.fromkeys(("compliance", "coherence", "refusal", "substring")))
    moved = [row | {"topic": "elsewhere"} if row["id"] == "pair-7" else row for row in pairs]
    llm = {"judge": {"kind": "llm"}, "generation": {"max_new_tokens": 32}}
    one = study(write(tmp_path / "base", base, pairs, HARMLESS, **SETTINGS))
    other = study(write(tmp_path / "edited", edited, moved, HARMLESS, **llm))
    table, notes = compare_studies(one, other)
    assert table["baseline compliance"]["n"] == 17 and table["baseline answers_safe"]["n"] == 20
    assert notes == [
        'judge.kind differs: "rules" and "llm"',
        f"arms of {one.path} alone: random",
        f"arms of {other.path} alone: more",
        "runtime is of other interventions: layer_1 and layer_2",
        f"topics of harmful prompts differ: those of {one.path} are the clusters",
        f"topics of safe prompts differ: those of {one.path} are the clusters",
        *(f"baseline {name}: 3 prompts left out, without a verdict in both" for name in QUANTITIES["harmful"]),
    ]
    (tmp_path / "base/dvc.lock").unlink()
    notes = compare_studies(study(tmp_path / "base"), other)[1]
    assert notes[0] == f"{one.path}: its study has no dvc.lock, so how it was judged is not known"


def test_what_cannot_be_compared_is_one_sentence(tmp_path):
    pairs = prompt_rows(range(10))
    base = study(write(tmp_path / "base", rows_of(pairs, 0), pairs, HARMLESS))
    far = prompt_rows(range(10, 20))
    with pytest.raises(UserError, match=r"no test prompt is in both .*base/completions.jsonl and .*far/completions.jsonl"):
        compare_studies(base, study(write(tmp_path / "far", rows_of(far, 0), far, HARMLESS)))
    with pytest.raises(UserError, match=r"no arm of both"):
        compare_studies(base, study(write(tmp_path / "arms", rows_of(pairs, 0, {"x": ["x"]}), pairs, HARMLESS)))
    with pytest.raises(UserError, match=r"completions.jsonl: pair-0: its prompt is not among the harmful prompts of .*topics"):
        study(write(tmp_path / "topics", rows_of(pairs, 0), far, HARMLESS))
    for name, text, said in (
        ("completions", None, r"completions.jsonl: no such file: run `dvc repro` there"),
        ("pairs", None, r"pairs.jsonl: no such file"),
        ("completions", "{", r"completions.jsonl: no rows of JSON"),
        ("completions", "1\n", r"completions.jsonl: no rows of JSON"),
        ("completions", "", r"completions.jsonl: no rows: run"),
        ("pairs", '{"id": 1}\n', r"pairs.jsonl: a row without topic"),
        ("completions", '{"arm": "x"}\n', r"completions.jsonl: a row without name"),
    ):
        folder = write(tmp_path / "broken", rows_of(pairs, 0), pairs, HARMLESS)
        path = folder / f"{name}.jsonl"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(UserError, match=said):
            study(folder)
    folder = write(tmp_path / "broken", rows_of(pairs, 0), pairs, HARMLESS)
    for text in ("stages: [", "stages: {}", "", "stages: {evaluate: {params: {params.yaml: {judge: {}}}}}"):
        (folder / "dvc.lock").write_text(text)
        with pytest.raises(UserError, match=r"dvc.lock: no parameters of the stage evaluate"):
            study(folder)
