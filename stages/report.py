"""report: published beside ours, the twelve scalars that tell variants apart, and the study as one page."""

import hashlib
from pathlib import Path
from typing import Any

from refusal.io.params import Params
from refusal.io.tables import read_jsonl
from stages import read_json, stage, write_json, write_text

REPRODUCTION, SUMMARY, PAGE = Path("metrics/reproduction.json"), Path("metrics/summary.json"), Path("report/index.html")
METRICS = ("model", "directions", "judge", "agreement", "select", "orthogonalize", "evaluate", "benchmark")
ROWS = {
    "pairs": Path("data/prompts/pairs.jsonl"),
    "unrelated": Path("data/prompts/unrelated.jsonl"),
    "sweep": Path("data/sweep/completions.jsonl"),
    "verdicts": Path("data/judged/verdicts.jsonl"),
    "evaluated": Path("data/evaluated/completions.jsonl"),
}
CAPABILITY, LOCK, PUBLISHED = Path("plots/capability.csv"), Path("requirements.lock"), Path("refusal/report/published.json")
BASE, DIRECTIONS, IMPORTED = Path("models/base"), Path("models/directions.safetensors"), Path("metrics/published.json")
SCIENCE, ALPHAS = Path("metrics/science.json"), Path("plots/science/alphas.csv")
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "lm_eval", "numpy", "scipy", "dvc")


def main(params: Params) -> str:
    import csv

    from refusal.report.page import Study, page
    from refusal.report.reproduction import published, reproduce, summary
    from refusal.report.weaknesses import weaknesses

    metrics = {name: read_json(Path(f"metrics/{name}.json")) for name in METRICS}
    imported, science = read_json(IMPORTED), read_json(SCIENCE)
    rows = {name: read_jsonl(path) for name, path in ROWS.items()}
    with CAPABILITY.open(encoding="utf-8", newline="") as file:
        capability = [{key: float(text) for key, text in row.items()} for row in csv.DictReader(file)]
    arm = f"{params.sweep.method}-{params.sweep.pairing}"
    organism = params.model.id == "organism"
    settings = {
        "model": params.model.id,
        "n_layers": len(metrics["directions"][arm]["separation"]),
        "hook": "hook_resid_pre",
        "position": "last prompt token",
        "n_pairs": len(rows["pairs"]),
        "pairs_by": params.prompts.source,
        "judge": params.judge.kind,
        "judged": ["compliance", "coherence"],
        "alphas": params.sweep.alphas,
        "benchmark_tasks": list(metrics["benchmark"]["baseline"]["tasks"]),
        "benchmark_score": "mean over tasks of acc_norm, or of acc where a task has no acc_norm",
        "checkpoint_name": "{method}_layer_{layer}_alpha_{100 alpha}",
    }
    if organism:
        shape = {"d_model": "hidden_size", "n_heads": "num_attention_heads", "vocab_size": "vocab_size"}
        settings |= {name: getattr(params.organism, key) for name, key in shape.items()}
    reproduction = reproduce(
        published(), params.model.id, arm, settings, *(metrics[name] for name in ("directions", "judge", "select", "benchmark"))
    )
    strengths: list[dict[str, Any]] = []
    if ALPHAS.is_file():  # science.level: mediation has none
        with ALPHAS.open(encoding="utf-8", newline="") as file:
            strengths = [
                {k: v if k == "place" else float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)
            ]
    reproduction["weaknesses"] = weaknesses(
        published(), metrics["directions"], rows["verdicts"], metrics["select"], science, strengths
    )
    inputs = [
        *(ROWS[name] for name in ("pairs", "unrelated")),
        *sorted(path for path in BASE.rglob("*") if path.is_file()),
        DIRECTIONS,
        *(ROWS[name] for name in ("sweep", "verdicts", "evaluated")),
        *(Path(f"metrics/{name}.json") for name in METRICS),
        *(IMPORTED, SCIENCE, CAPABILITY, PUBLISHED, LOCK),
    ]
    pinned = dict(line.split("==") for line in LOCK.read_text(encoding="utf-8").splitlines() if "==" in line)
    # Threads determine no value, and a page that printed them would change with the machine.
    read: dict[str, Any] = {**metrics, **rows}
    text = page(
        Study(
            params=params.model_dump(exclude={"compute"}),
            capability=capability,
            reproduction=reproduction,
            imported=imported,
            science=science,
            **read,
            versions={name: pinned[name] for name in PACKAGES},
            hashes=hashes(inputs),
        )
    )
    figures = summary(arm, *(metrics[name] for name in ("directions", "select", "evaluate", "benchmark")))
    write_json(REPRODUCTION, reproduction)
    write_json(SUMMARY, figures)
    write_text(PAGE, text)
    filled = sum(row["ours"] is not None for row in reproduction["rows"])
    verdict = "comparable" if reproduction["comparable"] else "not comparable: another model"
    return (
        f"{PAGE}, {len(text.encode()) / 1e6:.1f} MB; {filled} of {len(reproduction['rows'])} published figures have ours beside "
        f"them, {verdict}"
    )


def hashes(paths: list[Path]) -> dict[str, str]:
    """The SHA-256 of each file, by its path."""
    from refusal.io.store import progress

    found = {}
    with progress(len(paths), "report: hashes", "file") as bar:  # a model's weights may take minutes
        for path in paths:
            with path.open("rb") as file:
                found[path.as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
            bar.update()
    return found


stage(main)
