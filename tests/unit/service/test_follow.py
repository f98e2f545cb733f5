"""Following a job from its directory: the same events as in its own callbacks, and its end."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.errors import DriverLost
from pipeline.events import Event, PartitionEnded, ProgressMade, RoundStarted, RunningPartition, StatusChanged
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.layout import heartbeat_path, lease_path
from pipeline.jobs.lease import Holder, acquire_lease, hold_lease, identify
from pipeline.jobs.progress_file import ProgressRecord, write_progress
from pipeline.jobs.status import Status
from pipeline.service.follow import EndMonitor, Follower
from pipeline.service.queue import Submission, put_submission
from pipeline.service.servers import ServerRecord, put_server
from pipeline.storage.store import open_store
from pipeline.testing.jobs import SmallJob, small_job, write_receipt


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"), bad_every=10)


@pytest.fixture
def job(tmp_path: Path, small: SmallJob) -> JobDirectory:
    return JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")


def kinds(events: list[Event]) -> list[str]:
    return [type(event).__name__ for event in events]


def test_the_first_look_shows_how_it_stands(job: JobDirectory, small: SmallJob) -> None:
    """The first poll reports the status, and the round with its completed rows."""
    write_receipt(job, small, small.plan.partitions[0])
    job.set_status(Status.RUNNING)
    status, round = Follower(job).poll()
    assert isinstance(status, StatusChanged)
    assert status.after == "RUNNING"
    assert isinstance(round, RoundStarted)
    assert (round.partitions, round.done, round.rows, round.rows_done) == (3, 1, 75, 30)


def test_progress_inside_partitions_is_that_of_the_present_driver(job: JobDirectory, small: SmallJob) -> None:
    made = ProgressMade(job.id, 0, 75, 10, 3, 0, (RunningPartition("00000", "w", 30, 10, 2.0, 1.0),))
    record = ProgressRecord.make(made, epoch=1, rows_per_second=5.0, seconds_left=13.0)
    follower = Follower(job)
    list(follower.poll())
    job.set_status(Status.RUNNING)
    with hold_lease(job.store, lease_seconds=60):
        write_progress(job.store, record)
        assert made in list(follower.poll())
        assert list(follower.poll()) == []
    with hold_lease(job.store, lease_seconds=60):
        write_progress(job.store, replace(record, time="later"))
        assert list(follower.poll()) == []


def test_later_polls_report_each_change_once(job: JobDirectory, small: SmallJob) -> None:
    """Later polls report each status, receipt and event once."""
    follower = Follower(job)
    list(follower.poll())
    assert list(follower.poll()) == []
    job.set_status(Status.RUNNING)
    for partition in small.plan.partitions[:2]:
        write_receipt(job, small, partition)
    job.events.append("partition", partition="00002", outcome="retry", attempt=1, reason="disk")
    events = list(follower.poll())
    assert kinds(events) == ["StatusChanged", "PartitionEnded", "PartitionEnded", "PartitionEnded"]
    assert sum(event.rows.rejected for event in events if isinstance(event, PartitionEnded)) == 4
    assert list(follower.poll()) == []


def test_completed_partitions_are_not_reported_again(job: JobDirectory, small: SmallJob) -> None:
    """Receipts counted in a ``RoundStarted`` event are not reported again."""
    follower = Follower(job)
    list(follower.poll())
    job.events.append("round_started", round=0, partitions=3, done=0)
    write_receipt(job, small, small.plan.partitions[0])
    (round,) = follower.poll()
    assert isinstance(round, RoundStarted)
    assert (round.done, round.rows_done) == (1, 30)
    write_receipt(job, small, small.plan.partitions[1])
    assert kinds(list(follower.poll())) == ["PartitionEnded"]


def test_the_end_has_the_report(job: JobDirectory, small: SmallJob) -> None:
    """The end event has status, reason and report."""
    job.set_status(Status.FAILED, reason="bad file")
    ended = Follower(job).end(Status.FAILED)
    assert (ended.status, ended.reason, ended.report["status"]) == ("FAILED", "bad file", "FAILED")


def test_waiting_ends_with_the_job(job: JobDirectory) -> None:
    """Waiting returns the final status at the first poll that finds one."""
    with hold_lease(job.store):
        job.set_status(Status.RUNNING)
        looks: list[float] = []

        def pause(seconds: float) -> None:
            looks.append(seconds)
            if len(looks) == 3:
                job.set_status(Status.INTERRUPTED)

        assert EndMonitor(job).wait(pause=pause) is Status.INTERRUPTED
    assert len(looks) == 3


def test_waiting_has_an_end_of_its_own(job: JobDirectory) -> None:
    """Waiting raises `TimeoutError` after its timeout, with the current status."""
    clock = iter(range(100))
    with pytest.raises(TimeoutError, match="PLANNED"):
        EndMonitor(job).wait(timeout=5, clock=lambda: float(next(clock)), pause=lambda _: None)


def dead_driver(job: JobDirectory) -> None:
    place = identify(os.getpid()).rpartition("/")[0]
    job.store.replace(lease_path(1), Holder(1, "n", "h", os.getpid(), f"{place}/0", "", 30).to_json_bytes())
    job.store.replace(heartbeat_path(1), b"n 5\n")
    job.set_status(Status.RUNNING)


def test_driver_that_died_is_reported_as_lost(job: JobDirectory) -> None:
    """Waiting for a job whose driver has died raises `DriverLost` with the next command."""
    dead_driver(job)
    with pytest.raises(DriverLost) as caught:
        EndMonitor(job).wait()
    assert "resume small-1" in str(caught.value)


def test_a_server_will_start_another_one(job: JobDirectory) -> None:
    """If a server can restart the driver, a dead driver is not an error."""
    dead_driver(job)
    put_submission(job.store, Submission(1, "", "me", "by hand", "key"))
    root = open_store(str(Path(job.root).parent))
    process = identify(os.getpid())
    put_server(root, ServerRecord("s", "h", os.getpid(), process, "", datetime.now(UTC).isoformat(), 1))
    assert EndMonitor(job).poll() is None


def test_running_driver_is_not_reported_as_lost(job: JobDirectory) -> None:
    """A driver that holds the lease is not reported as lost."""
    acquire_lease(job.store)
    job.set_status(Status.RUNNING)
    assert EndMonitor(job).poll() is None
