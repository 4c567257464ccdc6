"""What every section of the science stage needs: the model, its prompts, its answers, their verdicts and what an edit costs."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from refusal.io.params import Params
from refusal.stats import subsample_indices


@dataclass
class Study:
    """One model and what was found of it so far."""

    params: Params
    model: Any
    tokenizer: Any
    store: Any
    judge: Any
    weights: str
    found: dict[str, Any]  # directions of the study's method and pairing
    harmless_difference: dict[str, Any]  # and of two harmless sets
    activations: dict[str, dict[str, Any]]  # {method: {set: Stack}}
    rows: dict[str, list[dict]]  # of pairs, by split
    unrelated: list[dict]
    rank_1: dict[str, Any]
    plots: dict[str, list[dict]] = field(default_factory=dict)

    @property
    def organism(self) -> bool:
        return self.params.model.id == "organism"

    def ids(self, prompts: Sequence[str]) -> list[list[int]]:
        from refusal.lm.load import encode_chats

        return encode_chats(self.tokenizer, prompts, self.params.model.system_prompt, self.params.generation.max_new_tokens)

    def texts(self, completions: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode(completions, skip_special_tokens=True)

    @cached_property
    def rows_at_once(self) -> int:
        from refusal.lm.memory import rows_at_once

        return rows_at_once(self.params.generation.batch_size, self.model, self.params.generation.max_new_tokens + 1, "sweep")

    def decoding(self) -> dict[str, Any]:
        from refusal.lm.load import stop_ids

        stop, pad_id = stop_ids(self.model, self.tokenizer), self.tokenizer.pad_token_id
        return {
            "stop": stop,
            "pad_id": pad_id,
            "max_new_tokens": self.params.generation.max_new_tokens,
            "batch_size": self.rows_at_once,
            "store": self.store,
        }

    def answers(self, prompts: Sequence[str], arms: Sequence[Any], label: str) -> dict[str, list[str]]:
        """Completions of the arms, as texts."""
        from refusal.method.arms import complete_arms

        sites = self.params.ablation.sites
        done = complete_arms(self.model, self.weights, self.ids(prompts), arms, sites, **self.decoding(), label=label)
        return {name: self.texts(tokens) for name, tokens in done.items()}

    def verdicts(self, prompts: Sequence[str], texts: dict[str, list[str]], label: str) -> dict[str, list]:
        return {name: self.judge(prompts, found, f"{label}: {name}", self.organism) for name, found in texts.items()}

    @cached_property
    def harmless(self) -> tuple[list, list, list]:
        """Ids of harmless test prompts, the base model's own answers that are not empty, and topics."""
        from refusal.method.arms import BASELINE_ARM, complete_arms

        rows = [
            self.unrelated[i]
            for i in subsample_indices(len(self.unrelated), self.params.science.n_harmless, self.params.science.seed)
        ]
        ids = self.ids([row["safe"] for row in rows])
        arms, label = [BASELINE_ARM], "science: harmless answers"
        tails = complete_arms(self.model, self.weights, ids, arms, "resid_pre", **self.decoding(), label=label)["baseline"]
        kept = [i for i, tail in enumerate(tails) if tail]
        return [ids[i] for i in kept], [tails[i] for i in kept], [rows[i]["topic"] for i in kept]

    def costs(
        self, edits: Mapping[str, tuple[Callable[[Any], AbstractContextManager], Sequence[object]]], label: str
    ) -> dict[str, dict[str, float | None]]:
        """Of each (edit, its key): cross-entropy of the base model's own harmless answers, and KL from it, nats a token."""
        from refusal.analysis.harmless_kl import Edited, costs
        from refusal.judges.verdicts import mean

        (heads, answers, topics), s = self.harmless, self.params.science
        if not heads:
            return {name: {"cross_entropy": None, "kl": None, "n_harmless": 0} for name in edits}
        what = ["science", self.weights, self.params.model.dtype, self.params.model.device]
        edited = {name: Edited(self.model, key, edit) for name, (edit, key) in edits.items()}
        pad_id, size = self.tokenizer.pad_token_id, self.rows_at_once
        found = costs(edited, self.model, heads, answers, pad_id, size, self.store, what, label)

        def figures(values: tuple[list[float], list[float]]) -> dict[str, float | None]:
            means = [
                mean(n, v, topics, s.n_resamples, s.seed, None) for n, v in zip(("cross_entropy", "kl"), values, strict=True)
            ]
            return {**means[0], **means[1], "n_harmless": len(heads)}

        return {name: figures(values) for name, values in found.items()}
