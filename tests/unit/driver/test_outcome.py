"""The outcome of a job by manifest and sink: what cancel, a server and a trigger do after a driver died."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.driver.driver import Driver
from pipeline.driver.job_run import ParentContext
from pipeline.driver.outcome import Outcome, cancel_job, give_up, has_output, outcome
from pipeline.errors import ConflictError, DiskFull
from pipeline.jobs import layout
from pipeline.jobs.cancellation import CancelOutcome
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import highest_epoch
from pipeline.jobs.status import Status
from pipeline.runner import run_job
from pipeline.service.triggers.decide import COMMITTED, SUCCEEDED
from pipeline.service.triggers.jobs import TriggerJobs
from pipeline.settings import Settings
from pipeline.sinks.parquet.sink import ParquetSink
from pipeline.storage.store import open_store
from pipeline.testing.examples import IS_LONG
from pipeline.testing.jobs import SmallJob, drive, open_retry, read_output, small_job, write_receipts
from pipeline.testing.stores import Crash, Faults, FaultyStore


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"), mode="append")


@pytest.fixture
def job(small: SmallJob, tmp_path: Path) -> JobDirectory:
    """A job whose every partition has a receipt, and whose driver died before the commit."""
    directory = JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")
    directory.set_status(Status.RUNNING)
    write_receipts(directory, small)
    directory.set_status(Status.PUBLISHING)
    return directory


def commit(job: JobDirectory) -> None:
    job.manifests.commit(job.manifests.prepare(job.ledger()))


def publish(job: JobDirectory) -> None:
    """Commit and publish, as a driver does that dies before it records the end."""
    commit(job)
    manifest = job.manifests.last()
    assert manifest is not None
    ParquetSink().publish(manifest, job)


@pytest.mark.fault(58)
class TestCancel:
    """`cancel_job` of a job without a driver."""

    def test_before_the_commit_the_job_is_cancelled(self, job: JobDirectory) -> None:
        assert cancel_job(job) is CancelOutcome.CANCELLED
        assert job.status() is Status.CANCELLED

    def test_a_committed_job_is_not_cancelled(self, job: JobDirectory) -> None:
        """A resume publishes it; nothing is changed until then."""
        commit(job)
        assert cancel_job(job) is CancelOutcome.COMMITTED
        assert job.status() is Status.PUBLISHING

    def test_a_published_job_has_succeeded(self, job: JobDirectory) -> None:
        """Its driver died after it had published, and before it recorded that."""
        publish(job)
        assert cancel_job(job) is CancelOutcome.PUBLISHED
        assert job.status() is Status.SUCCEEDED
        report = job.read_report()
        assert report is not None
        assert (report["status"], report["rows"]["out"]) == ("SUCCEEDED", 75)
        assert cancel_job(job) is CancelOutcome.ENDED

    def test_a_job_that_failed_after_its_commit_is_not_cancelled(self, job: JobDirectory) -> None:
        """FAILED is not: nothing will be published."""
        commit(job)
        job.set_status(Status.FAILED)
        assert cancel_job(job) is CancelOutcome.COMMITTED

    def test_a_retry_is_cancelled_and_the_first_output_stays(self, job: JobDirectory, small: SmallJob) -> None:
        """The last round counts, but the job has output all the same."""
        publish(job)
        job.set_status(Status.SUCCEEDED_WITH_WARNINGS)
        open_retry(job)
        assert outcome(job) is Outcome.OPEN
        assert has_output(job)


@pytest.mark.fault(60)
class TestSuperseded:
    """A job that a trigger cancelled, and whose files a newer job scores."""

    def test_superseded_job_is_not_resumed(self, job: JobDirectory) -> None:
        """Its rows would be appended twice."""
        assert cancel_job(job, superseded_by="trigger land") is CancelOutcome.CANCELLED
        with pytest.raises(ConflictError, match="another job scores the input"):
            run_job(job, settings=Settings.load(directory=str(Path(job.root).parent)))
        assert job.status() is Status.CANCELLED
        assert not Path(job.plan.spec.sink.path).exists()

    def test_a_committed_job_is_resumed(self, job: JobDirectory) -> None:
        """Its files are never given back, so that only it can publish their rows."""
        commit(job)
        assert cancel_job(job, superseded_by="trigger land") is CancelOutcome.COMMITTED
        report = run_job(job, settings=Settings.load(directory=str(Path(job.root).parent)))
        assert (report.status, report.rows.output) == ("SUCCEEDED", 75)


@pytest.mark.fault(58)
class TestGiveUp:
    """`give_up`, after the drivers of a job died too often."""

    def test_a_published_job_has_succeeded(self, job: JobDirectory) -> None:
        publish(job)
        assert give_up(job, reason="its driver died 5 times") is Status.SUCCEEDED

    def test_a_committed_job_fails_and_a_resume_publishes_it(self, job: JobDirectory, small: SmallJob) -> None:
        commit(job)
        assert give_up(job, reason="its driver died 5 times") is Status.FAILED
        drive(small, job, sink=ParquetSink())
        assert job.status() is Status.SUCCEEDED
        assert read_output(job.plan.spec.sink.path).num_rows == 75


@pytest.mark.fault(59)
class TestFailureAfterPublishing:
    """A driver that fails between the publication and the last status."""

    def test_a_report_that_cannot_be_written_is_no_failure(
        self, job: JobDirectory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The disk is full once the output is published."""

        def full(report: object) -> None:
            raise DiskFull("no space left")

        with job.hold() as lease:
            driver = Driver(job, lease, Settings.load(directory=str(Path(job.root).parent)), (), ParentContext())
            monkeypatch.setattr(job, "write_report", full)
            assert driver.drive().status == "SUCCEEDED"
        assert job.status() is Status.SUCCEEDED

    def test_failure_is_not_recorded_over_a_publication(self, job: JobDirectory) -> None:
        """The status stays PUBLISHING, which a resume completes, instead of FAILED."""
        publish(job)
        with job.hold() as lease:
            driver = Driver(job, lease, Settings.load(directory=str(Path(job.root).parent)), (), ParentContext())
            driver.record_failure(DiskFull("no space left"))
            assert job.status() is Status.PUBLISHING
            assert driver.drive().status == "SUCCEEDED"


