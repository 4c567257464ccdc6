"""Whether a rebuilt study's figures are the committed ones, up to what another processor's rounding explains.

The same weights and prompts give the same greedy completions on another processor, but for ties in the top two logits, and
figures that differ in their last digits.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

RELATIVE = 1e-4
# Below eight roundings at one a figure is a residual of sums that cancel, such as 1 - cosine, and has no digits to compare.
EPS = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}
FLOOR = 8
MAX_FLIPS = 0.01  # the share of completions that may differ
# What is counted over completions, which a flipped one moves by 1/n.
_RATE = re.compile(
    r"compliance|coherence|score|exact|refusal|substring|agree|kappa|full$|corrected|accuracy|sensitivity|specificity|(low|high)$"
)
_COUNT = re.compile(r"/n_(empty|degenerate|unfinished|tied)$")


class Difference(NamedTuple):
    """A figure that differs; `excess` is how many times its tolerance that is, infinite where it has to be equal."""

    figure: str
    committed: Any
    rebuilt: Any
    excess: float


def digests(rows: Iterable[Mapping[str, Any]], arm: str) -> dict[str, str]:
    """For each value of the column `arm`, 24 bits of the SHA-256 of every completion, in order: what is committed of texts.

    Under `prompts` the ids of the prompts, in the same order, which is that of every arm.
    """
    found: dict[str, list[str]] = {}
    prompts: dict[str, None] = {}
    for row in rows:
        prompts[f"{row['id']}/{row['half']}" if "half" in row else row["id"]] = None
        found.setdefault(row[arm], []).append(hashlib.sha256(row["completion"].encode()).hexdigest()[:6])
    return {"prompts": " ".join(prompts)} | {name: " ".join(each) for name, each in found.items()}


def flips(committed: Mapping[str, Mapping[str, str]], rebuilt: Mapping[str, Mapping[str, str]]) -> tuple[list[str], int]:
    """The completions that differ, as stage/arm/id of the prompt, and how many were compared.

    Both are {stage: `digests`}. Arms of one side alone are not compared: `differences` of the same files names them.
    """
    found, n = [], 0
    for stage, arms in committed.items():
        ids = arms["prompts"].split()
        for arm in arms.keys() - {"prompts"}:
            rows = list(zip(ids, arms[arm].split(), rebuilt.get(stage, {}).get(arm, "").split(), strict=False))
            found += [f"{stage}/{arm}/{name}" for name, one, other in rows if one != other]
            n += len(rows)
    return sorted(found), n


def differences(committed: Any, rebuilt: Any, dtype: str, name: str, n_flips: int = 0, n: int = 1) -> list[Difference]:
    """The figures of a file (JSON, or rows of CSV) that are not the same text, worst first.

    Texts, counts and null have to be equal; numbers agree to 1e-4 of the greater one, or to eight roundings of `dtype` at one.
    What `n_flips` completions that differ, of `n` an arm, can have moved is added to the tolerance of rates, of their limits and
    of counts of outcomes.
    """
    ours, theirs = _leaves(committed, name), _leaves(rebuilt, name)
    found = []
    for figure in ours.keys() | theirs.keys():
        one, other = ours.get(figure, "absent"), theirs.get(figure, "absent")
        if one == other and type(one) is type(other):
            continue
        excess = math.inf
        if {type(one), type(other)} in ({float}, {int, float}):
            tolerance = max(RELATIVE * max(abs(one), abs(other)), FLOOR * EPS[dtype])
            excess = abs(one - other) / (tolerance + (n_flips / n if _RATE.search(figure) else 0.0))
        elif {type(one), type(other)} == {int} and n_flips and _COUNT.search(figure):
            excess = abs(one - other) / n_flips
        found.append(Difference(figure, one, other, excess))
    return sorted(found, key=lambda each: (-each.excess, each.figure))


def _leaves(value: Any, name: str) -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    return {name: value} if items is None else {k: v for at, item in items for k, v in _leaves(item, f"{name}/{at}").items()}
