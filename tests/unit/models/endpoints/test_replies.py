"""What an answer of a service means."""

from __future__ import annotations

import json
from email.utils import formatdate
from typing import Any

import pytest

from pipeline.models.endpoints.bodies import Refusal
from pipeline.models.endpoints.replies import Again, Body, Fatal, pause, read_reply, retry_after

NOW = 1_800_000_000.0


def error(message: str = "no", **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, **fields}}


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        (200, {"choices": []}, Body, ""),
        (200, b"<html>", Again, "InvalidAnswer"),
        (200, [1], Again, "InvalidAnswer"),
        (200, error(), Refusal, "BadRequest"),
        (400, error(), Refusal, "BadRequest"),
        (400, error(code="content_filter"), Refusal, "ContentFilter"),
        (400, error(code="context_length_exceeded"), Refusal, "ContextLength"),
        (400, error("This model's maximum context length is 4096 tokens"), Refusal, "ContextLength"),
        (
            400,
            {"object": "error", "message": "the request exceeds the available context size"},
            Refusal,
            "ContextLength",
        ),
        (413, b"too large", Refusal, "BadRequest"),
        (422, {"detail": "wrong"}, Refusal, "BadRequest"),
        (429, error(), Again, "ServerError"),
        (429, error(code="insufficient_quota"), Fatal, ""),
        (402, error(), Fatal, ""),
        (401, error(), Fatal, ""),
        (403, b"", Fatal, ""),
        (404, error(), Fatal, ""),
        (408, b"", Again, "ServerError"),
        (500, b"", Again, "ServerError"),
        (503, error(), Again, "ServerError"),
        (302, b"", Again, "ServerError"),
    ],
)
def test_meaning(status: int, body: Any, kind: type, reason: str) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    found = read_reply(status, {}, data, now=NOW)
    assert type(found) is kind
    assert getattr(found, "reason", "") == reason


def test_only_429_is_a_limit() -> None:
    found = [read_reply(status, {"retry-after": "7"}, b"", now=NOW) for status in (429, 503)]
    assert [(one.is_limit, one.after) for one in found if isinstance(one, Again)] == [(True, 7.0), (False, 7.0)]


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "1.5"}, 1.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0),
        ({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "999999"}, 3600.0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=NOW) == seconds


def test_pauses_grow_and_spread() -> None:
    assert [pause(attempt, None, random=1.0) for attempt in (1, 2, 3, 20)] == [0.5, 1.0, 2.0, 60.0]
    assert pause(3, None, random=0.25) == 0.5
    assert 10.0 == pause(1, 10.0, random=0.0) < pause(1, 10.0, random=1.0) <= 12.0
