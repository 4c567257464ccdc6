"""The schema of `params.yaml`: its sections, and what each key may be. `refusal.io.params_file` reads the file."""

import reprlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from refusal.io.claims import ClaimsSection
from refusal.io.edits import Edits
from refusal.io.endpoint import Endpoint
from refusal.io.section import (
    AtMost10000,
    Batch,
    Count,
    Distinct,
    Dtype,
    GgufName,
    Method,
    Pairing,
    PathText,
    PromptSet,
    Resampled,
    Section,
    Seed,
    Seeded,
    Share,
    Sites,
    SystemPrompt,
)
from refusal.io.sweep import Sweep


class PromptsApi(Section):
    pairs_per_request: Annotated[int, Field(ge=1, le=50)]
    max_rounds: Count


class Splits(Section):
    train: Share
    val: Share
    test: Share

    def contradictions(self) -> Iterator[str]:
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            yield "train, val and test must add up to 1"


class Prompts(Seeded):
    source: PathText
    unrelated: PathText
    harmful: Distinct[PathText] | None = None
    harmless: PathText | None = None
    n_pairs: AtMost10000 | None
    n_unrelated: AtMost10000 | None
    splits: Splits
    _one_file = field_validator("harmful", mode="before")(lambda files: [files] if isinstance(files, str) else files)
    near_duplicate: Annotated[float, Field(gt=0, le=1)]
    keep: Literal["all", "behaving"] = "all"
    api: PromptsApi

    def contradictions(self) -> Iterator[str]:
        for source, count, files in (("source", "n_pairs", "harmful"), ("unrelated", "n_unrelated", "harmless")):
            name, given = getattr(self, source), getattr(self, files)
            if given is not None and name != "grammar":
                yield f"{files} stands in place of {source}: {name}: set {source} back to grammar, or {files} to null"
            drawn = name == "api" or (name == "grammar" and given is None and self.harmful is None)
            if drawn and getattr(self, count) is None:
                yield f"{count} must be a number where {source} is {name}"


class Model(Section):
    id: PathText
    revision: str | None
    file: GgufName | None = None
    dtype: Dtype
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    system_prompt: SystemPrompt
    thinking: bool | None

    @property
    def loading(self) -> dict[str, Any]:
        """The keywords of `refusal.lm.load.load_lm`."""
        return self.model_dump(include={"dtype", "device", "system_prompt", "thinking"})

    def contradictions(self) -> Iterator[str]:
        if self.id == "organism" and self.revision is not None:
            yield "revision must be null where id is organism; it belongs to a hub id"
        if self.file is not None and self.revision is None:
            yield "file names one of a hub id at model.revision; of a file here give the path as id, and null as file"


class TrainingPhase(Section):
    steps: Count
    batch_size: Count
    learning_rate: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]


class Organism(Section):
    kind: Literal["single", "planted", "distributed", "natural", "none"]
    seed: Seed
    corpus_seed: Seed
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Annotated[int, Field(ge=2)]
    num_attention_heads: Count
    vocab_size: Annotated[int, Field(ge=300)]
    phase_1: TrainingPhase
    phase_2: TrainingPhase
    ablation_layer: Count

    def contradictions(self) -> Iterator[str]:
        if self.hidden_size % self.num_attention_heads:
            yield "hidden_size must be a multiple of num_attention_heads"
        if self.ablation_layer >= self.num_hidden_layers:
            yield f"ablation_layer must be below num_hidden_layers ({self.num_hidden_layers})"


class Generation(Section):
    max_new_tokens: Count
    batch_size: Batch


class Activations(Section):
    methods: Distinct[Method]
    batch_size: Count
    n_positions: Count = 1


class Directions(Resampled):
    estimator: Literal["mean", "geometric_median", "winsorized", "normalised"] = "mean"
    pairings: Distinct[Pairing]
    n_sign_flips: Count


class AblationSection(Section):
    sites: Sites
    kind: Literal["linear", "affine"]

    def contradictions(self) -> Iterator[str]:
        if self.kind == "affine" and self.sites != "resid_pre":
            yield "kind: affine is defined at sites: resid_pre alone"


class Calibration(Section):
    """Right verdicts, of so many: of completions that comply in full, and of those that do not."""

    sensitivity: Annotated[list[int], Field(min_length=2, max_length=2)]
    specificity: Annotated[list[int], Field(min_length=2, max_length=2)]

    def contradictions(self) -> Iterator[str]:
        for name in ("sensitivity", "specificity"):
            right, n = getattr(self, name)
            if not 0 <= right <= n or n == 0:
                yield f"{name} is [right verdicts, of so many], and {right} of {n} is no share"


Rubric = Literal["axes", "strongreject", "classifier"]


class Judge(Section):
    kind: Literal["rules", "llm"]
    rubric: Rubric = "axes"
    allow_missing: bool
    max_tokens: Annotated[int, Field(ge=1)]
    labelled: PathText | None
    calibration: Calibration | None = None


class Select(Section):
    top: Annotated[int, Field(ge=1, le=20)]
    by: Literal["compliance", "paper"] = "compliance"


class Orthogonalize(Section):
    include_embedding: bool
    format: Literal["safetensors", "lora", "gguf-f16", "gguf-bf16"]
    variant: Literal["plain", "row_norms", "column_norms", "harmless_kept"] = "plain"

    def contradictions(self) -> Iterator[str]:
        if self.format == "lora" and self.variant.endswith("_norms"):
            yield f"variant {self.variant} changes matrices at full rank, which an adapter cannot hold: set format to safetensors"


