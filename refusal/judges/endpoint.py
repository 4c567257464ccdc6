"""Asking a chat model behind an OpenAI-compatible endpoint: many requests at once, within limits.

The openai client retries (408, 409, 429, 5xx, timeouts, lost connections) with backoff, or after a Retry-After of two minutes
at most. What is added here: longer ones, a bound on what is under way and on what may be spent, a wall-clock limit of an attempt,
and the reason in one sentence when asking on is of no use.
"""

import asyncio
import os
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, TypeVar

from refusal.io.endpoint import Endpoint
from refusal.io.errors import UserError
from refusal.judges.thinking import answer_of

T = TypeVar("T")
OF_OPENAI, PATIENCE = 120, 900  # seconds of Retry-After that the client waits, and that are waited here beyond it
IN_A_ROW = 50  # jobs without a result, one after another, after which no more are begun

STOPS = {  # statuses after which asking on is of no use: what is wrong, and what to do
    401: ("refuses the key", "export a valid one"),
    402: ("says that the account has nothing left to spend", "top it up"),
    403: ("denies access", "use another key or model"),
    404: ("has no such model or path", "correct base_url or model"),
}


WHOLE = {None, "", "stop", "eos_token", "stop_sequence"}  # finish_reason of an answer that is one; two are older TGI's


class Answer(NamedTuple):
    """text: what follows the model's thinking, "" where it said nothing. model: the version that the endpoint reports, with its
    fingerprint if it has one. fault: why this is no whole answer (cut off, filtered, declined, thinking alone, empty), "" where
    it is one. final: the same request at temperature 0 would end so again.
    """

    text: str
    model: str
    fault: str = ""
    final: bool = False


class Unanswered(Exception):
    """One request got no answer, for the reason said; others may."""


class Rejected(Unanswered):
    """The endpoint will not answer this request (400, 422 and the like; a filter of its own, often)."""


class MalformedResponse(Unanswered):
    """What came was no chat completion; the same request may fare better."""


class OutOfCalls(UserError):
    """`max_calls` requests were made."""


class Chat:
    """An endpoint in use. `where` names the endpoint's settings in what a user reads, such as `params.yaml: endpoint`."""

    def __init__(self, endpoint: Endpoint, where: str) -> None:
        self.endpoint, self.where, self.calls = endpoint, where, 0
        self._key = ""
        self.left_out: set[str] = set()  # settings of a request that this endpoint does not take

    def run(self, jobs: Iterable[T], work: Callable[[T], Awaitable[str | None]]) -> None:
        """`await work(job)` for every job, `concurrency` at once; work returns None, or why there is no result.

        Where asking on is of no use no job is begun any more, those under way are finished (they may be paid for), and
        UserError is raised: the key or account is refused (401, 402, 403), there is no such model or path (404),
        `IN_A_ROW` jobs in a row had no result; or OutOfCalls.
        """
        # The key is asked for here: a run that finds all it needs in a store wants none.
        self._key = _key(self.endpoint.api_key_variable, self.where)
        asyncio.run(self._run(jobs, work))

    async def _run(self, jobs: Iterable[T], work: Callable[[T], Awaitable[str | None]]) -> None:
        waiting, stopped, in_a_row = iter(jobs), list[UserError](), 0

        async def worker() -> None:
            nonlocal in_a_row
            while not stopped and (job := next(waiting, None)) is not None:
                try:
                    reason = await work(job)
                except UserError as error:
                    stopped.append(error)
                    return
                in_a_row = 0 if reason is None else in_a_row + 1
                if in_a_row >= IN_A_ROW:
                    problem = f"{in_a_row} requests in a row to {self.name} gave no result, the last with: {reason}"
                    stopped.append(self.error(problem, "fix the cause"))

        async with self._client() as self.client:
            await asyncio.gather(*(worker() for _ in range(self.endpoint.concurrency)))
        if stopped:
            raise stopped[0]

    def _client(self) -> Any:
        import httpx2  # openai's own HTTP client
        import openai

        limit = self.endpoint.timeout_seconds

        class Punctual(openai.DefaultAsyncHttpxClient):
            """httpx bounds the wait for each byte; an endpoint under load sends blanks to keep a request alive for minutes."""

            async def send(self, request: Any, **options: Any) -> Any:
                try:
                    return await asyncio.wait_for(super().send(request, **options), limit)
                except TimeoutError:
                    raise httpx2.ReadTimeout("the attempt took too long", request=request) from None

        try:
            http_client = Punctual(timeout=limit)
        except (ImportError, ValueError) as error:
            why = " ".join(str(error).split())[:120]
            raise self.error(f"the proxy that ALL_PROXY names cannot be used ({why})", "name an http:// one") from None
        return openai.AsyncOpenAI(
            api_key=self._key,
            base_url=self.endpoint.base_url,
            timeout=limit,
            max_retries=self.endpoint.max_attempts - 1,
            http_client=http_client,
        )

    async def ask(
        self, messages: list[dict[str, str]], temperature: float, max_tokens: int, waited: int = 0, json_mode: bool = True
    ) -> Answer:
        """The model's answer, with `json_mode` in JSON mode where the endpoint has one.

        A setting that the endpoint refuses by name is left out from then on (for `max_tokens`, `max_completion_tokens` is tried)
        and named in `Answer.model`, since the answers may be others. `waited`: how often it was asked before, each time with a
        wait that the openai client has no patience for. Raises Unanswered, OutOfCalls, or UserError where asking on
        is of no use.
        """
        import openai

        if self.endpoint.max_calls is not None and self.calls >= self.endpoint.max_calls:
            raise OutOfCalls(str(self.error(f"max_calls: {self.calls} requests were made", "raise it")))
        self.calls += 1
        options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens}
        if json_mode:
            options["response_format"] = {"type": "json_object"}
        options = {name: value for name, value in options.items() if name not in self.left_out}
        if "max_tokens" in self.left_out:
            options["max_completion_tokens"] = max_tokens
        try:
            response = await self.client.chat.completions.create(model=self.endpoint.model, messages=messages, **options)
            if error := getattr(response, "error", None):  # some send it with status 200
                raise MalformedResponse(f"an error in place of an answer: {self._words(error)}")
            choice = response.choices[0]
            text = answer_of(_text(choice.message.content)) or ""
            version = "/".join(str(name) for name in (response.model, response.system_fingerprint) if name)
            version += "".join(f"/without {name}" for name in sorted(self.left_out))
            fault, final = _fault(choice, text, max_tokens)
            # A key that an endpoint repeats must not reach a store.
            text, version = (said.replace(self._key, "***") for said in (text, version))
            return Answer(text, version, fault and self._words(fault), final)
        except openai.APIStatusError as error:
            said = f"{error.status_code}: {self._said(error)}"
            status = 402 if error.code == "insufficient_quota" else error.status_code
            if status in STOPS:
                problem, fix = STOPS[status]
                raise self.error(f"{self.endpoint.base_url} {problem} ({said})", fix) from None
            refused = {name for name in options if re.search(rf"\b{name}\b", said)} & {
                "temperature",
                "max_tokens",
                "response_format",
            }
            if error.status_code in {400, 422} and refused:
                self.left_out |= refused
                return await self.ask(messages, temperature, max_tokens, waited, json_mode)
            wait = _retry_after(error.response.headers)
            if OF_OPENAI < wait <= PATIENCE and waited + 1 < self.endpoint.max_attempts:
                await asyncio.sleep(wait)
                return await self.ask(messages, temperature, max_tokens, waited + 1, json_mode)
            said += f" (it asks for {wait:.0f} s of patience)" if wait > PATIENCE else ""
            client_error = error.status_code < 500 and error.status_code not in {408, 409, 429}
            raise (Rejected if client_error else Unanswered)(said) from None
        except openai.APITimeoutError:
            raise Unanswered(f"no answer within {self.endpoint.timeout_seconds:g} s") from None
        except openai.APIConnectionError as error:
            raise Unanswered(f"no connection ({type(error.__cause__).__name__})") from None
        except (openai.APIError, ValueError, AttributeError, IndexError, TypeError, RecursionError):
            raise MalformedResponse("the answers were no chat completions") from None

    @property
    def name(self) -> str:
        """The model and where it is, for what a user reads."""
        return f"{self.endpoint.model} at {self.endpoint.base_url}"

    def error(self, problem: str, fix: str) -> UserError:
        """A UserError about this endpoint, in one sentence."""
        return UserError(f"{self.where}: {problem}; every answer so far is kept: {fix}, and run again to go on")

    def _said(self, error: Any) -> str:
        """The endpoint's own words, on one line; should they repeat the key, without it."""
        return self._words(error.body)

    def _words(self, body: Any) -> str:
        words = (body.get("message") or body.get("detail")) if isinstance(body, dict) else body
        words = " ".join(str(words or "no reason given").split())
        return "".join(c for c in words.replace(self._key, "***") if c.isprintable())[:200]


