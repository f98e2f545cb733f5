"""A background job from Python: waited for, awaited, observed and cancelled."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pipeline.errors import Cancelled, PipelineError, SchemaDrift, TooManyRejects, error_from_dict
from pipeline.events import Callback, JobEnded, PartitionEnded, StatusChanged
from pipeline.jobs.cancellation import CancelOutcome
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease, acquire_lease
from pipeline.jobs.status import Status
from pipeline.report.build import make_report
from pipeline.report.report import Report
from pipeline.service.handle import JobHandle
from pipeline.testing.inline import publish_inline
from pipeline.testing.jobs import SmallJob, small_job, write_receipts


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"))


@pytest.fixture
def job(tmp_path: Path, small: SmallJob) -> JobDirectory:
    return JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")


@pytest.fixture
def driver(job: JobDirectory) -> Lease:
    """Hold the lease of the running job in this process."""
    lease = acquire_lease(job.store)
    job.set_status(Status.RUNNING)
    return lease


def handle(job: JobDirectory) -> JobHandle:
    return JobHandle(job)


def succeed(job: JobDirectory, small: SmallJob) -> None:
    write_receipts(job, small)
    for status in (Status.PUBLISHING, Status.SUCCEEDED):
        job.set_status(status)


def fail(job: JobDirectory, error: PipelineError, status: Status = Status.FAILED) -> None:
    job.write_report(make_report(job, status=status, error=error).to_dict())
    job.set_status(status, reason=error.message)


@dataclass
class Notes(Callback):
    """A callback that records events."""

    statuses: list[str] = field(default_factory=list)
    partitions: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def on_status(self, event: StatusChanged) -> None:
        self.statuses.append(event.after)

    def on_partition(self, event: PartitionEnded) -> None:
        self.partitions.append(event.partition)

    def on_end(self, event: JobEnded) -> None:
        self.ends.append(event.status)


def test_repr_shows_the_status(job: JobDirectory, driver: Lease) -> None:
    """A handle shows id, status, report and logs of a running job."""
    one = handle(job)
    assert (one.job, one.status, repr(one)) == (
        "small-1",
        Status.RUNNING,
        f"<JobHandle small-1 in {one.directory.root}>",
    )
    assert one.report().status == "RUNNING"
    assert one.logs()[0].message.startswith("PLANNED")


def test_waiting_gives_the_report(job: JobDirectory, small: SmallJob, driver: Lease) -> None:
    """`wait` returns the report of a job that succeeded, or raises `TimeoutError`."""
    with pytest.raises(TimeoutError):
        handle(job).wait(timeout=0)
    succeed(job, small)
    assert handle(job).wait().rows.output == 75


def test_waiting_raises_what_ended_the_job(job: JobDirectory, driver: Lease) -> None:
    """`wait` raises the error that ended the job, with all its parts."""
    fail(job, SchemaDrift("a column is gone", where="in-0.parquet", next_step="repair it"))
    with pytest.raises(SchemaDrift) as caught:
        handle(job).wait()
    assert (caught.value.where, caught.value.next_step, caught.value.exit_code) == ("in-0.parquet", "repair it", 4)


def test_handles_are_awaited_together(job: JobDirectory, small: SmallJob, driver: Lease) -> None:
    """Handles can be awaited together on one event loop."""

    async def both() -> list[Report]:
        waiting = asyncio.gather(handle(job)._wait(), handle(job)._wait())
        await asyncio.sleep(0)
        succeed(job, small)
        return list(await waiting)

    async def plainly() -> Report:
        return await handle(job)

    assert [report.status for report in asyncio.run(both())] == ["SUCCEEDED"] * 2
    assert asyncio.run(plainly()).status == "SUCCEEDED"


def test_observers_are_notified(job: JobDirectory, small: SmallJob, driver: Lease) -> None:
    """A callback receives the events of the job up to its end; then the thread ends."""
    notes = Notes()
    thread = handle(job).observe(notes)
    succeed(job, small)
    thread.join(30)
    assert not thread.is_alive()
    assert notes.ends == ["SUCCEEDED"]
    assert notes.statuses[-1] == "SUCCEEDED"
    assert set(notes.partitions) <= {"00000", "00001", "00002"}


def test_cancelling(job: JobDirectory, driver: Lease) -> None:
    """`cancel` cancels a job without a driver at once, and `wait` raises `Cancelled`."""
    driver.release()
    assert handle(job).cancel(reason="no more") is CancelOutcome.CANCELLED
    with pytest.raises(Cancelled):
        handle(job).wait()


@pytest.mark.parametrize(
    "error",
    [TooManyRejects("too many", where="job x", found="1", expected="0"), Cancelled("stopped")],
)
def test_error_is_rebuilt_from_a_report(error: PipelineError) -> None:
    """An error is rebuilt from its dictionary with its class and all its parts."""
    again = error_from_dict(error.to_dict(), default="")
    assert type(again) is type(error)
    assert again.to_dict() == error.to_dict()


def test_an_error_that_is_unknown_here_keeps_its_exit_code() -> None:
    """An error of an unknown kind becomes a `PipelineError` with its exit code."""
    again = error_from_dict({"kind": "FromTheFuture", "message": "x", "exit_code": 42}, default="")
    assert (type(again), again.exit_code, again.message) == (PipelineError, 42, "x")
    assert error_from_dict({}, default="it is FAILED").message == "it is FAILED"


def test_watching_shows_the_job_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    job = JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")
    write_receipts(job, small)
    published: list[object] = []
    monkeypatch.setattr("pipeline.service.handle.time.sleep", lambda _: published.append(publish_inline(job)))
    report = JobHandle(job).watch()
    assert report.ok
    assert len(published) == 1
    assert "75 rows in 3 partitions" in capsys.readouterr().err
