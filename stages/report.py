"""report: published figures and ours, the twelve scalars that tell variants apart, and the study as one page."""

from pathlib import Path
from typing import Any

from refusal.io.files import read_csv, read_jsonl
from refusal.io.params import Params
from stages import hashes, read_json, stage, write_json, write_text

REPRODUCTION, SUMMARY, PAGE = Path("metrics/reproduction.json"), Path("metrics/summary.json"), Path("report/index.html")
DIGESTS = Path("metrics/completions.json")
METRICS = {
    name: Path(f"metrics/{name}.json")
    for name in "model directions judge agreement select orthogonalize evaluate benchmark science".split()
} | {
    "imported": Path("metrics/published.json"),
    **{name: Path(f"metrics/{name}.json") for name in ("selection", "long_answers", "generalization", "edits")},
}
PROMPTS = {name: Path(f"data/prompts/{name}.jsonl") for name in ("pairs", "unrelated")}
COMPLETIONS = {
    "sweep": Path("data/sweep/completions.jsonl"),
    "verdicts": Path("data/judged/verdicts.jsonl"),
    "evaluated": Path("data/evaluated/completions.jsonl"),
}
PLOTS = {
    name: Path(f"plots/{name}.csv")
    for name in ("separation", "cosine_to_sequential", "capability", "science/arms", "science/alphas")
}
BASE, DIRECTIONS = Path("models/base"), Path("models/directions.safetensors")
LOCK, PUBLISHED = Path("requirements.lock"), Path("refusal/report/published.json")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "lm_eval", "numpy", "scipy", "dvc")


def main(params: Params) -> str:
    from refusal.report.page import SHOWN, page
    from refusal.report.reproduction import reproduce, summary
    from refusal.report.study import Study
    from refusal.report.verify import digests
    from refusal.report.weaknesses import weaknesses

    base = sorted(path for path in BASE.rglob("*") if path.is_file())
    plots = {name: path for name, path in PLOTS.items() if path.is_file()}  # science.strength: null has no curve of alphas
    inputs = [*PROMPTS.values(), *base, DIRECTIONS, *COMPLETIONS.values(), *METRICS.values(), *plots.values(), PUBLISHED, LOCK]
    pinned = dict(line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    read: dict[str, Any] = {name: read_jsonl(path) for name, path in (PROMPTS | COMPLETIONS).items()}
    read |= {name: read_json(path) for name, path in METRICS.items()}
    read["directions"] = {name: m for name, m in read["directions"].items() if m is not None}  # null: left out
    study = Study(
        params=params.model_dump(exclude={"compute"}),  # threads determine no value
        plots={name: read_csv(plots[name]) if name in plots else [] for name in PLOTS},
        versions={name: pinned[name] for name in PACKAGES},
        hashes=hashes(inputs, "report"),
        **read,
    )
    reproduction = reproduce(study) | {"weaknesses": weaknesses(study)}
    text = page(study, reproduction)
    write_json(REPRODUCTION, reproduction)
    write_json(SUMMARY, summary(study))
    shown = [row for row in read["evaluated"] if row["arm"] in SHOWN]
    write_json(DIGESTS, {"sweep": digests(read["sweep"], "cell"), "evaluate": digests(shown, "arm")})
    write_text(PAGE, text)
    filled = sum(row["ours"] is not None for row in reproduction["rows"])
    verdict = "comparable" if reproduction["comparable"] else "not comparable: another model"
    size = len(text.encode()) / 1e6
    return f"{PAGE}, {size:.1f} MB; ours for {filled} of {len(reproduction['rows'])} published figures, {verdict}"


stage(main)
