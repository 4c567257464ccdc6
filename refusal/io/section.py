"""What sections of `params.yaml` are made of: their kinds of values, and the section itself."""

import unicodedata
from collections.abc import Iterator
from os.path import expanduser
from pathlib import PurePath
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

T = TypeVar("T")


def _path(text: str) -> str:
    if not text.strip() or "\0" in text:
        raise ValueError("is empty, or holds a NUL character that no path has")
    return expanduser(text)  # noqa: PTH111, Path raises where there is no such user


def _text(text: str) -> str:
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in text):
        raise ValueError("holds a control character or an unpaired surrogate; delete it")
    return text


def _no_duplicates(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise ValueError("duplicate value; delete it")
    return values


Dtype = Literal["float32", "float16", "bfloat16"]
Method = Literal["sequential", "batched", "batched_unmasked"]
Pairing = Literal["matched", "shuffled", "unrelated"]
Sites = Literal["resid_pre", "paper", "writes"]
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
AtMost10000 = Annotated[int, Field(ge=1, le=10_000)]
Batch = Count | Literal["auto"]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
PathText = Annotated[str, AfterValidator(_path)]
Text = Annotated[str, AfterValidator(_text)]
SystemPrompt = Text | None
GgufName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+ -]*\.gguf$")]
NonEmpty = Annotated[list[T], Field(min_length=1)]
Distinct = Annotated[list[T], Field(min_length=1), AfterValidator(_no_duplicates)]


class Section(BaseModel):
    """A section of params.yaml: no unknown keys, no silent conversion of a string to a number, no infinity."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True, allow_inf_nan=False)

    def contradictions(self) -> Iterator[str]:
        """What is wrong with values that are each right alone."""
        yield from ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if messages := list(self.contradictions()):
            raise ValueError("; ".join(messages))
        return self


class Seeded(Section):
    """A section that draws at random, by the file's own seed where it names none."""

    seed: Seed


class Resampled(Seeded):
    """A section with bootstrap intervals, of as many resamples as the file's own `n_resamples` where it names none."""

    n_resamples: Count


class PromptSet(Section):
    """A set of prompts in data/raw; with `sha256` it may come from elsewhere, and from `url` where it is nowhere."""

    file: PathText
    url: Annotated[str, Field(pattern=r"^https?://[^@\s]+$")] | None = None
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None

    @property
    def name(self) -> str:
        """The file's name without its ending, as figures have it."""
        return PurePath(self.file).stem

    def contradictions(self) -> Iterator[str]:
        if self.url is not None and self.sha256 is None:
            yield "url needs sha256, the hash of the file that is meant"
