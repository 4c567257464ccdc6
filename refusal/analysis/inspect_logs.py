"""Two models on the same samples of an inspect task, by the logs that inspect writes (`.eval`, `.json`), read without inspect.

Source: https://inspect.aisi.org.uk/eval-logs.html (EvalLog); a `.eval` file is a zip of `header.json` and a file for each sample
and epoch. What a score's value means as a number: its `value_to_float`, except that what is none raises an error and is not 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

from refusal.analysis.samples import paired_row, with_holm
from refusal.io.errors import UserError

# Of one sample's file and of all together, uncompressed, since a zip may hold a thousand times its own size; of a .json.
MAX_BYTES, MAX_TOTAL_BYTES, MAX_JSON_BYTES = 2**28, 2**34, 2**30
NUMBERS = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}
WORDS = {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}
_SAMPLE = re.compile(r"samples/.*_epoch_\d+\.json", re.DOTALL)


@dataclass(frozen=True)
class Log:
    """One log: of each sample what was asked (equal where it is the same), and its scores by `<scorer>` or `<scorer>/<key>`.

    A score is the mean over the epochs that have one; samples without any have no entry.
    """

    path: Path
    task: str
    status: str
    asked: Mapping[str, str]
    scores: Mapping[str, Mapping[str, float]]  # {scorer: {sample: score}}


def read_log(path: Path) -> Log:
    """A log of inspect. Raises UserError for what is none, and for a score that is no number."""
    asked: dict[str, str] = {}
    epochs: dict[str, dict[str, dict[int, float]]] = {}
    seen: set[tuple[str, int]] = set()
    try:
        rows = _rows(path)
        header = next(rows)
        version, task, status = header.get("version", 2), str(header["eval"]["task"]), str(header["status"])
        if version != 2:
            raise UserError(f"{path}: is of version {version}, and 2 is read: write it with an inspect of that version.")
        for sample in rows:
            name, epoch = str(sample["id"]), int(sample.get("epoch", 1))
            if (name, epoch) in seen or asked.setdefault(name, _asked(sample)) != _asked(sample):
                raise UserError(f"{path}: sample {name} is there twice, or its epochs ask other things: write the log anew.")
            seen.add((name, epoch))
            for scorer, value in _scores(path, name, sample):
                of = epochs.setdefault(scorer, {}).setdefault(name, {})
                if epoch in of:
                    raise UserError(f"{path}: sample {name}: two scorers give {scorer}: rename one and write the log anew.")
                of[epoch] = value
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, BadZipFile, ZlibError, EOFError) as error:
        said = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"{path}: no log of inspect ({said}): give a .eval file, or a .json of version 2.") from None
    except (NotImplementedError, RuntimeError):  # zipfile's, of a method that it has not, and of a password
        says = "its zip is compressed or locked in a way that is not read here"
        raise UserError(f"{path}: {says}: run `inspect log convert --to json` and give what it writes.") from None
    means = {scorer: {name: math.fsum(v.values()) / len(v) for name, v in of.items()} for scorer, of in epochs.items()}
    return Log(path, task, status, asked, means)


def _rows(path: Path) -> Iterator[Any]:
    """The header of a log, then its samples one after another."""
    if path.suffix == ".json":
        _check_sizes(path, {path.name: path.stat().st_size}, MAX_JSON_BYTES)
        log = json.loads(path.read_bytes())
        yield log
        yield from log.get("samples") or []
        return
    with ZipFile(path) as file:  # names are looked up and never made into paths
        sizes = {one.filename: one.file_size for one in file.infolist()}
        samples = {name: size for name, size in sizes.items() if _SAMPLE.fullmatch(name)}
        # A run that was killed left what it began with, and no header.
        start = "header.json" if "header.json" in sizes else "_journal/start.json"
        _check_sizes(path, samples | {start: sizes.get(start, 0)}, MAX_BYTES)
        yield {"status": "started"} | json.loads(file.read(start))
        for name in samples:
            yield json.loads(file.read(name))


def _check_sizes(path: Path, sizes: Mapping[str, int], most: int) -> None:
    name = max(sizes, key=lambda name: sizes[name])
    for of, size, limit in ((name, sizes[name], most), ("all samples", sum(sizes.values()), MAX_TOTAL_BYTES)):
        if size > limit:
            raise UserError(f"{path}: {of}: {size} bytes, and {limit} are read: log fewer samples, or without images.")


def _asked(sample: Mapping[str, Any]) -> str:
    """What a sample asks, without the ids that inspect gives messages anew in each run."""
    given = sample["input"]
    if not isinstance(given, str):
        given = [{"role": one["role"], "content": _without_ids(one["content"])} for one in given]
    return json.dumps([given, sample.get("choices"), sample.get("target")], sort_keys=True)


def _without_ids(content: Any) -> Any:
    return content if isinstance(content, str) else [{k: v for k, v in part.items() if k != "id"} for part in content]


def _scores(path: Path, sample: str, row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(`<scorer>` or `<scorer>/<key>`, value) of one sample and epoch; unscored ones (null, NaN) are left out."""
    for scorer, score in (row.get("scores") or {}).items():
        value = score.get("value")
        several = value if isinstance(value, dict) else dict(enumerate(value)) if isinstance(value, list) else {None: value}
        for key, each in several.items():
            number = _number(each)
            name = scorer if key is None else f"{scorer}/{key}"
            if number is None:
                said = f"{each!r}"[:60]
                raise UserError(
                    f"{path}: sample {sample}, scorer {name}: {said} is no number, nor one of {', '.join(NUMBERS)}: "
                    "score it anew with one of these (`inspect score`)."
                )
            if not math.isnan(number):
                yield name, number


