"""docs/across-models.md: of made-up studies on disk, cell by cell; and the committed page is what `make models` makes."""

import json
import re
import shutil

import pytest
import yaml
from place import ROOT, Place

from refusal.report.models import COLUMNS, KINDS, ORGANISM_COLUMNS, Made, organism_rows, page
from refusal.report.reproduction import published
from stages import models, studies

# The write-up's table, copied by hand; LLaMA-1B's subspace is of the text of its own page.
THEIRS = {
    "Qwen3-1.7B": ("0.96", "yes"),
    "Qwen-1.8B": ("0.90", "yes"),
    "gemma-2b-it": ("0.90", "yes"),
    "LLaMA-3.1-8B-Instruct": ("0.80", "yes"),
    "phi-3-mini-4k-instruct": ("0.39", "partial"),
    "LLaMA-3.2-1B-Instruct": ("0.21", "no"),
    "LLaMA-3.2-3B-Instruct": ("0.15", "no"),
}
OVERLAY = {
    "model": {"id": "owner/Some-Chat-GGUF", "revision": "0" * 40, "file": "some.gguf"},
    "prompts": {"source": "data/raw/pairs.jsonl"},
}
REFUSES = {
    "model": {"gguf": ["F32", "Q6_K", "IQ4_XS"]},
    "science": {
        "arms": {
            "baseline": {"n": 80, "refusal": 0.5, "refusal_low": 0.4, "refusal_high": 0.6},
            "lda.7": {"layer": 7, "compliance": 0.9, "compliance_low": 0.8125, "compliance_high": 0.95},
            "qr_3": {"layer": None, "compliance": 1.0, "compliance_low": 0.954, "compliance_high": 1.0},
        },
        "verdict": {
            "verdict": "single",
            "reason": None,
            "by": "lda.7",
            "n_refused": 40,
            "single": {"name": "lda.7", "removed": 0.875, "above_random": 0.75, "above_random_low": 0.625},
            "subspace": {"name": "qr_3", "removed": 1.0, "above_random": -0.1, "above_random_low": -0.25},
        },
    },
}
# A model that refuses nothing, on prompts that are no pairs: no subspace was tried, and no refusal could be removed.
HELPS = {
    "model": {"gguf": None},
    "science": {
        "arms": {
            "baseline": {"n": 60, "refusal": 0.0, "refusal_low": 0.0, "refusal_high": 0.06},
            "rank_1": {"layer": 4, "compliance": 1.0, "compliance_low": 0.94, "compliance_high": 1.0},
        },
        "verdict": {
            "verdict": "none",
            "reason": "no_refusal",
            "by": None,
            "n_refused": 0,
            "single": {"name": "rank_1", "removed": None, "above_random": None, "above_random_low": None},
            "subspace": None,
        },
    },
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path)
    shutil.copyfile(ROOT / "dvc.yaml", tmp_path / "dvc.yaml")
    for package in ("refusal", "stages"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    return place


def add(place, name, metrics, **model):
    """A committed study, of the code and parameters as they are."""
    place.write(f"studies/{name}.yaml", json.dumps(OVERLAY | {"model": OVERLAY["model"] | model}))
    for file, content in metrics.items():
        place.write(f"studies/{name}/metrics/{file}.json", json.dumps(content))
    place.write(f"studies/{name}/study.json", json.dumps(studies.made_by(name)))


def made(place):
    done = place.stage("models")
    assert done.status == 0 and "Traceback" not in done.said, done.said
    return (place.folder / "docs/across-models.md").read_text(encoding="utf-8")


def cells(text, first):
    """The cells of the one row that begins so."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {first} |")]
    return line.strip("| ").split(" | ")


def test_every_cell_of_two_studies(place):
    add(place, "some", REFUSES)
    text = made(place)
    assert cells(text, "Some-Chat") == [
        "Some-Chat",
        "4-bit (Q6_K, IQ4_XS), dequantized to float32",
        "80",
        "40",
        "0.50 [0.40, 0.60]",
        "`lda.7` (layer 7): 0.90 [0.81, 0.95]",
        "0.88; +0.75 (lower limit +0.62)",
        "`qr_3`: 1.00 [0.95, 1.00]",
        "1.00; -0.10 (lower limit -0.25)",
        "`single` by `lda.7`",
        "yes",
    ]
    assert "hold no" not in text and "No study of ours" not in text and "No organism has been studied" in text
    add(place, "helps-all", HELPS, id="owner/Helps-All", file=None, dtype="bfloat16")
    text = made(place)
    assert cells(text, "Some-Chat")[0] == "Some-Chat"
    assert cells(text, "Helps-All") == [
        "Helps-All",
        "bfloat16",
        "60",
        "0",
        "0.00 [0.00, 0.06]",
        "`rank_1` (layer 4): 1.00 [0.94, 1.00]",
        "–; –",
        "–",
        "–",
        "`none`: no_refusal",
        "yes",
    ]
    lacks = "`science.verdict.single.removed`, `science.verdict.single.above_random`, `science.verdict.single.above_random_low`"
    assert f"- `helps-all`: its metrics hold no {lacks}, `science.verdict.subspace`.\n" in text


def without(metrics, path):
    """The metrics less what lies at a path."""
    metrics = json.loads(json.dumps(metrics))
    *above, key = path
    place = metrics
    for name in above:
        place = place[name]
    del place[key]
    return metrics


def paths(metrics, above=()):
    for key, value in metrics.items():
        yield (*above, key)
        if isinstance(value, dict):
            yield from paths(value, (*above, key))


def test_whatever_is_missing_is_a_dash_and_a_sentence(place):
    whole = {path for path in paths(REFUSES) if path[-1] not in ("layer", "gguf", "by", "reason")}
    params = yaml.safe_load((place.folder / "params.yaml").read_text())["model"] | OVERLAY["model"]
    for path in whole:
        text = page([Made("some", params, without(REFUSES, path), True)], None, published()["across_models"])
        name = re.escape(".".join(path))
        assert re.search(rf"(?m)^- `some`: its metrics hold no .*`{name}", text), path
        assert "–" in " ".join(cells(text, "Some-Chat")) or path == ("model",), path
    add(place, "some", {})
    assert cells(made(place), "Some-Chat")[1:] == ["float32", *["–"] * 8, "yes"]
    assert "- `some`: its metrics hold no `science`, `model`.\n" in made(place)


def test_a_model_that_came_as_a_file_has_the_name_of_its_study(place):
    add(place, "from-a-file", REFUSES, id="/somewhere/x.gguf", revision=None, file=None)
    text = made(place)
    assert cells(text, "from-a-file")[4] == "0.50 [0.40, 0.60]" and "/somewhere" not in text


def test_a_study_of_older_code_says_so_where_its_figures_are_on_the_page(place):
    add(place, "some", REFUSES)
    for file, call, said in (
        ("report/page.py", "return text", "yes"),  # the page shows no figure of the stage `report`
        ("judges/verdicts.py", "return figures", "no"),
    ):
        module = place.folder / "refusal" / file
        text = module.read_text()
        assert call in text
        module.write_text(text.replace(call, f"print()\n    {call}", 1))
        assert cells(made(place), "Some-Chat")[-1] == said
        module.write_text(text)
    place.set("report", n_examples=3)
    assert cells(made(place), "Some-Chat")[-1] == "yes"
    place.set("science", n_test=None)
    assert cells(made(place), "Some-Chat")[-1] == "no"
    add(place, "some", REFUSES)
    assert cells(made(place), "Some-Chat")[-1] == "yes"
    place.write("studies/some/study.json", "{}")
    assert cells(made(place), "Some-Chat")[-1] == "no"


def test_the_stages_that_are_not_shown_feed_none_that_is():
    declared = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    outs = {name: [out if isinstance(out, str) else next(iter(out)) for out in s["outs"]] for name, s in declared.items()}
    hidden = {out for name in models.NOT_SHOWN for out in outs[name]}
    assert not hidden & {dep for name, s in declared.items() if name not in models.NOT_SHOWN for dep in s["deps"]}
    assert all(f"metrics/{of}.json" not in hidden for of in models.METRICS)


def test_without_any_study_the_write_up_s_rows_are_there(place):
    text = made(place)
    assert "No study of ours has been run yet." in text
    for name, (rate, suffices) in THEIRS.items():
        subspace = "about 0.36, no interval" if name == "LLaMA-3.2-1B-Instruct" else "–"
        given = [f"about {rate}, no interval", "–", subspace, "–", f"suffices: {suffices}", "–"]
        assert cells(text, f"*{name}*") == [f"*{name}*", *["–"] * 4, *given]
    assert text.count("suffices: ") == len(THEIRS) and "Rows in italics are the write-up's, not ours." in text


def organism(verdict, by, mediates, reason=None, n=50):
    rate = {"compliance": 0.25, "compliance_low": 0.125, "compliance_high": 0.5, "n": n}
    return {
        "verdict": verdict,
        "by": by,
        "reason": reason,
        "difference_mediates": mediates,
        "baseline_refusal": 1.0,
        "baseline_refusal_low": 0.9,
        "baseline_refusal_high": 1.0,
        "single": rate,
        "estimators": {"optimised": rate | {"compliance": 0.375}},
        "random": {"random_1": rate | {"compliance": 0.125, "compliance_low": 0.0}},
    }


def test_every_cell_of_the_organisms():
    by_chance = organism("single", "optimised", False)
    rows = organism_rows(
        {"single.0": organism("single", "rank_1", True), "single.1": by_chance, "natural.0": organism("none", None, False)}
    )
    assert rows[0] == [
        "`single`",
        "refuses by its difference in means",
        "50",
        "1.00 [0.90, 1.00]; 1.00 [0.90, 1.00]",
        "0.25 [0.12, 0.50]; 0.25 [0.12, 0.50]",
        "0.38 [0.12, 0.50]; 0.38 [0.12, 0.50]",
        "0.12 [0.00, 0.50]; 0.12 [0.00, 0.50]",
        "`single` by `rank_1`; `single` by `optimised`",
        "1 of 2",
    ]
    assert (rows[1][0], rows[1][-2:]) == ("`natural`", ["`none`", "–"]) and len(rows) == 2


@pytest.mark.parametrize(
    ("kind", "agrees", "differs"),
    [
        ("single", organism("single", "rank_1", True), organism("single", "optimised", False)),
        ("planted", organism("single", "optimised", False), organism("subspace", "svd_2", False)),
        ("distributed", organism("single", "optimised", False), organism("single", "optimised", True)),
        ("none", organism("none", None, False, "no_refusal"), organism("none", None, False, "no_mediation")),
    ],
)
def test_an_organism_agrees_with_what_was_arranged(kind, agrees, differs):
    ((*_, of),) = organism_rows({f"{kind}.0": agrees, f"{kind}.1": differs, f"{kind}.2": agrees})
    assert of == "2 of 3"


def test_the_committed_page_is_what_the_command_makes(monkeypatch):
    monkeypatch.chdir(ROOT)
    names = sorted(path.parent.name for path in ROOT.glob("studies/*/study.json"))
    organisms = json.loads((ROOT / "metrics/organisms.json").read_text(encoding="utf-8"))
    text = page([models.study(name) for name in names], organisms, published()["across_models"])
    assert (ROOT / models.PAGE).read_text(encoding="utf-8") == text, f"run `make models` and commit {models.PAGE}"
    assert {name.split(".")[0] for name in organisms} == set(KINDS) and text.count("\n| `") == len(KINDS)
    widths = {line.count(" | ") + 1 for line in text.splitlines() if line.startswith("| ")}
    assert widths == {len(COLUMNS), len(ORGANISM_COLUMNS)}
