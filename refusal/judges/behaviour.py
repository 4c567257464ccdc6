"""What a model does as it is, before anything is estimated from it: does it refuse what it should, and on which train prompts."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from refusal.io.errors import UserError
from refusal.io.params import Generation
from refusal.io.prompts import Rows, is_paired
from refusal.io.store import Store
from refusal.judges.panel import Judge
from refusal.judges.verdicts import OF_HARMFUL, Judged, behaves, judge_all, rates, row, summaries, values
from refusal.lm.batching import rows_at_once
from refusal.lm.load import LM
from refusal.method.generate import Decoding
from refusal.method.interventions import BASELINE
from refusal.method.sweep import complete
from refusal.organism import grammar


def behaviour(
    lm: LM,
    twin: LM | None,
    prompts: Mapping[str, Sequence[str]],
    topics: Mapping[str, Sequence[Hashable]],
    generation: Generation,
    store: Store,
) -> dict[str, Any]:
    """Rates of refusal of harmful and of safe prompts, by the rules whatever `judge.kind` says, or exactly for an organism.

    prompts, topics: of `harmful` and of `safe` prompts, the texts and their topic phrases. An organism comes with its
    helpful-only `twin`, whose refusal and whose share of right answers to facts are told too.
    """
    exact, n, harmful, safe = twin is not None, len(prompts["harmful"]), prompts["harmful"], prompts["safe"]
    n_judged = n + len(safe)

    facts = [(question, fact.answer) for fact in grammar.facts() for question in fact.questions] if exact else []
    texts = _answers(lm, [*harmful, *safe, *(question for question, _ in facts)], generation, store, "answers of base")
    judged = judge_all([*harmful, *safe], texts[:n_judged], exact)
    figures: dict[str, Any] = {"n": n, "n_safe": len(safe)}

    def refusal(name: str, half: str, verdicts: Sequence[Judged]) -> dict[str, float]:
        return rates(name, {name: [values(verdicts, OF_HARMFUL["refusal"])]}, topics[half])[name]

    figures |= refusal("refusal_harmful", "harmful", judged[:n]) | refusal("refusal_safe", "safe", judged[n:])
    if twin is None:
        figures |= {"twin_refusal_harmful": None, "facts_accuracy": None}
    else:
        of_twin = judge_all(harmful, _answers(twin, harmful, generation, store, "answers of twin"), exact)
        right = [text == answer for text, (_, answer) in zip(texts[n_judged:], facts, strict=True)]
        figures |= refusal("twin_refusal_harmful", "harmful", of_twin)
        figures |= rates("facts_accuracy", {"base": [right]}, [answer for _, answer in facts])["base"]
        figures["n_facts"] = len(facts)
    return figures | {"n_parameters": sum(p.numel() for p in lm.model.parameters())}


def all_kept(train: Rows, unrelated: Rows) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What `behaving` gives where every train prompt is kept: nobody is asked."""
    parts = _parts(train, unrelated)
    rows = [{"set": f"train.{part}", "id": given["id"], "kept": True} for part, asked in parts.items() for given, _ in asked]
    return rows, {part: {"n": len(asked), "n_kept": len(asked)} for part, asked in parts.items()}


def behaving(
    lm: LM,
    train: Rows,
    unrelated: Rows,
    judges: Mapping[str, Judge],
    generation: Generation,
    store: Store,
    allow_missing: bool = False,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Which train prompts a direction is fitted on where it is fitted on those that behave: harmful ones that the baseline
    refuses, safe ones that it answers (compliance 1), of a pair both or neither.

    Arditi et al. 2024 keep harmful prompts by the first token's score; here the judge says what became of the whole answer.
    judges: of answers to `harmful` and to `safe` prompts.

    Returns (a row for each prompt: its set, id, whether it is `kept`, completion and verdict; by part (`harmful`, `safe`,
    `unrelated`) how many there are, how many behave and are kept, and the baseline's rates). Raises UserError where fewer than
    two of a part are kept, or too few verdicts came (`verdicts.present`).
    """
    parts, judged, texts, figures = _parts(train, unrelated), {}, {}, {}
    for part, asked in parts.items():
        prompts, topics = [prompt for _, prompt in asked], [given["topic"] for given, _ in asked]
        texts[part] = _answers(lm, prompts, generation, store, f"answers: train, {part}")
        judged[part] = judges["harmful" if part == "harmful" else "safe"](prompts, texts[part], f"judge: train, {part}")
        figures[part] = summaries({part: [judged[part]]}, topics, " prompts of train", allow_missing, part != "harmful")[part]
    kept = {part: behaves(verdicts, part) for part, verdicts in judged.items()}
    n_behaving = {part: sum(some) for part, some in kept.items()}
    if "safe" in parts:
        kept["harmful"] = kept["safe"] = [a and b for a, b in zip(kept["harmful"], kept["safe"], strict=True)]
    for part, asked in parts.items():
        figures[part] = {"n": len(asked), "n_behaving": n_behaving[part], "n_kept": sum(kept[part])} | figures[part]
        if sum(kept[part]) < 2:
            raise UserError(
                f"params.yaml: prompts.keep: behaving leaves {sum(kept[part])} of {len(asked)} {part} train prompts (harmful "
                "ones that the model refuses, safe ones that it answers), too few for a direction: set prompts.keep to all"
            )
    rows = [
        {"set": f"train.{part}", "id": given["id"], "kept": keep, "prompt": prompt, "completion": text, **row(verdict)}
        for part, asked in parts.items()
        for (given, prompt), keep, text, verdict in zip(asked, kept[part], texts[part], judged[part], strict=True)
    ]
    return rows, figures


def _parts(train: Rows, unrelated: Rows) -> dict[str, list[tuple[Mapping[str, Any], str]]]:
    """Rows and prompts of each part of train."""
    parts = {"harmful": [(given, given["harmful"]) for given in train]}
    if is_paired(train):
        parts["safe"] = [(given, given["safe"]) for given in train]
    return parts | {"unrelated": [(given, given["safe"]) for given in unrelated]}


def _answers(lm: LM, prompts: Sequence[str], generation: Generation, store: Store, label: str) -> list[str]:
    """The model's greedy answers, as it is."""
    size = rows_at_once(generation.batch_size, lm.model, generation.max_new_tokens + 1, "generation")
    ids, decoding = lm.encode(prompts, generation.max_new_tokens), Decoding(generation.max_new_tokens, size)
    return lm.decode(complete(lm, ids, [BASELINE], decoding, store, label)[BASELINE.name])
