"""Answers of a service that outlive the attempt that paid them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.jobs.answers import StoredAnswers
from pipeline.storage.store import open_store


def test_the_next_attempt_takes_each_answer_once(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    first = StoredAnswers(store, "00003")
    assert first.take("a") is None
    for value in (1, 2):
        first.keep("a", {"value": value})
    first.flush()
    first.keep("b", {"value": "ü\u2028"})
    first.flush()
    first.keep("lost", {"value": 0})
    for partition in ("00003", "00003.1"):
        second = StoredAnswers(store, partition)
        found = [second.take(key) for key in ("a", "a", "a", "b", "lost")]
        assert sorted(one["value"] for one in found[:2] if one) == [1, 2]
        assert found[2:] == [None, {"value": "ü\u2028"}, None]


def test_they_are_removed_with_their_partition(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for partition in ("00003", "00004.1"):
        answers = StoredAnswers(store, partition)
        answers.keep("a", {})
        answers.flush()
        answers.remove()
    # The other parts of a split one may need them.
    assert list(store.list_folders("answers")) == ["00004"]


def test_damage_costs_a_call_and_no_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = open_store(tmp_path)
    store.replace("answers/00003/x-0.jsonl", b'["a", {"value": 1}]\n["b", {"val')
    answers = StoredAnswers(store, "00003")
    assert (answers.take("a"), answers.take("b")) == ({"value": 1}, None)
    assert "cannot be read" in caplog.text
