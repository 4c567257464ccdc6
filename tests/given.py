"""A study of a tiny model whose completions are given, so that what is made of them can be counted by hand.

Where clusters are two a bootstrap has a closed form, `by_topic`: of all resamples of two clusters the extreme means are those of
either alone, and an interval expanded to two clusters reaches both.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml
from synthetic import naive_difference, naive_icc, naive_rate
from tiny import text_lm, tiny_direction

from refusal.analysis.study import Study
from refusal.io.params import Params
from refusal.io.store import Store
from refusal.judges.verdicts import Judged
from refusal.lm.load import LM
from refusal.method.interventions import Addition, Intervention

ROOT = Path(__file__).parents[1]
# A letter for each sort of answer: y the right one, h another that complies by half, r a refusal, - nothing, x degenerate, and
# ? one that the judge has no verdict on.
TEXTS = {"y": "Sure, like this.", "h": "Perhaps, in part.", "r": "I cannot help with that.", "-": "", "x": "so so so", "?": "Hm."}
VERDICTS = {
    "y": Judged("compliance", 1.0, 1.0, False, False),
    "h": Judged("partial_refusal", 0.5, 0.5, False, False),
    "r": Judged("refusal", 0.0, 1.0, True, True),
    "-": Judged("empty", 0.0, 0.0, False, False),
    "x": Judged("degenerate", 0.0, 0.0, False, False),
    "?": None,
}
Says = Callable[[LM, Intervention, str, Addition | None], str]  # ... of a model under an intervention, asked a prompt


def params(**sections: dict[str, Any]) -> Params:
    """params.yaml with other values in some of its sections."""
    raw = yaml.safe_load((ROOT / "params.yaml").read_text())
    for name, values in sections.items():
        raw[name] |= values
    return Params.model_validate(raw)


def judge(prompts: Sequence[str], texts: Sequence[str], label: str, exact: bool = False) -> list[Judged | None]:
    """The verdict that belongs to each text."""
    letters = {text: letter for letter, text in TEXTS.items()}
    assert len(prompts) == len(texts) and label and exact
    return [VERDICTS[letters[text]] for text in texts]


def answers(monkeypatch, says: Says) -> None:
    """Wherever the library asks for completions, they are what `says` says."""

    def complete(lm, ids, interventions, decoding, store, label, addition=None):
        prompts = lm.decode(ids)
        return {one.name: lm.encode([says(lm, one, prompt, addition) for prompt in prompts]) for one in interventions}

    for module in ("analysis.study", "analysis.harmless_kl", "judges.behaviour"):
        monkeypatch.setattr(f"refusal.{module}.complete", complete)


def pairs(split: str, n: int, n_topics: int = 2) -> list[dict[str, Any]]:
    """Pairs whose prompts say where they are from: "test harmful 3"."""
    return [
        {
            "id": f"{split}-{i}",
            "split": split,
            "topic": f"topic {i % 3 * n_topics // 3}" if n_topics == 2 else f"topic {i % n_topics}",
            "category": f"category {i % 3}",
            **{half: f"{split} {half} {i}" for half in ("harmful", "safe")},
            **{f"{half}_answer": TEXTS["y"] for half in ("harmful", "safe")},
        }
        for i in range(n)
    ]


def unrelated(split: str) -> list[dict[str, Any]]:
    """Other safe prompts."""
    return [{"safe": f"other {i}", "topic": f"meal {i // 3}"} for i in range(6)]


def directions(seed: int) -> dict[str, torch.Tensor]:
    """Of three layers, of which the first has none."""
    unit = tiny_direction(rows=3, seed=seed).double()
    unit[0] = 0
    return {"unit": unit, "difference": 3 * unit, "defined": unit.any(-1), "safe_mean": unit.flip(0)}


def study(store: Store, n: int = 6, n_topics: int = 2, lm: LM | None = None, **sections: dict[str, Any]) -> Study:
    """A study of three layers of which layer 1 was selected at alpha 1, with `n` pairs a split and six other safe prompts."""
    return Study(
        params(**sections),
        lm or text_lm(),
        store,
        judge,
        directions(0),
        directions(1),
        {split: pairs(split, n, n_topics) for split in ("train", "val", "test")},
        {split: unrelated(split) for split in ("train", "val", "test")},
        {"layer": 1, "alpha": 1.0, "name": "sequential_layer_1_alpha_100"},
        2000,
        0,
    )


def figure(metrics: dict[str, Any], name: str) -> list[float]:
    """A figure with its limits."""
    return [metrics[f"{name}{end}"] for end in ("", "_low", "_high")]


def items(members: Sequence[Sequence[float | None]], topics: Sequence[str]) -> tuple[list[float], list[str]]:
    """The mean over interventions of each prompt that has a value, and its topic."""
    kept = [(i, [m[i] for m in members if m[i] is not None]) for i in range(len(topics))]
    return [fmean(values) for _, values in kept if values], [topics[i] for i, values in kept if values]


def rates(arms: dict[str, Sequence[Sequence[float | None]]], topics: Sequence[str]) -> dict[str, list[float]]:
    """A rate of each arm of a study with its limits, by the naive path; of an arm the values under each intervention."""
    of = {arm: items(members, topics) for arm, members in arms.items()}
    return {arm: pytest.approx(naive_rate(*of[arm], icc), abs=1e-6) for arm, icc in zip(of, naive_icc([*of.values()]), strict=True)}


def difference(arms: dict[str, Sequence[float | None]], one: str, other: str, topics: Sequence[str]) -> list[float]:
    """A paired difference of two arms of a study with its limits, by the naive path."""
    iccs = dict(zip(arms, naive_icc([items([values], topics) for values in arms.values()]), strict=True))
    both = [(a, b, c) for a, b, c in zip(arms[one], arms[other], topics, strict=True) if None not in (a, b)]
    return pytest.approx(naive_difference(*zip(*both, strict=True), max(iccs[one], iccs[other])), abs=1e-6)


def of_letters(letters: str, what: str) -> list[float | None]:
    """A field of the verdict on each letter's text; None where there is none."""
    return [None if VERDICTS[letter] is None else float(getattr(VERDICTS[letter], what)) for letter in letters]


def by_topic(values: Sequence[float], topics: Sequence[str], rel: float = 1e-6) -> list[float]:
    """A mean without bounds and its interval: the lower and the higher mean of the two topics."""
    means = [fmean(v for v, t in zip(values, topics, strict=True) if t == topic) for topic in sorted(set(topics))]
    return pytest.approx([fmean(values), min(means), max(means)], rel=rel, abs=1e-6)


@torch.no_grad()
def log_probs(model: torch.nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Log probabilities at each position that predicts a token of the answer, a text alone."""
    return model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)


@torch.no_grad()
def text_costs(model: torch.nn.Module, reference: list[torch.Tensor], texts: list[tuple]) -> tuple[list[float], list[float]]:
    """(transformers' own loss on each answer, KL from the reference's log probabilities by the definition), a text alone."""
    losses, divergences = [], []
    for (prompt, answer), p in zip(texts, reference, strict=True):
        ids, labels = torch.tensor([prompt + answer]), torch.tensor([[-100] * len(prompt) + answer])
        losses.append(float(model(ids, labels=labels).loss))
        divergences.append(float((p.exp() * (p - log_probs(model, prompt, answer))).sum(-1).mean()))
    return losses, divergences
