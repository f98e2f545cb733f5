"""Cancelling: at once without a driver; a running driver receives a request, valid for its epoch only."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from pipeline.driver.outcome import cancel_job
from pipeline.jobs.cancellation import CancelOutcome, CancelRequest, Stop, find_request, watch_for_cancel
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


def test_one_that_ended_is_left_as_it_is(job: JobDirectory) -> None:
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
