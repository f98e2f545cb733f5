"""Callbacks: each event reaches its method, and an error in one callback affects no other."""

from __future__ import annotations

import logging

import pytest

from pipeline.common.rows import RowCounts
from pipeline.events import Callback, ClusterReady, Event, JobEnded, PartitionEnded, RoundStarted, StatusChanged, notify

EVENTS: list[Event] = [
    StatusChanged("j", "PLANNED", "RUNNING"),
    ClusterReady("j", 2, 4, "http://127.0.0.1:8787/status"),
    RoundStarted("j", 0, 4, 1, 100, 25),
    PartitionEnded("j", 0, "00000", "done", RowCounts(10, 9, 1, 0)),
    JobEnded("j", "SUCCEEDED", RowCounts(), "out", "dir"),
]


class Seen(Callback):
    def __init__(self) -> None:
        self.events: list[tuple[str, Event]] = []

    def on_status(self, event: StatusChanged) -> None:
        self.events.append(("status", event))

    def on_cluster(self, event: ClusterReady) -> None:
        self.events.append(("cluster", event))

    def on_round(self, event: RoundStarted) -> None:
        self.events.append(("round", event))

    def on_partition(self, event: PartitionEnded) -> None:
        self.events.append(("partition", event))

    def on_end(self, event: JobEnded) -> None:
        self.events.append(("end", event))


class Broken(Callback):
    def on_partition(self, event: PartitionEnded) -> None:
        raise ZeroDivisionError


def test_events_reach_their_methods() -> None:
    seen = Seen()
    for event in EVENTS:
        notify([Callback(), seen], event)
    assert seen.events == list(zip(["status", "cluster", "round", "partition", "end"], EVENTS, strict=True))


def test_a_broken_callback_is_logged_and_passed_over(caplog: pytest.LogCaptureFixture) -> None:
    seen = Seen()
    with caplog.at_level(logging.ERROR):
        for event in EVENTS:
            notify([Broken(), seen], event)
    assert len(seen.events) == 5
    assert [record.getMessage() for record in caplog.records] == [
        "callback Broken failed at on_partition; the job continues"
    ]


def test_a_callback_cannot_swallow_an_interrupt() -> None:
    class Stopped(Callback):
        def on_status(self, event: StatusChanged) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        notify([Stopped()], EVENTS[0])