def _text(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list. Parts that are thinking are none, whatever they hold."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    parts = [p.get("text") for p in content if isinstance(p, dict) and p.get("type", "text") in ("text", "output_text")]
    return "".join(part for part in parts if isinstance(part, str))


def _fault(choice: Any, text: str, max_tokens: int) -> tuple[str, bool]:
    """`Answer.fault` and `Answer.final` of a choice whose text this is."""
    message, reason = choice.message, choice.finish_reason
    parts = message.content if isinstance(message.content, list) else []
    if reason == "length":
        return f"the answers were cut off at the limit of {max_tokens} tokens", True
    if reason == "content_filter":
        return "the answers were stopped by a content filter", True
    if getattr(message, "refusal", None) or any(isinstance(p, dict) and p.get("type") == "refusal" for p in parts):
        return "the model declined to answer", True
    if reason not in WHOLE:  # DeepSeek: insufficient_system_resource; vLLM: abort
        return f"the answers were broken off (finish_reason {reason})", False
    if text.strip():
        return "", False
    # vLLM since 0.11, Ollama and OpenRouter call it reasoning; DeepSeek, llama.cpp and vLLM before, reasoning_content.
    said = message.content if isinstance(message.content, str | list) else None
    if getattr(message, "reasoning_content", None) or getattr(message, "reasoning", None) or said:
        return f"the answers were thinking alone (finish_reason {reason})", False
    return f"the answers were empty (finish_reason {reason})", False


def _retry_after(headers: Mapping[str, str]) -> float:
    """The seconds that a response asks to wait, 0 where it does not: a number or a date (RFC 9110, 10.2.3)."""
    value = headers.get("retry-after", "")
    try:
        return float(value) if re.fullmatch(r"[\d.]+", value) else parsedate_to_datetime(value).timestamp() - time.time()
    except ValueError:
        return 0.0


def _key(variable: str | None, where: str) -> str:
    if variable is None:
        return "no-key-wanted"  # the client insists on one
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"{where}.api_key_variable: {variable} is not set in the environment; run `export {variable}=...` first")
    if not re.fullmatch(r"[!-~]+", key):
        # The HTTP client would repeat it in its complaint.
        raise UserError(f"{where}.api_key_variable: {variable} holds a blank or a character that no key has; export it again")
    return key
