"""Near-duplicate prompts: those whose sets of words overlap (Jaccard) by a threshold or more."""

import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

# Scripts that set no blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese.
UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORDS = re.compile(rf"([{UNSPACED}]+)|[^\W{UNSPACED}]+")


def words(text: str) -> frozenset[str]:
    """The distinct words of a prompt, case folded; of scripts without blanks between words, pairs of neighbouring characters."""
    found = set()
    for match in WORDS.finditer(text.casefold()):
        run = match.group()
        found |= {run[i : i + 2] for i in range(max(1, len(run) - 1))} if match.group(1) else {run}
    return frozenset(found)


class NearDuplicateIndex:
    """Prompts as the rows of a sparse matrix with a column a word: how many words a prompt shares with each is one product."""

    def __init__(self, threshold: float, prompts: Iterable[str] = ()) -> None:
        self.threshold = threshold
        self._column: dict[str, int] = {}
        self._columns, self._starts = array("q"), array("q", [0])  # of the matrix as scipy's CSR has it
        self._matrix: Any = None
        for prompt in prompts:
            self.add(prompt)

    def add(self, prompt: str) -> None:
        """One prompt more; its number is that of the prompts before it."""
        self._columns.extend(self._column.setdefault(word, len(self._column)) for word in words(prompt))
        self._starts.append(len(self._columns))
        self._matrix = None

    def near(self, prompt: str) -> Int[np.ndarray, " n_near"]:
        """The numbers of the prompts added so far of which `prompt` is a near-duplicate; one without words is of none."""
        if self._matrix is None:
            from scipy.sparse import csr_array

            columns, starts = np.array(self._columns), np.array(self._starts)
            shape = (len(starts) - 1, len(self._column))
            self._matrix, self._sizes = csr_array((np.ones(len(columns)), columns, starts), shape), np.diff(starts)
        here = words(prompt)
        occurs = np.zeros(len(self._column))
        occurs[[self._column[word] for word in here if word in self._column]] = 1
        shared = self._matrix @ occurs
        return np.flatnonzero((shared > 0) & (shared >= self.threshold * (self._sizes + len(here) - shared)))


def near_duplicate_groups(rows: Sequence[tuple[str, ...]], threshold: float) -> list[int]:
    """The group of each row: rows joined by near-duplicate prompts, directly or through others, numbered by its first row."""
    index = NearDuplicateIndex(threshold, (prompt for row in rows for prompt in row))
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    group = np.arange(len(rows))
    for i, row in enumerate(rows):
        for prompt in row:
            joined = np.unique(np.append(group[row_of[index.near(prompt)]], group[i]))
            if len(joined) > 1:
                group[np.isin(group, joined)] = joined[0]
    return group.tolist()
