"""What `params.yaml` may say, and one clear sentence where it says something else."""

import re
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from refusal.errors import RefusalError

Method = Literal["sequential", "batched", "batched_unmasked"]
Pairing = Literal["matched", "shuffled", "unrelated"]
Sites = Literal["resid_pre", "paper", "writes"]
Count = Annotated[int, Field(ge=1)]
Batch = Count | Literal["auto"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Section(BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversion of a string to a number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class Endpoint(Section):
    """An OpenAI-compatible endpoint and how hard it may be used. Its key is in the environment and nowhere else.

    `api_key_variable` names the environment variable (None: the endpoint wants no key); `timeout_seconds` bounds one
    attempt and `max_attempts` the attempts at one request; `max_calls` bounds the requests of one run (None: no bound).
    """

    base_url: str = "https://api.deepseek.com"
    model: Annotated[str, Field(min_length=1)] = "deepseek-chat"
    api_key_variable: str | None = "DEEPSEEK_API_KEY"
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 60.0
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 6
    max_calls: Count | None = None

    # A key or password pasted into one of these must not be printed: a ValueError of ours shows no value.
    @field_validator("base_url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        if not re.fullmatch(r"https?://[^@\s]+", url):
            raise ValueError("must begin with http:// or https:// and hold no user name, password or blank")
        return url

    @field_validator("api_key_variable")
    @classmethod
    def _name_not_key(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError("must be the NAME of an environment variable, such as DEEPSEEK_API_KEY, and never a key")
        return name


class PromptsApi(Endpoint):
    batch: Annotated[int, Field(ge=1, le=50)]
    max_rounds: Count


class Splits(Section):
    train: Share
    val: Share
    test: Share

    @model_validator(mode="after")
    def _whole(self) -> "Splits":
        if abs(self.train + self.val + self.test - 1) > 1e-6:
            raise ValueError("train, val and test must add up to 1")
        return self


class Prompts(Section):
    source: str
    unrelated: str
    n_pairs: Annotated[int, Field(ge=1, le=10_000)] | None
    n_unrelated: Count | None
    splits: Splits
    near_duplicate: Annotated[float, Field(gt=0, le=1)]
    seed: Seed
    api: PromptsApi

    @model_validator(mode="after")
    def _counts_where_prompts_are_made(self) -> "Prompts":
        for source, count in (("source", "n_pairs"), ("unrelated", "n_unrelated")):
            if getattr(self, source) in {"grammar", "api"} and getattr(self, count) is None:
                raise ValueError(f"{count} must be a number where {source} is {getattr(self, source)}")
        return self


class Model(Section):
    id: str
    revision: str | None
    dtype: Literal["float32", "float16", "bfloat16"]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    system_prompt: str | None

    @model_validator(mode="after")
    def _only_the_hub_has_revisions(self) -> "Model":
        if self.id == "organism" and self.revision is not None:
            raise ValueError("revision must be null where id is organism; it belongs to a hub id")
        return self


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

    @model_validator(mode="after")
    def _shape(self) -> "Organism":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.ablation_layer >= self.num_hidden_layers:
            raise ValueError(f"ablation_layer must be below num_hidden_layers ({self.num_hidden_layers})")
        return self


class Activations(Section):
    methods: Annotated[list[Method], Field(min_length=1)]
    batch_size: Count


class DirectionsSection(Section):
    pairings: Annotated[list[Pairing], Field(min_length=1)]
    n_resamples: Count
    n_sign_flips: Count
    seed: Seed


class AblationSection(Section):
    sites: Sites
    kind: Literal["linear", "affine"]

    @model_validator(mode="after")
    def _affine_sites(self) -> "AblationSection":
        if self.kind == "affine" and self.sites != "resid_pre":
            raise ValueError("kind: affine is defined at sites: resid_pre alone")
        return self


class Sweep(Section):
    method: Method
    pairing: Literal["matched", "unrelated"]
    layers: list[Annotated[int, Field(ge=0)]] | None
    alphas: Annotated[list[Annotated[float, Field(gt=0, le=10)]], Field(min_length=1)]
    n_random: Count
    max_new_tokens: Count
    batch_size: Batch
    seed: Seed

    @model_validator(mode="after")
    def _cells_differ(self) -> "Sweep":
        names = [f"{100 * alpha:.0f}" for alpha in self.alphas]  # as a cell's name has them
        if len(set(names)) < len(names) or len(set(self.layers or [])) < len(self.layers or []):
            raise ValueError("two alphas (to two decimals) or two layers are the same; delete one")
        return self


class Judge(Endpoint):
    kind: Literal["rules", "llm"]
    allow_missing: bool
    labelled: str | None
    n_resamples: Count
    seed: Seed


class Select(Section):
    top: Annotated[int, Field(ge=1, le=20)]


class Orthogonalize(Section):
    include_embedding: bool
    format: Literal["safetensors", "lora"]


class Evaluate(Section):
    n_resamples: Count
    seed: Seed


class Science(Section):
    level: Literal["mediation", "basic", "full"]
    n_random: Annotated[int, Field(ge=1)]
    n_resamples: Count
    seed: Seed


class Benchmark(Section):
    suite: str | list[str]
    apply_chat_template: bool
    batch_size: Batch
    limit: Count | None
    n_resamples: Count
    seed: Seed

    @field_validator("suite", mode="before")
    @classmethod
    def _suite(cls, value: object) -> object:
        if value in ("organism", "standard") or (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
            return value
        raise ValueError(f"must be organism, standard, or a list of the names of lm-eval tasks (it is {value!r})")


class Report(Section):
    n_examples: Count


class Compute(Section):
    threads: Count


class Params(Section):
    """All of params.yaml, a section a stage and three that stages share."""

    prompts: Prompts
    model: Model
    organism: Organism
    activations: Activations
    directions: DirectionsSection
    ablation: AblationSection
    sweep: Sweep
    judge: Judge
    select: Select
    orthogonalize: Orthogonalize
    evaluate: Evaluate
    science: Science
    benchmark: Benchmark
    report: Report
    compute: Compute

    @model_validator(mode="after")
    def _sweep_is_collected(self) -> "Params":
        if self.sweep.method not in self.activations.methods:
            raise ValueError(f"sweep.method {self.sweep.method} is not among activations.methods {self.activations.methods}")
        if self.sweep.pairing not in self.directions.pairings:
            raise ValueError(f"sweep.pairing {self.sweep.pairing} is not among directions.pairings {self.directions.pairings}")
        return self


def load_params(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises RefusalError naming the file, the key and what is wrong with its value.
    """
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RefusalError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            key = ".".join(str(part) for part in problem["loc"]) or "the file"
            given = "" if problem["type"] in {"missing", "value_error"} else f" (it is {problem['input']!r})"
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}{given}")
        raise RefusalError(f"{path}: " + "; ".join(problems)) from error
