"""A server on loopback that speaks as much of the hub's protocol as a download needs, and can be told to misbehave."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlsplit

from loopback import listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories {id: {path: content}} at one commit, with the tag v1.0; what was asked of it is in `requests`."""

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: str | None = None, token: str | None = None):
        self.repositories, self.gated, self.token = repositories, gated, token
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.sent: dict[str, int] = {}  # bytes of each file that went out
        self.cut: dict[str, int] = {}  # bytes after which the connection is dropped, each time
        self.patience: dict[str, int] = {}  # requests after which a file's connection is dropped at once
        self.stall: dict[str, int] = {}  # bytes after which nothing more comes
        self.spoiled: set[str] = set()  # files that come with one byte changed
        self.url = ""


def siblings(files: dict[str, bytes]) -> list[dict]:
    found = []
    for path, content in files.items():
        entry: dict = {"rfilename": path, "size": len(content)}
        entry["blobId"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if path.endswith((".safetensors", ".bin", ".pth")):
            entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        found.append(entry)
    return found


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def log_message(self, *_: object) -> None:
            pass

        def fail(self, status: int, code: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def answer(self, body: bool) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            hub.requests.append((self.command, path, self.headers.get("Range")))
            model_id = next((m for m in hub.repositories if f"{path}/".startswith((f"api/models/{m}/", f"{m}/resolve/"))), None)
            if model_id is None:
                return self.fail(401, "RepoNotFound")
            authorised = hub.token is not None and self.headers.get("Authorization") == f"Bearer {hub.token}"
            files = hub.repositories[model_id]
            if path.startswith("api/models/"):
                revision = path.removeprefix(f"api/models/{model_id}").removeprefix("/revision/")
                if revision not in (COMMIT, "v1.0"):
                    return self.fail(404, "RevisionNotFound")
                return self.send(200, json.dumps({"id": model_id, "sha": COMMIT, "siblings": siblings(files)}).encode(), body)
            if model_id == hub.gated and not authorised:
                return self.fail(403, "GatedRepo")
            revision, _, name = path.removeprefix(f"{model_id}/resolve/").partition("/")
            if revision != COMMIT or name not in files:
                return self.fail(404, "EntryNotFound")
            content = files[name]
            if name in hub.spoiled:
                content = bytes([content[0] ^ 1]) + content[1:]
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            self.send(206 if start else 200, content[start:], body, len(content), start, name)

        def send(self, status: int, data: bytes, body: bool, total: int = 0, start: int = 0, name: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Connection", "close")
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            self.end_headers()
            if not body:
                return
            n = min(len(data), hub.cut.get(name, len(data)), hub.stall.get(name, len(data)))
            if name in hub.patience:
                n, hub.patience[name] = (n if hub.patience[name] > 0 else 0), hub.patience[name] - 1
            hub.sent[name] = hub.sent.get(name, 0) + n  # before the client can have them all and look
            self.wfile.write(data[:n])
            self.wfile.flush()
            if name in hub.stall:
                self.rfile.read(1)  # until the other side is gone
            self.close_connection = True

    with listening(Handler) as hub.url:
        yield hub
