"""The committed metrics and plots with a few rows of hostile text, wherever text of a model or a user enters."""

import json
from pathlib import Path

import yaml

from refusal.io.files import read_csv
from refusal.report.study import Study

ROOT = Path(__file__).parents[2]
HOSTILE = "</script><script>alert(1)</script>"
IMAGE = "<img src=x onerror=\"alert('ran')\">"
METRICS = ("model", "directions", "judge", "select", "orthogonalize", "evaluate", "benchmark", "agreement", "science")
PLOTS = ("separation", "cosine_to_sequential", "capability", "science/arms", "science/alphas")


def study(model_id: str = "organism", kind: str = "single", n_examples: int = 3, answer: str = HOSTILE) -> Study:
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["model"]["id"], params["organism"]["kind"], params["report"]["n_examples"] = model_id, kind, n_examples
    params["endpoint"]["base_url"] = "127.0.0.1"  # the page shows it, and asks for nothing
    metrics = {name: json.loads((ROOT / f"metrics/{name}.json").read_text(encoding="utf-8")) for name in METRICS}
    splits = ["train"] * 6 + ["val"] * 4 + ["test"] * 4
    pairs = [
        {"id": f"pair-{i}", "split": split, "category": IMAGE if i % 2 else "fraud", "topic": "a", "seen": bool(i % 2)}
        | {"harmful": f"harmful {i} {IMAGE}", "safe": f"safe {i} {HOSTILE}"}
        for i, split in enumerate(splits)
    ]
    cells = {{"random": "random_0", "harmless": "harmless_1"}.get(name, name): m for name, m in metrics["judge"].items()}
    sweep = [
        {"cell": name, "layer": m["layer"], "alpha": m["alpha"], "id": row["id"], "prompt": row["harmful"]}
        | {"completion": f"{name} {answer}"}
        for name, m in cells.items()
        for row in pairs[6:10]
    ]
    verdict = {"label": "compliance", "compliance": 1.0, "coherence": 1.0, "refusal": False, "substring": False}
    evaluated = [
        {"arm": arm, "half": half, "prompt": row[half], "completion": f"{arm} {answer}", **row, **verdict}
        for arm in ("baseline", "runtime", "orthogonalized", "random")
        for half in ("harmful", "safe")
        for row in pairs[10:]
    ]
    evaluated[0] |= {"label": "refusal", "compliance": 0.0}
    return Study(
        params=params,
        pairs=pairs,
        unrelated=[{"id": "unrelated-0", "safe": "hello"}],
        sweep=sweep,
        verdicts=[{"cell": row["cell"], "id": row["id"], **verdict} for row in sweep],
        evaluated=evaluated,
        plots={name: read_csv(ROOT / f"plots/{name}.csv") for name in PLOTS},
        imported={"files": {}, "between": {}, "figures": {}},
        versions={"torch": "1"},
        hashes={"metrics/judge.json": "0" * 64},
        **metrics,
    )
