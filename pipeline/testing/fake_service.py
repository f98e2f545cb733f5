"""A service with the interface of OpenAI for tests: chat completions and embeddings, with faults on request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdef"
MODEL = "tiny-chat"
DIMENSIONS = 4


@dataclass
class Fault:
    """What the service does in place of an answer."""

    status: int = 500
    body: Any = field(default_factory=lambda: {"error": {"message": "out of order"}})
    headers: dict[str, str] = field(default_factory=dict)
    raw: bytes | None = None
    """Bytes in place of JSON."""
    drops: bool = False
    """True: close the connection without an answer."""


Choose = Callable[[str, int], Fault | None]
"""Return the fault of a request by its text and the number of requests with that text, from 1."""


@dataclass
class FakeService:
    """The state of a running service."""

    url: str = ""
    choose: Choose = lambda text, number: None
    reply: Callable[[str], str] = lambda text: text.upper()
    """Answer to the last message of a chat."""
    seconds: float = 0.0
    """Time that an answer takes."""
    key: str = KEY
    asked: Counter[str] = field(default_factory=Counter)
    """Requests by the text of the last message, or the texts to embed joined by a line break."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    answered: Counter[str] = field(default_factory=Counter)
    """Answers that were sent."""
    most_open: int = 0
    """Most requests that were open at a time."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    _open: int = 0

    @contextmanager
    def counted(self, text: str, body: dict[str, Any]) -> Iterator[int]:
        """Count a request; yields its number among those with this text."""
        with self.lock:
            self.asked[text] += 1
            self.bodies.append(body)
            self.times.append(time.monotonic())
            self._open += 1
            self.most_open = max(self.most_open, self._open)
            number = self.asked[text]
        try:
            yield number
        finally:
            with self.lock:
                self._open -= 1

    def answer_to(self, body: dict[str, Any], text: str) -> dict[str, Any]:
        """Return the body of an answer; a word is a token."""
        words = len(text.split())
        if "input" in body:
            data = [
                {"object": "embedding", "index": index, "embedding": embedding_of(one)}
                for index, one in enumerate(body["input"])
            ]
            return {"object": "list", "data": data[::-1], "usage": {"prompt_tokens": words, "total_tokens": words}}
        content = self.reply(text)
        return {
            "object": "chat.completion",
            "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}],
            "usage": {"prompt_tokens": words, "completion_tokens": len(content.split())},
        }


def embedding_of(text: str) -> list[float]:
    """Return the embedding of a text: a few numbers of its digest."""
    return [byte / 8 for byte in hashlib.sha256(text.encode()).digest()[:DIMENSIONS]]


@contextmanager
def fake_service(**options: Any) -> Iterator[FakeService]:
    """Run a service on a free port of this machine inside the block."""
    service = FakeService(**options)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"service": service}))
    server.daemon_threads = True
    service.url = f"http://127.0.0.1:{server.server_port}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    service: FakeService
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._is_allowed():
            self._send(200, {"object": "list", "data": [{"id": MODEL}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_allowed():
            return
        text = "\n".join(body["input"]) if "input" in body else body["messages"][-1]["content"]
        with self.service.counted(text, body) as number:
            fault = self.service.choose(text, number)
            if self.service.seconds:
                time.sleep(self.service.seconds)
            if fault is None:
                with self.service.lock:
                    self.service.answered[text] += 1
                self._send(200, self.service.answer_to(body, text))
            elif fault.drops:
                self.close_connection = True
                self.connection.close()
            else:
                self._send(fault.status, fault.body, fault.headers, raw=fault.raw)

    def _is_allowed(self) -> bool:
        is_allowed = self.headers.get("Authorization") == f"Bearer {self.service.key}"
        if not is_allowed:
            self._send(401, {"error": {"message": f"wrong key {self.headers.get('Authorization')}"}})
        return is_allowed

    def _send(self, status: int, body: Any, headers: dict[str, str] | None = None, *, raw: bytes | None = None) -> None:
        data = json.dumps(body).encode() if raw is None else raw
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)
        except OSError:  # a client that was killed
            self.close_connection = True
