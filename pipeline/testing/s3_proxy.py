"""Run a loopback proxy before an S3 server; it loses replies, resets connections and says SlowDown, by rules."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Action = Literal["lose reply", "reset", "slow down", "fail"]
_HOP_BY_HOP = {"connection", "transfer-encoding", "keep-alive", "expect"}
_ERRORS = {"slow down": (503, "SlowDown", "Please reduce your request rate."), "fail": (500, "InternalError", "")}


@dataclass
class Rule:
    """A rule for the next requests that match.

    - ``lose reply``: the server carries out the request, and the connection ends before the answer;
    - ``reset``: the connection ends before the request reaches the server;
    - ``slow down``, ``fail``: 503 SlowDown or 500 InternalError instead of an answer of the server.
    """

    action: Action
    method: str
    path: str
    """Regular expression, searched for in the path with its query."""
    times: int = 1
    done: int = 0
    """Number of requests to which the rule was applied."""


@dataclass
class Proxy:
    """A running proxy."""

    endpoint: str
    rules: list[Rule] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)
    """``METHOD path`` of every request."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, action: Action, method: str, path: str, *, times: int = 1) -> Rule:
        """Arm a rule."""
        rule = Rule(action, method, path, times)
        self.rules.append(rule)
        return rule

    def take(self, method: str, path: str) -> Rule | None:
        """Return the rule for a request and count it as applied; None if no rule matches."""
        with self._lock:
            self.seen.append(f"{method} {path}")
            for rule in self.rules:
                if rule.done < rule.times and rule.method == method and re.search(rule.path, path):
                    rule.done += 1
                    return rule
        return None


@contextmanager
def proxy_s3(endpoint: str) -> Iterator[Proxy]:
    """Run a proxy in front of the server at ``endpoint`` on a free port of 127.0.0.1."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.target = urlsplit(endpoint).netloc
    server.proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, name="s3-proxy", daemon=True)
    thread.start()
    try:
        yield server.proxy
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    target: str
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore a client that hung up."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing."""

    def _serve(self) -> None:
        body = self._body()
        rule = self.server.proxy.take(self.command, self.path)
        action = rule.action if rule else None
        if action == "reset":
            self._hang_up()
        elif action in _ERRORS:
            self._refuse(*_ERRORS[action])
        else:
            status, headers, answer = self._forward(body)
            if action == "lose reply":
                self._hang_up()
            else:
                self._reply(status, headers, answer)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _serve  # noqa: N815 - http.server names them

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_BY_HOP}
        connection = http.client.HTTPConnection(self.server.target, timeout=60)
        try:
            connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _reply(self, status: int, headers: list[tuple[str, str]], answer: bytes) -> None:
        self.send_response_only(status)
        has_length = False
        for name, value in headers:
            has_length |= name.lower() == "content-length"
            if name.lower() not in _HOP_BY_HOP:
                self.send_header(name, value)
        if not has_length:
            self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        self._reply(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else text)

    def _hang_up(self) -> None:
        """End the connection with a reset, without a byte of an answer."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
