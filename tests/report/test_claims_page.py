"""docs/claims.md is what `make claims` makes of the committed figures, and says of each claim where it stands."""

import json

import yaml
from place import ROOT

from refusal.analysis.claims import MEASURES
from refusal.io.claims import read
from refusal.report.claims import false_verdicts, page
from stages import claims, models


def test_the_committed_page_is_of_the_committed_figures():
    listed = read(yaml.safe_load((ROOT / "data/claims.yaml").read_text()), MEASURES, "data/claims.yaml")
    found = json.loads((ROOT / "metrics/claims.json").read_text())
    older = [name for name in found if name != "organism" and not models.current(name)]
    text = (ROOT / "docs/claims.md").read_text()
    assert text == page(listed, found, json.loads((ROOT / "metrics/organisms.json").read_text()), older)
    for name, claim in listed.items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        assert claim.source in section and claim.their_n in section and claim.decides in section
        for study, rows in found.items():
            (row,) = [line for line in section.splitlines() if line.startswith(f"| {study} |")]
            assert row.endswith(f"| {rows[name]['outcome']} |")


def test_the_committed_table_is_of_the_committed_metrics(monkeypatch, tmp_path):
    """Made anew, it is the same to the byte."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(claims, "TABLE", tmp_path / "claims.json")
    monkeypatch.setattr(claims, "PAGE", tmp_path / "claims.md")
    claims.table()
    assert (tmp_path / "claims.json").read_text() == (ROOT / "metrics/claims.json").read_text()
    assert (tmp_path / "claims.md").read_text() == (ROOT / "docs/claims.md").read_text()


def test_false_verdicts_are_of_organisms_whose_answer_was_arranged():
    single = {"verdict": "single", "reason": None, "difference_mediates": True}
    none = {"verdict": "none", "reason": "no_refusal", "difference_mediates": False}
    organisms = {"single.0": single, "single.1": none, "natural.0": none, "none.0": none, "planted.0": single}
    # Wilson's limits of one of four, by its closed form.
    assert "of 4 organisms whose answer was arranged, 1 were found otherwise, a rate of 0.25 [0.05, 0.70]" in false_verdicts(organisms)