class Evaluate(Resampled):
    n_harmless: Count | None


class LongAnswers(Seeded):
    n: Count | None
    max_new_tokens: Count
    n_random: AtMost10000


class Optimised(Section):
    steps: Count
    batch_size: Count


class Sensitivity(Section):
    n_resamples: Count


class Padding(Section):
    n_pads: Distinct[Count]
    n: Count


class Strength(Section):
    alphas: Distinct[Annotated[float, Field(ge=0, le=10)]]
    n: Count


class Generalization(Resampled):
    sets: list[PromptSet]
    n: Count
    n_random: AtMost10000
    system_prompts: Distinct[SystemPrompt]

    @field_validator("sets", mode="before")
    @classmethod
    def _paths(cls, sets: Any) -> Any:
        return [{"file": one} if isinstance(one, str) else one for one in sets] if isinstance(sets, list) else sets

    def contradictions(self) -> Iterator[str]:
        if len({one.name for one in self.sets}) < len(self.sets):
            yield "two sets are files of one name; rename one"


class Science(Resampled):
    layers: Distinct[Annotated[int, Field(ge=0)]] | None
    n_random: AtMost10000
    n_subspaces: Annotated[int, Field(ge=1, le=1_000)]
    n_val: Count | None
    n_test: Count | None
    n_control: Count | None
    n_harmless: Count | None
    n_fit: Count
    optimised: Optimised
    sensitivity: Sensitivity | None
    padding: Padding | None
    strength: Strength | None


class Benchmark(Resampled):
    suite: str | list[str]
    apply_chat_template: bool
    batch_size: Batch
    limit: Count | None

    @field_validator("suite", mode="before")
    @classmethod
    def _suite(cls, value: object) -> object:
        tasks = value if isinstance(value, list) else []
        # A name is no path: lm-eval would read a definition, which may hold code, from any file.
        named = all(isinstance(task, str) and task.strip() and not set(task) & set("/\\\0") for task in tasks)
        if value in ("organism", "standard") or (tasks and named and len(set(tasks)) == len(tasks)):
            return value
        raise ValueError(
            f"must be organism, standard, or a list of the names of lm-eval tasks, each once (it is {reprlib.repr(value)})"
        )


class Report(Section):
    n_examples: Count


class Compute(Section):
    threads: Annotated[int, Field(ge=1, le=1024)]
    engine: Literal["local", "ray"]
    address: str | None
    workers: Annotated[int, Field(ge=1, le=1024)]
    gpus_per_worker: Annotated[int, Field(ge=0, le=1024)]


class Params(Section):
    """All of params.yaml: a section a stage, sections that stages share, and what a section takes where it names none of its
    own: `seed` (`Seeded`) and `n_resamples` (`Resampled`)."""

    seed: Seed
    n_resamples: Count
    prompts: Prompts
    model: Model
    organism: Organism
    generation: Generation
    activations: Activations
    directions: Directions
    ablation: AblationSection
    sweep: Sweep
    endpoint: Endpoint
    judge: Judge
    select: Select
    orthogonalize: Orthogonalize
    evaluate: Evaluate
    long_answers: LongAnswers | None
    generalization: Generalization
    science: Science
    benchmark: Benchmark
    edits: Edits
    claims: ClaimsSection
    report: Report
    compute: Compute

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        shared = {key: raw[key] for key in ("seed", "n_resamples") if key in raw}
        filled = dict(raw)
        for name, field in cls.model_fields.items():
            for section in (field.annotation, *get_args(field.annotation)):  # a section, or a section or null
                if isinstance(section, type) and issubclass(section, Seeded) and isinstance(raw.get(name), dict):
                    filled[name] = {key: shared[key] for key in shared.keys() & section.model_fields.keys()} | raw[name]
        return filled

    def contradictions(self) -> Iterator[str]:
        if self.sweep.method not in self.activations.methods:
            yield f"sweep.method {self.sweep.method} is not among activations.methods {self.activations.methods}"
        if self.select.by == "paper" and 1.0 not in self.sweep.alphas:
            yield "select.by: paper ablates at alpha 1: put 1.0 among sweep.alphas"
        if self.select.by == "paper" and self.sweep.basis != "single":
            yield f"select.by: paper is of single directions, and sweep.basis is {self.sweep.basis}: set one of these back"
        if self.long_answers and self.long_answers.max_new_tokens <= self.generation.max_new_tokens:
            yield (
                f"long_answers.max_new_tokens must be more than generation.max_new_tokens ({self.generation.max_new_tokens}): "
                "raise it, or set long_answers to null"
            )
        if self.long_answers and self.long_answers.n_random > self.sweep.n_random:
            yield f"long_answers.n_random takes the first of the sweep's: at most sweep.n_random ({self.sweep.n_random})"
        for one in self.edits.checkpoints:
            if one.own and one.id != "random" and int(one.id.removeprefix("rank_")) > self.select.top:
                yield f"edits.checkpoints: {one.id} is not made, with select.top {self.select.top}: raise that, or delete this"
        wanted = ["matched", "unrelated"] if self.sweep.pairing == "auto" else [self.sweep.pairing]
        if missing := [pairing for pairing in wanted if pairing not in self.directions.pairings]:
            yield f"sweep.pairing {self.sweep.pairing} needs {missing[0]} among directions.pairings {self.directions.pairings}"
