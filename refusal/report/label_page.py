"""The page that asks a rater for labels, served on 127.0.0.1 to whoever has its address, and to no other page of the browser."""

import errno
import json
import secrets
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from refusal.io.errors import UserError
from refusal.report.labels import LABELS, Session, Text, number

HTML = Path(__file__).with_name("label.html")


def shown(session: Session) -> dict[str, Any]:
    """All that the page is told: the text that is asked for, or none, and how far the rater is. Nothing of arm or verdict."""
    left = session.left()
    text = {"key": number(left[0], 0, "key"), "prompt": left[0].prompt, "completion": left[0].completion} if left else None
    return {"text": text, "progress": session.progress(), "labels": LABELS}


class LabelServer(ThreadingHTTPServer):
    """Serves `session` on `port`, or on a free one where that is taken.

    The address has a token of this run: a page that does not know it can neither read nor post, and a name that was made to
    point here (DNS rebinding) is refused by its Host.
    """

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session = session
        self.lock = threading.Lock()  # one question at a time; connections that a browser opens ahead hold up nobody
        self.by_key: dict[str, Text] = {number(text, 0, "key"): text for text in session.texts}
        self.token = secrets.token_urlsafe(16)
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            super().__init__(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    server: LabelServer

    def do_GET(self) -> None:
        if not self._known():
            return
        if self.path.endswith("/next"):
            self._do({"do": "nothing"})
        else:
            self._send(200, HTML.read_text(encoding="utf-8"), "text/html")

    def do_POST(self) -> None:
        if not self._known():
            return
        try:
            asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        except ValueError:
            asked = None
        self._do(asked)

    def _do(self, asked: Any) -> None:
        session, by_key = self.server.session, self.server.by_key
        try:
            with self.server.lock:
                if asked["do"] == "back":
                    session.back()
                elif asked["do"] == "skip":
                    session.skip(by_key[asked["key"]])
                elif asked["do"] == "answer":
                    session.answer(by_key[asked["key"]], asked["label"], asked["coherence"])
                state = shown(session)
        except (TypeError, KeyError):
            self._send(400, "this is no answer to a text of the sample; reload the page", "text/plain")
        except UserError as error:
            self._send(409, str(error), "text/plain")
        except OSError as error:
            self._send(500, f"{session.file.path}: {error.strerror}; the answer is not kept", "text/plain")
        else:
            self._send(200, json.dumps(state), "application/json")

    def _known(self) -> bool:
        server, sent = self.server, self.headers
        own = f"http://{server.host}"
        paths = [f"/{server.token}/{name}".encode() for name in ("", "next", "answer")]
        known = sent.get("Host") == server.host and sent.get("Origin", own) == own
        known = known and any(secrets.compare_digest(self.path.encode(), path) for path in paths)
        if not known:
            self._send(403, "open the address that make label printed", "text/plain")
        return known

    def _send(self, status: int, text: str, kind: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the address, token and all, would stand in the terminal at every answer."""
