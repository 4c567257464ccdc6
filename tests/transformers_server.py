"""The chat-completions server of transformers on loopback: `python transformers_server.py CHECKPOINT` prints its address.

This is the code behind `transformers serve`: its request check, chat template, generation and response. Its web framework
(FastAPI on uvicorn) is not among the pinned packages, so the two names that this code takes from there are given here, and
the standard library carries the bytes.
"""

import asyncio
import json
import sys
import types
from http.server import ThreadingHTTPServer
from typing import Any

from loopback import Handler


class JSONResponse:
    def __init__(self, content: Any, status_code: int = 200, media_type: str | None = None) -> None:
        self.content, self.status_code = content, status_code


class HTTPException(Exception):
    def __init__(self, status_code: int, detail: str) -> None:
        self.status_code, self.detail = status_code, detail


class Stub(types.ModuleType):
    def __getattr__(self, name: str) -> None:  # what routes and starts the server is imported and never called
        if name.startswith("__"):
            raise AttributeError(name)


for name in ("fastapi", "fastapi.responses", "fastapi.middleware", "fastapi.middleware.cors"):
    sys.modules[name] = Stub(name)
sys.modules["fastapi"].HTTPException = HTTPException  # type: ignore[attr-defined]
sys.modules["fastapi.responses"].JSONResponse = JSONResponse  # type: ignore[attr-defined]

from transformers.utils import import_utils  # noqa: E402

import_utils.is_serve_available = lambda: True

from transformers.cli.serving.chat_completion import ChatCompletionHandler  # noqa: E402
from transformers.cli.serving.model_manager import ModelManager  # noqa: E402
from transformers.cli.serving.utils import GenerationState  # noqa: E402


def main(checkpoint: str) -> None:
    chat = ChatCompletionHandler(ModelManager(device="cpu", force_model=checkpoint), GenerationState())

    class Answers(Handler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                response = asyncio.run(chat.handle_request(body, "1"))
                status, content = response.status_code, response.content
            except HTTPException as error:
                status, content = error.status_code, {"detail": error.detail}
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as http:
        print(f"http://127.0.0.1:{http.server_address[1]}", flush=True)
        http.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1])
