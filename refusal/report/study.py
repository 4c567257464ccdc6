"""What a finished study left behind, as the report reads it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from refusal.io.prompts import is_paired, resolve_pairing

Metrics = dict[str, Any]
Rows = Sequence[dict[str, Any]]


class Study(NamedTuple):
    """The sections of params.yaml, the metrics of every stage (of `directions` what is not null), and the rows behind them.

    `imported` is metrics/published.json, published directions compared with ours; `plots` are the rows of plots/<name>.csv;
    `selection`, `generalization` and `edits` are None for a study older than these; `long_answers` is None where they were left
    out, too; `versions` and `hashes` are package: version and path: SHA-256 of every input, as the page prints them.
    """

    params: Metrics
    pairs: Rows
    unrelated: Rows
    sweep: Rows
    verdicts: Rows
    evaluated: Rows
    plots: dict[str, Rows]
    model: Metrics
    directions: Metrics
    judge: Metrics
    select: Metrics
    orthogonalize: Metrics
    evaluate: Metrics
    benchmark: Metrics
    agreement: Metrics
    imported: Metrics
    science: Metrics
    versions: dict[str, str]
    hashes: dict[str, str]
    selection: Metrics | None = None
    long_answers: Metrics | None = None
    generalization: Metrics | None = None
    edits: Metrics | None = None

    @property
    def arm(self) -> str:
        """The `<method>-<pairing>` that was swept."""
        return f"{self.params['sweep']['method']}-{self.pairing}"

    @property
    def cell(self) -> str:
        """The selected cell of the sweep."""
        return str(self.select["rank_1"]["name"]).removeprefix(f"{self.params['sweep']['method']}_")

    @property
    def place(self) -> str:
        """What the selected cell takes out, in words: `layer 5`, `qr 7-10`."""
        return self.cell.rpartition("_alpha_")[0].replace("_", " ")

    @property
    def paired(self) -> bool:
        """Whether harmful prompts have safe counterparts."""
        return is_paired(self.pairs)

    def of(self, method: str) -> Metrics | None:
        """The directions of a method that others are compared with: of matched pairs, or of prompts that are no pairs."""
        return self.directions.get(f"{method}-{'matched' if self.paired else 'unrelated'}")

    @property
    def pairing(self) -> str:
        """The pairing that was swept."""
        return resolve_pairing(self.params["sweep"]["pairing"], self.params["sweep"]["method"], self.directions)
