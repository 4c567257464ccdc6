"""evaluate: rank_1 at run time and as weights, on test prompts, compared with the baseline and the controls."""

from pathlib import Path

from refusal.io.files import csv_text, write_jsonl
from refusal.io.params import Params
from stages import read_json, stage, use_transformers, write_json, write_text

OUT, METRICS, PLOT = Path("data/evaluated"), Path("metrics/evaluate.json"), Path("plots/capability.csv")


def main(params: Params) -> str:
    use_transformers(params)
    from refusal.analysis.evaluation import evaluate
    from refusal.lm.load import load_lm
    from stages.study import load_study

    study = load_study(params, params.evaluate)
    written = read_json(Path("metrics/orthogonalize.json"))
    edited = {
        arm: load_lm(Path("models/ablated") / written[rank]["name"], **params.model.loading)
        for arm, rank in (("orthogonalized", "rank_1"), ("random_weights", "random"))
    }
    metrics, rows, curve = evaluate(study, edited)
    write_jsonl(OUT / "completions.jsonl", rows)
    write_json(METRICS, metrics)
    write_text(PLOT, csv_text(curve))
    r, o = metrics["runtime"], metrics["orthogonalized"]
    return (
        f"compliance on test: baseline {metrics['baseline']['compliance']:.2f}, run time {r['compliance']:.2f} "
        f"[{r['compliance_low']:.2f}, {r['compliance_high']:.2f}], weights {o['compliance']:.2f} "
        f"[{o['compliance_low']:.2f}, {o['compliance_high']:.2f}], random {metrics['random']['compliance']:.2f}; "
        f"n = {len(study.pairs['test'])}"
    )


stage(main)
