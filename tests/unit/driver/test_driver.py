"""The driver of one job: from the last receipt to the end, without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.driver.driver import Driver
from pipeline.driver.job_run import ParentContext
from pipeline.errors import Cancelled, InputError
from pipeline.events import Callback, JobEnded, StatusChanged
from pipeline.jobs.cancellation import StopReason
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease, hold_lease
from pipeline.jobs.status import Status
from pipeline.settings import Settings
from pipeline.testing.jobs import SmallJob, read_output, small_job, write_receipts

Make = Callable[..., Driver]


class Recorder(Callback):
    """Keeps the statuses and the end of a job."""

    def __init__(self) -> None:
        self.statuses: list[str] = []
        self.ends: list[JobEnded] = []

    def on_status(self, event: StatusChanged) -> None:
        self.statuses.append(str(event.after))

    def on_end(self, event: JobEnded) -> None:
        self.ends.append(event)


@pytest.fixture
def small(tmp_path: Path) -> SmallJob:
    return small_job(tmp_path / "lake", sink=str(tmp_path / "out"))


@pytest.fixture
def job(small: SmallJob, tmp_path: Path) -> JobDirectory:
    """A job whose every partition has a receipt, and whose driver died before the commit."""
    directory = JobDirectory.create(tmp_path / "jobs", small.plan, job="small-1")
    directory.set_status(Status.RUNNING)
    write_receipts(directory, small)
    return directory


@pytest.fixture
def lease(job: JobDirectory) -> Iterator[Lease]:
    with hold_lease(job.store) as lease:
        yield lease


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def driver(job: JobDirectory, lease: Lease, recorder: Recorder) -> Driver:
    return Driver(job, lease, Settings.load(directory=str(Path(job.root).parent)), (recorder,), ParentContext())


class TestDrive:
    """`Driver.drive` of a job whose every partition has a receipt."""

    def test_commits_and_publishes_without_a_cluster(
        self, driver: Driver, job: JobDirectory, small: SmallJob, recorder: Recorder
    ) -> None:
        report = driver.drive()
        assert (str(report.status), report.rows.output) == ("SUCCEEDED", small.expected.num_rows)
        assert recorder.statuses == ["PUBLISHING", "SUCCEEDED"]
        assert [(str(end.status), end.reason) for end in recorder.ends] == [("SUCCEEDED", "")]
        assert job.status() is Status.SUCCEEDED
        assert read_output(small.plan.spec.sink.path).num_rows == small.expected.num_rows

    def test_child_that_its_parent_publishes_ends_as_scored(self, driver: Driver, job: JobDirectory) -> None:
        driver.parent = ParentContext(publishes=False)
        driver.drive()
        assert job.status() is Status.SCORED
        assert job.manifests.last() is None

    def test_cancelled_job_publishes_nothing(self, driver: Driver, job: JobDirectory) -> None:
        driver.stop.request(StopReason.CANCEL, message="by a test")
        with pytest.raises(Cancelled):
            driver.drive()
        assert job.manifests.last() is None


class TestRecordFailure:
    """`JobRun.record_failure`, as `Driver` uses it."""

    def test_stores_report_status_and_notifies(self, driver: Driver, job: JobDirectory, recorder: Recorder) -> None:
        driver.record_failure(InputError("a column is gone"))
        assert job.status() is Status.FAILED
        stored = job.read_report()
        assert stored is not None
        assert stored["error"]["message"] == "a column is gone"
        assert [(str(end.status), end.reason) for end in recorder.ends] == [("FAILED", "a column is gone")]

    def test_own_errors_do_not_mask_the_failure(
        self, driver: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """An error while the end is recorded is logged, not raised."""

        def full(_: object) -> None:
            raise OSError("no space left on device")

        monkeypatch.setattr(driver.job, "write_report", full)
        driver.record_failure(InputError("a column is gone"))
        assert "the end of job small-1 could not be recorded" in caplog.text
