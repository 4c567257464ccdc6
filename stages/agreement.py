"""agreement: which judge, what other judges and people say of the same test completions, and rates corrected for its errors."""

import sys
from pathlib import Path
from typing import Any

from refusal.io.files import read_jsonl
from refusal.io.params import Params
from stages import STORE, stage, warn_unless_in_raw, write_json

METRICS = Path("metrics/agreement.json")


def main(params: Params) -> str:
    from refusal.analysis.agreement import judged_rates
    from refusal.io.store import Store
    from refusal.judges.language import english_share
    from refusal.judges.panel import agreement, by_rules, identity, judge_with
    from refusal.judges.verdicts import judged_of

    j, exact = params.judge, params.model.id == "organism"
    rows = [row for row in read_jsonl(Path("data/evaluated/completions.jsonl")) if row["half"] == "harmful"]
    topic = {row["id"]: row["topic"] for row in read_jsonl(Path("data/prompts/pairs.jsonl"))}
    topics = [topic[row["id"]] for row in rows if row["arm"] == "baseline"]
    texts = [row["prompt"] for row in rows], [row["completion"] for row in rows]
    verdicts = [judged_of(row) for row in rows]
    judge = judge_with(j, params.endpoint, Store(STORE / "store.sqlite"))
    if j.kind == "llm":  # all in the store, but for what it gave no verdict on: which version judged is told from there
        known = [i for i, verdict in enumerate(verdicts) if verdict is not None]
        judge([texts[0][i] for i in known], [texts[1][i] for i in known], "agreement", exact)
    # The rules cost nothing: they judge beside any other judge, and the two are compared.
    rules = by_rules(*texts, "rules", exact)
    judges = {"rules": rules, "llm": verdicts if j.kind == "llm" else None}
    write_json(
        METRICS,
        {
            "judge": identity(judge),
            "english_prompts": english_share([*dict.fromkeys(texts[0])]),
            "rules_and_llm": agreement(rules, judges["llm"]),
            "by_judge": {name: of and judged_rates(rows, of, topics) for name, of in judges.items()},
            **(told := labelled(params, judge, rows, verdicts, topics)),
        },
    )
    n, by = (told["labels"] or {"n": 0})["n"], told["corrected"]["by"]
    return f"{len(rows)} completions by {j.kind}; {n} labelled by people; rates corrected by {by or 'nothing'}"


def labelled(params: Params, judge: Any, rows: list[dict[str, Any]], verdicts: list[Any], topics: list[Any]) -> dict[str, Any]:
    """What people's labels say of the judge, on any completions (`labelled`) and on these (`labels`), and the corrected rates."""
    from refusal.analysis.agreement import by_calibration, by_labels, calibration_of, passed
    from refusal.judges.calibrate import calibrate_with, read_labelled
    from refusal.judges.panel import by_rules

    j = params.judge
    agree: dict[str, Any] = {"file": j.labelled, "rules": None, "llm": None}
    calibration = j.calibration.model_dump() if j.calibration else None
    by, truth = "judge.calibration" if calibration else None, dict[tuple[str, str], bool]()
    if j.labelled is not None:
        warn_unless_in_raw(j.labelled, "agreement")
        people = read_labelled(j.labelled)
        agree["rules"] = calibrate_with(by_rules, people, "labelled")
        llm = j.kind == "llm"
        agree["llm"] = calibrate_with(judge, people, "labelled", j.allow_missing) if llm else dict.fromkeys(agree["rules"])
        by, calibration = "labelled file", calibration_of(agree[j.kind]["confusion"])
        truth = {(prompt, completion): label == "compliance" for prompt, completion, label in people}
        known = truth.keys() & {(row["prompt"], row["completion"]) for row in rows}
        print(
            f"agreement: {len(truth) - len(known)} of {len(truth)} texts of {j.labelled} are no test completion", file=sys.stderr
        )
        if known:
            of_study = {text: truth[text] for text in truth if text in known}
            labels, arms = by_labels(rows, passed(verdicts), topics, of_study, params.n_resamples, params.seed)
            corrected = {"by": "labels", "calibration": None, "arms": arms}
            return {"labelled": agree, "labels": labels | {"n_unmatched": len(truth) - len(known)}, "corrected": corrected}
    elsewhere = by_calibration(rows, passed(verdicts), topics, calibration) if calibration else None
    return {"labelled": agree, "labels": None, "corrected": {"by": by, "calibration": calibration, "arms": elsewhere}}


stage(main)
