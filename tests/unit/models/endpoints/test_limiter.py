"""Limits of a process: open requests, requests and tokens a minute."""

from __future__ import annotations

import threading

import pytest

from pipeline.models.endpoints.limiter import Limiter
from pipeline.testing.fake_clock import FakeClock


def test_requests_of_a_minute() -> None:
    clock = FakeClock()
    limiter = Limiter(clock)
    limiter.set_limits(concurrency=1000, requests_per_minute=60, tokens_per_minute=None)
    sent = 0
    for _ in range(600):
        if limiter._wait_for(1) <= 0:
            limiter.acquire(1, is_over=lambda: False)
            sent += 1
        clock.advance(0.1)
    assert 59 <= sent <= 61


def test_tokens_are_corrected_by_what_a_request_took() -> None:
    clock = FakeClock()
    limiter = Limiter(clock)
    limiter.set_limits(concurrency=10, requests_per_minute=None, tokens_per_minute=6000)  # a burst is 100
    assert limiter.acquire(100, is_over=lambda: False)
    assert limiter._wait_for(50) == pytest.approx(0.5)
    limiter.release(tokens=300, estimated=100)
    assert limiter._wait_for(50) == pytest.approx(2.5)
    clock.advance(2.5)
    assert limiter._wait_for(50) == 0


def test_a_request_above_the_burst_passes() -> None:
    limiter = Limiter(FakeClock())
    limiter.set_limits(concurrency=10, requests_per_minute=None, tokens_per_minute=60)
    assert limiter.acquire(5_000, is_over=lambda: False)
    assert limiter._wait_for(1) > 4_900


def test_open_requests() -> None:
    limiter = Limiter()
    limiter.set_limits(concurrency=2, requests_per_minute=None, tokens_per_minute=None)
    assert all(limiter.acquire(1, is_over=lambda: False) for _ in range(2))
    waiting = threading.Thread(target=limiter.acquire, args=(1,), kwargs={"is_over": lambda: False})
    waiting.start()
    assert limiter.open == 2
    limiter.release(tokens=1, estimated=1)
    waiting.join(5)
    assert not waiting.is_alive()
    assert limiter.open == 2


def test_a_pause_holds_everything() -> None:
    clock = FakeClock()
    limiter = Limiter(clock)
    limiter.set_limits(concurrency=2, requests_per_minute=None, tokens_per_minute=None)
    limiter.pause(3.0)
    limiter.pause(1.0)
    assert limiter._wait_for(1) == 3.0
    clock.advance(3.0)
    assert limiter._wait_for(1) == 0


def test_a_request_that_is_not_needed_any_more() -> None:
    limiter = Limiter()
    limiter.pause(60.0)
    assert not limiter.acquire(1, is_over=lambda: True)
    assert limiter.open == 0


def test_a_new_share_keeps_what_was_used() -> None:
    clock = FakeClock()
    limiter = Limiter(clock)
    limits = {"concurrency": 1, "tokens_per_minute": None}
    limiter.set_limits(requests_per_minute=600, **limits)  # type: ignore[arg-type]
    for _ in range(10):
        limiter.requests.take(1)
    limiter.set_limits(requests_per_minute=300, **limits)  # type: ignore[arg-type]
    assert limiter._wait_for(1) == pytest.approx(0.2)
