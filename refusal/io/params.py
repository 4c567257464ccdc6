"""What `params.yaml` may say, and one clear sentence where it says something else."""

import re
import reprlib
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from refusal.io.errors import UserError

Method = Literal["sequential", "batched", "batched_unmasked"]
Pairing = Literal["matched", "shuffled", "unrelated"]
Sites = Literal["resid_pre", "paper", "writes"]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Batch = Count | Literal["auto"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]


# A parameter that changed its name: what it is called now.
RENAMED = {
    "sweep.max_new_tokens": "generation.max_new_tokens",
    "sweep.batch_size": "generation.batch_size",
    "prompts.api.batch": "prompts.api.pairs_per_request",
    **{
        f"{old}.{key}": f"endpoint.{key}"
        for old in ("judge", "prompts.api")
        for key in ("base_url", "model", "api_key_variable", "concurrency", "timeout_seconds", "max_attempts", "max_calls")
    },
    "science.level": "science.n_val, n_test, optimised, sensitivity, padding and strength, which say what a level spent",
}


class Section(BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversion of a string to a number, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False)


def _no_nul(path: str) -> str:
    if not path.strip() or "\0" in path:
        raise ValueError("is empty, or holds a NUL character that no path has")
    return path


Where = Annotated[str, AfterValidator(_no_nul)]


