"""What a run will take, counted from its parameters before anything is computed: forward passes, tokens, judge calls, disk.

A *forward pass* is one prompt or document through the model once, or one new token of it: batches change how long that takes,
not how much there is. New tokens are counted as if every completion were as long as it may be, so a run takes less.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from refusal.analysis.benchmark import TASKS, packaged, tasks_of
from refusal.analysis.candidates import AT_LEAST, RANKS
from refusal.analysis.edited_checkpoints import OWN_ARMS
from refusal.analysis.harmless_kl import BATCH_SIZE, FEW
from refusal.analysis.long_answers import ARMS
from refusal.io.params import Params
from refusal.lm.architecture import Architecture
from refusal.lm.batching import job_slices
from refusal.lm.gguf_writer import FORMATS
from refusal.method.bridge import N_PROMPTS
from refusal.method.first_token import DIRECTIONS_PER_JOB
from refusal.method.intake import N_PROVED, N_TOKENS
from refusal.method.subspaces import spans

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
EDITS = {"safetensors": "checkpoints", "lora": "adapters of kilobytes"}
HANDED_OUT = ("model", "behaviour", "activations", "selection", "sweep", "long_answers", "generalization")
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
    model's chat format; `safe` are the unrelated ones where prompts are not `paired`."""

    n: Mapping[str, int]
    tokens: Mapping[str, int]
    paired: bool = True


@dataclass(frozen=True)
class Step:
    """One stage's share. `calls`: requests to an endpoint that may cost money; `tokens` and `passes` None where unknown."""

    stage: str
    passes: int | None = 0
    tokens: int | None = 0
    calls: int = 0
    n_bytes: int = 0
    note: str = ""


def hours(found: Sequence[Step], runs: Sequence[Mapping[str, Any]], workers: int) -> tuple[float, float] | None:
    """(hours with one worker, with so many) that these stages take at most, None where no run has computed anything.

    `runs` are lines of the log of runs (`stage`, `tokens` computed, `seconds`, `workers`), of this model on this machine. A stage
    goes at its own rate in tokens a second and worker, where there is one, or else at that of all runs. Only the stages whose
    work is handed out whole are divided by the number of workers: of the others a part stays in one process.
    """

    def rate(of: Sequence[Mapping[str, Any]]) -> float:
        return sum(run["tokens"] for run in of) / sum(run["seconds"] * run["workers"] for run in of)

    computed = [run for run in runs if run["tokens"] and run["seconds"] > 0]
    if not computed:
        return None
    own = {step.stage: [run for run in computed if run["stage"] == step.stage] for step in found}
    each = [(step.stage in HANDED_OUT, (step.tokens or 0) / rate(own[step.stage] or computed) / 3600) for step in found]
    return sum(h for _, h in each), sum(h / workers if handed_out else h for handed_out, h in each)


