"""Prints and warnings of steps on their way to the driver."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.common.step_output import OutputLine
from pipeline.execution import step_messages
from pipeline.execution.step_messages import StepMessage, message_forwarder, read_message

LINE = OutputLine("f:build", "print", "f.py:9", "3 rows", "2026-01-01T00:00:00Z")


def test_a_place_is_forwarded_once_for_each_job(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    worker = SimpleNamespace(
        address="tcp://w",
        get_current_task=lambda: "score churn-1-00000-abc",
        log_event=lambda topic, message: sent.append((topic, message)),
    )
    monkeypatch.setattr(step_messages, "get_worker", lambda: worker)
    monkeypatch.setattr(step_messages, "_forwarded", {})
    for job in ("churn-1", "churn-1", "churn-2"):
        forward = message_forwarder(job)
        assert forward is not None
        forward(LINE)
    assert [topic for topic, _ in sent] == [step_messages.TOPIC] * 2
    assert read_message(sent[0][1]) == StepMessage("score churn-1-00000-abc", LINE, "tcp://w")


def test_outside_of_a_worker_nothing_is_forwarded() -> None:
    assert message_forwarder("churn-1") is None
