"""directions: every method x pairing at once: unit vectors, separation, cosines, spectrum, bootstrap."""

from pathlib import Path
from typing import Any

from refusal.io.files import csv_text, read_jsonl
from refusal.io.params import Params
from stages import stage, use_torch, write_json, write_text

OUT, METRICS, PLOTS = Path("models/directions.safetensors"), Path("metrics/directions.json"), Path("plots")


def main(params: Params) -> str:
    use_torch(params)
    from safetensors.torch import save_file

    from refusal.analysis.separation import contrast, describe, plot_rows
    from refusal.io.store import progress
    from refusal.method.activations_file import read_activations
    from refusal.method.directions import difference_in_means

    d, methods = params.directions, params.activations.methods
    topics = [row["topic"] for row in read_jsonl(Path("data/prompts/pairs.jsonl")) if row["split"] == "val"]
    activations = {str(method): read_activations(Path(f"data/activations/{method}.safetensors")) for method in methods}
    first = ("sequential", "matched") if "sequential" in methods and "matched" in d.pairings else (methods[0], d.pairings[0])
    reference = contrast(activations[first[0]], first[1], d.seed).directions
    metrics, directions = {}, {}
    with progress(len(methods) * len(d.pairings), "directions", "set") as bar:
        for method, sets in activations.items():
            for pairing in d.pairings:
                name, of = f"{method}-{pairing}", contrast(sets, pairing, d.seed)
                metrics[name] = describe(of, sets, topics, reference, d.n_resamples, d.n_sign_flips, d.seed)
                directions[name] = of.directions
                bar.update()
            # The control: the difference between two sets of prompts of which neither is harmful.
            directions[f"{method}-harmless"] = difference_in_means(sets["train.unrelated"], sets["train.safe"])
    tensors = {f"{name}.{key}": tensor.contiguous() for name, of in directions.items() for key, tensor in vars(of).items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, OUT)
    write_json(METRICS, metrics)
    for plot, rows in plot_rows(metrics).items():
        write_text(PLOTS / f"{plot}.csv", csv_text(rows))
    return _headline(metrics, f"{params.sweep.method}-{params.sweep.pairing}")


def _headline(metrics: dict[str, dict[str, Any]], name: str) -> str:
    selected, n = metrics[name], f"{len(metrics)} sets of directions"
    if not selected["layers"]:
        return f"{n}; {name} has none at any layer: harmful and safe prompts come out the same"
    if selected["peak_layer"] is None:
        return f"{n}; {name} has no separation: too few val prompts for a spread"
    return f"{n}; {name} separates most at layer {selected['peak_layer']} (Cohen's d {selected['peak_separation']:.2f} on val)"


stage(main)
