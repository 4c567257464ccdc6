"""Two studies compared prompt by prompt: every arm that both have, by the verdicts that each keeps of its test completions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from refusal.analysis.inspect_logs import left_out
from refusal.analysis.samples import paired_row, with_holm
from refusal.io.errors import UserError
from refusal.io.files import read_jsonl
from refusal.judges.verdicts import OF_HARMFUL, OF_SAFE, judged_of
from refusal.stats import intraclass_correlations

# `score` is the product of two of these, and phrases found are no outcome.
QUANTITIES = {
    "harmful": {name: OF_HARMFUL[name] for name in ("compliance", "coherence", "refusal")},
    "safe": OF_SAFE,
}
Values = Mapping[str, Mapping[str, float]]  # {arm: {prompt: mean over the arm's interventions}}


@dataclass(frozen=True)
class Evaluated:
    """What a study found on its test prompts: `values` by half and quantity; of each half the topic phrase of each prompt.

    interventions: the names of those of each arm. settings: the sections of params.yaml that it was judged and decoded by; None
    where its dvc.lock is not there.
    """

    path: Path
    topics: Mapping[str, Mapping[str, Hashable]]
    values: Mapping[tuple[str, str], Values]
    interventions: Mapping[str, set[str]]
    settings: Mapping[str, Any] | None


def read_study(completions: Path, prompts: Sequence[Path], lock: Path, sections: Sequence[str]) -> Evaluated:
    """A study of its completions with verdicts (rows of `evaluation.evaluate`), its prompts (rows with harmful or safe, and
    topic) and its dvc.lock, of whose stage `evaluate` these sections of params.yaml are read.

    Raises UserError where one cannot be read, or a prompt's topic is not among the prompts.
    """
    rows = _rows(completions, "arm", "name", "half", "prompt", "label", "compliance", "coherence", "refusal", "substring")
    topics: dict[str, dict[str, Hashable]] = {"harmful": {}, "safe": {}}
    for row in (row for path in prompts for row in _rows(path, "topic")):
        for half, of in topics.items():
            if row.get(half) is not None:
                of[row[half]] = row["topic"]
    asked: dict[str, dict[str, Hashable]] = {"harmful": {}, "safe": {}}
    names: dict[str, set[str]] = defaultdict(set)
    values: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        arm, half, prompt = row["arm"], row["half"], row["prompt"]
        names[arm].add(row["name"])
        if half not in topics or prompt not in topics[half]:
            where = f"{completions}: {row.get('id')}: its prompt is not among the {half} prompts of {prompts[0].parent}"
            raise UserError(f"{where}: run `dvc repro` in that study.")
        asked[half][prompt] = topics[half][prompt]
        if (verdict := judged_of(row)) is not None:
            for name, quantity in QUANTITIES[half].items():
                values[half, name][arm][prompt].append(float(quantity(verdict)))
    means = {
        key: {arm: {prompt: sum(v) / len(v) for prompt, v in each.items()} for arm, each in arms.items()}
        for key, arms in values.items()
    }
    return Evaluated(completions, asked, means, names, _settings(lock, sections))


def _rows(path: Path, *fields: str) -> list[dict[str, Any]]:
    try:
        rows = read_jsonl(path)
        missing = next((name for row in rows for name in fields if name not in row), None)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: run `dvc repro` there, or give the folder where that study ran.") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: no rows of JSON ({error}): run `dvc repro` in that study.") from None
    if missing is not None or not rows:
        raise UserError(f"{path}: {'a row without ' + missing if missing else 'no rows'}: run `dvc repro` in that study.")
    return rows


def _settings(lock: Path, sections: Sequence[str]) -> dict[str, Any] | None:
    if not lock.is_file():
        return None
    try:
        params = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"]["evaluate"]["params"]
        return {name: next(iter(params.values()))[name] for name in sections}
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{lock}: no parameters of the stage evaluate ({said}): run `dvc repro` in that study.") from None


def compare_studies(base: Evaluated, edited: Evaluated) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(of each arm of both and each quantity, `<arm> <quantity>`, `paired_row` over the prompts of both, with Holm's correction
    over all; what was left out or differs, in sentences).

    An item is a prompt, with its mean over the arm's interventions; prompts of one topic phrase are a cluster, and the
    intraclass correlation is that of `intraclass_correlations` over both studies' arms. Raises UserError where no prompt or arm
    is shared.
    """
    shared = {half: [prompt for prompt in of if prompt in edited.topics[half]] for half, of in base.topics.items()}
    if not any(shared.values()):
        raise UserError(f"no test prompt is in both {base.path} and {edited.path}: compare studies of the same prompts.")
    notes = _differing(base, edited)
    for half, prompts in shared.items():
        alone = (len(of.topics[half]) - len(prompts) for of in (base, edited))
        n_base, n_edited = alone
        notes += left_out(f"{half} prompts", base.path, n_base, edited.path, n_edited)
        if any(base.topics[half][prompt] != edited.topics[half][prompt] for prompt in prompts):
            notes.append(f"topics of {half} prompts differ: those of {base.path} are the clusters")
    table: dict[str, dict[str, Any]] = {}
    for (half, quantity), of in base.values.items():
        table |= _of_quantity(quantity, of, edited.values.get((half, quantity), {}), base.topics[half], shared[half], notes)
    if not table:
        raise UserError(f"no arm of both {base.path} and {edited.path} has verdicts on the same prompts: run both again.")
    order = list(dict.fromkeys(name.split(" ")[0] for name in table))
    return with_holm({name: table[name] for name in sorted(table, key=lambda name: order.index(name.split(" ")[0]))}), notes


