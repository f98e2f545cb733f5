"""A scheduler that is given by its address."""

from __future__ import annotations

import socket

import pytest

from pipeline.errors import SchedulerLost
from pipeline.execution.clusters import address
from pipeline.execution.clusters.address import ExistingScheduler
from pipeline.settings import Settings


def test_a_dead_address_fails_long_before_the_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask's client would try for scheduler_timeout, 30 s by default."""
    monkeypatch.setattr(address, "REFUSED_SECONDS", 0.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    with pytest.raises(SchedulerLost) as caught, ExistingScheduler(Settings(), f"tcp://127.0.0.1:{port}").open():
        pass
    assert caught.value.found == f"127.0.0.1:{port}: Connection refused"


def test_a_scheduler_that_listens_later_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = ["refused", "refused", None]
    monkeypatch.setattr(address, "_connection_error", lambda host, port, *, timeout: answers.pop(0))
    monkeypatch.setattr(address, "REFUSED_PAUSE", 0.0)
    ExistingScheduler(Settings(), "tcp://127.0.0.1:1")._check_listens()
    assert answers == []


def test_start_is_described() -> None:
    text = ExistingScheduler(Settings(no_workers_timeout=90.0), "tcp://host:8786").describe_start()
    assert text == "those of tcp://host:8786, at most 1 min 30 s"
