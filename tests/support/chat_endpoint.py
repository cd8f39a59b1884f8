"""A stand-in for an OpenAI-compatible endpoint: it answers what a function makes of a question."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

from PIL import Image

Answer = Callable[[str, Image.Image], Any]
"""(question, image) -> the content of the answer; or (status, body) of another answer."""


class Endpoint(ThreadingHTTPServer):
    """What it was asked: (path, headers, body) of each question."""

    daemon_threads = True

    def __init__(self, answer: Answer) -> None:
        self.answer, self.asked = answer, []
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, dict(self.headers), body))
        words, picture = body["messages"][0]["content"]
        data = base64.b64decode(picture["image_url"]["url"].removeprefix("data:image/png;base64,"))
        made = self.server.answer(words["text"], Image.open(io.BytesIO(data)))
        status, held = made if isinstance(made, tuple) else (200, None)
        if held is None:
            message = {
                "choices": [{"message": {"content": made}}],
                "usage": {"prompt_tokens": 90, "completion_tokens": 2},
            }
            held = json.dumps(message).encode()
        self.send_response(status)
        self.end_headers()
        self.wfile.write(held)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def endpoint(answer: Answer) -> Iterator[Endpoint]:
    server = Endpoint(answer)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
