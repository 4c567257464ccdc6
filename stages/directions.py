"""directions: every method x pairing at once: unit vectors, separation, cosines, spectrum, bootstrap."""

from pathlib import Path

from refusal.params import Params
from refusal.tables import read_jsonl
from stages import stage, torch_ready, write_json, write_text

OUT, METRICS, PLOTS = Path("models/directions.safetensors"), Path("metrics/directions.json"), Path("plots")


def main(params: Params) -> str:
    torch_ready(params)
    from safetensors.torch import load_file, save_file

    from refusal.directions import difference_in_means
    from refusal.geometry import arm, describe, rows_of
    from refusal.store import progress
    from refusal.tables import csv_text

    d = params.directions
    topics = [row["topic"] for row in read_jsonl(Path("data/prompts/pairs.jsonl")) if row["split"] == "val"]
    activations = {m: load_file(Path(f"data/activations/{m}.safetensors")) for m in params.activations.methods}
    arms = {(m, p): arm(activations[m], p, d.seed) for m in activations for p in d.pairings}
    reference = arms.get(("sequential", "matched"), next(iter(arms.values()))).directions
    metrics = {}
    with progress(len(arms), "directions", "set") as bar:
        for (m, p), a in arms.items():
            metrics[f"{m}-{p}"] = describe(a, activations[m], p, reference, topics, d.n_resamples, d.n_sign_flips, d.seed)
            bar.update()
    made = {f"{m}-{p}": a.directions for (m, p), a in arms.items()}
    # The control of a difference between two sets of prompts of which neither is harmful.
    made |= {f"{m}-harmless": difference_in_means(a["train.unrelated"], a["train.safe"]) for m, a in activations.items()}
    tensors = {
        f"{of}.{name}": getattr(found, name).contiguous()
        for of, found in made.items()
        for name in ("difference", "unit", "defined", "safe_mean")
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT)
    write_json(METRICS, metrics)
    for name, rows in rows_of(metrics).items():
        write_text(PLOTS / f"{name}.csv", csv_text(rows))
    chosen = metrics[f"{params.sweep.method}-{params.sweep.pairing}"]
    of = f"{params.sweep.method}-{params.sweep.pairing}"
    if not chosen["layers"]:
        return f"{len(arms)} sets of directions; {of} has none at any layer: harmful and safe prompts come out the same"
    if chosen["peak_layer"] is None:
        return f"{len(arms)} sets of directions; {of} has no separation: too few val prompts for a spread"
    return (
        f"{len(arms)} sets of directions; {of} separates most at layer {chosen['peak_layer']} "
        f"(Cohen's d {chosen['peak_separation']:.2f} on val)"
    )


stage(main)
