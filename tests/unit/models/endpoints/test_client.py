"""Attempts at a request: which errors are repeated, how long, and what ends the job."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from pipeline.errors import EndpointUnavailable, ModelError, SpecError
from pipeline.models.endpoints.bodies import Refusal
from pipeline.models.endpoints.client import Attempts, Client, join_url
from pipeline.models.endpoints.limiter import Limiter
from pipeline.models.endpoints.replies import Again, Body, Fatal, Reply
from pipeline.spec.endpoint import Endpoint
from pipeline.testing.fake_clock import FakeClock

ENDPOINT = Endpoint(url="http://host/v1", model="m", messages="{{a}}", attempts=3, patience="100 s")
BAD = Again("ServerError", "500: out of order")
DONE = Body({"ok": 1})


class Script:
    """A transport that answers by a script, and repeats its last answer."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.sent: list[tuple[str, str, Mapping[str, str]]] = []

    def __call__(self, method: str, url: str, headers: Mapping[str, str], data: bytes | None, /) -> Reply:
        self.sent.append((method, url, headers))
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def client_of(*replies: Reply, **fields: Any) -> tuple[Client, Script, FakeClock]:
    script, clock = Script(*replies), FakeClock()
    endpoint = ENDPOINT.model_copy(update=fields)
    limiter = Limiter(clock, concurrency=4)
    return Client(endpoint, script, limiter, clock, clock.pause, lambda: 1.0), script, clock


def ask(client: Client, read: Callable[[Mapping[str, Any]], Any] = dict, **options: Any) -> tuple[Any, Attempts]:
    attempts = Attempts()
    return client.post("chat/completions", {"a": 1}, read, estimated=1.0, attempts=attempts, **options), attempts


def test_an_answer_at_once() -> None:
    client, script, clock = client_of(DONE)
    assert ask(client) == ({"ok": 1}, Attempts(1, 0))
    assert (script.sent[0][:2], clock.now) == (("POST", "http://host/v1/chat/completions"), 0.0)


@pytest.mark.parametrize("first", [BAD, Again("Timeout", "slow"), Again("ConnectionLost", "gone")])
def test_an_answer_after_an_error(first: Reply) -> None:
    client, _, clock = client_of(first, first, DONE)
    assert ask(client) == ({"ok": 1}, Attempts(3, 2))
    assert clock.now == 0.5 + 1.0


def test_a_pause_that_the_service_asks_for_holds_all_requests() -> None:
    client, _, clock = client_of(Again("ServerError", "429", 20.0, is_limit=True), DONE)
    assert ask(client)[1] == Attempts(2, 1)
    assert clock.now >= 20.0
    assert client.limiter.paused_until == 20.0


def test_a_row_that_fails_while_others_are_answered() -> None:
    client, _, clock = client_of(BAD)
    clock.during_pause[0] = lambda: setattr(client, "_answered", clock.now)  # another row
    result, attempts = ask(client)
    assert isinstance(result, Refusal)
    assert (result.reason, attempts.calls) == ("ServerError", 3)
    assert "in 3 attempts" in result.message


def test_a_service_that_answers_nobody() -> None:
    client, script, clock = client_of(BAD)
    with pytest.raises(EndpointUnavailable, match="does not answer") as caught:
        ask(client)
    assert 100 < clock.now < 200
    assert len(script.sent) > 3  # patience counts, not attempts
    assert caught.value.exit_code == 75


def test_a_limit_counts_as_no_attempt() -> None:
    client, script, _ = client_of(*[Again("ServerError", "429", 1.0, is_limit=True)] * 20, DONE)
    assert ask(client)[0] == {"ok": 1}
    assert len(script.sent) == 21


def test_patience_lasts_as_long_as_the_pause_that_was_asked_for() -> None:
    client, _, clock = client_of(Again("ServerError", "429", 600.0, is_limit=True), DONE)
    assert ask(client)[0] == {"ok": 1}
    assert clock.now >= 600


def test_an_answer_that_cannot_be_read_is_repeated() -> None:
    def read(body: Mapping[str, Any]) -> Any:
        if body["ok"] == 1:
            raise ValueError("no choices")
        return body

    client, _, _ = client_of(DONE, Body({"ok": 2}))
    assert ask(client, read) == ({"ok": 2}, Attempts(2, 1))


@pytest.mark.parametrize(("is_spent", "kind"), [(False, ModelError), (True, EndpointUnavailable)])
def test_what_ends_the_job(is_spent: bool, kind: type[Exception]) -> None:
    client, script, _ = client_of(Fatal("the service refuses the key", "401", "set it", is_spent))
    with pytest.raises(kind, match="refuses the key"):
        ask(client)
    assert len(script.sent) == 1


def test_a_refusal_is_final() -> None:
    client, script, _ = client_of(Refusal("BadRequest", "400: no"))
    assert ask(client)[0].reason == "BadRequest"
    assert len(script.sent) == 1


def test_nothing_is_sent_for_a_batch_that_has_failed() -> None:
    client, script, _ = client_of(DONE)
    assert isinstance(ask(client, is_over=lambda: True)[0], Refusal)
    assert script.sent == []


def test_secrets_are_resolved_where_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"key": "env:A_KEY", "headers": {"X-Team": "blue", "api-key": "env:B_KEY"}, "url": "env:A_PLACE"}
    monkeypatch.delenv("A_KEY", raising=False)
    monkeypatch.setenv("A_PLACE", "https://host/openai?api-version=3")
    monkeypatch.setenv("B_KEY", "0123456789")
    with pytest.raises(SpecError, match="not set"):
        client_of(DONE, **fields)
    monkeypatch.setenv("A_KEY", "9876543210")
    client, script, _ = client_of(DONE, **fields)
    ask(client)
    headers = script.sent[0][2]
    assert (headers["Authorization"], headers["api-key"], headers["X-Team"]) == (
        "Bearer 9876543210",
        "0123456789",
        "blue",
    )
    assert script.sent[0][1] == "https://host/openai/chat/completions?api-version=3"


def test_tokens_of_answers_improve_the_estimate() -> None:
    client, _, _ = client_of(Body({"usage": {"completion_tokens": 30}}))
    assert client.mean_answer_tokens is None
    ask(client)
    assert client.mean_answer_tokens == 30


@pytest.mark.parametrize(
    ("base", "url"),
    [
        ("http://h/v1/", "http://h/v1/models"),
        ("http://h", "http://h/models"),
        ("http://h/a?b=c", "http://h/a/models?b=c"),
    ],
)
def test_urls(base: str, url: str) -> None:
    assert join_url(base, "models") == url