OLD, NEWER = 4, 5
"""Rows in the sink before, and rows of one more file that arrives after the job was submitted."""


def _end(directory: JobDirectory, by: str) -> str:
    """End a job whose driver died. Return the status that a trigger records; empty while the job has not ended."""
    settings = Settings.load(directory=str(Path(directory.root).parent))
    watched: Any = SimpleNamespace(name="land", trigger=SimpleNamespace(kind="arrival"))
    jobs = TriggerJobs(watched, settings)
    if by == "trigger":
        jobs.cancel(directory.id)
    elif by == "cancel":
        cancel_job(directory)
    else:
        with directory.hold():
            if not directory.status().is_final:
                give_up(directory, reason="its driver died 5 times")
    return jobs.ended(directory.id)


class Sweep:
    """A job that appends, dies at a storage operation, is ended by somebody else, and is resumed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sink = str(folder / "out")
        self.old = small_job(folder / "old", sink=self.sink, mode="append", rows=(OLD,))
        self.new = small_job(folder / "new", sink=self.sink, mode="append", rows=(7, 5), start=100)
        # A newer firing has the files of the cancelled job, and one more.
        self.newer = small_job(folder / "newer", sink=self.sink, mode="append", rows=(7, 5, NEWER), start=100)
        self.run(self.old, "old-1", Faults())

    def run(self, job: SmallJob, name: str, faults: Faults) -> Faults:
        """Drive a job from where it is, until it ends or dies."""

        def opened(path: str, *, private: bool = False) -> Any:
            return FaultyStore(open_store(path, private=private), faults)

        with suppress(Crash):
            store = opened(f"{self.folder}/jobs/{name}", private=True)
            directory = JobDirectory.open_or_create(self.folder / "jobs", job.plan, job=name, store=store)
            drive(job, directory, sink=ParquetSink(opened))
        return faults

    def directory(self) -> JobDirectory | None:
        """The job that died, whose lease is known to be free; None if it died before it existed."""
        store = open_store(f"{self.folder}/jobs/new-1", private=True)
        if not store.exists(layout.JOB_FILE):
            return None
        if (epoch := highest_epoch(store)) != 0:
            # The process of its driver is this one, which lives.
            store.replace(layout.heartbeat_path(epoch), b"dead released\n")
        return JobDirectory.open(store.root, store=store)


@pytest.mark.fault(58)
@pytest.mark.parametrize("by", ["cancel", "give up", "trigger"])
def test_job_that_died_is_ended_without_lost_or_double_rows(
    by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every storage operation the driver dies; then somebody ends the job, and a person resumes it.

    A trigger gives the files of a job that it cancelled to a newer job, unless the job has committed.
    """
    monkeypatch.setattr(os, "fsync", lambda _: None)
    first = Sweep(tmp_path / "count")
    count = first.run(first.new, "new-1", Faults()).count
    ends = set()
    for step in range(count) if IS_LONG else range(count - 21, count, 2):
        sweep = Sweep(tmp_path / f"{step}")
        assert sweep.run(sweep.new, "new-1", Faults(step)).has_failed
        directory = sweep.directory()
        recorded = _end(directory, by) if directory is not None else ""
        ends.add(recorded)
        is_released = by == "trigger" and recorded not in ("", COMMITTED, *SUCCEEDED)
        sweep.run(sweep.newer if is_released else sweep.new, "newer-1" if is_released else "new-1", Faults())
        ids = read_output(sweep.sink).column("id").to_pylist()
        assert len(ids) == len(set(ids)) == OLD + 12 + (NEWER if is_released else 0), (step, recorded)
        if directory is not None and not is_released:
            assert directory.status() is Status.SUCCEEDED, step
    assert len(ends) > 1, ends
