"""Reading `params.yaml`: its values as `Params`, or one sentence that names the file, the key and what is wrong."""

import re
import reprlib
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from refusal.io.endpoint import Endpoint
from refusal.io.errors import UserError
from refusal.io.params import Params

# The keys of earlier versions, and what each is called now.
RENAMED = {
    "sweep.max_new_tokens": "generation.max_new_tokens",
    "sweep.batch_size": "generation.batch_size",
    "prompts.api.batch": "prompts.api.pairs_per_request",
    **{f"{section}.{key}": f"endpoint.{key}" for section in ("judge", "prompts.api") for key in Endpoint.model_fields},
    "science.level": "science.n_val, n_test, optimised, sensitivity, padding and strength, which say what a level spent",
}


class _Loader(yaml.SafeLoader):
    """YAML that refuses duplicate keys, of which PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: {key.value} is a duplicate key; delete one")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.2, which DVC writes, reads 1e-05 as a number; PyYAML wants a point in it.
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def load_params(path: Path) -> Params:
    """Read and check a params.yaml.

    Raises UserError naming the file, the key and what is wrong with its value.
    """
    return _checked(path, _read(path))


def overlaid(path: Path, overlay: Path) -> dict[str, Any]:
    """The values of a params.yaml with those of an overlay, which holds the keys that differ, in their sections.

    A section of both is merged key by key; anything else is the overlay's. Raises UserError for either file, as `load_params`
    does: what is wrong with the two together is said of the overlay.
    """
    base, changes = _read(path), _read(overlay)
    _checked(path, base)
    if not isinstance(changes, dict | None):
        raise UserError(f"{overlay}: give the keys that differ from {path}, in their sections (it is {reprlib.repr(changes)})")
    both = _merged(base, changes or {})
    _checked(overlay, both)
    return both


def _merged(base: dict, changes: dict) -> dict:
    nested = {
        key: _merged(base[key], new) for key, new in changes.items() if isinstance(new, dict) and isinstance(base.get(key), dict)
    }
    return base | changes | nested


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except RecursionError:
        raise UserError(f"{path}: cannot be read as YAML: its brackets are nested too deeply; delete them") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error


def _checked(path: Path, raw: Any) -> Params:
    try:
        return Params.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        of_the_file = {problem["loc"] for problem in problems if len(problem["loc"]) == 1}
        sentences = [_sentence(p) for p in problems if p["loc"][1:] not in of_the_file or p["loc"][-1] in raw[p["loc"][0]]]
        raise UserError(f"{path}: " + "; ".join(sentences)) from error


def _keys(section: type[BaseModel] = Params, at: str = "") -> Iterator[str]:
    """Every key that a params.yaml may have, dotted."""
    for name, field in section.model_fields.items():
        yield at + name
        for kind in (field.annotation, *get_args(field.annotation)):  # a section, or a section or null
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from _keys(kind, f"{at}{name}.")


def _sentence(problem: Any) -> str:
    """What is wrong with a key, of pydantic's description of it."""
    # Of a union pydantic names the member too, which is no key of the file.
    key = ".".join(str(part) for part in problem["loc"] if part not in ("constrained-int", "literal['auto']")) or "the file"
    if problem["type"] == "extra_forbidden" and key in RENAMED:
        return f"{key} is now {RENAMED[key]}: change the name"
    if problem["type"] == "extra_forbidden":
        (nearest,) = get_close_matches(key, _keys(), n=1, cutoff=0)
        return f"{key}: there is no such key (the nearest is {nearest}): correct or delete it"
    given = "" if problem["type"] in {"missing", "value_error"} else f" (it is {reprlib.repr(problem['input'])[:100]})"
    return f"{key}: {problem['msg'].removeprefix('Value error, ')}{given}"
