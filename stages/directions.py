"""directions: every method x pairing at once: unit vectors, separation, cosines, spectrum, bootstrap."""

from pathlib import Path
from typing import Any

from refusal.io.files import csv_text, read_jsonl
from refusal.io.params import Params
from refusal.io.prompts import is_paired, kept_rows, resolve_pairing, safe_rows
from refusal.io.sweep import SINGULAR_VECTORS
from stages import stage, use_torch, write_json, write_text

OUT, METRICS, PLOTS = Path("models/directions.safetensors"), Path("metrics/directions.json"), Path("plots")
BEHAVIOUR = Path("data/behaviour/train.jsonl")


def main(params: Params) -> str:
    use_torch(params)
    from safetensors.torch import save_file

    from refusal.analysis.ceilings import categories, ceiling_to_all, ceilings, describe_noise
    from refusal.analysis.estimated import contrast_by, without_noise_of_means
    from refusal.analysis.separation import cosine_to_all, describe, harmless_sets, plot_rows
    from refusal.analysis.subspaces import singular_vectors
    from refusal.io.progress import progress
    from refusal.method.activations_file import read_activations
    from refusal.method.robust_means import estimate

    d, methods = params.directions, params.activations.methods
    of_means = d.estimator == "mean"
    pairs, unrelated = (read_jsonl(Path(f"data/prompts/{name}.jsonl")) for name in ("pairs", "unrelated"))
    paired, safe = is_paired(pairs), safe_rows(pairs, unrelated)
    topics = [row["topic"] for rows in (pairs, safe) for row in rows if row["split"] == "val"]
    pairings = [pairing for pairing in d.pairings if paired or pairing == "unrelated"]
    s, names = params.sweep, [f"{method}-{pairing}" for method in methods for pairing in pairings]
    swept = f"{s.method}-{resolve_pairing(s.pairing, s.method, names)}"  # before anything that takes time
    behaviour = read_jsonl(BEHAVIOUR)
    kept, left_out = kept_rows(behaviour), not all(row["kept"] for row in behaviour)
    train = [row for row in pairs if row["split"] == "train"]
    groups = [train[i]["category"] for i in kept["train.harmful"]]
    files = {str(method): Path(f"data/activations/{method}.safetensors") for method in methods}
    activations = {method: read_activations(path, kept) for method, path in files.items()}
    first = "sequential" if "sequential" in methods else methods[0], "matched" if "matched" in pairings else pairings[0]
    reference = contrast_by(d.estimator, activations[first[0]], first[1], d.seed)
    metrics: dict[str, Any] = {f"{method}-{pairing}": None for method in methods for pairing in d.pairings}
    directions, singular = {}, {}
    with progress(len(methods) * len(pairings), "directions", "set") as bar:
        for method, sets in activations.items():
            for pairing in pairings:
                name, of = f"{method}-{pairing}", contrast_by(d.estimator, sets, pairing, d.seed)
                metrics[name] = describe(of, sets, topics, reference.directions, d.n_resamples, d.n_sign_flips, d.seed)
                metrics[name] = without_noise_of_means(metrics[name] | describe_noise(of, reference, d.seed), d.estimator)
                # All activations are read once more only where some prompts are left out.
                everyone = contrast_by(d.estimator, read_activations(files[method]), pairing, d.seed) if left_out else of
                metrics[name]["cosine_to_all"] = cosine_to_all(of, everyone)
                metrics[name]["cosine_to_all_ceiling"] = ceiling_to_all(of, everyone) if of_means else None
                if name == swept:
                    metrics[name]["categories"] = categories(of, groups, d.n_resamples, d.seed) if of_means else None
                directions[name] = of.directions
                if pairing == "matched":
                    vectors = singular_vectors(of.harmful, of.safe, of.directions.layers, SINGULAR_VECTORS)
                    singular[f"{name}.singular"] = vectors
                bar.update()
            # The control: the difference between two sets of prompts of which neither is harmful.
            directions[f"{method}-harmless"] = estimate(*harmless_sets(sets), d.estimator, paired=False)
    described = {name: m for name, m in metrics.items() if m is not None}
    for m in described.values():
        m["cosine_to_sequential_ceiling"] = ceilings(m["reliability"], described["-".join(first)]["reliability"])
    tensors = {f"{name}.{key}": tensor.contiguous() for name, of in directions.items() for key, tensor in vars(of).items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors | singular, OUT)
    write_json(METRICS, metrics)
    for plot, rows in plot_rows(described).items():
        write_text(PLOTS / f"{plot}.csv", csv_text(rows))
    return _headline(described, swept)


def _headline(metrics: dict[str, dict[str, Any]], name: str) -> str:
    selected, n = metrics[name], f"{len(metrics)} sets of directions"
    if not selected["layers"]:
        return f"{n}; {name} has none at any layer: harmful and safe prompts come out the same"
    if selected["peak_layer"] is None:
        return f"{n}; {name} has no separation: too few val prompts for a spread"
    return f"{n}; {name} separates most at layer {selected['peak_layer']} (Cohen's d {selected['peak_separation']:.2f} on val)"


stage(main)
