"""science: one direction, several or none, and what the answer depends on: prompts, padding, position and strength."""

from pathlib import Path
from typing import Any

from refusal.io.errors import UserError
from refusal.io.files import csv_text, read_jsonl
from refusal.io.params import Params, Science
from refusal.io.prompts import kept_rows
from stages import read_json, stage, use_transformers, write_json, write_text

TRUTH, METRICS, PLOTS = Path("models/truth/planted.safetensors"), Path("metrics"), Path("plots")
# What `make full` spends: all prompts. Its figures go to files of their own, which the pipeline does not read.
FULL: dict[str, Any] = {
    **dict.fromkeys(("n_val", "n_test", "n_harmless")),
    "n_control": 100,
    "n_subspaces": 5,
    "n_fit": 5000,
    "optimised": {"steps": 200, "batch_size": 32},
    "sensitivity": {"n_resamples": 500},
    "padding": {"n_pads": [1, 2, 4, 8, 16, 32, 64], "n": 200},
    "strength": {"alphas": [i / 4 for i in range(13)], "n": 60},
}


def main(params: Params, budget: str = "") -> str:
    """`budget` full: FULL in place of the file's own figures."""
    if budget not in ("", "full"):
        raise UserError(f"science: there is no budget {budget}: say full, or nothing for that of params.yaml")
    if budget:
        params = params.model_copy(update={"science": Science.model_validate(params.science.model_dump() | FULL)})
    use_transformers(params)
    from safetensors.torch import load_file

    from refusal.analysis import geometry, strength
    from refusal.analysis.mediation import mediation
    from refusal.method.activations_file import read_activations
    from refusal.method.select import layer_scores
    from refusal.method.subspaces import spans
    from stages.study import BEHAVIOUR, load_study

    s, study = params.science, load_study(params, params.science)
    kept = kept_rows(read_jsonl(BEHAVIOUR))
    study.activations = {m: read_activations(Path(f"data/activations/{m}.safetensors"), kept) for m in params.activations.methods}
    score = layer_scores(read_json(METRICS / "judge.json"), spans(params.sweep, study.layers))
    truth = load_file(TRUTH)["direction"] if TRUTH.is_file() else None

    metrics: dict[str, Any] = {"layer": study.layer, "alpha": study.rank_1["alpha"], "sites": params.ablation.sites}
    table, arms = mediation(study, truth, score)
    metrics |= table | {"spectrum": geometry.spectra(study), "zero": geometry.origins(study), "monitor": geometry.monitor(study)}
    plots = {"arms": arms, "zero": [{"layer": i, **row} for i, row in enumerate(metrics["zero"]) if row]}
    metrics |= dict.fromkeys(("addition", "sensitivity", "positions", "padding", "collapse_alpha"))
    if s.sensitivity:
        metrics["sensitivity"], plots["sensitivity"] = geometry.sensitivity(study, s.sensitivity.n_resamples)
    if s.padding:
        metrics["positions"], metrics["padding"] = geometry.positions_and_padding(study, s.padding)
        plots |= {name: metrics[name] for name in ("padding", "positions")}
    if s.strength:
        metrics["addition"] = strength.additions(study)
        metrics["collapse_alpha"], plots["alphas"] = strength.strength(study, s.strength)
    name = f"science_{budget}" if budget else "science"
    write_json(METRICS / f"{name}.json", metrics)
    for plot, rows in plots.items():
        write_text(PLOTS / name / f"{plot}.csv", csv_text(rows))
    v, random = metrics["verdict"], metrics["controls"]["random_1"]["compliance"]
    best = f" by {v['by']}" if v["by"] else f" ({v['reason']})"
    return (
        f"verdict {v['verdict']}{best}; compliance on test: "
        + "".join(f"{name} {metrics['arms'][name]['compliance']:.2f}, " for name in ("rank_1", v["best_subspace"]) if name)
        + f"random {random:.2f}"
    )


stage(main)