def _number(value: Any) -> float | None:
    """The number that a value stands for, NaN where there is none yet, None where it stands for none."""
    if value is None:
        return math.nan
    if isinstance(value, str):
        if value in NUMBERS or value.lower() in WORDS:
            return NUMBERS.get(value, WORDS.get(value.lower()))
        try:
            number = float(value)
        except ValueError:
            return None
        return number if math.isfinite(number) else None
    return float(value) if isinstance(value, int | float) else None


def compare_logs(base: Log, edited: Log) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """(of each scorer of both `paired_row` with Holm's correction over all, what was left out or may mislead in sentences).

    A sample is one item however many epochs it has; samples that ask the same are one cluster. Raises UserError where no sample
    or scorer is shared, or one sample asks something else in each.
    """
    shared = [name for name in base.asked if name in edited.asked]
    if not shared:
        raise UserError(f"no sample is in both {base.path} and {edited.path}: give two logs of one task.")
    for name in shared:
        if base.asked[name] != edited.asked[name]:
            raise UserError(f"{edited.path}: sample {name} asks something else than in {base.path}: give two logs of one task.")
    notes = [f"{log.path}: its status is {log.status}: it is not complete" for log in (base, edited) if log.status != "success"]
    if base.task != edited.task:
        notes.append(f"the tasks differ: {base.task} and {edited.task}")
    notes += left_out("samples", base.path, len(base.asked) - len(shared), edited.path, len(edited.asked) - len(shared))
    table: dict[str, dict[str, Any]] = {}
    for scorer in [*base.scores, *(name for name in edited.scores if name not in base.scores)]:
        ours, theirs = (log.scores.get(scorer, {}) for log in (base, edited))
        both = [name for name in shared if name in ours and name in theirs]
        beyond = [name for name in both if not (0 <= ours[name] <= 1 and 0 <= theirs[name] <= 1)]
        if not both or beyond:
            why = f"sample {beyond[0]} has a score beyond 0 and 1" if beyond else "no sample has it in both"
            notes.append(f"scorer {scorer} left out: {why}")
            continue
        if len(both) < len(shared):
            notes.append(f"scorer {scorer}: {len(shared) - len(both)} samples left out that it did not score in both")
        asked = [base.asked[name] for name in both]
        table[scorer] = paired_row([ours[name] for name in both], [theirs[name] for name in both], asked)
    if not table:
        raise UserError("; ".join([f"no scorer of both {base.path} and {edited.path} can be compared", *notes]) + ".")
    return with_holm(table), notes


def left_out(what: str, base: Path, n_base: int, edited: Path, n_edited: int) -> list[str]:
    """A sentence where items are in one alone."""
    if not n_base + n_edited:
        return []
    return [f"{what} left out, since one side alone has them: {n_base} of {base}, {n_edited} of {edited}"]
