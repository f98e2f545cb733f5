"""Deliver one message to one hook: signed, retried, and within its time limit."""

from __future__ import annotations

import hashlib
import hmac
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from threading import Event
from typing import Any

from pipeline.common.secrets import redact, resolve_reference
from pipeline.errors import PipelineError
from pipeline.spec.parts import Hook

FIRST_PAUSE = 1.0
"""Seconds before the second attempt; each pause is twice the one before."""
LONGEST_PAUSE = 60.0
_AGAIN = frozenset({408, 425, 429})
_READ_BYTES = 1 << 16
_SHOWN = 200


@dataclass(frozen=True)
class Message:
    """One notification for a hook."""

    key: str
    """Unique per notification; all attempts at one notification share it."""
    event: str
    body: bytes
    """One JSON object."""
    variables: Mapping[str, str]
    """Environment variables for a command, with the facts of the body."""


@dataclass(frozen=True)
class DeliveryAttempt:
    """The outcome of one attempt."""

    ok: bool
    reason: str = ""
    is_final: bool = False
    """True if another attempt would have the same outcome."""
    wait: float | None = None
    """Seconds that the server asked to wait (``Retry-After``)."""


@dataclass(frozen=True)
class Delivery:
    """The outcome of a message after its last attempt."""

    hook: str
    event: str
    ok: bool
    attempts: int
    reason: str = ""


def pause(attempt: DeliveryAttempt, *, number: int, attempts: int) -> float | None:
    """Return the seconds until the next attempt; None if there is no next attempt.

    :param number: number of the attempt that ended, from 1.
    """
    if attempt.ok or attempt.is_final or number >= attempts:
        return None
    own = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (number - 1))
    return own if attempt.wait is None else min(LONGEST_PAUSE, max(own, attempt.wait))


def is_final_status(code: int) -> bool:
    """True if a web server that returned ``code`` will return it again: no retry."""
    return code < 500 and code not in _AGAIN


def sign(secret: str, *, timestamp: str, body: bytes) -> str:
    """Return ``sha256=<hex>``: HMAC-SHA256 over the timestamp, a dot, and the body."""
    return "sha256=" + hmac.new(secret.encode(), timestamp.encode() + b"." + body, hashlib.sha256).hexdigest()


def deliver(
    hook: Hook, message: Message, *, is_over: Event, send: Callable[[Hook, Message], DeliveryAttempt] | None = None
) -> Delivery:
    """Retry until the message is delivered, no attempt is left, or ``is_over`` is set."""
    number, attempt = 0, DeliveryAttempt(False, "it was not tried")
    while not is_over.is_set():
        number += 1
        try:
            attempt = (send or _send)(hook, message)
        except PipelineError as error:
            attempt = DeliveryAttempt(False, f"{error.message}: {error.found}", is_final=True)
        except Exception as error:
            attempt = DeliveryAttempt(False, f"{type(error).__name__}: {error}")
        wait = pause(attempt, number=number, attempts=hook.attempts)
        if wait is None or is_over.wait(wait):
            break
    return Delivery(hook.name, message.event, attempt.ok, number, redact(attempt.reason)[:_SHOWN])


def _send(hook: Hook, message: Message) -> DeliveryAttempt:
    return post(hook, message) if hook.url is not None else run_command(hook, message)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuse redirects: a message signed for one server is not sent to another."""

    def redirect_request(self, *arguments: Any, **options: Any) -> None:
        return None


def post(hook: Hook, message: Message) -> DeliveryAttempt:
    """Send the message to a web server.

    :raises PipelineError: if a reference to a secret cannot be resolved.
    """
    url = resolve_reference(hook.url or "", where="hooks.url")
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "dask-batch-pipeline",
        "Idempotency-Key": message.key,
        "X-Pipeline-Event": message.event,
        "X-Pipeline-Timestamp": timestamp,
    }
    if hook.secret is not None:
        secret = resolve_reference(hook.secret, where="hooks.secret")
        headers["X-Pipeline-Signature"] = sign(secret, timestamp=timestamp, body=message.body)
    request = urllib.request.Request(url, data=message.body, headers=headers, method="POST")
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=hook.timeout) as answer:
            answer.read(_READ_BYTES)
            return DeliveryAttempt(True)
    except urllib.error.HTTPError as error:
        with error:
            wait = error.headers.get("Retry-After", "")
        seconds = float(wait) if wait.isdigit() else None
        return DeliveryAttempt(
            False, f"HTTP {error.code} {error.reason}", is_final=is_final_status(error.code), wait=seconds
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        return DeliveryAttempt(False, f"{type(error).__name__}: {reason}", is_final=isinstance(error, ValueError))


def run_command(hook: Hook, message: Message) -> DeliveryAttempt:
    """Run the hook's command in its own process group, which is killed at the end or after the timeout."""
    words = list(hook.command or ())
    try:
        process = subprocess.Popen(
            words,
            env={**os.environ, **message.variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        return DeliveryAttempt(False, f"{words[0]}: {error.strerror or error}", is_final=True)
    try:
        _, errors = process.communicate(message.body, timeout=hook.timeout)
    except subprocess.TimeoutExpired:
        return DeliveryAttempt(False, f"{words[0]} took longer than {hook.timeout:g} s")
    finally:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
    if process.returncode == 0:
        return DeliveryAttempt(True)
    output = " ".join(errors.decode(errors="replace").split())
    return DeliveryAttempt(False, f"{words[0]} ended with {process.returncode}" + (f": {output}" if output else ""))
