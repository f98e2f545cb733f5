"""Warnings of steps: each kind is shown once."""

from __future__ import annotations

import logging
import warnings

import pytest

from pipeline.common import warn_once


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging, "lastResort", logging.StreamHandler())
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


def test_a_warning_is_shown_once_though_the_filters_change(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *others: shown.append(str(message)))
    warn_once.install()
    warn_once.install()
    for number in (1, 1, 2):
        with warnings.catch_warnings(action="always"):
            warnings.warn(f"old feature {number}", UserWarning, stacklevel=1)
    assert shown == ["old feature 1", "old feature 2"]


def test_a_record_without_handler_is_shown_once_for_its_template() -> None:
    taken: list[str] = []

    class Forwarded(warn_once.WarnOnce):
        def is_due(self, kind: str, text: str) -> bool:
            taken.extend([text] if self.is_first(kind) else [])
            return False

    handler = Forwarded(None)
    for row in (1, 2):
        handler.handle(logging.LogRecord("mine", logging.WARNING, "", 1, "row %d odd", (row,), None))
    assert taken == ["WARNING mine: row 1 odd"]


def test_endless_kinds_are_not_remembered() -> None:
    handler = warn_once.WarnOnce(None)
    assert sum(handler.is_first(str(number)) for number in range(1000)) == warn_once.MAX_KINDS