class Endpoint(Section):
    """An OpenAI-compatible endpoint and how hard it may be used. Its key is in the environment and nowhere else.

    `api_key_variable` names the environment variable (None: the endpoint wants no key); `timeout_seconds` bounds one
    attempt and `max_attempts` the attempts at one request; `max_calls` bounds the requests of one run (None: no bound).
    """

    base_url: str = "https://api.deepseek.com"
    model: Annotated[str, Field(min_length=1)] = "deepseek-chat"
    api_key_variable: str | None = "DEEPSEEK_API_KEY"
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    timeout_seconds: Annotated[float, Field(gt=0, le=300)] = 120.0
    max_attempts: Annotated[int, Field(ge=1, le=20)] = 6
    max_calls: Count | None = None

    # A key or password pasted into one of these must not be printed: a ValueError of ours shows no value.
    @field_validator("base_url")
    @classmethod
    def _no_password(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            whole = bool(re.fullmatch(r"https?://[^@\s]+", url) and url.isprintable() and parts.hostname and parts.port != 0)
        except ValueError:  # urllib would say the value
            whole = False
        if not whole:
            raise ValueError(
                "must be http:// or https:// with a host and, if need be, a port, and hold no user name, password or blank"
            )
        return url

    @field_validator("api_key_variable")
    @classmethod
    def _name_not_key(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError("must be the NAME of an environment variable, such as DEEPSEEK_API_KEY, and never a key")
        return name


def _each_once(values: list) -> list:
    if len(set(values)) < len(values):
        raise ValueError("duplicate value; delete it")
    return values


class PromptsApi(Section):
    pairs_per_request: Annotated[int, Field(ge=1, le=50)]
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
    source: Where
    unrelated: Where
    n_pairs: Annotated[int, Field(ge=1, le=10_000)] | None
    n_unrelated: Annotated[int, Field(ge=1, le=10_000)] | None
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
    id: Where
    revision: str | None
    dtype: Literal["float32", "float16", "bfloat16"]
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")]
    system_prompt: str | None

    @field_validator("system_prompt")
    @classmethod
    def _text(cls, text: str | None) -> str | None:
        if text is not None and any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in text):
            raise ValueError("holds a control character or an unpaired surrogate; delete it")
        return text

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


class Generation(Section):
    max_new_tokens: Count
    batch_size: Batch


class Activations(Section):
    methods: Annotated[list[Method], Field(min_length=1), AfterValidator(_each_once)]
    batch_size: Count


class DirectionsSection(Section):
    pairings: Annotated[list[Pairing], Field(min_length=1), AfterValidator(_each_once)]
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
    n_random: Annotated[int, Field(ge=1, le=10_000)]
    seed: Seed

    @model_validator(mode="after")
    def _cells_differ(self) -> "Sweep":
        names = [f"{100 * alpha:.0f}" for alpha in self.alphas]  # as a cell's name has them
        if len(set(names)) < len(names) or len(set(self.layers or [])) < len(self.layers or []):
            raise ValueError("two alphas (to two decimals) or two layers are the same; delete one")
        return self


class Judge(Section):
    kind: Literal["rules", "llm"]
    allow_missing: bool
    labelled: Where | None
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


class Optimised(Section):
    steps: Count
    batch_size: Count


class Sensitivity(Section):
    n_resamples: Count


class Padding(Section):
    n_pads: Annotated[list[Count], Field(min_length=1), AfterValidator(_each_once)]
    n: Count


class Strength(Section):
    alphas: Annotated[list[Annotated[float, Field(ge=0, le=10)]], Field(min_length=1), AfterValidator(_each_once)]
    n: Count


class Science(Section):
    n_random: Annotated[int, Field(ge=1, le=10_000)]
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
        if value in ("organism", "standard"):
            return value
        # A name is no path: lm-eval would read a definition, which may hold code, from any file.
        names = (
            [v for v in value if isinstance(v, str) and v.strip() and not set(v) & set("/\\\0")]
            if isinstance(value, list)
            else []
        )
        if names and names == value and len(set(names)) == len(names):
            return value
        raise ValueError(
            f"must be organism, standard, or a list of the names of lm-eval tasks, each once (it is {reprlib.repr(value)})"
        )


class Report(Section):
    n_examples: Count


class Compute(Section):
    threads: Annotated[int, Field(ge=1, le=1024)]


class Params(Section):
    """All of params.yaml: a section a stage, sections that stages share, and the seed and number of resamples that a section
    takes where it has none of its own."""

    seed: Seed
    n_resamples: Count
    prompts: Prompts
    model: Model
    organism: Organism
    generation: Generation
    activations: Activations
    directions: DirectionsSection
    ablation: AblationSection
    sweep: Sweep
    endpoint: Endpoint
    judge: Judge
    select: Select
    orthogonalize: Orthogonalize
    evaluate: Evaluate
    science: Science
    benchmark: Benchmark
    report: Report
    compute: Compute

    @model_validator(mode="before")
    @classmethod
    def _shared(cls, raw: Any) -> Any:
        """The file's own seed and n_resamples in every section that takes one and names none."""
        if not isinstance(raw, dict):
            return raw
        shared = {name: raw[name] for name in ("seed", "n_resamples") if name in raw}
        filled = dict(raw)
        for section, field in cls.model_fields.items():
            if isinstance(raw.get(section), dict) and isinstance(field.annotation, type) and section != "organism":
                fields = getattr(field.annotation, "model_fields", {})
                filled[section] = {name: value for name, value in shared.items() if name in fields} | raw[section]
        return filled

    @model_validator(mode="after")
    def _sweep_is_collected(self) -> "Params":
        if self.sweep.method not in self.activations.methods:
            raise ValueError(f"sweep.method {self.sweep.method} is not among activations.methods {self.activations.methods}")
        if self.sweep.pairing not in self.directions.pairings:
            raise ValueError(f"sweep.pairing {self.sweep.pairing} is not among directions.pairings {self.directions.pairings}")
        return self


class _Loader(yaml.SafeLoader):
    """YAML where a key stands once: of two values the last would win unseen."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is a duplicate key; delete one")
        return super().construct_mapping(node, deep)


def load_params(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises UserError naming the file, the key and what is wrong with its value.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except RecursionError:
        raise UserError(f"{path}: cannot be read as YAML: too many brackets in one another; delete them") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            # Of a union pydantic names the member too, which is no key of the file.
            parts = [str(part) for part in problem["loc"] if part not in ("constrained-int", "literal['auto']")]
            key = ".".join(parts) or "the file"
            if problem["type"] == "extra_forbidden" and key in RENAMED:
                problems.append(f"{key} is now {RENAMED[key]}: change the name")
                continue
            given = "" if problem["type"] in {"missing", "value_error"} else f" (it is {reprlib.repr(problem['input'])[:100]})"
            message = problem["msg"].removeprefix("Value error, ")
            problems.append(f"{key}: {message}{given}")
        raise UserError(f"{path}: " + "; ".join(problems)) from error
