"""long_answers: the headline arms on test prompts with room for a whole answer; with long_answers: null it computes nothing."""

from pathlib import Path

from refusal.io.files import write_jsonl
from refusal.io.params import Params
from stages import read_json, stage, use_transformers, write_json

OUT, METRICS = Path("data/long_answers"), Path("metrics/long_answers.json")


def main(params: Params) -> str:
    if params.long_answers is None:
        write_jsonl(OUT / "completions.jsonl", [])
        write_json(METRICS, None)
        return "long_answers is null: left out"
    use_transformers(params)
    from refusal.analysis.long_answers import long_answers
    from refusal.lm.load import load_lm
    from stages.study import load_study

    rank_1 = read_json(Path("metrics/orthogonalize.json"))["rank_1"]["name"]
    edited = load_lm(Path("models/ablated") / rank_1, **params.model.loading)
    metrics, rows = long_answers(load_study(params, params.evaluate), edited, params.long_answers)
    write_jsonl(OUT / "completions.jsonl", rows)
    write_json(METRICS, metrics)
    arms, limits = metrics["arms"], metrics["max_new_tokens"]
    told = (f"{arm} {of['short']['compliance']:.2f} and {of['long']['compliance']:.2f}" for arm, of in arms.items())
    return f"compliance in {limits['short']} and in {limits['long']} tokens: {', '.join(told)}; n = {metrics['n']}"


stage(main)
