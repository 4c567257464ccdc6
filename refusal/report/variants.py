"""Every variant beside the others, on one page: `dvc exp show --json | python -m refusal.report.variants OUT.html EVALUATE.json`.

`dvc exp show` has the parameters and the twelve scalars of each; the intervals come from EVALUATE.json as Git holds it at
the variant's revision, since a figure without one does not tell variants apart.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from refusal.io.errors import UserError
from refusal.report.page import ARMS, HERE, ci, num, signed, value

WORKSPACE = "workspace"


class Variant(NamedTuple):
    """One row: a commit, the workspace or an experiment; `state` is empty where it has run."""

    name: str
    rev: str
    state: str
    params: dict[str, Any]
    summary: dict[str, Any]
    evaluate: dict[str, Any] | None


def read(shown: Any, evaluate: Callable[[str], dict[str, Any] | None]) -> list[Variant]:
    """The variants in the answer of `dvc exp show --json`, as it orders them; `evaluate` gives a revision's test metrics.

    The workspace is left out where it is the commit below it. Raises UserError where there is none with results.
    """
    found = []
    for commit in shown:
        found.append(_variant(commit, "", evaluate))
        for experiment in commit.get("experiments") or []:
            state = (experiment.get("executor") or {}).get("state") or ""
            found += [_variant(rev, "" if state == "success" else state, evaluate) for rev in experiment["revs"]]
    if len(found) > 1 and found[0].rev == WORKSPACE and found[0][3:] == found[1][3:]:
        del found[0]
    if not any(variant.summary for variant in found):
        raise UserError("dvc exp show: no variant has results yet; run `dvc repro` or `dvc exp run` first")
    return found


def _variant(shown: dict[str, Any], state: str, evaluate: Callable[[str], dict[str, Any] | None]) -> Variant:
    data, rev = shown.get("data") or {}, shown["rev"]
    failed = "failed" if shown.get("error") else state
    files = {kind: [f.get("data") or {} for f in (data.get(kind) or {}).values()] for kind in ("params", "metrics")}
    summary = {key: x for file in files["metrics"] for key, x in file.items()}
    return Variant(
        name=shown.get("name") or (rev if rev == WORKSPACE else rev[:7]),
        rev=rev,
        state=failed,
        params={key: x for file in files["params"] for key, x in flat(file).items()},
        summary=summary,
        evaluate=evaluate(rev) if summary else None,
    )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of parameters as {dotted key: value}; lists are values."""
    found: dict[str, Any] = {}
    for key, x in tree.items():
        found |= flat(x, f"{prefix}{key}.") if isinstance(x, dict) else {f"{prefix}{key}": x}
    return found


def varied(variants: Sequence[Variant]) -> list[str]:
    """The parameters in which the variants differ, compute.* aside, which determines no value; one at work shows none yet."""
    variants = [variant for variant in variants if variant.params]
    keys = dict.fromkeys(key for variant in variants for key in variant.params if not key.startswith("compute."))
    return [key for key in keys if len({json.dumps(variant.params.get(key)) for variant in variants}) > 1]


def page(variants: Sequence[Variant]) -> str:
    """The page as HTML. Equal variants give equal text."""
    env = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    env.filters |= {"num": num, "signed": signed, "ci": ci, "value": value}
    metrics = list(dict.fromkeys(key for variant in variants for key in variant.summary))
    return (
        env.get_template("variants.html").render(
            variants=variants,
            varied=varied(variants),
            metrics=metrics,
            arms=ARMS,
            chart=chart([variant for variant in variants if variant.evaluate]),
            style=(HERE / "page.css").read_text(encoding="utf-8"),
        )
        + "\n"
    )


def chart(variants: Sequence[Variant]) -> Markup:
    """Compliance on test of each variant's four arms with their intervals, a row a variant, from 0 to 1."""
    left, width, row, top = 8, 560, 74, 24
    height = top + row * len(variants) + 24
    out = [f'<svg viewBox="0 0 {left + width + 8} {height}" role="img" aria-label="Compliance on test by variant and arm">']
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        x = left + tick * width
        out.append(
            f'<line class="grid" x1="{x:g}" x2="{x:g}" y1="{top - 6}" y2="{height - 22}"/>'
            f'<text class="tick" x="{x:g}" y="{height - 6}" text-anchor="middle">{tick:g}</text>'
        )
    for i, variant in enumerate(variants):
        assert variant.evaluate is not None
        y = top + i * row
        out.append(f'<text class="label" x="{left}" y="{y + 4}">{escape(variant.name)}</text>')
        for j, arm in enumerate(ARMS):
            m, at = variant.evaluate[arm], y + 16 + 12 * j
            x, low, high = (left + m[f"compliance{end}"] * width for end in ("", "_low", "_high"))
            title = f"{variant.name}, {arm}: {ci(m, 'compliance')}"
            out.append(
                f'<line class="line s{j}" x1="{low:.1f}" x2="{high:.1f}" y1="{at}" y2="{at}"/>'
                f'<circle class="mark s{j}" cx="{x:.1f}" cy="{at}" r="4"><title>{escape(title)}</title></circle>'
            )
    key = "".join(
        f'<li><svg viewBox="0 0 34 12" aria-hidden="true"><line class="line s{j}" x1="1" x2="33" y1="6" y2="6"/>'
        f'<circle class="mark s{j}" cx="17" cy="6" r="4"/></svg>{arm}</li>'
        for j, arm in enumerate(ARMS)
    )
    return Markup("".join(out) + f'</svg><ul class="key">{key}</ul>')


def main(out: Path, evaluate: str, shown: str) -> str:
    """Write the page from the text that `dvc exp show --json` printed; the line to print."""
    try:
        commits = json.loads(shown)
    except json.JSONDecodeError as error:
        raise UserError(f"dvc exp show --json: gave no JSON ({error}): run it by itself and see what it says") from None

    def at(rev: str) -> dict[str, Any] | None:
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
    try:
        print(main(Path(sys.argv[1]), sys.argv[2], sys.stdin.read()))
    except UserError as error:
        sys.exit(f"variants: {error}")
