"""published: the cosine by layer of our directions with those that were imported into data/published/."""

from pathlib import Path

from refusal.io.params import Params
from stages import stage, use_torch, write_json

FOLDER, METRICS = Path("data/published"), Path("metrics/published.json")


def main(params: Params) -> str:
    use_torch(params)
    from refusal.method.directions import read_directions
    from refusal.report.published import compare, read_vectors

    ours = {
        name.removesuffix(".unit"): tensor
        for name, tensor in read_directions(Path("models/directions.safetensors")).items()
        if name.endswith(".unit")
    }
    comparison = compare(*read_vectors(FOLDER), ours)
    write_json(METRICS, comparison)
    files = comparison["files"].values()
    if not files:
        return f"no published vectors in {FOLDER}/, so nothing to compare; `dvc import` brings some in"
    same = sum(file["comparable"] for file in files)
    return f"{len(files)} published sets of directions, {same} of our model's shape, {len(comparison['between'])} pairs"


stage(main)
