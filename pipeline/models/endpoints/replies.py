"""Decide what an answer of a service means: a result, another attempt, a reject, the end of the job. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from pipeline.models.endpoints.bodies import Refusal, shown

BASE_SECONDS = 0.5
"""Pause before the second attempt, at most; doubled for each further one."""
MOST_SECONDS = 60.0
"""Longest pause that a service's ``Retry-After`` does not ask for."""
MOST_RETRY_AFTER = 3600.0
"""Longest pause that a service may ask for."""


@dataclass(frozen=True, slots=True)
class Body:
    """The body of a successful answer."""

    value: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Again:
    """The same request may work later."""

    reason: str
    """As in `Refusal`, for a row that fails in the end."""
    message: str
    after: float | None = None
    """Seconds that the service asks for; None: it does not say."""
    is_limit: bool = False
    """True: the service puts requests off (429), whatever their rows."""


@dataclass(frozen=True, slots=True)
class Fatal:
    """No request will work."""

    message: str
    found: str
    next_step: str
    is_spent: bool = False
    """True: the account has no credit left."""


Reply = Body | Again | Refusal | Fatal


def read_reply(status: int, headers: Mapping[str, str], data: bytes, *, now: float) -> Reply:
    """Decide what an answer means.

    :param headers: with names in lower case.
    :param now: seconds since the epoch, for dates in ``Retry-After``.
    """
    try:
        body: Any = json.loads(data)
    except (ValueError, RecursionError):
        body = None
    if 200 <= status < 300:
        if not isinstance(body, dict):
            return Again("InvalidAnswer", f"{status} with a body that is no JSON object: {_text(data)}")
        # Some gateways answer 200 with an error inside.
        return _of_error(400, body, data) if "error" in body and "choices" not in body and body["error"] else Body(body)
    if status in (408, 409, 425, 429) or status >= 500 or 300 <= status < 400:
        found = _error(body)
        if status == 429 and (found.get("code") or found.get("type")) in ("insufficient_quota", "billing_not_active"):
            return _spent(body, data)
        after = retry_after(headers, now=now)
        message = f"{status}: {_message(body, data)}"
        return Again("ServerError", message, after, is_limit=status == 429)
    return _of_error(status, body, data)


def _of_error(status: int, body: Any, data: bytes) -> Reply:
    message = _message(body, data)
    if status in (401, 403):
        return Fatal(
            "the service refuses the key",
            f"{status}: {message}",
            "set the variable that endpoint.key names, for driver and workers, to a key that may use the model",
        )
    if status == 402:
        return _spent(body, data)
    if status in (404, 405):
        return Fatal(
            "the service has no such model or operation",
            f"{status}: {message}",
            "look at endpoint.url, the base of the service as …/v1, and at endpoint.model",
        )
    return Refusal(_reason(body, message), f"{status}: {message}")


def _spent(body: Any, data: bytes) -> Fatal:
    return Fatal(
        "the account at the service has no credit left",
        _message(body, data),
        "fill it up, and resume: paid answers are kept",
        is_spent=True,
    )


def _reason(body: Any, message: str) -> str:
    code, text = str(_error(body).get("code") or _error(body).get("type") or ""), message.lower()
    if "content_filter" in code or "content_policy" in code or "content management policy" in text:
        return "ContentFilter"
    if code == "context_length_exceeded" or "context length" in text or "context size" in text or "too long" in text:
        return "ContextLength"
    return "BadRequest"


def _error(body: Any) -> Mapping[str, Any]:
    """Return the error in a body: an object, or empty."""
    found = body.get("error") if isinstance(body, dict) else None
    return found if isinstance(found, dict) else {}


def _message(body: Any, data: bytes) -> str:
    """Return the text of an error, whatever the service calls it."""
    if isinstance(body, dict):
        found = body.get("error")
        options = (_error(body).get("message"), found, body.get("message"), body.get("detail"))
        text = next((one for one in options if isinstance(one, str) and one), None)
        if text is not None:
            return shown(text)
    return _text(data) or "no text"


def _text(data: bytes) -> str:
    return shown(data[:1000].decode("utf-8", "replace"))


def retry_after(headers: Mapping[str, str], *, now: float) -> float | None:
    """Return the seconds of ``retry-after-ms`` or ``retry-after`` (seconds, or a date); None without a valid one."""
    try:
        if "retry-after-ms" in headers:
            seconds = float(headers["retry-after-ms"]) / 1000
        elif "retry-after" in headers:
            text = headers["retry-after"].strip()
            is_number = text.replace(".", "", 1).isdigit()
            seconds = float(text) if is_number else parsedate_to_datetime(text).timestamp() - now
        else:
            return None
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(0.0, seconds), MOST_RETRY_AFTER)


def pause(attempt: int, after: float | None, *, random: float) -> float:
    """Return the seconds before the next attempt.

    :param attempt: number of the attempt that failed, from 1.
    :param after: seconds that the service asks for.
    :param random: from 0 to 1; spreads the attempts of many rows.
    """
    most = min(MOST_SECONDS, BASE_SECONDS * 2.0 ** min(attempt - 1, 16))
    return most * random if after is None else after + min(most, 1.0 + 0.1 * after) * random
