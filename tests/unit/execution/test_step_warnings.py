"""Warnings of steps on a worker."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.execution import step_warnings
from pipeline.execution.step_warnings import StepWarning, _Forwarder, read_warning


def test_first_of_a_kind_is_forwarded_from_a_task_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []
    worker = SimpleNamespace(address="tcp://w", log_event=lambda topic, message: sent.append((topic, message)))
    forwarder = _Forwarder(None)
    assert forwarder.is_due("UserWarning f.py:9 old", "f.py:9: UserWarning: old")  # of another user of the worker
    monkeypatch.setattr(step_warnings, "_current_task", lambda: (worker, "score churn-1-00000-abc"))
    for _ in range(2):
        assert not forwarder.is_due("UserWarning f.py:9 old", "f.py:9: UserWarning: old")
    ((topic, message),) = sent
    assert topic == step_warnings.TOPIC
    expected = StepWarning("score churn-1-00000-abc", "UserWarning f.py:9 old", "f.py:9: UserWarning: old", "tcp://w")
    assert read_warning(message) == expected
