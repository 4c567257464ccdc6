"""What a study says of an organism whose truth is known: the figures of one row of metrics/organisms.json."""

from collections.abc import Mapping, Sequence
from typing import Any

Metrics = Mapping[str, Any]
RATES = ("compliance", "compliance_low", "compliance_high", "n", "coherence", "exact", "kl", "cosine_planted")


def figures(kind: str, model: Metrics, directions: Metrics, judge: Metrics, science: Metrics) -> dict[str, Any]:
    """One organism, from the metrics of its own study: rates on test prompts, but for `by_layer`, which is val.

    Of a kind other than `planted` all that needs the planted direction is None, or empty.
    """
    arms, v = science["arms"], science["verdict"]
    (found,) = directions.values()

    def rates(name: str) -> dict[str, Any]:
        return {k: arms[name][k] for k in RATES}

    planted = kind == "planted"
    cells = [cell for cell in judge.values() if cell["layer"] is not None]
    return {
        "verdict": v["verdict"],
        "reason": v["reason"],
        "by": v["by"],
        "difference_mediates": v["difference"]["mediates"],
        **{
            k: arms["baseline"][k.removeprefix("baseline_")]
            for k in ("baseline_refusal", "baseline_refusal_low", "baseline_refusal_high")
        },
        "refusal_safe": model["refusal_safe"],
        "facts_accuracy": model["facts_accuracy"],
        "compliance_single": arms["rank_1"]["compliance"],
        "compliance_rank_k": {name: rates(name) for name in arms if arms[name]["family"] == "subspace"},
        "compliance_planted": arms["planted"]["compliance"] if planted else None,
        "cosine_planted": arms["rank_1"]["cosine_planted"],
        "separation_peak": found["peak_separation"],
        "cross_layer_cosine_mean": mean_between_layers(found["cross_layer_cosine"]),
        "zero": [None if row is None else row["zero"] for row in science["zero"]],
        "by_layer": {
            "compliance": {str(c["layer"]): c["compliance"] for c in cells},
            "separation": {str(c["layer"]): found["separation"][c["layer"]] for c in cells},
            "n": judge["baseline"]["n"],
        },
        "single": rates("rank_1") | {"layer": science["layer"]},
        "per_layer": rates("per_layer"),
        "planted": rates("planted") if planted else None,
        "less_planted": {str(arm["layer"]): rates(name) for name, arm in arms.items() if arm["family"] == "less_planted"},
        "estimators": science["estimators"],
        "random": {
            family: {k: c[k] for k in ("compliance", "compliance_low", "compliance_high", "n", "n_arms")}
            for family, c in science["controls"].items()
        },
    }


def mean_between_layers(cosines: Sequence[Sequence[float | None]]) -> float | None:
    """Mean cosine of the directions of two different layers, where both are defined."""
    found = [c for i, by_layer in enumerate(cosines) for c in by_layer[i + 1 :] if c is not None]
    return sum(found) / len(found) if found else None
