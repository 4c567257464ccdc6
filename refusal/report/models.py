"""Models beside each other: docs/across-models.md, from the metrics of every committed study (`make models`).

A cell that the metrics cannot fill is a dash, and one sentence for each study says what they lack.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from refusal.analysis.verdict import NO_REFUSAL
from refusal.report.study import Metrics

DASH = "–"
COLUMNS = (
    "model",
    "weights",
    "harmful test prompts",
    "of them refused",
    "baseline refuses",
    "best single direction ablated: complies",
    "refusals removed; beyond random",
    "best subspace ablated: complies",
    "refusals removed; beyond random",
    "verdict",
    "of today's code",
)
ORGANISM_COLUMNS = (
    "kind",
    "as it was made",
    "n",
    "baseline refuses",
    "`rank_1` ablated: complies",
    "`optimised` ablated: complies",
    "random directions ablated: complies",
    "verdict",
    "seeds that agree with it",
)
# What each kind of organism was made to be, and whether the study of one found that; None where nothing was arranged.
KINDS: dict[str, tuple[str, Callable[[Metrics], bool] | None]] = {
    "single": ("refuses by its difference in means", lambda o: o["verdict"] == "single" and o["difference_mediates"]),
    "planted": ("refuses by one random vector", lambda o: o["verdict"] == "single"),
    "distributed": ("refuses by no difference in means", lambda o: not o["difference_mediates"]),
    "natural": ("refuses; how, nobody arranged", None),
    "none": ("never refuses", lambda o: (o["verdict"], o["reason"]) == ("none", "no_refusal")),
}
READING = """\
Each row of ours is a study of `studies/`, on its own prompts and under its own judge; all figures are of harmful *test*
prompts, with 95 % intervals ([intervals.md](intervals.md)). The best single direction and the best subspace were chosen on
val. *Refusals removed* is the share of what the baseline refuses that is then answered in full; *beyond random* is that
share less the same share of random directions (or subspaces of the same rank), with its lower limit, on which the verdict
rests ([mediation.md](mediation.md)). The verdict `none` with `no_refusal` is of a model that hardly refuses (the upper limit of
the baseline's refusal is below {no_refusal}): it leaves too little to remove, and says nothing about directions. *Of today's
code*: whether parameters and code, as far as these figures come from them, are those that made them; `make study` names all
that has changed. A dash: not known.
"""
THEIRS = """\
Rows in italics are the write-up's, not ours. Each is the greatest *mean compliance* (0, 0.5 or 1 a prompt, judged by
DeepSeek) over the layers whose direction was ablated at run time, on no prompts that their pages keep apart from the choice.
They come with no baseline rate, no random control and no interval: they say how often an ablated model complies, not how
much of that the ablation did, and are not comparable with ours without their prompts and their judge. *Suffices* is their
reading. Source: {source}.
"""
CALIBRATION = """\
Models trained here so that the answer is known, three seeds a kind, one figure a seed, n harmful test prompts each. A verdict
of `single` by `optimised` says that some direction mediates and not that the difference in means does. Which rule these
verdicts and intervals are of: [mediation.md](mediation.md).
"""


class Made(NamedTuple):
    """A committed study: `model` of its parameters, its metrics by file, and whether parameters and code are today's."""

    name: str
    model: Metrics
    metrics: Mapping[str, Metrics]
    current: bool


class Figures:
    """The metrics of a study, and the names of those that were asked for in vain."""

    def __init__(self, metrics: Mapping[str, Metrics]) -> None:
        self.metrics, self.missing = metrics, dict[str, None]()

    def get(self, *path: str) -> Any:
        """The value at a path of keys; None where it, or what it lies in, is missing or null."""
        found: Any = self.metrics
        for i, key in enumerate(path, 1):
            found = found.get(key) if isinstance(found, Mapping) else None
            if found is None:
                self.missing[".".join(path[:i])] = None
                return None
        return found

    def rate(self, *path: str) -> str:
        """A rate with its interval, or a dash."""
        *above, key = path
        found = {end: self.get(*above, f"{key}{end}") for end in ("", "_low", "_high")}
        return DASH if None in found.values() else interval(found, "")


def interval(figures: Metrics, key: str, form: str = ".2f") -> str:
    """A figure and its interval, as tables show them."""
    value, low, high = (f"{figures[f'{key}{end}']:{form}}" for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (columns, ["---"] * len(columns), *rows))


def row(study: Made) -> tuple[list[str], str | None]:
    """The cells of a study in the order of COLUMNS, and a sentence on what its metrics lack."""
    figures = Figures(study.metrics)
    n, refused = figures.get("science", "arms", "baseline", "n"), figures.get("science", "verdict", "n_refused")
    cells = [
        called(study),
        weights(study.model, figures.get("model")),
        DASH if n is None else str(n),
        DASH if refused is None else str(refused),
        figures.rate("science", "arms", "baseline", "refusal"),
        *intervention(figures, "single"),
        *intervention(figures, "subspace"),
        decision(figures),
        "yes" if study.current else "no",
    ]
    missing = ", ".join(f"`{name}`" for name in figures.missing)
    return cells, f"`{study.name}`: its metrics hold no {missing}." if missing else None


