"""Logs as inspect writes them: one JSON, or a zip of a header and a file for each sample and epoch."""

import json
import zipfile
from pathlib import Path
from typing import Any


def sample(name: str | int, scores: dict[str, Any] | None, epoch: int = 1, **fields: Any) -> dict[str, Any]:
    """One sample of a log in one epoch, scored with these values by scorer."""
    scored = None if scores is None else {scorer: {"value": value, "answer": "x"} for scorer, value in scores.items()}
    return {"id": name, "epoch": epoch, "input": f"Question {name}?", "target": "x", "messages": [], "scores": scored} | fields


def write_log(path: Path, samples: list[dict[str, Any]], status: str = "success", task: str = "toy", version: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"version": version, "status": status, "eval": {"task": task, "task_id": "1", "model": "m", "dataset": {}}}
    if path.suffix == ".json":
        path.write_text(json.dumps(header | {"samples": samples}))
        return path
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("_journal/start.json", json.dumps({key: header[key] for key in ("version", "eval")}))
        for one in samples:
            file.writestr(f"samples/{one['id']}_epoch_{one['epoch']}.json", json.dumps(one))
        file.writestr("summaries.json", "[]")
        if status != "started":
            file.writestr("header.json", json.dumps(header))
    return path
