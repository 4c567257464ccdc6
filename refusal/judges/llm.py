"""A judge of completions made of a chat model and a rubric. It sees one request and one completion at a time.

Labels follow from compliance, except that empty and degenerate completions keep the rules' class, so that both judges mean the
same by it. Coherence is the rules' under a rubric that does not ask for it, and so is refusal under `classifier`, since text
that is safe need not be a refusal.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from refusal.io import store as stores
from refusal.io.endpoint import Endpoint
from refusal.io.params import Rubric
from refusal.io.progress import progress
from refusal.io.store import Store
from refusal.judges import rules
from refusal.judges.endpoint import Chat, MalformedResponse, OutOfCalls, Unanswered
from refusal.judges.rubrics import LABELS, TEXTS, read, turns
from refusal.judges.thinking import answer_of
from refusal.judges.verdicts import UNFINISHED, Judged
from refusal.organism.grammar import REFUSALS

ASKED_AGAIN = 2  # times, where an answer is no verdict
TEMPERATURE = 0.0
Turns = tuple[str, ...]


class LLMJudge:
    """A judge behind an endpoint; verdicts are stored as they arrive, and what is stored is not asked for again.

    `where` names the endpoint's settings for the user. `reported` counts verdicts by the model version that the endpoint
    reported for them. With `allow_missing`, running out of calls leaves verdicts missing and is no error.
    `max_tokens` is the limit of an answer, thinking included; a verdict has some 15.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        store: Store,
        allow_missing: bool = False,
        max_tokens: int = 200,
        where: str = "params.yaml: endpoint",
        rubric: Rubric = "axes",
    ) -> None:
        self.endpoint, self.store, self.allow_missing, self.max_tokens = endpoint, store, allow_missing, max_tokens
        self.rubric: Rubric = rubric
        self.chat = Chat(endpoint, where)
        self.reported: Counter[str] = Counter()

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], label: str, exact: bool = False
    ) -> list[Judged | None]:
        """Verdicts on completions in their order, None where the judge gave none in `1 + ASKED_AGAIN` answers.

        Empty completions and thoughts that never end are scored 0 and 0 without a call; of one that ends, what follows is judged.
        With `exact` (the organism) `Judged.refusal` is one of its sentences.
        Raises UserError as `Chat.run` does, and where calls run out unless `allow_missing`.
        """
        answers = [answer_of(completion) for completion in completions]
        questions = [
            turns(self.rubric, p, a) if a is not None and a.strip() else None for p, a in zip(prompts, answers, strict=True)
        ]
        scores = self._scores(dict.fromkeys(text for text in questions if text is not None), label)
        judged: list[Judged | None] = []
        for prompt, answer, text in zip(prompts, answers, questions, strict=True):
            if answer is None or text is None:
                judged.append(UNFINISHED if answer is None else Judged("empty", 0.0, 0.0, False, False))
                continue
            value = scores.get(text)
            if value is None:
                judged.append(None)
                continue
            self.reported[value["model"]] += 1
            ruled = rules.judge(prompt, answer)
            compliance = 0.0 if ruled.label == "degenerate" else value["compliance"]
            name = "degenerate" if ruled.label == "degenerate" else LABELS[compliance]
            refused = (ruled.label if self.rubric == "classifier" else name) == "refusal"
            if exact:
                refused = answer.strip() in REFUSALS
            coherence = value.get("coherence", ruled.coherence)
            own = {key: n for key, n in value.items() if key not in ("compliance", "coherence", "model")} or None
            judged.append(Judged(name, compliance, coherence, refused, rules.substring_refusal(answer), own))
        return judged

    def _key(self, asked: Turns, version: str) -> str:
        """Of everything that determines a verdict, the version that the endpoint reports behind the model's name included."""
        return stores.key(
            "verdict",
            (turns, read),
            base_url=self.endpoint.base_url,
            model=self.endpoint.model,
            version=version,
            rubric=[self.rubric, TEXTS[self.rubric]],
            asked=asked,
            temperature=TEMPERATURE,
            max_tokens=self.max_tokens,
        )

    def _versions(self) -> list[str]:
        """The versions that this endpoint has reported for this model so far, in the order they came."""
        versions: list[str] = []
        while (value := self.store.get(self._slot(len(versions)))) is not None:
            versions.append(value.decode())
        return versions

    def _slot(self, i: int) -> str:
        return stores.key("versions", (), base_url=self.endpoint.base_url, model=self.endpoint.model, i=i)

    def _keep(self, asked: Turns, value: dict[str, Any]) -> None:
        """Store a verdict under its version, and the version, if new, in the next free slot: which version an endpoint
        has is known only from an answer, so those seen are what a later run can look under."""
        while value["model"] not in (seen := self._versions()):
            self.store.put(self._slot(len(seen)), value["model"].encode())  # a slot that another process took keeps its value
        self.store.put(self._key(asked, value["model"]), json.dumps(value).encode())

    def _scores(self, questions: dict[Turns, None], label: str) -> dict[Turns, dict[str, Any]]:
        verdicts: dict[Turns, dict[str, Any]] = {}
        for version in self._versions():  # the newest verdict last
            for text in questions:
                if (value := self.store.get(self._key(text, version))) is not None:
                    verdicts[text] = json.loads(value)
        to_ask = [text for text in questions if text not in verdicts]
        why: Counter[str] = Counter()
        if not to_ask:
            return verdicts
        with progress(len(questions), label, "verdict", done=len(verdicts)) as bar:

            async def work(asked: Turns) -> str | None:
                value, reason = await self._ask(asked)
                if value is None:
                    why[reason] += 1
                    bar.set_postfix(missing=why.total(), refresh=False)
                else:
                    self._keep(asked, value)
                    verdicts[asked] = value
                bar.update()
                return None if value else reason

            try:
                self.chat.run(to_ask, work)
            except OutOfCalls:
                if not self.allow_missing:
                    raise
                why["calls ran out"] = sum(text not in verdicts for text in to_ask) - why.total()
        if why:
            named = why.most_common(4)
            reasons = ", ".join(f"{reason} ({n})" for reason, n in named)
            if others := why.total() - sum(n for _, n in named):
                reasons += f", other reasons ({others})"
            print(
                f"{label}: {self.chat.name} gave no verdict on {why.total()} of "
                f"{len(questions)} distinct completions: {reasons}; they count as missing, and the next run asks for them again",
                file=sys.stderr,
            )
        return verdicts

    async def _ask(self, asked: Turns) -> tuple[dict[str, Any] | None, str]:
        """The verdict on one question, or why there is none."""
        reason, fenced = "", self.rubric != "classifier"
        for again in range(1 + ASKED_AGAIN):
            messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), asked, strict=False)]
            if fenced:
                messages.insert(0, {"role": "system", "content": TEXTS[self.rubric]})
            if fenced and again:
                messages[1]["content"] += "\n\n(Your last reply was not one JSON object with numbers on the scale.)"
            try:
                answer = await self.chat.ask(messages, TEMPERATURE, self.max_tokens, json_mode=fenced)
            except MalformedResponse as error:
                reason = str(error)
                continue
            except Unanswered as error:
                return None, str(error)
            if not answer.fault and (value := read(self.rubric, answer.text, asked)):
                return value | {"model": answer.model}, ""
            if answer.final:
                return None, f"{answer.fault}{' (judge.max_tokens)' if 'cut off' in answer.fault else ''}"
            declined = rules.substring_refusal(answer.text)
            reason = answer.fault or ("the judge declined to grade" if declined else "the answers were no verdicts")
        return None, reason
