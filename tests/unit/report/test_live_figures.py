"""Figures of the live page: sums over receipts, events and running partitions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.events import RunningPartition
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.status import Status
from pipeline.report.live_figures import LiveFigures, stored_figures, straggler_line
from pipeline.testing.jobs import SmallJob, small_job, write_receipts


@pytest.fixture
def job(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path, sink=str(tmp_path / "out"), bad_every=10)


@pytest.fixture
def directory(tmp_path: Path, job: SmallJob) -> JobDirectory:
    directory = JobDirectory.create(tmp_path / "jobs", job.plan, job="small-1")
    directory.set_status(Status.RUNNING)
    write_receipts(directory, job)
    return directory


def live(figures: LiveFigures, **options: Any) -> dict[str, Any]:
    return figures.to_dict(**{"now": 100.0, "rows_done": figures.rows_done, "rate": 10.0, "left": 5.0, **options})


def test_figures_of_a_directory_are_the_sums_of_its_receipts(directory: JobDirectory) -> None:
    shown, ledger = stored_figures(directory), directory.ledger()
    receipts = list(ledger.done)
    assert shown["counts"] == ledger.rows.to_dict()
    assert shown["rows_done"] == sum(receipt.rows.input for receipt in receipts)
    assert (shown["partitions"]["done"], shown["partitions"]["waiting"]) == (len(receipts), 0)
    assert shown["reasons"] == ledger.reasons
    assert sum(worker["score"] for worker in shown["workers"]) == pytest.approx(
        sum(receipt.seconds.score for receipt in receipts), abs=0.01
    )
    assert sum(shown["durations"]["counts"]) == len(receipts)
    assert json.loads(json.dumps(shown)) == shown


def test_a_driver_that_counts_as_it_goes_has_the_same_figures(directory: JobDirectory) -> None:
    ledger = directory.ledger()
    empty = LiveFigures.of(directory, directory.ledger(()))
    for receipt in ledger.done:
        empty.add(receipt)
    again = LiveFigures.of(directory, ledger)
    for name in ("counts", "done", "rows_done", "workers", "durations", "engines", "peak_memory"):
        assert getattr(empty, name) == getattr(again, name), name
    assert +empty.reasons == again.reasons


def test_events_and_running_partitions_are_counted(directory: JobDirectory) -> None:
    figures = LiveFigures.of(directory, directory.ledger(()))
    for event in (
        {"event": "partition", "outcome": "retry", "reason": "its worker died"},
        {"event": "partition", "outcome": "retry", "reason": "OSError: disk"},
        {"event": "partition", "outcome": "split", "reason": "worker killed for memory", "split_reason": "memory"},
        {"event": "straggler", "action": "backup", "is_over": False},
        {"event": "straggler", "action": "backup", "is_over": True},
    ):
        figures.add_event(event)
    figures.add_parts(2)
    planned = figures.planned
    shown = live(figures, running=[RunningPartition("00000", "tcp://w", 25, 5, 1.0, 0.1)], rows_done=5)
    counted = [shown[name] for name in ("retries", "lost_workers", "splits", "backups")]
    assert counted == [2, 2, 1, 1]
    assert shown["batch"]["backoffs"] == 1
    assert shown["partitions"] == {"planned": planned, "done": 0, "running": 1, "waiting": planned - 1}
    assert shown["rows_done"] == 5


@pytest.mark.parametrize(
    ("times", "line"), [([1.0, 1.0], None), ([1.0, 1.0, 1.0], 4.0), ([10.0, 10.0, 10.0], 15.0), ([1, 5, 9], 28.721)]
)
def test_straggler_line_is_the_limit_of_the_driver(times: list[float], line: float | None) -> None:
    assert straggler_line(np.asarray(times, float)) == line
