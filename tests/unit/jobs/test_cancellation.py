"""Cancelling a job, and requests to stop a run: the reason that counts, and the error that ends the run."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.driver.outcome import cancel_job
from pipeline.errors import Cancelled, Interrupted, ModelChanged, PipelineError
from pipeline.jobs.cancellation import (
    CancelOutcome,
    CancelRequest,
    Stop,
    StopReason,
    find_request,
    partitions_left,
    stop_checks,
    wait_in_slices,
    watch_for_cancel,
)
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import acquire_lease, hold_lease
from pipeline.jobs.status import Status
from pipeline.testing.jobs import small_job
from pipeline.testing.processes import wait_until


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    return JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")


def test_a_job_without_a_driver_is_cancelled_at_once(job: JobDirectory) -> None:
    """Without a driver, the job is CANCELLED at once, with the reason; a second request reports ENDED."""
    assert cancel_job(job, reason="wrong month") is CancelOutcome.CANCELLED
    last = job.events.read()[-1]
    assert last["after"] == "CANCELLED"
    assert last["reason"].endswith(": wrong month")
    assert cancel_job(job) is CancelOutcome.ENDED


def test_cancelling_an_ended_job_changes_nothing(job: JobDirectory) -> None:
    """A request for a job that has ended changes no status and leaves no file."""
    job.set_status(Status.FAILED)
    assert cancel_job(job) is CancelOutcome.ENDED
    assert job.status() is Status.FAILED
    assert job.store.list("cancel") == []


def test_a_driver_is_asked(job: JobDirectory) -> None:
    """A running driver receives the request and sets the final status itself."""
    stop = Stop()
    with hold_lease(job.store, lease_seconds=0.6) as lease, watch_for_cancel(job.store, lease.epoch, stop):
        job.set_status(Status.RUNNING)
        assert cancel_job(job, now=True, lease_seconds=0.6) is CancelOutcome.ASKED
        wait_until(lambda: stop.is_cancel)
        assert stop.now
        assert job.status() is Status.RUNNING, "the driver says how it ends"


def test_a_request_that_drains_can_be_made_one_that_does_not(job: JobDirectory) -> None:
    """A second request with ``now`` replaces a request that drains."""
    stop = Stop()
    with watch_for_cancel(job.store, 1, stop):
        job.store.replace("cancel/1.json", CancelRequest(1, "", "me").to_json_bytes())
        wait_until(lambda: stop.is_cancel)
        assert not stop.now
        job.store.replace("cancel/1.json", CancelRequest(1, "", "me", now=True).to_json_bytes())
        wait_until(lambda: stop.now)


def test_a_request_is_for_one_epoch(job: JobDirectory) -> None:
    """A request counts for one epoch only, so that a resumed job is not cancelled again."""
    acquire_lease(job.store).release()
    job.store.replace("cancel/1.json", CancelRequest(1, "", "me").to_json_bytes())
    assert find_request(job.store, 1) is not None
    assert find_request(job.store, 2) is None, "resumed, it is not cancelled again"


def test_a_damaged_request_counts(job: JobDirectory) -> None:
    """A damaged request file still cancels."""
    job.store.replace("cancel/1.json", b"")
    assert find_request(job.store, 1) is not None


def test_the_watch_is_over_with_its_block(job: JobDirectory) -> None:
    """The thread that watches for requests ends with its block."""
    with watch_for_cancel(job.store, 1, Stop()):
        pass
    assert not [one for one in threading.enumerate() if one.name == "pipeline-cancel"]


@pytest.mark.parametrize(
    ("asked", "counts"),
    [
        ([StopReason.SIGNAL], StopReason.SIGNAL),
        ([StopReason.ALIAS_CHANGE, StopReason.SIGNAL], StopReason.SIGNAL),
        ([StopReason.SIGNAL, StopReason.ALIAS_CHANGE], StopReason.SIGNAL),
        ([StopReason.CANCEL, StopReason.SIGNAL], StopReason.CANCEL),
        ([StopReason.SIGNAL, StopReason.CANCEL], StopReason.CANCEL),
        ([StopReason.ALIAS_CHANGE, StopReason.CANCEL], StopReason.CANCEL),
    ],
)
def test_the_weightiest_reason_counts(asked: list[StopReason], counts: StopReason) -> None:
    """A cancel outweighs a signal, and a signal outweighs an alias change, in any order."""
    stop = Stop()
    assert not stop.is_requested
    for reason in asked:
        stop.request(reason, message=str(reason))
    assert stop.is_requested
    assert (stop.reason, stop.message) == (counts, str(counts))
    assert stop.is_cancel is (counts is StopReason.CANCEL)


def test_a_second_signal_means_at_once() -> None:
    """The first signal drains, the second stops at once."""
    stop = Stop()
    stop.request(StopReason.SIGNAL, signal_number=2)
    assert not stop.now
    stop.request(StopReason.SIGNAL, signal_number=2)
    assert stop.now


def test_a_signal_after_another_reason_drains_still() -> None:
    """A first signal after a cancel still drains; a cancel with ``now`` stops at once."""
    stop = Stop()
    stop.request(StopReason.CANCEL)
    stop.request(StopReason.SIGNAL, signal_number=15)
    assert not stop.now
    stop.request(StopReason.CANCEL, now=True)
    assert stop.now


@pytest.mark.parametrize(
    ("reason", "kind", "code"),
    [
        (StopReason.SIGNAL, Interrupted, 143),
        (StopReason.CANCEL, Cancelled, 8),
        (StopReason.ALIAS_CHANGE, ModelChanged, 5),
    ],
)
def test_each_reason_has_its_end(reason: StopReason, kind: type[PipelineError], code: int) -> None:
    """Each reason has its error, exit code and next command."""
    stop = Stop()
    stop.request(reason, signal_number=15 if reason is StopReason.SIGNAL else None)
    error = stop.error("job-1", left=3)
    assert type(error) is kind
    assert error.exit_code == code
    assert "3 partitions are left" in str(error)
    assert "resume job-1" in error.next_step


def test_wait_for_workers_checks_for_a_stop() -> None:
    """A wait for workers checks for a stop every second."""
    stop, waits = Stop(), []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 3:
            stop.request(StopReason.CANCEL, now=True)
        raise TimeoutError

    def check() -> None:
        if stop.is_requested:
            raise stop.error("job-1", left=1)

    with stop_checks(check), pytest.raises(Cancelled):
        wait_in_slices(wait, timeout=1e9)
    assert waits == [1.0] * 3


def test_a_wait_has_its_end_and_its_success() -> None:
    """A wait in slices returns on success, and raises `TimeoutError` at exactly its timeout."""
    now = [0.0]

    def wait(seconds: float) -> None:
        now[0] += seconds
        if now[0] < 2.5:
            raise TimeoutError

    wait_in_slices(wait, timeout=5.0, clock=lambda: now[0])
    now[0] = 0.0
    with pytest.raises(TimeoutError):
        wait_in_slices(wait, timeout=1.5, clock=lambda: now[0])
    assert now[0] == 1.5


def test_partitions_that_are_left_are_counted_in_english() -> None:
    """One partition is left, two are left."""
    assert (partitions_left(1), partitions_left(2000)) == ("1 partition is left", "2,000 partitions are left")