class _Counts:
    """(forward passes, tokens) of what stages do with sets of these prompts, each completed to `new` tokens."""

    def __init__(self, prompts: Prompts, new: int) -> None:
        self.n, self.tokens, self.new = prompts.n, prompts.tokens, new

    def rows(self, sets: Sequence[str], times: int, at_most: int | None = None) -> tuple[int, int]:
        """(rows, tokens) of at most so many prompts of each set, so many times."""
        rows = {name: self.n[name] if at_most is None else min(at_most, self.n[name]) for name in sets}
        tokens = sum(self.tokens[name] * rows[name] // max(1, self.n[name]) for name in sets)
        return times * sum(rows.values()), times * tokens

    def completed(self, sets: Sequence[str], times: int = 1, at_most: int | None = None) -> tuple[int, int]:
        """Of greedy completions: one pass for all of a prompt but its last token, then one a new token."""
        rows, tokens = self.rows(sets, times, at_most)
        return rows * (1 + self.new), tokens + rows * (self.new - 1)

    def read(self, sets: Sequence[str], times: int = 1, more: int = 0, at_most: int | None = None) -> tuple[int, int]:
        """Of texts read once, with `more` tokens after each."""
        rows, tokens = self.rows(sets, times, at_most)
        return rows, tokens + rows * more


def _total(*parts: tuple[int, int]) -> tuple[int, int]:
    return sum(p for p, _ in parts), sum(tokens for _, tokens in parts)


def steps(params: Params, size: Size, prompts: Prompts) -> list[Step]:
    """The stages that cost something, in the pipeline's order.

    `passes` and `tokens` are at most what the stage computes, and just that where every completion runs to
    `generation.max_new_tokens` and every layer but 0 has a direction; `calls` at most, since equal completions are asked about
    once.
    """
    s, n, count, llm = params.sweep, prompts.n, _Counts(prompts, params.generation.max_new_tokens), params.judge.kind == "llm"
    n_layers, organism = size.architecture.n_layers, params.model.id == "organism"
    parts = ("harmful", "safe", "unrelated") if prompts.paired else ("harmful", "unrelated")
    collected = [f"{split}.{part}" for split in ("train", "val") for part in parts]
    kept = [f"train.{part}" for part in parts] if params.prompts.keep == "behaving" else []
    methods = params.activations.methods
    # Batched computes what all prompts begin with by itself, once.
    read = _total(count.read(collected, len(methods)), (int("batched" in methods), 0))
    width = {"float32": 4, "float16": 2, "bfloat16": 2}[params.model.dtype]
    # Layer 0 has no direction where the last token is the same. Singular vectors have no harmless difference as control.
    among, harmless = spans(s, s.layers or range(1, n_layers)), s.basis != "svd"
    cells, at_once = 1 + s.n_random + len(among) * (harmless + len(s.alphas)), 4 + harmless + s.n_random
    checkpoints, of_edit = params.select.top + 1, params.orthogonalize.format
    gguf = 2 * size.n_parameters if of_edit in FORMATS else 0
    facts = count.completed(["val.harmful", "facts"]) if organism else (0, 0)
    phases = (params.organism.phase_1.steps, params.organism.phase_2.steps)
    compared = n_layers - 1 if params.science.layers is None else len(params.science.layers)
    science, science_calls = _science(params, compared, count, prompts.paired, len({*RANKS, among[0].rank} - {1}))
    return [
        _prompts(params),
        Step(
            "model",
            *_total(count.completed(["val.harmful", "val.safe"]), facts, *_engine(count), *_intake(count)),
            n_bytes=size.downloaded + (2 if organism else 1) * COPIES * size.n_bytes,
            note=f"trains {phases[0]} + {phases[1]} steps first" if organism else "",
        ),
        Step("behaviour", *count.completed(kept), calls=llm * count.rows(kept, 1)[0]),
        # DVC's cache and the workspace; the resume store keeps activations too.
        Step("activations", *read, n_bytes=(COPIES + 1) * read[0] * n_layers * size.architecture.d_model * width),
        *_selection(params, len(among), count),
        Step("sweep", *count.completed(["val.harmful"], cells), note=f"{cells} cells x {n['val.harmful']} val prompts"),
        Step("judge", calls=llm * cells * n["val.harmful"]),
        Step(
            "orthogonalize",
            n_bytes=0 if of_edit == "lora" else COPIES * checkpoints * (size.n_bytes + gguf),
            note=f"{checkpoints} {EDITS.get(of_edit, 'checkpoints, each as GGUF too')}",
        ),
        Step(
            "evaluate",
            *_evaluate(params, at_once, count),
            calls=llm * (at_once * (n["test.harmful"] + n["test.safe"]) + n["test.safe"]),
        ),
        *_long_answers(params, prompts),
        *_generalization(params, count, llm),
        Step("science", *science, calls=llm * science_calls),
        _benchmark(params, checkpoints + 1),
        *_edits(params, count, size),
    ]


def _prompts(params: Params) -> Step:
    p = params.prompts
    sources = ((p.source, p.n_pairs), (p.unrelated, p.n_unrelated))
    written = sum(-(-(n or 0) // p.api.pairs_per_request) for source, n in sources if source == "api")
    return Step("prompts", calls=written, note="at least; more where rows are refused" if written else "")


def _selection(params: Params, layers: int, count: _Counts) -> list[Step]:
    """By the paper's rule, first tokens of val: of harmful prompts under each ablation, of harmless ones under each addition too;
    the baseline once a job."""
    if params.select.by != "paper":
        return []
    jobs = -(-layers // DIRECTIONS_PER_JOB)
    passes = _total(count.read(["val.harmful"], layers + jobs), count.read(["val.unrelated"], 2 * layers + jobs))
    return [Step("selection", *passes, note=f"{layers} directions, first tokens alone")]


def _engine(count: _Counts) -> list[tuple[int, int]]:
    """The first prompts of val read by both engines, completed with and without ablation, and the former read once more."""
    return [
        count.completed(["val.harmful"], 2, N_PROMPTS),
        count.read(["val.harmful", "val.safe"], 1, 0, N_PROMPTS),
        count.read(["val.harmful"], 1, 0, N_PROMPTS),
        count.read(["val.harmful"], 1, count.new, N_PROMPTS),
    ]


def _intake(count: _Counts) -> list[tuple[int, int]]:
    """A few prompts of val completed, and read with their answers; two of them, twice, with every block looked at."""
    few = ["val.harmful", "val.safe"]
    rows, tokens = count.rows(few, 1, N_PROVED)
    answered = rows * (1 + N_TOKENS), tokens + rows * (N_TOKENS - 1)
    return [answered, count.read(few, 1, N_TOKENS, N_PROVED), count.read(["val.harmful"], 2, 0, 2)]


def _evaluate(params: Params, at_once: int, count: _Counts) -> tuple[int, int]:
    """Baseline, run time, weights and random weights, harmless difference and random directions; addition; then KL on harmless
    text of each of these and of every alpha, with the baseline twice; and the identity, which is two."""
    read = 1 + at_once + len(params.sweep.alphas) + 2 * params.orthogonalize.include_embedding
    return _total(
        count.completed(["test.harmful", "test.safe"], at_once),
        count.completed(["test.safe"]),
        count.completed(["test.unrelated"], 1, params.evaluate.n_harmless),
        count.read(["test.unrelated"], read, count.new, params.evaluate.n_harmless),
    )


def _long_answers(params: Params, prompts: Prompts) -> list[Step]:
    """Every arm's answers, as if all were cut short; the short ones are in the store, and so are verdicts on them."""
    if (section := params.long_answers) is None:
        return []
    count, asked = _Counts(prompts, section.max_new_tokens), (["test.harmful"], len(ARMS) - 1 + section.n_random, section.n)
    calls = count.rows(*asked)[0] if params.judge.kind == "llm" else 0
    return [Step("long_answers", *count.completed(*asked), calls=calls, note=f"to {section.max_new_tokens} tokens")]


def _generalization(params: Params, count: _Counts, llm: bool) -> list[Step]:
    """Baseline, run time and random directions on at most so many harmful and safe prompts of each set, which may not be here
    yet: they are taken to be as long as the study's own test prompts."""
    g, parts = params.generalization, ("test.harmful", "test.safe")
    if not g.sets:
        return []
    times, new = len(g.sets) * len(g.system_prompts) * (2 + g.n_random), params.generation.max_new_tokens
    rows = 2 * g.n * times
    tokens = times * sum(g.n * count.tokens[part] // max(1, count.n[part]) for part in parts) + rows * (new - 1)
    note = f"{len(g.sets)} sets, as if each had {g.n} harmful and {g.n} safe prompts as long as the study's own"
    return [Step("generalization", rows * (1 + new), tokens, llm * rows, note=note)]


def _science(params: Params, defined: int, count: _Counts, paired: bool, n_ranks: int) -> tuple[tuple[int, int], int]:
    """Every intervention on val, one of each estimator on test, controls of each rank; what each costs; then the other sections.
    And the completions that a judge sees."""
    b, pairs = params.science, ["train.harmful", "train.safe"]
    alphas, pads = b.strength.alphas if b.strength else [], b.padding.n_pads if b.padding else []
    affine = params.ablation.sites == "resid_pre"
    planted = params.model.id == "organism" and params.organism.kind == "planted"
    # With the planted one, each layer's without its component along it. Pairs alone have paired_svd, svd_k and optimised.
    several = (1 + paired) * len(RANKS) + 1 + planted * (1 + defined)
    matched = paired and params.sweep.pairing != "unrelated"
    on_val = 2 + (3 + paired + matched + affine) * defined + paired + several
    on_test = 2 + defined + 2 + 2 * paired + matched + affine + several
    controls = 1 + b.n_random + n_ranks * b.n_subspaces + AT_LEAST * (1 + affine)
    judged = [  # prompts, interventions, and at most how many prompts
        (["val.harmful"], on_val, b.n_val),
        (["test.harmful"], on_test, b.n_test),
        (["test.harmful"], controls, b.n_control),
        (["test.safe"], 4 + 6 * bool(alphas), b.n_test),
        (["test.harmful"], 2 * 4 * len(alphas), b.strength.n if b.strength else 0),
    ]
    rows, tokens = count.rows(pairs, 1, b.optimised.batch_size)
    n_padded = b.padding.n if b.padding else 0
    # The baseline is read once with what depends on no direction, once with the rest, and once a place of the strengths.
    edits = 2 + on_test + controls + (4 + 2 * 4 * len(alphas) if alphas else 0)
    passes = _total(
        (paired * 3 * b.optimised.steps * rows // 2, paired * 3 * b.optimised.steps * tokens // 2),
        *(count.completed(*some) for some in judged),
        count.completed(["test.unrelated"], 1, b.n_harmless),
        count.read(["test.unrelated"], edits, count.new, b.n_harmless),
        count.read(["test.harmful", "test.safe"]),
        count.read([*pairs, "val.harmful", "val.safe"], 1, 0, n_padded),
        count.read(pairs, 2 * (len(pads) + 1), max(pads, default=0), n_padded),
    )
    return passes, sum(count.rows(*some)[0] for some in judged)


def _benchmark(params: Params, checkpoints: int) -> Step:
    tasks = tasks_of(params.benchmark.suite)
    documents = {task: _documents(task, params.benchmark.limit) for task in tasks}
    if unknown := [task for task, sizes in documents.items() if sizes is None]:
        return Step("benchmark", None, None, note=f"documents of {', '.join(unknown)} are not known yet")
    sizes = [size for size in documents.values() if size is not None]
    fetched = "" if all(map(packaged, tasks)) else " from the hub, unless they are kept already"
    return Step(
        "benchmark",
        round(sum(docs * requests for docs, requests, _ in sizes) * checkpoints),
        round(sum(docs * requests * tokens for docs, requests, tokens in sizes) * checkpoints),
        note=f"{sum(docs for docs, _, _ in sizes):,} documents{fetched} x {checkpoints} checkpoints",
    )


def _edits(params: Params, count: _Counts, size: Size) -> list[Step]:
    """Test prompts to each checkpoint that `evaluate` has not asked; KL of each, two passes a text, and the base's cross-entropy
    once, what all texts of a batch begin with by itself; documents to those that are not the study's own, of which one copy is on
    the disk at a time, and the hub's all."""
    edited, both = params.edits.checkpoints, ["test.harmful", "test.safe"]
    if not edited:
        return []
    asked, others = [one for one in edited if one.name not in OWN_ARMS], [one for one in edited if not one.own]
    scored, reads = _benchmark(params, len(others)), 2 + 2 * len(edited)
    texts, size_of_batch = count.rows(["test.unrelated"], 1, params.evaluate.n_harmless)[0], params.generation.batch_size
    batches = job_slices(texts, BATCH_SIZE if size_of_batch == "auto" else min(size_of_batch, BATCH_SIZE), FEW)
    passes, tokens = _total(
        count.completed(both, len(asked)),
        count.read(["test.unrelated"], reads, count.new, params.evaluate.n_harmless),
        (reads * len(batches), 0),
    )
    known = not others or scored.passes is not None
    return [
        Step(
            "edits",
            passes + (scored.passes or 0) if known else None,
            tokens + (scored.tokens or 0) if known else None,
            calls=count.rows(both, len(asked))[0] if params.judge.kind == "llm" else 0,
            n_bytes=size.n_bytes * (sum(one.revision is not None for one in others) + bool(others)),
            note=f"{len(edited)} edited checkpoints, {len(others)} of others",
        )
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
