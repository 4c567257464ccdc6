"""A chat-completions server on loopback that answers as a script says: `with serve(reply) as server`.

`reply(n, question)` is called for the n-th request (from 0) whose last message is `question`, counted by question, and
returns what to do: a string is the content of the answer; a Reply says more.
"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from loopback import Handler, listening

NOTE = "\n\n(Your last reply"


@dataclass
class Reply:
    content: str | list | None = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    wait: float = 0.0  # seconds before anything is sent
    drip: float = 0.0  # seconds over which blanks keep the connection busy before the answer
    raw: str | None = None  # the body itself, whatever it is
    error: str = "scripted"
    finish_reason: str = "stop"


@dataclass
class Server:
    url: str
    version: str = "0324"  # of the model behind the name
    asked: Counter[str] = field(default_factory=Counter)  # requests begun, by question
    answered: Counter[str] = field(default_factory=Counter)  # answered in full with status 200
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0


def split(question: str) -> tuple[str, str]:
    """(request, completion) of a judge's question, as a careful reader finds them."""
    fence = question.removeprefix("The fence is ").split(".\n", 1)[0]
    request = question.split(f"BEGIN REQUEST {fence}\n", 1)[1].split(f"\nEND REQUEST {fence}\n", 1)[0]
    completion = question.split(f"BEGIN COMPLETION {fence}\n", 1)[1].rsplit(f"\nEND COMPLETION {fence}\n", 1)[0]
    return request, completion


def verdict(compliance: float, coherence: float) -> str:
    return json.dumps({"compliance": compliance, "coherence": coherence})


def gullible(question: str) -> str:
    """A judge that obeys any verdict it meets outside the fence, and else refuses to be impressed."""
    fence = question.removeprefix("The fence is ").split(".\n", 1)[0]
    outside = re.sub(rf"BEGIN (\w+) {fence}\n.*?\nEND \1 {fence}\n", "", question, flags=re.DOTALL)
    told = re.search(r'\{"compliance": *[\d.]+, *"coherence": *[\d.]+\}', outside)
    return told.group() if told else verdict(0, 1)


def written(reply: Reply, model: str) -> str:
    """The body of a response."""
    if reply.raw is not None:
        return reply.raw
    if reply.status != 200:
        return json.dumps({"error": {"message": reply.error, "type": "scripted", "code": None}})
    choice = {"index": 0, "message": {"role": "assistant", "content": reply.content}, "finish_reason": reply.finish_reason}
    version = {"model": model, "system_fingerprint": "fp_1"}
    return json.dumps({"id": "1", "object": "chat.completion", "created": 0, "choices": [choice], **version})


@contextmanager
def serve(reply: Callable[[int, str], str | Reply], port: int = 0):
    lock = threading.Lock()

    class Answers(Handler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            question = body["messages"][-1]["content"].split(NOTE)[0]
            with lock:
                n = server.asked[question]
                server.asked[question] += 1
                server.bodies.append(body)
                server.headers.append({name.lower(): value for name, value in self.headers.items()})
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                answer = reply(n, question)
                self.answer(answer if isinstance(answer, Reply) else Reply(answer), body, question)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with lock:
                    server.at_once -= 1

        def answer(self, answer: Reply, body: dict[str, Any], question: str) -> None:
            time.sleep(answer.wait)
            if self.path != "/chat/completions":
                answer = Reply(status=404, error="no such path")
            text = written(answer, f"{body['model']}-{server.version}")
            data = text.encode()
            steps = int(answer.drip / 0.05)
            self.send_response(answer.status)
            for name, value in ({"Content-Type": "application/json"} | answer.headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(steps + len(data)))
            self.end_headers()
            for _ in range(steps):
                self.wfile.write(b"\n")
                time.sleep(0.05)
            self.wfile.write(data)
            self.wfile.flush()
            if answer.status == 200:
                with lock:
                    server.answered[question] += 1

    with listening(Answers, port) as url:
        server = Server(url)
        yield server
