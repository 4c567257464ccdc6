"""People's labels of a study's completions: which are asked for, in what order, and the file that the answers are kept in.

Raters see neither the arm nor the verdict of the judge, which they could not help but follow.
"""

import csv
import hashlib
import io
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from refusal.io.errors import UserError
from refusal.io.files import set_aside, write_whole
from refusal.stats import cohens_kappa, kappa_interval, wilson

LABELS = ("compliance", "partial_refusal", "refusal", "degenerate")
COHERENCE = ("0", "0.5", "1")
COLUMNS = ("prompt", "completion", "label", "coherence")


class Text(NamedTuple):
    """What is labelled, once however many arms gave it."""

    prompt: str
    completion: str


class Answer(NamedTuple):
    text: Text
    label: str
    coherence: str


def number(text: Text, seed: int, use: str) -> str:
    """A random number of a text, as hexadecimal digits: the same in whatever row it stands. Each use has numbers of its own."""
    return hashlib.sha256("\0".join([str(seed), use, *text]).encode()).hexdigest()


def sample(rows: Iterable[Mapping[str, Any]], n: int, seed: int) -> list[Text]:
    """At most `n` texts of the rows (arm, prompt, completion, compliance), in random order.

    Strata are arms by whether the judge holds that it complied in full. Each gives one text after another in turn, so all get as
    many as the smallest can give, and the rare verdicts are not left without labels; within a stratum the texts of least random
    number are taken. Numbers belong to texts, so a text that several arms gave is drawn for all of them (permanent random
    numbers: Ohlsson 1995, "Coordination of samples using permanent random numbers"), and a greater `n` keeps what a smaller
    one drew.
    """
    strata: dict[tuple[str, bool], set[Text]] = defaultdict(set)
    for row in rows:
        strata[row["arm"], row["compliance"] == 1].add(Text(row["prompt"], row["completion"]))
    turns = (enumerate(sorted((number(text, seed, "draw"), text) for text in texts)) for texts in strata.values())
    drawn = dict.fromkeys(text for _, (_, text) in sorted(turn for stratum in turns for turn in stratum))
    return sorted(list(drawn)[:n], key=lambda text: number(text, seed, "order"))


