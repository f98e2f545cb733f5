"""A driver without a terminal: finished and cancelled jobs stay as they are, and the mark of the job is removed."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from pipeline.errors import StorageError
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.lease import identify
from pipeline.jobs.status import Status
from pipeline.service import driver_process, submit
from pipeline.service.driver_process import copy_output, drive, needs_no_driver, unmark_if_done
from pipeline.service.queue import Start, Submission, find_starts, mark_queued, put_submission, queued_marks
from pipeline.settings import Settings
from pipeline.storage.store import Store, open_store
from pipeline.testing.jobs import small_job


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    made = JobDirectory.create(
        tmp_path / "jobs", small.plan, job="small-1", options=JobOptions(first_status=Status.QUEUED)
    )
    mark_queued(open_store(tmp_path / "jobs"), "small-1")
    return made


def test_a_job_that_was_cancelled_while_its_driver_started_is_not_driven(job: JobDirectory) -> None:
    """The driver of a cancelled job exits with 8 and acquires no lease."""
    job.set_status(Status.CANCELLED)
    assert drive(job.root) == 8
    assert job.status() is Status.CANCELLED
    assert job.store.list("lease") == []


def submitted(job: JobDirectory) -> JobDirectory:
    put_submission(job.store, Submission(1, "", "me", "by hand", "key"))
    return job


@pytest.mark.fault(104)
def test_failed_launch_from_a_notebook_can_be_repeated(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The claim of a launch that failed is withdrawn: the next submission starts a driver."""
    started: list[Start] = []
    failures = [OSError(errno.EAGAIN, "fork")]

    def launch(job: JobDirectory, start: Start) -> None:
        if failures:
            raise failures.pop()
        started.append(start)

    monkeypatch.setattr(submit, "launch", launch)
    with pytest.raises(OSError, match="fork"):
        submit.start_driver(submitted(job), by="submit", settings=Settings())
    assert submit.start_driver(job, by="submit", settings=Settings())
    assert [start.number for start in started] == [1]


@pytest.mark.fault(104)
def test_driver_that_cannot_be_recorded_is_killed(job: JobDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the process of a started driver cannot be stored, the driver is killed, and its claim withdrawn."""
    pids = []

    def fail(store: Store, start: Start, *, pid: int, output: str) -> Start:
        pids.append(pid)
        raise StorageError("the disk is gone")

    monkeypatch.setattr(driver_process, "note_start", fail)
    with pytest.raises(StorageError):
        submit.start_driver(submitted(job), by="submit", settings=Settings())
    assert identify(pids[0]) == ""
    assert find_starts(job.store) == ()


@pytest.mark.parametrize(
    ("status", "is_over"), [(Status.CANCELLED, True), (Status.FAILED, False), (Status.QUEUED, False)]
)
def test_queue_mark_is_removed_once_the_job_needs_no_driver(job: JobDirectory, status: Status, is_over: bool) -> None:
    """The queue mark is removed for a cancelled job, and kept while the job may need a driver."""
    if status is not job.status():
        job.set_status(status)
    assert needs_no_driver(job) is is_over
    unmark_if_done(job.root)
    assert queued_marks(open_store(str(Path(job.root).parent))) == ([] if is_over else ["small-1"])


def test_output_is_copied_to_a_directory_that_is_no_folder(job: JobDirectory, tmp_path: Path) -> None:
    """The driver's output is copied to the job's store at the end, and the local file is removed."""
    output = tmp_path / "driver.out"
    output.write_text("what it had to say\n")
    with copy_output(job.root, "3", str(output)):
        output.write_text("what it had to say\nand more\n")
    assert job.store.read("starts/3.out") == b"what it had to say\nand more\n"
    assert not output.exists()
    with copy_output(job.root, "4", ""):
        pass
    assert not job.store.exists("starts/4.out")
