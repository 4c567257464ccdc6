"""Every variant compared on one page: `dvc exp show --json | python -m refusal.report.variants OUT.html EVALUATE.json`.

`dvc exp show` has the parameters and the twelve scalars of each; the intervals come from EVALUATE.json as Git holds it at
the variant's revision, since a figure without one does not tell variants apart.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refusal.io.command import in_one_sentence
from refusal.io.errors import UserError
from refusal.report.charts import figure, fill
from refusal.report.page import ARMS, render
from refusal.report.study import Metrics

WORKSPACE = "workspace"
Evaluate = Callable[[str], Metrics | None]


class Variant(NamedTuple):
    """One row: a commit, the workspace or an experiment; `state` is empty where it has run."""

    name: str
    state: str
    params: Metrics
    summary: Metrics
    evaluate: Metrics | None


def read(shown: Any, evaluate: Evaluate) -> list[Variant]:
    """The variants in the answer of `dvc exp show --json`, as it orders them; `evaluate` gives a revision's test metrics.

    The workspace is left out where it is the commit below it. Raises UserError where there is none with results.
    """
    variants = []
    for commit in shown:
        variants.append(_variant(commit, "", evaluate))
        for experiment in commit.get("experiments") or []:
            state = (experiment.get("executor") or {}).get("state") or ""
            variants += [_variant(rev, "" if state == "success" else state, evaluate) for rev in experiment["revs"]]
    if len(variants) > 1 and variants[0].name == WORKSPACE and variants[0][2:] == variants[1][2:]:
        del variants[0]
    if not any(variant.summary for variant in variants):
        raise UserError("dvc exp show: no variant has results yet; run `dvc repro` or `dvc exp run` first")
    return variants


def _variant(shown: Metrics, state: str, evaluate: Evaluate) -> Variant:
    data, rev = shown.get("data") or {}, shown["rev"]
    params, summary = (
        {key: x for file in (data.get(kind) or {}).values() for key, x in flat(file.get("data") or {}).items()}
        for kind in ("params", "metrics")
    )
    name = shown.get("name") or (rev if rev == WORKSPACE else rev[:7])
    return Variant(name, "failed" if shown.get("error") else state, params, summary, evaluate(rev) if summary else None)


def flat(tree: Metrics, prefix: str = "") -> Metrics:
    """A tree of parameters as {dotted key: value}; lists are values."""
    leaves: Metrics = {}
    for key, x in tree.items():
        leaves |= flat(x, f"{prefix}{key}.") if isinstance(x, dict) else {f"{prefix}{key}": x}
    return leaves


def varied(variants: Sequence[Variant]) -> list[str]:
    """The parameters in which the variants differ, compute.* aside, which determines no value; one at work shows none yet."""
    variants = [variant for variant in variants if variant.params]
    keys = dict.fromkeys(key for variant in variants for key in variant.params if not key.startswith("compute."))
    return [key for key in keys if len({json.dumps(variant.params.get(key)) for variant in variants}) > 1]


def page(variants: Sequence[Variant]) -> str:
    """The page as HTML, its chart one of `dvc plots diff`. Equal variants give equal text."""
    rows = [{"rev": v.name, "arm": arm} | v.evaluate[arm] for v in variants if v.evaluate for arm in ARMS]
    chart = figure(fill("arms", rows, "compliance", "arm", y_label=""), "Compliance on test by arm and variant")
    metrics = list(dict.fromkeys(key for variant in variants for key in variant.summary))
    return render("variants.html", variants=variants, varied=varied(variants), metrics=metrics, arms=ARMS, chart=chart)


def main(out: Path, evaluate: str, shown: str) -> str:
    """Write the page from the text that `dvc exp show --json` printed; the line to print."""
    try:
        commits = json.loads(shown)
    except json.JSONDecodeError as error:
        raise UserError(f"dvc exp show --json: gave no JSON ({error}): run it by itself and see what it says") from None

    def at(rev: str) -> Metrics | None:
        if rev == WORKSPACE:
            return json.loads(Path(evaluate).read_text(encoding="utf-8")) if Path(evaluate).is_file() else None
        held = subprocess.run(["git", "show", f"{rev}:{evaluate}"], capture_output=True, text=True)
        return json.loads(held.stdout) if held.returncode == 0 else None

    variants = read(commits, at)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page(variants), encoding="utf-8")
    ran = sum(variant.evaluate is not None for variant in variants)
    return f"{out}: {len(variants)} variants, {ran} with results; they differ in {', '.join(varied(variants)) or 'nothing'}"


if __name__ == "__main__":
    with in_one_sentence("variants"):
        print(main(Path(sys.argv[1]), sys.argv[2], sys.stdin.read()))
