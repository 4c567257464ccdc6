"""What a run will take, counted from its parameters before anything is computed: forward passes, tokens, judge calls, disk.

A *forward pass* is one prompt or document through the model once, or one new token of it: batches change how long that takes,
not how much there is. New tokens are counted as if every completion were as long as it may be, so a run takes less.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from refusal.analysis.benchmark import TASKS, packaged, tasks_of
from refusal.analysis.candidates import RANKS
from refusal.io.params import Params
from refusal.lm.architecture import Architecture

# (documents, requests a document, tokens a request) of the write-up's tasks. Documents: the split that lm-eval's task files
# score, as the hub's dataset cards give their sizes. The other two were measured on 200 rows of each with Qwen's tokenizer.
STANDARD = {
    "arc_easy": (2376, 4.0, 32.2),
    "arc_challenge": (1172, 4.0, 35.9),
    "boolq": (3270, 2.0, 144.9),
    "hellaswag": (10042, 4.0, 43.3),
    "piqa": (1838, 2.0, 35.8),
    "truthfulqa_mc1": (817, 5.1, 179.4),
    "winogrande": (1267, 2.0, 22.1),
}
COPIES = 2  # of each output: the workspace's and DVC's cache's (one, where the file system shares blocks)


@dataclass(frozen=True)
class Size:
    """What is known of a model before its weights are there. `n_bytes`: its weight files."""

    n_parameters: int
    n_bytes: int
    architecture: Architecture
    downloaded: int  # bytes still to fetch


@dataclass(frozen=True)
class Prompts:
    """How many prompts there are by `<split>.<harmful, safe or unrelated>` (the organism's `facts` too), and their tokens in the
    model's chat format."""

    n: Mapping[str, int]
    tokens: Mapping[str, int]


@dataclass(frozen=True)
class Step:
    """One stage's share. `calls`: requests to an endpoint that may cost money; `tokens` and `passes` None where unknown."""

    stage: str
    passes: int | None = 0
    tokens: int | None = 0
    calls: int = 0
    n_bytes: int = 0
    note: str = ""


def steps(params: Params, size: Size, prompts: Prompts) -> list[Step]:
    """The stages that cost something, in the pipeline's order.

    `passes` and `tokens` are at most what the stage computes, and just that where every completion runs to
    `sweep.max_new_tokens` and every layer but 0 has a direction; `calls` at most, since equal completions are asked about once.
    """
    s, n, t = params.sweep, prompts.n, prompts.tokens
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[params.model.dtype]
    n_layers, new = size.architecture.n_layers, params.generation.max_new_tokens

    def some(sets: Sequence[str], arms: int, at_most: int | None) -> tuple[int, int]:
        """(rows, tokens) of at most so many prompts of each set, by so many arms."""
        rows = {name: n[name] if at_most is None else min(at_most, n[name]) for name in sets}
        return arms * sum(rows.values()), arms * sum(t[name] * rows[name] // max(1, n[name]) for name in sets)

    def completed(sets: Sequence[str], arms: int = 1, at_most: int | None = None) -> tuple[int, int]:
        """(passes, tokens) of greedy completions: one pass for all of a prompt but its last token, then one a new token."""
        rows, tokens = some(sets, arms, at_most)
        return rows * (1 + new), tokens + rows * (new - 1)

    def read(sets: Sequence[str], arms: int = 1, answers: int = 0, at_most: int | None = None) -> tuple[int, int]:
        """(passes, tokens) of texts read once, with `answers` tokens after each."""
        rows, tokens = some(sets, arms, at_most)
        return rows, tokens + rows * answers

    def total(*parts: tuple[int, int]) -> tuple[int, int]:
        return sum(p for p, _ in parts), sum(tokens for _, tokens in parts)

    organism = params.model.id == "organism"
    collected = [f"{split}.{part}" for split in ("train", "val") for part in ("harmful", "safe", "unrelated")]
    layers = n_layers - 1 if s.layers is None else len(s.layers)  # layer 0 has no direction where the last token is the same
    cells = 1 + s.n_random + layers * (1 + len(s.alphas))
    arms = 4 + s.n_random
    test = ["test.harmful", "test.safe"]
    passes = {
        "model": total(completed(["val.harmful", "val.safe"]), completed(["val.harmful", "facts"]) if organism else (0, 0)),
        # Batched computes what all prompts begin with by itself, once.
        "activations": total(read(collected, len(params.activations.methods)), (int("batched" in params.activations.methods), 0)),
        "sweep": completed(["val.harmful"], cells),
        # Baseline, run time, weights, harmless difference and random directions; addition; then the cost on harmless text of
        # each of these and of every alpha, beside the base model twice; and the identity, which is two.
        "evaluate": total(
            completed(test, arms),
            completed(["test.safe"]),
            completed(["test.unrelated"]),
            read(["test.unrelated"], 1 + arms + len(s.alphas) + 2 * params.orthogonalize.include_embedding, new),
        ),
    }
    # The science stage: every arm on val, one of each estimator on test, controls; what each costs; then its other sections.
    b, defined = params.science, n_layers - 1
    alphas, pads = b.strength.alphas if b.strength else [], b.padding.n_pads if b.padding else []
    affine, planted = params.ablation.sites == "resid_pre", organism and params.organism.kind == "planted"
    several = 2 * len(RANKS) + 1 + planted * (1 + defined)  # beside the planted one, each layer's less its part along it
    on_val, on_test = 2 + (4 + affine) * defined + 1 + several, 2 + defined + 4 + affine + several
    n_controls = 1 + params.science.n_random + len(RANKS) * b.n_subspaces
    pairs, both = ["train.harmful", "train.safe"], ["train.harmful", "train.safe", "val.harmful", "val.safe"]
    batch = some(pairs, 1, b.optimised.batch_size)
    judged = [  # completions that a judge sees: prompts, arms, and at most how many of them
        (["val.harmful"], on_val, b.n_val),
        (["test.harmful"], on_test, b.n_test),
        (["test.harmful"], n_controls, b.n_control),
        (["test.safe"], 4 + 6 * bool(alphas), b.n_test),
        (["test.harmful"], 4 * len(alphas), b.strength.n if b.strength else 0),
    ]
    passes["science"] = total(
        (3 * b.optimised.steps * batch[0] // 2, 3 * b.optimised.steps * batch[1] // 2),
        *(completed(*arms) for arms in judged),
        completed(["test.unrelated"], 1, b.n_harmless),
        read(["test.unrelated"], 1 + on_test + 2 + len(RANKS) + (4 + 4 * len(alphas) if alphas else 0), new, b.n_harmless),
        read(test),
        read(both if b.padding else [], 1, 0, b.padding.n if b.padding else 0),
        read(pairs if b.padding else [], 2 * (len(pads) + 1), max(pads, default=0), b.padding.n if b.padding else 0),
    )
    checkpoints = params.select.top + 1
    tasks = tasks_of(params.benchmark.suite)
    documents = [_documents(task, params.benchmark.limit) for task in tasks]
    unknown = [task for task, found in zip(tasks, documents, strict=True) if found is None]
    fetched = "" if all(map(packaged, tasks)) else " from the hub, unless they are kept already"
    scored = [found for found in documents if found is not None]
    val_calls = test_calls = science_calls = 0
    if params.judge.kind == "llm":
        val_calls = cells * n["val.harmful"]
        test_calls = arms * (n["test.harmful"] + n["test.safe"]) + n["test.safe"]
        science_calls = sum(some(*arms)[0] for arms in judged)
    p = params.prompts
    written = sum(
        -(-(count or 0) // p.api.pairs_per_request)
        for source, count in ((p.source, p.n_pairs), (p.unrelated, p.n_unrelated))
        if source == "api"
    )
    # DVC's cache and the workspace; the resume store keeps activations too.
    kept = passes["activations"][0] * n_layers * size.architecture.d_model * width
    return [
        Step("prompts", calls=written, note="at least; more where rows are refused" if written else ""),
        Step(
            "model",
            *passes["model"],
            n_bytes=size.downloaded + (2 if organism else 1) * COPIES * size.n_bytes,
            note=f"trains {params.organism.phase_1.steps} + {params.organism.phase_2.steps} steps first" if organism else "",
        ),
        Step("activations", *passes["activations"], n_bytes=(COPIES + 1) * kept),
        Step("sweep", *passes["sweep"], note=f"{cells} cells x {n['val.harmful']} val prompts"),
        Step("judge", calls=val_calls),
        Step(
            "orthogonalize",
            n_bytes=0 if params.orthogonalize.format == "lora" else COPIES * checkpoints * size.n_bytes,
            note=f"{checkpoints} {'adapters of kilobytes' if params.orthogonalize.format == 'lora' else 'checkpoints'}",
        ),
        Step("evaluate", *passes["evaluate"], calls=test_calls),
        Step("science", *passes["science"], calls=science_calls, note=""),
        Step(
            "benchmark",
            None if unknown else round(sum(docs * requests for docs, requests, _ in scored) * (checkpoints + 1)),
            None if unknown else round(sum(docs * r * tokens for docs, r, tokens in scored) * (checkpoints + 1)),
            note=f"documents of {', '.join(unknown)} are not known yet"
            if unknown
            else f"{sum(docs for docs, _, _ in scored):,} documents{fetched} x {checkpoints + 1} checkpoints",
        ),
    ]


def _documents(task: str, limit: int | None) -> tuple[int, float, float] | None:
    """(documents, requests a document, tokens a request) of a task, None for one that only lm-eval knows."""
    if packaged(task):
        rows = [json.loads(line) for line in (TASKS / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()]
        # About a token a word of these: one in a thousand of the run's.
        words = sum(len(row["question"].split()) + 1 for row in rows) / len(rows)
        found: tuple[int, float, float] = (len(rows), float(len(rows[0]["choices"])), words)
    elif task in STANDARD:
        found = STANDARD[task]
    else:
        return None
    return (min(found[0], limit or found[0]), *found[1:])
