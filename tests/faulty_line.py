"""An HTTP server on loopback that stands before another and fails at random: a line that drops, a server that answers 500.

Of the requests, `rate` fail: a third are not passed on, a third are answered 500, and a third are passed on and their answer cut
off. Which, a seeded generator says.
"""

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import ThreadingHTTPServer
from typing import Any

from loopback import Handler, listening

HOP_BY_HOP = {"connection", "transfer-encoding", "content-length", "keep-alive"}


@dataclass
class Line:
    url: str
    rate: float = 0.0
    which: str = ""  # only requests that begin so can fail, such as "PUT /bucket/"
    fates: Counter[str] = field(default_factory=Counter)


@contextmanager
def faulty_line(port: int, seed: int) -> Iterator[Line]:
    """Before the server that listens on `port`."""
    rng, lock = random.Random(seed), threading.Lock()

    class Answers(Handler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            strikes = f"{self.command} {self.path}".startswith(line.which)
            with lock:
                fate = rng.choice(["dropped", "500", "cut"]) if strikes and rng.random() < line.rate else "passed"
                line.fates[fate] += 1
            if fate == "dropped":
                self.close_connection = True
                return
            if fate == "500":
                self.answer(500, {"Content-Type": "application/xml"}, b"<Error><Code>InternalError</Code></Error>")
                return
            there = HTTPConnection("127.0.0.1", port)
            there.request(self.command, self.path, body, dict(self.headers))
            reply = there.getresponse()
            # A HEAD's length is that of the body it does not have.
            length = reply.getheader("Content-Length") if self.command == "HEAD" else None
            self.answer(reply.status, dict(reply.getheaders()), reply.read(), fate == "cut", length)
            there.close()

        def answer(self, status: int, headers: dict[str, str], data: bytes, cut: bool = False, length: str | None = None) -> None:
            self.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in HOP_BY_HOP:
                    self.send_header(name, value)
            self.send_header("Content-Length", length or str(len(data)))
            if not cut:
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else data)
                return
            self.close_connection = True
            if len(data) > 1 and self.command != "HEAD":
                self.end_headers()
                self.wfile.write(data[: len(data) // 2])

    for method in ("GET", "HEAD", "PUT", "POST", "DELETE"):
        setattr(Answers, f"do_{method}", Answers.handle_any)

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            pass  # a client that hangs up is what this is for

    with listening(Answers, server=Quiet) as url:
        line = Line(url)
        yield line