def _of_quantity(
    quantity: str, base: Values, edited: Values, topics: Mapping[str, Hashable], shared: Sequence[str], notes: list[str]
) -> dict[str, dict[str, Any]]:
    """The rows of one quantity; `notes` gets a sentence for each arm without some verdicts."""
    pairs = {}
    for arm in (arm for arm in base if arm in edited):
        prompts = [prompt for prompt in shared if prompt in base[arm] and prompt in edited[arm]]
        if len(prompts) < len(shared):
            notes.append(f"{arm} {quantity}: {len(shared) - len(prompts)} prompts left out, without a verdict in both")
        if prompts:
            clusters = [topics[prompt] for prompt in prompts]
            pairs[arm] = ([base[arm][prompt] for prompt in prompts], [edited[arm][prompt] for prompt in prompts], clusters)
    if not pairs:
        return {}
    iccs = intraclass_correlations([(side, clusters) for *sides, clusters in pairs.values() for side in sides])
    greater = [max(two) for two in zip(iccs[::2], iccs[1::2], strict=True)]
    return {f"{arm} {quantity}": paired_row(*pair, icc) for (arm, pair), icc in zip(pairs.items(), greater, strict=True)}


def _differing(base: Evaluated, edited: Evaluated) -> list[str]:
    """What differs in how the two were judged and decoded, where that is known, and in their arms."""
    unknown = (one for one in (base, edited) if one.settings is None)
    notes = [f"{one.path}: its study has no dvc.lock, so how it was judged is not known" for one in unknown]
    if base.settings is not None and edited.settings is not None:
        for section, ours in base.settings.items():
            theirs = edited.settings[section]
            keys = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
            notes += [f"{section}.{key} differs: {json.dumps(ours.get(key))} and {json.dumps(theirs.get(key))}" for key in keys]
    for one, other in ((base, edited), (edited, base)):
        if alone := [arm for arm in one.interventions if arm not in other.interventions]:
            notes.append(f"arms of {one.path} alone: {', '.join(alone)}")
    for arm, names in base.interventions.items():
        others = edited.interventions.get(arm, names)
        if names != others:
            listed = (", ".join(sorted(each)) if len(each) < 2 else f"{len(each)} interventions" for each in (names, others))
            notes.append(f"{arm} is of other interventions: {' and '.join(listed)}")
    return notes
