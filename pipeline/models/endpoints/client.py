"""`Client`: send requests to a service, within its limits, until each has an answer or is refused."""

from __future__ import annotations

import json
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import urlsplit, urlunsplit

from pipeline.common.secrets import redact, resolve_reference
from pipeline.errors import EndpointUnavailable, ModelError
from pipeline.models.endpoints.bodies import Refusal, Usage
from pipeline.models.endpoints.limiter import Limiter
from pipeline.models.endpoints.replies import MOST_SECONDS, Again, Body, Fatal, Reply, pause, read_reply
from pipeline.spec.endpoint import Endpoint

logger = logging.getLogger(__name__)
SLICE_SECONDS = 0.25
"""Longest pause between two looks whether a request is still needed."""
MOST_BODY = 64 << 20
"""Bytes of an answer that are read."""


class Transport(Protocol):
    """Sends one request."""

    def __call__(self, method: str, url: str, headers: Mapping[str, str], data: bytes | None, /) -> Reply:
        """Return what the answer means; a lost connection or a time-out is an `Again`."""


@dataclass
class Attempts:
    """Attempts at one request, for the figures of a receipt."""

    calls: int = 0
    """Requests that were sent."""
    failed: int = 0
    """Those of them that were sent again."""


@dataclass
class Client:
    """The requests of a process to one service. Threads share it."""

    endpoint: Endpoint
    transport: Transport
    limiter: Limiter = field(default_factory=Limiter)
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random
    _answered: float = field(init=False)
    """Time of the last answer to any request; at first, the start."""
    _answers: int = field(default=0, init=False)
    _answer_tokens: float = field(default=0.0, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)

    def __post_init__(self) -> None:
        self._answered = self.clock()
        self._url = resolve_reference(self.endpoint.url, where="endpoint.url")
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "application/json",
            "User-Agent": "dask-pipeline",
        }
        for name, value in self.endpoint.secrets():
            secret = resolve_reference(
                value, where="endpoint.key" if value == self.endpoint.key else "endpoint.headers"
            )
            is_bearer = name == "Authorization" and value == self.endpoint.key
            self._headers[name] = f"Bearer {secret}" if is_bearer else secret

    @property
    def mean_answer_tokens(self) -> float | None:
        """Mean tokens of the answers so far; None before the first one."""
        with self._lock:
            return self._answer_tokens / self._answers if self._answers else None

    def start_batch(self) -> None:
        """Count the patience from now on, if no request is open: nothing was asked meanwhile."""
        with self._lock:
            if not self.limiter.open:
                self._answered = max(self._answered, self.clock())

    def post(
        self,
        operation: str,
        body: Mapping[str, Any],
        read: Callable[[Mapping[str, Any]], Any],
        *,
        estimated: float,
        attempts: Attempts,
        is_over: Callable[[], bool] = lambda: False,
    ) -> Any:
        """Send a request until it has an answer, and return what ``read`` makes of its body; or a `Refusal`.

        :param operation: ``chat/completions`` or ``embeddings``.
        :param read: raises ValueError for a body that is unreadable.
        :param estimated: tokens that the request will take, for the limits.
        :param is_over: True if the answer is not needed any more; then a `Refusal` is returned.
        :raises ModelError: when no request will work: the key is refused, there is no such model.
        :raises EndpointUnavailable: when the service has answered nothing for `Endpoint.patience`.
        """
        data = json.dumps(body, ensure_ascii=False).encode("utf-8", "replace")
        first, tries, limited = self.clock(), 0, 0
        while self.limiter.acquire(estimated, is_over=is_over):
            tokens = 0.0
            attempts.calls += 1
            try:
                reply = self.transport("POST", join_url(self._url, operation), self._headers, data)
                if isinstance(reply, Body):
                    usage = Usage.from_body(reply.value)
                    tokens = usage.tokens
                    reply = self._read(reply, read, usage)
            finally:
                self.limiter.release(tokens=tokens, estimated=estimated)
            if isinstance(reply, Fatal):
                raise fatal_error(self.endpoint, reply)
            if not isinstance(reply, Again):
                with self._lock:
                    self._answered = self.clock()
                return reply
            attempts.failed += 1
            limited, tries = limited + reply.is_limit, tries + (not reply.is_limit)
            if tries >= self.endpoint.attempts and self._answered > first:
                # Others were answered meanwhile: it is the row.
                return Refusal(reply.reason, f"{reply.message}, in {tries} attempts")
            self._check_patience(reply)
            seconds = pause(tries + limited, reply.after, random=self.random())
            if reply.is_limit:
                self.limiter.pause(reply.after if reply.after is not None else min(seconds, MOST_SECONDS))
            self._wait(seconds, is_over)
        return Refusal("Dropped", "the attempt ended before the service was asked")

    def _read(self, reply: Body, read: Callable[[Mapping[str, Any]], Any], usage: Usage) -> Any:
        try:
            result = read(reply.value)
        except ValueError as error:
            return Again("InvalidAnswer", f"the service's answer cannot be read: {error}")
        with self._lock:
            self._answers += 1
            self._answer_tokens += usage.completion_tokens
        return result

    def _check_patience(self, reply: Again) -> None:
        seconds = self.clock() - self._answered
        limit = self.endpoint.patience_seconds
        # A service may ask for a pause that is longer than the patience: that is an answer, too.
        if seconds > limit + (reply.after or 0.0):
            raise EndpointUnavailable(
                "the service does not answer",
                where=service_text(self.endpoint),
                found=f"{redact(reply.message)}; no answer for {seconds:,.0f} s",
                expected=f"an answer within endpoint.patience, {limit:,.0f} s",
                next_step="start the service, or wait until it answers again; then resume: paid answers are kept",
            )

    def _wait(self, seconds: float, is_over: Callable[[], bool]) -> None:
        end = self.clock() + seconds
        while not is_over() and (left := end - self.clock()) > 0.0:
            self.sleep(min(left, SLICE_SECONDS))

    def get(self, operation: str) -> Reply:
        """Send one request without a body, and return what its answer means."""
        return self.transport("GET", join_url(self._url, operation), self._headers, None)


