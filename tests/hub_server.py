"""A server on loopback that speaks as much of the hub's protocol as a download needs, and can be told to misbehave."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urlsplit

from loopback import Handler, listening

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Repositories {id: {path: content}} at one `commit`, with the tag v1.0; what was asked of it is in `requests`."""

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: str | None = None, token: str | None = None):
        self.repositories, self.gated, self.token = repositories, gated, token
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range
        self.sent: dict[str, int] = {}  # bytes of each file that went out
        self.cut: dict[str, int] = {}  # bytes after which the connection is dropped, each time
        self.patience: dict[str, int] = {}  # requests after which a file's connection is dropped at once
        self.stall: dict[str, int] = {}  # bytes after which nothing more comes
        self.spoiled: set[str] = set()  # files that come with one byte changed
        self.commit = COMMIT
        self.url = ""


def is_large(path: str) -> bool:
    """Whether the hub keeps the file as Git LFS and names it by SHA-256, not by Git's own hash."""
    return path.endswith((".safetensors", ".gguf", ".bin", ".pth"))


def etag(path: str, content: bytes) -> str:
    git = hashlib.sha1(b"blob %d\0" % len(content) + content)
    return (hashlib.sha256(content) if is_large(path) else git).hexdigest()


def listed(path: str, content: bytes) -> dict:
    """A file as the hub's listing of a tree has it."""
    hashes = {"oid": etag(path, content)}
    lfs = {"lfs": hashes | {"size": len(content), "pointerSize": 134}} if is_large(path) else {}
    return {"type": "file", "path": path, "size": len(content), **hashes, **lfs}


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    class Answers(Handler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def fail(self, status: int, code: str) -> None:
            self.send(status, b"", {"X-Error-Code": code})

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path).lstrip("/")
            hub.requests.append((self.command, path, self.headers.get("Range")))
            model_id = next((m for m in hub.repositories if f"{path}/".startswith((f"api/models/{m}/", f"{m}/resolve/"))), None)
            if model_id is None:
                return self.fail(401, "RepoNotFound")
            files = hub.repositories[model_id]
            if path.startswith("api/models/"):
                what, _, revision = path.removeprefix(f"api/models/{model_id}/").partition("/")
                if revision not in (hub.commit, "v1.0"):
                    return self.fail(404, "RevisionNotFound")
                tree = [listed(name, content) for name, content in files.items()]
                return self.send(200, json.dumps(tree if what == "tree" else {"id": model_id, "sha": hub.commit}).encode())
            authorised = hub.token is not None and self.headers.get("Authorization") == f"Bearer {hub.token}"
            if model_id == hub.gated and not authorised:
                return self.fail(403, "GatedRepo")
            revision, _, name = path.removeprefix(f"{model_id}/resolve/").partition("/")
            if revision not in (hub.commit, "v1.0") or name not in files:
                return self.fail(404, "EntryNotFound")
            content = files[name]
            headers = {"ETag": f'"{etag(name, content)}"', "X-Repo-Commit": hub.commit}
            if name in hub.spoiled:
                content = bytes([content[0] ^ 1]) + content[1:]
            start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
            if start:
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            self.send(206 if start else 200, content[start:], headers, name)

        def send(self, status: int, data: bytes, headers: dict[str, str] | None = None, name: str = "") -> None:
            self.send_response(status)
            for header, value in {"Content-Length": str(len(data)), "Connection": "close", **(headers or {})}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "HEAD":
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

    with listening(Answers) as hub.url:
        yield hub
