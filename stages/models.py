"""models: docs/across-models.md, every committed study beside the write-up's models and the organisms; and the tables of
docs/replication.md, of the study of a real Qwen. `make models`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from refusal.io.params import Params
from stages import read_json, stage, write_text
from stages.studies import STUDIES, age, made_by, parameters

if TYPE_CHECKING:
    from refusal.report.models import Made

PAGE, ORGANISMS = Path("docs/across-models.md"), Path("metrics/organisms.json")
REPLICATION, REAL = Path("docs/replication.md"), STUDIES / "qwen2.5-coder-0.5b-instruct"
METRICS = ("model", "science")
NOT_SHOWN = ("published", "long_answers", "benchmark", "edits", "report")  # stages that no figure of the page comes from


def main(params: Params) -> str:
    from refusal.report.models import page
    from refusal.report.reproduction import published

    names = sorted(made.parent.name for made in STUDIES.glob("*/study.json"))
    organisms = read_json(ORGANISMS) if ORGANISMS.is_file() else None
    write_text(PAGE, page([study(name) for name in names], organisms, published()["across_models"]))
    if REPLICATION.is_file() and (REAL / "study.json").is_file():
        write_text(REPLICATION, replication(REPLICATION.read_text(encoding="utf-8")))
    return f"{PAGE}: {len(names)} {'study' if len(names) == 1 else 'studies'} of ours"


def replication(text: str) -> str:
    """docs/replication.md with the tables of the committed figures."""
    from refusal.report.replication import NAMES, arms, filled, numbered, other_sets, statements
    from refusal.report.reproduction import published

    metrics = {name: read_json(REAL / f"metrics/{name}.json") for name in (*NAMES, "long_answers", "generalization")}
    return filled(
        text,
        {
            "arms": arms(metrics),
            "sets": other_sets(metrics["generalization"]),
            "statements": numbered(statements(metrics, published())),
        },
    )


def study(name: str) -> "Made":
    """A committed study, with what there is of its metrics."""
    from refusal.report.models import Made

    files = {metric: STUDIES / name / f"metrics/{metric}.json" for metric in METRICS}
    return Made(
        name,
        parameters(name)["model"],
        {metric: read_json(file) for metric, file in files.items() if file.is_file()},
        current(name),
    )


def current(name: str) -> bool:
    """Whether the overlay, prompts, parameters and code behind the figures on the page are those that made a study."""
    now = made_by(name)
    shown = {of: {stage: v for stage, v in now[of].items() if stage not in NOT_SHOWN} for of in ("parameters", "code")}
    return not age(read_json(STUDIES / name / "study.json"), now | shown)


if __name__ == "__main__":
    stage(main)
