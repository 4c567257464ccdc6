"""A server of a test, on loopback and in a thread."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    """Answers as its subclass says, and logs nothing."""

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def listening(
    handler: type[BaseHTTPRequestHandler], port: int = 0, server: type[ThreadingHTTPServer] = ThreadingHTTPServer
) -> Iterator[str]:
    """The URL at which `handler` answers; by default at a port that is free."""
    with server(("127.0.0.1", port), handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()
