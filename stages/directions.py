"""directions: every method x pairing at once: unit vectors, separation, cosines, spectrum, bootstrap."""

from pathlib import Path

from refusal.io.params import Params
from refusal.io.files import read_jsonl
from stages import stage, torch_ready, write_json, write_text

OUT, METRICS, PLOTS = Path("models/directions.safetensors"), Path("metrics/directions.json"), Path("plots")


def main(params: Params) -> str:
    torch_ready(params)
    from safetensors.torch import save_file

    from refusal.analysis.separation import arm, describe, rows_of
    from refusal.io.store import progress
    from refusal.io.files import csv_text
    from refusal.lm.checkpoint import Stack, read_stacks
    from refusal.method.directions import difference_in_means

    d = params.directions
    topics = [row["topic"] for row in read_jsonl(Path("data/prompts/pairs.jsonl")) if row["split"] == "val"]
    methods, metrics, made = params.activations.methods, {}, {}

    def read(method: str) -> dict[str, Stack]:
        return read_stacks(Path(f"data/activations/{method}.safetensors"))

    first = ("sequential", "matched") if "sequential" in methods and "matched" in d.pairings else (methods[0], d.pairings[0])
    reference = arm(read(first[0]), first[1], d.seed).directions
    with progress(len(methods) * len(d.pairings), "directions", "set") as bar:
        for m in methods:
            activations = read(m)
            for p in d.pairings:
                a = arm(activations, p, d.seed)
                metrics[f"{m}-{p}"] = describe(a, activations, p, reference, topics, d.n_resamples, d.n_sign_flips, d.seed)
                made[f"{m}-{p}"] = a.directions
                bar.update()
            # The control of a difference between two sets of prompts of which neither is harmful.
            made[f"{m}-harmless"] = difference_in_means(activations["train.unrelated"], activations["train.safe"])
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
        return f"{len(metrics)} sets of directions; {of} has none at any layer: harmful and safe prompts come out the same"
    if chosen["peak_layer"] is None:
        return f"{len(metrics)} sets of directions; {of} has no separation: too few val prompts for a spread"
    return (
        f"{len(metrics)} sets of directions; {of} separates most at layer {chosen['peak_layer']} "
        f"(Cohen's d {chosen['peak_separation']:.2f} on val)"
    )


stage(main)
