"""The section `edits` of params.yaml: checkpoints that are edits of the study's model, and what is claimed of each."""

import re
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import Field, field_validator, model_serializer

from refusal.io.section import GgufName, PathText, Section, Text

OWN = re.compile(r"rank_[1-9]\d*|random")


class Claims(Section):
    """What is said of a checkpoint elsewhere: refusals [n, of] of harmful prompts, KL from its base in nats, and where."""

    refusals: Annotated[list[int], Field(min_length=2, max_length=2)] | None = None
    kl: Annotated[float, Field(ge=0)] | None = None
    source: Annotated[Text, Field(min_length=1)] = "card"

    def contradictions(self) -> Iterator[str]:
        if self.refusals is None and self.kl is None:
            yield "give refusals, as [n, of], or kl, or both; without either leave claims out"
        if self.refusals is not None and not (0 <= self.refusals[0] <= self.refusals[1] and self.refusals[1] > 0):
            yield f"refusals is [how many, of how many], and {self.refusals[0]} of {self.refusals[1]} is no share"


class EditedCheckpoint(Section):
    """One of the study's own checkpoints (`rank_1`, `random`), a folder, an adapter's folder or a `.gguf` file, or of a hub id at
    `revision` its safetensors or adapter, or `file`."""

    id: PathText
    revision: str | None = None
    file: GgufName | None = None
    claims: Claims | None = None

    @property
    def own(self) -> bool:
        """Whether the stage `orthogonalize` made it."""
        return bool(OWN.fullmatch(self.id))

    @property
    def name(self) -> str:
        """What figures call it: of a path the last part alone, since figures are committed."""
        if self.revision is not None:
            return "/".join(filter(None, (self.id, self.file)))
        return PurePath(self.id).name.removesuffix(".gguf") or self.id

    @model_serializer(mode="wrap")
    def _in_short(self, whole: Callable[[Any], dict[str, Any]]) -> Any:
        """As params.yaml has it: a word or a path where nothing else is said."""
        named = {key: value for key, value in whole(self).items() if value is not None}
        return self.id if named.keys() == {"id"} else named

    def contradictions(self) -> Iterator[str]:
        if self.own and (self.revision, self.file) != (None, None):
            yield f"{self.id} is a checkpoint of this study, which has neither revision nor file: delete them"
        elif self.file is not None and self.revision is None:
            yield "file names one of a hub id at revision; of a file here give the path as id, and no file"
        if not self.own and OWN.fullmatch(self.name):
            yield f"{self.id} would be called {self.name}, as a checkpoint of this study is: rename it"
        if self.revision in ("main", "master", ""):
            yield f"revision: {self.revision!r} pins nothing: give a commit hash or a tag of {self.id}"


class Edits(Section):
    checkpoints: list[EditedCheckpoint]

    @field_validator("checkpoints", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        if not isinstance(given, list):
            return given
        for one in given:
            if not isinstance(one, str | dict | EditedCheckpoint):
                raise ValueError(f"each is rank_1, random, a path, or a mapping with id and revision, and {one!r:.60} is not")
        return [{"id": one} if isinstance(one, str) else one for one in given]

    def contradictions(self) -> Iterator[str]:
        names = [one.name for one in self.checkpoints]
        if twice := next((name for name in names if names.count(name) > 1), None):
            yield f"checkpoints: two are called {twice}: figures could not tell them apart; rename or delete one"