def called(study: Made) -> str:
    """The model's own name: a hub id without its owner; of a file or a folder the study's name."""
    if not study.model["revision"]:
        return study.name
    return study.model["id"].split("/")[-1].removesuffix("-GGUF")


def weights(model: Metrics, found: Metrics | None) -> str:
    """What the weights were and what they are computed in, such as `4-bit (Q4_K, Q6_K), dequantized to float32`."""
    types = [name for name in (found or {}).get("gguf") or [] if "Q" in name]
    if not types:
        return model["dtype"]
    bits = min(int(digits[0]) for name in types if (digits := re.search(r"\d+", name)))
    return f"{bits}-bit ({', '.join(types)}), dequantized to {model['dtype']}"


def intervention(figures: Figures, family: str) -> tuple[str, str]:
    """Two cells of the best `single` or `subspace`: its compliance, and the share of refusals that it removes."""
    if figures.get("science", "verdict", family) is None:
        return DASH, DASH
    name = figures.get("science", "verdict", family, "name")
    layer = figures.metrics["science"].get("arms", {}).get(name, {}).get("layer")  # null where several layers give it, or none
    where = "" if layer is None else f" (layer {layer})"
    keys = ("removed", "above_random", "above_random_low")
    removed, above, low = (figures.get("science", "verdict", family, key) for key in keys)
    beyond = DASH if above is None or low is None else f"{above:+.2f} (lower limit {low:+.2f})"
    rate = figures.rate("science", "arms", str(name), "compliance")
    return f"`{name}`{where}: {rate}", f"{DASH if removed is None else f'{removed:.2f}'}; {beyond}"


def decision(figures: Figures) -> str:
    """The verdict, with what it names or why."""
    if (verdict := figures.get("science", "verdict", "verdict")) is None:
        return DASH
    by, reason = (figures.metrics["science"]["verdict"].get(key) for key in ("by", "reason"))
    return f"`{verdict}`" + (f" by `{by}`" if by else "") + (f": {reason}" if reason else "")


def theirs(published: Metrics) -> list[list[str]]:
    """The write-up's rows, in italics."""
    rows = []
    for given in published["rows"]:
        rates = [f"about {given[key]:.2f}, no interval" if key in given else DASH for key in ("compliance", "subspace")]
        suffices = f"suffices: {given['sufficient']}"
        rows.append([f"*{given['model']}*", *[DASH] * 4, rates[0], DASH, rates[1], DASH, suffices, DASH])
    return rows


def organism_rows(organisms: Metrics) -> list[list[str]]:
    """A row for each kind of metrics/organisms.json, one figure a seed."""
    rows = []
    for kind, (made, agrees) in KINDS.items():
        if not (found := [o for name, o in organisms.items() if name.split(".")[0] == kind]):
            continue
        arms = ([o["single"], o["estimators"]["optimised"], o["random"]["random_1"]] for o in found)
        cells = [
            [interval(o, "baseline_refusal") for o in found],
            *([interval(arm, "compliance") for arm in of_seeds] for of_seeds in zip(*arms, strict=True)),
            [f"`{o['verdict']}`" + (f" by `{o['by']}`" if o["by"] else "") for o in found],
        ]
        agreeing = f"{sum(map(agrees, found))} of {len(found)}" if agrees else DASH
        n = "/".join(str(n) for n in sorted({o["single"]["n"] for o in found}))
        rows.append([f"`{kind}`", made, n, *("; ".join(values) for values in cells), agreeing])
    return rows


def page(studies: Sequence[Made], organisms: Metrics | None, published: Metrics) -> str:
    """docs/across-models.md. organisms: metrics/organisms.json; published: `across_models` of published.json."""
    rows = [row(study) for study in studies]
    lacking = [sentence for _, sentence in rows if sentence]
    calibration = table(ORGANISM_COLUMNS, organism_rows(organisms)) if organisms else "No organism has been studied yet.\n"
    parts = [
        "<!-- Made by `make models`; what is written here by hand is lost. -->\n# Models beside each other\n",
        "Made by `make models` from `studies/*/metrics/`, `metrics/organisms.json` and `refusal/report/published.json`.\n",
        table(COLUMNS, [cells for cells, _ in rows] + theirs(published)),
        "" if studies else "No study of ours has been run yet.\n",
        "\n".join(f"- {sentence}" for sentence in lacking) + "\n" if lacking else "",
        READING.format(no_refusal=NO_REFUSAL),
        THEIRS.format(source=published["source"]),
        "## Calibration: organisms\n",
        CALIBRATION,
        calibration,
    ]
    return "\n".join(filter(None, parts))
