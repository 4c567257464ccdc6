"""evaluate: rank_1 at run time and as weights, on test prompts, beside the baseline and the controls."""

from itertools import chain
from pathlib import Path
from typing import Any

from refusal.io.params import Params, Sites
from refusal.io.files import read_jsonl, write_jsonl
from stages import STORE, model_ready, read_json, stage, write_json, write_text

BASE, OUT, METRICS, PLOT = (
    Path("models/base"),
    Path("data/evaluated"),
    Path("metrics/evaluate.json"),
    Path("plots/capability.csv"),
)


def main(params: Params) -> str:
    model_ready(params)
    from refusal.analysis.harmless_kl import Edited, costs
    from refusal.io.store import Store
    from refusal.io.files import csv_text
    from refusal.judges.panel import judge_with
    from refusal.judges.verdicts import difference, mean, present, rate, summary
    from refusal.judges.verdicts import row as verdict_row
    from refusal.lm.architecture import architecture_of
    from refusal.lm.load import encode_chats, load_model, load_tokenizer, stop_ids, weights_hash
    from refusal.lm.memory import rows_at_once
    from refusal.method.arms import Arm, edit, fingerprint
    from refusal.method.directions import read_directions, select_directions
    from refusal.method.select import checked
    from refusal.method.sweep import BASELINE, Cell, complete, grid

    s, e, j = params.sweep, params.evaluate, params.judge
    selected = checked(read_json(Path("metrics/select.json")))["rank_1"]
    directions = read_directions(Path("models/directions.safetensors"))
    found, harmless_difference = (select_directions(directions, s.method, pairing) for pairing in (s.pairing, "harmless"))
    layer, alpha = selected["layer"], selected["alpha"]
    cells = grid(found, harmless_difference, [layer], s.alphas, s.n_random, s.seed, affine=params.ablation.kind == "affine")
    runtime = next(cell for cell in cells if cell.alpha == alpha and cell.layer == layer)
    controls = {kind: [cell for cell in cells if cell.name.startswith(f"{kind}_")] for kind in ("random", "harmless")}
    controls = {kind: members for kind, members in controls.items() if members}

    organism = params.model.id == "organism"
    test = [row for row in read_jsonl(Path("data/prompts/pairs.jsonl")) if row["split"] == "test"]
    harmless = [row for row in read_jsonl(Path("data/prompts/unrelated.jsonl")) if row["split"] == "test"]
    prompts = [row[half] for half in ("harmful", "safe") for row in test]
    expected = [row[f"{half}_answer"] for half in ("harmful", "safe") for row in test]
    base, tokenizer, store = (
        load_model(BASE, params.model.dtype, params.model.device),
        load_tokenizer(BASE),
        Store(STORE / "store.sqlite"),
    )
    edited_folder = Path("models/ablated") / selected["name"]
    edited = load_model(edited_folder, params.model.dtype, params.model.device)
    size = rows_at_once(params.generation.batch_size, base, params.generation.max_new_tokens + 1, "sweep")
    stops, pad_id = stop_ids(base, tokenizer), tokenizer.pad_token_id
    hashes = {id(base): weights_hash(BASE), id(edited): weights_hash(edited_folder)}

    def answer(model: Any, texts: list[str], which: list, label: str, addition: Any = None) -> dict[str, list[list[int]]]:
        return complete(
            model,
            hashes[id(model)],
            encode_chats(tokenizer, texts, params.model.system_prompt, params.generation.max_new_tokens),
            which,
            params.ablation.sites,
            stops,
            pad_id,
            params.generation.max_new_tokens,
            size,
            store,
            label,
            addition,
        )

    tokens = answer(base, prompts, [BASELINE, runtime, *chain(*controls.values())], "test: run time")
    by_arm = {
        "baseline": [tokens["baseline"]],
        "runtime": [tokens[runtime.name]],
        **{kind: [tokens[cell.name] for cell in members] for kind, members in controls.items()},
        "orthogonalized": [answer(edited, prompts, [BASELINE], "test: weights")["baseline"]],
    }
    added = answer(base, [row["safe"] for row in test], [BASELINE], "test: addition", (found["difference"][layer], layer))[
        "baseline"
    ]

    judge = judge_with(j, params.endpoint, store)  # the sweep's judge
    metrics: dict[str, Any] = {"layer": layer, "alpha": alpha, "name": selected["name"]}
    rows, n = [], len(test)
    harmful_of: dict[str, list] = {}
    topics = [row["topic"] for row in test]
    for arm, runs in by_arm.items():
        texts = [tokenizer.batch_decode(run, skip_special_tokens=True) for run in runs]
        judged = [judge(prompts, run, f"judge: {arm}", organism) for run in texts]
        on_harmful, on_safe = ([v for run in judged for v in run[half]] for half in (slice(n), slice(n, None)))
        metrics[arm] = summary(on_harmful, topics * len(runs), e.n_resamples, e.seed, f"{arm}, harmful prompts", j.allow_missing)
        metrics[arm] |= {f"refusal_harmful{end}": metrics[arm][f"refusal{end}"] for end in ("", "_low", "_high")}
        metrics[arm] |= rate("refusal_safe", [v.refusal for _, v in present(on_safe, f"{arm}, safe prompts", j.allow_missing)])
        for name, half in (("exact", slice(n)), ("exact_safe", slice(n, None))):
            right = [text.strip() == answer_ for run in texts for text, answer_ in zip(run[half], expected[half], strict=True)]
            metrics[arm] |= rate(name, right) if organism and None not in expected else {name: None}
        harmful_of[arm] = judged[0][:n]
        if arm not in controls:
            rows += [
                {
                    "arm": arm,
                    "id": test[i % n]["id"],
                    "category": test[i % n]["category"],
                    "half": "harmful" if i < n else "safe",
                    "prompt": prompts[i],
                    "completion": texts[0][i],
                    **verdict_row(judged[0][i]),
                }
                for i in range(2 * n)
            ]
    verdicts_added = judge(prompts[n:], tokenizer.batch_decode(added, skip_special_tokens=True), "judge: addition", organism)
    judged_added = [v for _, v in present(verdicts_added, "addition, safe prompts", j.allow_missing)]
    metrics["addition"] = {
        **rate("refusal_safe", [v.refusal for v in judged_added]),
        "n": len(judged_added),
        "n_missing": n - len(judged_added),
        "n_degenerate": sum(v.label == "degenerate" for v in judged_added),
    }
    for arm in ("runtime", "orthogonalized"):
        metrics[arm] |= difference(harmful_of[arm], harmful_of["baseline"], topics, e.n_resamples, e.seed)

    # The cost on harmless text: the base model's own answers to unrelated safe prompts.
    safe_ids = encode_chats(tokenizer, [row["safe"] for row in harmless], params.model.system_prompt)
    answers = answer(base, [row["safe"] for row in harmless], [BASELINE], "harmless answers")["baseline"]
    kept = [i for i, a in enumerate(answers) if a]
    clusters = [harmless[i]["topic"] for i in kept]

    def priced(edited_of: dict[str, Edited], of: Any, label: str) -> dict[str, tuple[list[float], list[float]]]:
        if not kept:
            return {}
        key, heads, tails = [hashes[id(of)], *runs_on], [safe_ids[i] for i in kept], [answers[i] for i in kept]
        return costs(edited_of, of, heads, tails, pad_id, size, store, key, label)

    def figures(values: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
        """Means over all texts of all these cells."""
        if not kept:
            return {"cross_entropy": None, "kl": None}
        entropies, divergences = (list(chain(*which)) for which in zip(*values, strict=True))
        rest = (clusters * len(values), e.n_resamples, e.seed)
        return mean("cross_entropy", entropies, *rest, bounds=None) | mean("kl", divergences, *rest, bounds=None)

    def ablated(cell: Cell, sites: Sites) -> Edited:
        arm = Arm(cell.name, "cell", cell=cell)
        return Edited(base, [hashes[id(base)], *fingerprint(arm, sites)], edit(arm, sites))

    runs_on = [params.model.dtype, params.model.device]
    # What is the same whatever directions were found has jobs of its own: another study of the model finds it in the store.
    fixed, ours = ({c.name: ablated(c, params.ablation.sites) for c in cells if c.fixed is apart} for apart in (True, False))
    price = priced(fixed, base, "cost: controls")
    price |= priced(ours | {"orthogonalized": Edited(edited, [hashes[id(edited)]])}, base, "cost")
    metrics["n_harmless"] = len(kept)
    for arm, names in {
        "baseline": ["baseline"],
        "runtime": [runtime.name],
        "orthogonalized": ["orthogonalized"],
        **{kind: [cell.name for cell in members] for kind, members in controls.items()},
    }.items():
        metrics[arm] |= figures([price[name] for name in names if kept])
    # Edited weights equal run-time ablation at `writes` where no norm stands between writer and stream: by how much it fails.
    metrics["identity"] = {"norm_after_writer": architecture_of(base.config).norm_after_writer, "kl": None}
    if params.orthogonalize.include_embedding:
        writes = ablated(Cell("writes", layer, alpha, found["unit"][layer]), "writes")
        metrics["identity"] |= figures([*priced({"writes": writes}, edited, "cost: identity").values()])
    swept = [BASELINE, *(cell for cell in cells if cell.layer == layer)]
    curve = [(cell.alpha, figures([price[cell.name]] if kept else [])) for cell in swept]
    OUT.mkdir(parents=True, exist_ok=True)
    write_jsonl(OUT / "completions.jsonl", rows)
    write_json(METRICS, metrics)
    write_text(PLOT, csv_text([{"layer": layer, "alpha": a, **c} for a, c in sorted(curve, key=lambda row: row[0])]))
    r, o = metrics["runtime"], metrics["orthogonalized"]
    return (
        f"compliance on test: baseline {metrics['baseline']['compliance']:.2f}, run time {r['compliance']:.2f} "
        f"[{r['compliance_low']:.2f}, {r['compliance_high']:.2f}], weights {o['compliance']:.2f} "
        f"[{o['compliance_low']:.2f}, {o['compliance_high']:.2f}], random {metrics['random']['compliance']:.2f}; n = {n}"
    )


stage(main)