def join_url(base: str, operation: str) -> str:
    """Return the URL of an operation; the query of the base, such as ``?api-version=…``, stays."""
    parts = urlsplit(base)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{operation}"))


def service_text(endpoint: Endpoint) -> str:
    """Return model and place of a service for messages."""
    return f"{endpoint.model} at {endpoint.url}"


def fatal_error(endpoint: Endpoint, reply: Fatal) -> ModelError | EndpointUnavailable:
    """Return the error that ends a job at once."""
    kind = EndpointUnavailable if reply.is_spent else ModelError
    return kind(reply.message, where=service_text(endpoint), found=redact(reply.found), next_step=reply.next_step)


def http_transport(endpoint: Endpoint) -> Transport:
    """Return a transport that keeps connections open, and uses the proxy of the environment (``HTTPS_PROXY``)."""
    from urllib.request import getproxies, proxy_bypass

    import urllib3

    base = resolve_reference(endpoint.url, where="endpoint.url")
    parts = urlsplit(base)
    options: dict[str, Any] = {"maxsize": endpoint.concurrency, "block": False, "retries": False}
    proxy = None if proxy_bypass(parts.hostname or "") else getproxies().get(parts.scheme)
    pool = urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)
    timeout = urllib3.Timeout(connect=min(10.0, endpoint.seconds), read=endpoint.seconds)

    def send(method: str, url: str, headers: Mapping[str, str], data: bytes | None, /) -> Reply:
        try:
            response = pool.request(
                method, url, headers=dict(headers), body=data, timeout=timeout, preload_content=False, redirect=False
            )
            try:
                content = _content(response.stream(1 << 16), seconds=endpoint.seconds)
            except BaseException:
                response.close()
                raise
            response.release_conn()
        except (urllib3.exceptions.ReadTimeoutError, urllib3.exceptions.ConnectTimeoutError, TimeoutError) as error:
            return Again("Timeout", f"no answer within {endpoint.seconds:g} s ({type(error).__name__})")
        except (urllib3.exceptions.HTTPError, OSError) as error:
            return Again("ConnectionLost", redact(f"{type(error).__name__}: {error}")[:300])
        known = {name.lower(): value for name, value in response.headers.items()}
        return read_reply(response.status, known, content, now=time.time())

    return send


def _content(parts: Any, *, seconds: float) -> bytes:
    """Return the content of an answer that comes in parts.

    :raises TimeoutError: when it takes too long as a whole.
    """
    found, deadline = bytearray(), time.monotonic() + seconds
    for part in parts:
        found += part
        if time.monotonic() > deadline:
            raise TimeoutError("the answer took too long as a whole")
        if len(found) > MOST_BODY:
            raise OSError(f"an answer of more than {MOST_BODY >> 20} MiB")
    return bytes(found)


def open_client(endpoint: Endpoint) -> Client:
    """Return a client of the service, which opens connections when they are needed."""
    return Client(endpoint, http_transport(endpoint))


def rows_of(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Return ``rows`` in groups of ``size``."""
    return [rows[start : start + size] for start in range(0, len(rows), size)]