class LabelFile:
    """A CSV of COLUMNS, one row an answer, on disk before the next is asked. What it holds is read anew each time.

    A row ends at a line break outside quotes; what stands behind the last is half a row, of a run that was killed. (Or a quote
    went astray in an editor: so the file as it was is kept beside.)
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def repair(self) -> str | None:
        """Drop half a last row; what was dropped, in a sentence."""
        whole, half = self._read()
        if not half:
            return None
        row = len(list(csv.reader(io.StringIO(whole, newline=""))))
        kept = set_aside(self.path)
        write_whole(self.path, whole.encode())
        return f"{self.path}, row {row}: half a row, of a run that was stopped as it wrote; dropped, but for a copy in {kept}"

    def answers(self) -> list[Answer]:
        """What was answered, oldest first. Raises UserError where a row cannot be read (1 is the first after the header)."""
        try:
            table = list(csv.reader(io.StringIO(self._read()[0], newline=""), strict=True))
        except csv.Error as error:
            raise UserError(f"{self.path} is not a CSV file ({error}); restore it, or move it away to start anew") from None
        if table and tuple(table[0]) != COLUMNS:
            raise UserError(
                f"{self.path}: its header is {','.join(table[0])}; make it {','.join(COLUMNS)}, or move the file away"
            )
        rows: dict[Text, Answer] = {}
        for at, row in enumerate(table[1:], 1):
            if len(row) != len(COLUMNS):
                raise UserError(
                    f"{self.path}, row {at}: it has {len(row)} fields and not {len(COLUMNS)}; correct or delete the row"
                )
            answer = Answer(Text(*row[:2]), *row[2:])
            for name, value, known in (("label", answer.label, LABELS), ("coherence", answer.coherence, COHERENCE)):
                if value not in known:
                    raise UserError(f"{self.path}, row {at}: {name} is {value!r}; make it one of {', '.join(known)}")
            if answer.text in rows:
                raise UserError(f"{self.path}, row {at}: it labels a text that an earlier row labels; delete one of the two")
            rows[answer.text] = answer
        return list(rows.values())

    def append(self, answer: Answer) -> None:
        """Keep an answer, behind whole rows: one that a full disk cut short, as its rater was told, goes first."""
        self.repair()
        new = "" if self.path.exists() and self._read()[0] else self._line(COLUMNS)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write((new + self._line((*answer.text, answer.label, answer.coherence))).encode())
            file.flush()
            os.fsync(file.fileno())

    def remove(self, text: Text) -> None:
        kept = [(*a.text, a.label, a.coherence) for a in self.answers() if a.text != text]
        write_whole(self.path, "".join(map(self._line, [COLUMNS, *kept])).encode())

    def _read(self) -> tuple[str, str]:
        """Its whole rows, and what stands behind them."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return "", ""
        # Within UTF-8 these bytes stand for nothing else, and half a row may end within a character.
        end = at = 0
        while (at := data.find(b"\n", at) + 1) > 0:
            if data.count(b'"', end, at) % 2 == 0:
                end = at
        try:
            return data[:end].decode("utf-8-sig"), data[end:].decode("utf-8-sig", errors="replace")
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not in UTF-8 ({error.reason}); save it as CSV in UTF-8") from None

    @staticmethod
    def _line(fields: Sequence[str]) -> str:
        out = io.StringIO(newline="")
        csv.writer(out, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(fields)  # a bare \r would else end a row
        return out.getvalue()


class Session:
    """One rater at work on a sample: what is asked next, and one step back."""

    def __init__(self, texts: Sequence[Text], file: LabelFile) -> None:
        self.texts, self.file = texts, file
        self.skipped: list[Text] = []
        self.history: list[Text] = []  # skipped or answered, each text where that was last

    def left(self) -> list[Text]:
        """What is not labelled yet, in the sample's order, skipped texts last."""
        done = {answer.text for answer in self.file.answers()}
        return [t for t in self.texts if t not in done and t not in self.skipped] + [t for t in self.skipped if t not in done]

    def answer(self, text: Text, label: str, coherence: str) -> None:
        """Keep an answer. Raises UserError on what is no answer; one to a text that is labelled already changes nothing."""
        if label not in LABELS or coherence not in COHERENCE:
            raise UserError(f"{label!r} with coherence {coherence!r} is no answer; reload the page")
        if text in self.left():
            self.file.append(Answer(text, label, coherence))
            self.skipped = [t for t in self.skipped if t != text]
            self.history = [*(t for t in self.history if t != text), text]

    def skip(self, text: Text) -> None:
        self.skipped = [*(t for t in self.skipped if t != text), text]
        self.history = [*(t for t in self.history if t != text), text]

    def back(self) -> None:
        """Undo the last skip or answer; in a new session, the last answer in the file to a text of this sample."""
        labelled = [answer.text for answer in self.file.answers() if answer.text in self.texts]
        last = self.history.pop() if self.history else labelled[-1] if labelled else None
        if last in labelled:
            self.file.remove(last)
        elif last is not None:
            self.skipped = [t for t in self.skipped if t != last]

    def progress(self) -> str:
        done = len(self.texts) - len(self.left())
        return f"{min(done + 1, len(self.texts))} of {len(self.texts)}"


def raters_agree(first: Sequence[Answer], second: Sequence[Answer]) -> dict[str, Any]:
    """How far two raters agree on the texts that both labelled: shares with 95 % limits, Cohen's kappa over LABELS too.

    `confusion` counts the first's label -> the second's. Raises UserError where they share no text.
    """
    ours, theirs = ({answer.text: answer for answer in answers} for answers in (first, second))
    shared = [text for text in ours if text in theirs]
    if not shared:
        raise UserError("the two files have no text in common; label the same sample, with the same seed and study")
    a, b = ([of[text].label for text in shared] for of in (ours, theirs))
    n_same = sum(x == y for x, y in zip(a, b, strict=True))
    counts = Counter(zip(a, b, strict=True))
    return {
        "n": len(shared),
        "n_first_only": len(ours) - len(shared),
        "n_second_only": len(theirs) - len(shared),
        "agreement": n_same / len(shared),
        **dict(zip(("agreement_low", "agreement_high"), wilson(n_same, len(shared)), strict=True)),
        "kappa": cohens_kappa(a, b),
        **dict(zip(("kappa_low", "kappa_high"), kappa_interval(a, b), strict=True)),
        "coherence_agreement": sum(ours[text].coherence == theirs[text].coherence for text in shared) / len(shared),
        "confusion": {x: {y: counts[x, y] for y in LABELS} for x in LABELS},
    }
