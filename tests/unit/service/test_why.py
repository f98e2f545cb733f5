"""Reasons why a job makes no progress."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.errors import NoWorkers
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.status import Status
from pipeline.service.queue import Submission, mark_queued, put_submission
from pipeline.service.servers import ServerRecord, put_server
from pipeline.service.why import explain, workers_reasons
from pipeline.storage.store import open_store
from pipeline.testing.jobs import SmallJob, small_job


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path, sink=str(tmp_path / "out"))


@pytest.fixture
def job(tmp_path: Path, small: SmallJob) -> JobDirectory:
    return JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")


def reasons(job: JobDirectory) -> str:
    return "\n".join(explain(job, lease_seconds=30.0).reasons)


def submit(job: JobDirectory, *, priority: int = 0) -> None:
    submission = Submission(1, "2026-01-01T12:00:00.000Z", "you@node7", "by the trigger nightly", "k", priority)
    put_submission(job.store, submission)
    mark_queued(open_store(job.root.rpartition("/")[0]), job.id)


def test_queue_without_server(job: JobDirectory) -> None:
    job.set_status(Status.QUEUED)
    submit(job)
    shown = explain(job, lease_seconds=30.0)
    assert shown.reasons[0] == "no server runs that would start a driver"
    assert "submitted by the trigger nightly by you@node7" in shown.reasons[1]
    assert shown.reasons[2] == "it is the next in the queue"
    assert shown.next[0] == "python -m pipeline serve"


def test_place_in_the_queue_of_a_full_server(tmp_path: Path, small: SmallJob, job: JobDirectory) -> None:
    for directory, priority in ((job, 0), (JobDirectory.create(tmp_path / "jobs", small.plan, job="urgent-1"), 5)):
        directory.set_status(Status.QUEUED)
        submit(directory, priority=priority)
    now = "2999-01-01T12:00:00.000Z"
    put_server(open_store(tmp_path / "jobs"), ServerRecord("s", "node7", 1, "x/1", now, now, jobs=1, running=1))
    assert "the server s runs 1 of 1 jobs" in reasons(job)
    assert "1 job is before it in the queue" in reasons(job)


def test_waiting_for_workers_and_who_holds_the_lease(job: JobDirectory) -> None:
    with job.hold():
        job.set_status(
            Status.PROVISIONING, reason="driver 1 on node7 starts: 2 workers with 1 thread each, at most 90 s"
        )
        shown = reasons(job)
    assert "it has waited for workers for " in shown
    assert ": 2 workers with 1 thread each, at most 90 s" in shown
    assert "driver 1 holds the lease: process " in shown
    assert "no driver runs: driver 1 has released the lease" in reasons(job)


def test_running_without_progress(job: JobDirectory) -> None:
    with job.hold():
        job.set_status(Status.RUNNING)
        shown = reasons(job)
    assert "its scheduler cannot be asked from here" in shown
    assert "no partition has run for long enough" in shown


def test_end_with_its_cause(job: JobDirectory) -> None:
    error = NoWorkers("no worker started", where="cluster local", found="0 of 2 after 300 s")
    job.set_status(Status.FAILED, reason=error.message, error=error.to_dict())
    shown = explain(job, lease_seconds=30.0)
    assert shown.reasons == ("no worker started", "where: cluster local", "found: 0 of 2 after 300 s")
    assert shown.next == ("python -m pipeline resume small-1",)
    assert "  because    no worker started\n  and        where: cluster local\n" in shown.text()


def test_plan_that_nobody_started(tmp_path: Path, small: SmallJob) -> None:
    options = JobOptions(first_status=Status.PLANNED)
    planned = JobDirectory.create(tmp_path / "jobs", small.plan, job="planned-1", options=options)
    assert reasons(planned) == "nobody has started it: a plan, or a probe, was stored only"


@pytest.mark.parametrize(
    ("identity", "expected"),
    [
        ({"workers": {}}, ("its scheduler has no workers",)),
        (
            {"workers": {"tcp://a": {"status": "paused"}, "tcp://b": {"status": "running"}}},
            ("paused for their memory, until it falls: tcp://a", "2 workers: 1 paused, 1 running"),
        ),
    ],
)
def test_workers(identity: dict[str, object], expected: tuple[str, ...]) -> None:
    assert workers_reasons(identity) == expected
