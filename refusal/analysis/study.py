"""One study: a model, its prompts, its judge and the directions estimated from it, and what every analysis asks of these."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from refusal.analysis.harmless_kl import Texts, cost_figures, harmless_kl, harmless_texts
from refusal.io.params import Params
from refusal.io.prompts import Rows, is_paired, safe_rows
from refusal.io.store import Store
from refusal.judges.panel import for_safe_prompts
from refusal.judges.verdicts import Arms, Judged, Verdicts, behaves, rates, summaries
from refusal.lm.batching import rows_at_once
from refusal.lm.load import LM
from refusal.method.directions import defined_layers
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE, Addition, Intervention
from refusal.method.select import span_of
from refusal.method.subspaces import Span, basis_of, spans
from refusal.method.sweep import complete
from refusal.stats import subsample_indices


@dataclass(frozen=True)
class Judgements:
    """What became of prompts under some interventions: texts and verdicts by name, in the order of `rows` (of pairs.jsonl)."""

    rows: Rows
    prompts: Sequence[str]
    texts: Mapping[str, Sequence[str]]
    verdicts: Mapping[str, Verdicts]

    @property
    def topics(self) -> list[Hashable]:
        """The topic phrase of each prompt: the clusters of a mean."""
        return [row["topic"] for row in self.rows]

    def only(self, name: str) -> Judgements:
        """What became of the prompts under one intervention."""
        return Judgements(self.rows, self.prompts, {name: self.texts[name]}, {name: self.verdicts[name]})

    @property
    def the_only(self) -> Verdicts:
        """The verdicts where there was one intervention."""
        (verdicts,) = self.verdicts.values()
        return verdicts

    @property
    def the_only_texts(self) -> Sequence[str]:
        """The texts where there was one intervention."""
        (texts,) = self.texts.values()
        return texts


def topics_of(arms: Mapping[Any, Sequence[Judgements]]) -> list[Hashable]:
    """The topic phrase of each prompt; every arm was asked the same prompts."""
    return next(one.topics for members in arms.values() for one in members)


@dataclass
class Study:
    """A study of one model.

    directions: `unit`, `difference`, `defined` and `safe_mean` of its method and pairing, by layer; harmless_difference: the same
    of two harmless sets, a control. activations: {method: {set: [prompt, n_layers, d_model]}}. pairs: rows of pairs.jsonl by
    split; unrelated: those of unrelated.jsonl. rank_1: the selected cell's name, layer and alpha. n_resamples, seed: of
    intervals. unrelated_unit: [n_layers, d_model], unit directions with unrelated safe prompts, where `directions` are matched.
    """

    params: Params
    lm: LM
    store: Store
    judge: Callable[..., list[Judged | None]]
    directions: Mapping[str, Tensor]
    harmless_difference: Mapping[str, Tensor]
    pairs: Mapping[str, Rows]
    unrelated: Mapping[str, Rows]
    rank_1: Mapping[str, Any]
    n_resamples: int
    seed: int
    activations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    unrelated_unit: Tensor | None = None

    @property
    def layer(self) -> int:
        """The selected layer; of a subspace of several the one that separates best."""
        return self.rank_1["layer"]

    @property
    def span(self) -> Span:
        """What is selected, before its alpha: the direction of `layer`, or a subspace."""
        return span_of(self.rank_1["name"], self.params.sweep.method, spans(self.params.sweep, self.layers))

    @property
    def basis(self) -> Tensor:
        """The basis of what is selected: [k, d_model], or one a layer."""
        return basis_of(self.span, self.directions)

    @property
    def layers(self) -> list[int]:
        """The layers whose direction is defined."""
        return defined_layers(self.directions)

    @property
    def exact(self) -> bool:
        """Whether every right answer is known: the organism's."""
        return self.params.model.id == "organism"

    @property
    def sites(self) -> str:
        """Where ablations act."""
        return self.params.ablation.sites

    @cached_property
    def decoding(self) -> Decoding:
        """How all completions are decoded."""
        g = self.params.generation
        return Decoding(g.max_new_tokens, rows_at_once(g.batch_size, self.lm.model, g.max_new_tokens + 1, "generation"))

    @property
    def paired(self) -> bool:
        """Whether harmful prompts have safe counterparts."""
        return all(map(is_paired, self.pairs.values()))

    def rows(self, split: str, half: str) -> Rows:
        """The rows of a split whose `half` are its harmful or its safe prompts."""
        return self.pairs[split] if half == "harmful" else safe_rows(self.pairs[split], self.unrelated[split])

    def sample(self, split: str, n: int | None, half: str = "harmful") -> list[Mapping[str, Any]]:
        """At most `n` of the `rows` of a split and half, drawn by the seed; all where n is None. Halves of pairs go together."""
        rows = self.rows(split, half)
        return [rows[i] for i in subsample_indices(len(rows), n, self.seed)]

    def topics(self, split: str) -> list[Hashable]:
        """The topic phrases of a split's harmful prompts, then of its safe ones."""
        return [row["topic"] for half in ("harmful", "safe") for row in self.rows(split, half)]

    def ask(
        self,
        rows: Rows,
        half: str,
        interventions: Sequence[Intervention],
        label: str,
        addition: Addition | None = None,
        lm: LM | None = None,
    ) -> Judgements:
        """One half of rows (`harmful` or `safe`) completed under interventions, by the study's own LM or `lm`, and judged."""
        return self.judged(rows, half, self.completions(rows, half, interventions, label, addition, lm), label, lm)

    def completions(
        self,
        rows: Rows,
        half: str,
        interventions: Sequence[Intervention],
        label: str,
        addition: Addition | None = None,
        lm: LM | None = None,
    ) -> dict[str, list[list[int]]]:
        """The token ids of what `ask` judges, by the name of the intervention, without what ends them."""
        lm = lm or self.lm
        ids = lm.encode([row[half] for row in rows], self.decoding.max_new_tokens)
        return complete(lm, ids, interventions, self.decoding, self.store, label, addition)

    def judged(
        self, rows: Rows, half: str, tokens: Mapping[str, Sequence[Sequence[int]]], label: str, lm: LM | None = None
    ) -> Judgements:
        """Completions of one half of rows, token ids by the name of the intervention, as texts and judged."""
        prompts = [row[half] for row in rows]
        texts = {name: (lm or self.lm).decode(completions) for name, completions in tokens.items()}
        judge = for_safe_prompts(self.judge) if half == "safe" else self.judge
        verdicts = {name: judge(prompts, text, f"judge: {label}: {name}", self.exact) for name, text in texts.items()}
        return Judgements(rows, prompts, texts, verdicts)

    def behaving(self, rows: Rows, half: str, label: str) -> list[int]:
        """Which of these rows' prompts the baseline refuses (`harmful`) or answers in full (`safe`), as it should."""
        verdicts = self.ask(rows, half, [BASELINE], label).the_only
        return [i for i, is_so in enumerate(behaves(verdicts, half)) if is_so]

    def summaries(self, arms: Arms, topics: Sequence[Hashable], of: str, safe: bool = False) -> dict[str, dict[str, Any]]:
        """Rates of every arm with their intervals, and counts; raises UserError as `verdicts.summaries` does."""
        return summaries(arms, topics, of, self.params.judge.allow_missing, safe)

    def exact_rates(self, arms: Mapping[str, Sequence[Judgements]], half: str) -> Mapping[str, Mapping[str, Any]]:
        """Of every arm the share of answers that are word for word the right ones, `exact` or of safe prompts `exact_safe`.

        None where these are not known: they are the organism's, of prompts of its grammar.
        """
        name = "exact" if half == "harmful" else "exact_safe"
        if not self.exact or any(row.get(f"{half}_answer") is None for some in arms.values() for one in some for row in one.rows):
            return {arm: {name: None} for arm in arms}

        def right(one: Judgements) -> list[bool]:
            return [text.strip() == row[f"{half}_answer"] for text, row in zip(one.the_only_texts, one.rows, strict=True)]

        return rates(name, {arm: [right(one) for one in some] for arm, some in arms.items()}, topics_of(arms))

    def harmless(self, n: int | None) -> Texts:
        """At most `n` harmless test prompts with the baseline's answers to them."""
        rows = [self.unrelated["test"][i] for i in subsample_indices(len(self.unrelated["test"]), n, self.seed)]
        return harmless_texts(self.lm, rows, self.decoding, self.store, "harmless answers")

    def costs(
        self, arms: Mapping[str, Sequence[Intervention]], texts: Texts, label: str
    ) -> dict[str, dict[str, float | int | None]]:
        """KL and cross-entropy on harmless prompts of each arm, over all of its interventions, with their intervals."""
        edited = {one.name: (self.lm, one) for members in arms.values() for one in members}
        costs = harmless_kl(self.lm, edited, texts, self.decoding.batch_size, self.store, label)
        return {
            arm: {
                **cost_figures([costs[one.name] for one in members], texts.topics, self.n_resamples, self.seed),
                "n_harmless": len(texts.topics),
            }
            for arm, members in arms.items()
        }
