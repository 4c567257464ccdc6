"""orthogonalize: a checkpoint for each selected cell and one for a random direction."""

from pathlib import Path
from typing import Any, Literal

from refusal.io.params import Params
from stages import read_json, stage, use_torch, write_json

BASE, OUT, METRICS = Path("models/base"), Path("models/ablated"), Path("metrics/orthogonalize.json")
NORMS: dict[str, Literal["rows", "columns"]] = {"row_norms": "rows", "column_norms": "columns"}


def main(params: Params) -> str:
    use_torch(params)
    import shutil

    from refusal.method.directions import defined_layers, read_directions, select_directions
    from refusal.method.interventions import Intervention
    from refusal.method.orthogonalize import Edit, orthogonalize
    from refusal.method.select import checked, span_of
    from refusal.method.subspaces import basis_of, random_of, spans

    o, s, selected = params.orthogonalize, params.sweep, checked(read_json(Path("metrics/select.json")))
    directions = select_directions(read_directions(Path("models/directions.safetensors")), s.method, s.pairing)
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir(parents=True)
    among = spans(s, defined_layers(directions))
    cells = {rank: (cell, span_of(cell["name"], s.method, among)) for rank, cell in selected.items()}
    keep = o.variant == "harmless_kept"
    edited = {
        rank: Intervention(cell["name"], basis_of(span, directions, keep), cell["alpha"], "weights")
        for rank, (cell, span) in cells.items()
    }
    # The control differs from rank_1 in its direction or subspace alone: same layers in its name, same rank, alpha and matrices.
    first, span = cells["rank_1"]
    random = f"random_{first['name'].removeprefix(f'{s.method}_')}"
    edited["random"] = Intervention(random, random_of(span, directions, 1, s.seed, keep)[0], first["alpha"], "weights")
    norms = NORMS.get(o.variant)
    edits = [Edit(OUT / one.name, one, o.include_embedding, o.format, norms) for one in edited.values()]
    reports = orthogonalize(BASE, edits)
    metrics: dict[str, dict[str, Any]] = {
        rank: {
            "name": one.name,
            "alpha": one.alpha,
            "n_edited": report.n_edited,
            "n_copied": report.n_copied,
            "max_residual": report.max_residual,
            "max_deviation": report.max_deviation,
            "residuals": report.residuals,
            "deviations": report.deviations,
            **({"gguf": f"{one.name}.gguf", "max_cast": max(report.casts.values())} if report.casts else {}),
        }
        for (rank, one), report in zip(edited.items(), reports, strict=True)
    }
    write_json(METRICS, metrics)
    worst = max(m["max_deviation"] for m in metrics.values())
    return f"{len(edits)} checkpoints, {metrics['rank_1']['n_edited']} tensors edited in each; v^T W off by {worst:.1e} of |W|"


stage(main)
