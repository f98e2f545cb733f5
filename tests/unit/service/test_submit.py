"""Submitting: one key is one job, for any number of submissions, at once, or after crashes anywhere."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dask.config
import pytest

from pipeline.errors import OutputExists, PlanMismatch
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import hold_lease
from pipeline.jobs.status import Status
from pipeline.service import queue as records
from pipeline.service import submit as submitting
from pipeline.service.queue import find_starts, last_submission, note_start, queued_marks
from pipeline.service.submit import SubmitResult, submit, submit_again
from pipeline.settings import Settings
from pipeline.storage.store import open_store
from pipeline.testing.jobs import SmallJob, small_job
from pipeline.testing.stores import Crash, Faults, faulty_os


class Place:
    """A root of job directories, a planned job, and the drivers that were "started"."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.job: SmallJob = small_job(folder / "lake", sink=str(folder / "out"))
        self.settings = Settings(directory=str(folder / "jobs"))
        self.launched: list[tuple[str, int]] = []
        monkeypatch.setattr(submitting, "draft", lambda spec, settings: SimpleNamespace(plan=self.job.plan))
        monkeypatch.setattr(submitting, "launch", self.launch)

    def launch(self, job: JobDirectory, start: records.Start) -> records.Start:
        self.launched.append((job.id, start.number))
        return note_start(job.store, start, pid=os.getpid())

    def submit(self, **options: Any) -> SubmitResult:
        return submit(self.job.plan.spec, settings=self.settings, **options)

    def open(self, job: str) -> JobDirectory:
        return JobDirectory.open(f"{self.settings.directory}/{job}")

    @property
    def jobs(self) -> list[str]:
        return [name for name in open_store(self.settings.directory).list_folders() if not name.startswith(".")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return a function after whose call all records name a process that has ended."""
    real = records.identify

    def bury() -> None:
        monkeypatch.setattr(records, "identify", lambda pid: real(pid).rpartition("/")[0] + "/0")

    return bury


def test_a_submitted_job_is_queued_and_has_a_driver(place: Place) -> None:
    """A new job is QUEUED with its submission and mark, and one driver is started."""
    made = place.submit(priority=3, trigger="nightly")
    assert made.is_new
    assert made.status is Status.QUEUED
    assert place.launched == [(made.job, 1)]
    job = place.open(made.job)
    assert [event["after"] for event in job.events.read()] == ["QUEUED"]
    submission = last_submission(job.store)
    assert submission is not None
    assert (submission.trigger, submission.priority, submission.key) == ("nightly", 3, place.job.plan.work_digest)
    assert queued_marks(open_store(place.settings.directory)) == [made.job]


def test_settings_are_kept_with_their_rank(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags and variables are stored as settings, ``dask.config`` as config: their rank stays the same."""
    monkeypatch.setenv("PIPELINE_DRAIN_TIMEOUT", "7")
    with dask.config.set({"pipeline.workers": 3, "pipeline.threads": 2}):
        place.settings = Settings.load(directory=place.settings.directory, threads=4, import_paths=["/x"])
    submission = last_submission(place.open(place.submit().job).store)
    assert submission is not None
    assert submission.settings == {"threads": 4, "drain_timeout": 7.0}
    assert submission.config["workers"] == 3
    assert {"directory", "import_paths", "candidates"}.isdisjoint({*submission.settings, *submission.config})
    # What was kept is what another process takes.
    monkeypatch.delenv("PIPELINE_DRAIN_TIMEOUT")
    with dask.config.set({f"pipeline.{name}": value for name, value in submission.config.items()}):
        again = Settings.load(**submission.settings)
    assert (again.workers, again.threads, again.drain_timeout) == (3, 4, 7.0)


def test_settings_of_python_are_kept(place: Place) -> None:
    """Settings given in Python are stored, without paths."""
    place.settings = Settings(directory=place.settings.directory, workers=3, fsync=False, import_paths=("/x",))
    submission = last_submission(place.open(place.submit().job).store)
    assert submission is not None
    assert submission.settings == {"workers": 3, "fsync": False}


def test_only_queued_it_has_none(place: Place) -> None:
    """With ``start=False`` no driver is started; the next submission starts one."""
    assert place.submit(start=False).status is Status.QUEUED
    assert place.launched == []
    again = place.submit(start=True)
    assert (again.is_new, again.is_resumed) == (False, True)
    assert len(place.launched) == 1


def test_the_same_again_is_the_same_job(place: Place) -> None:
    """Submitting twice gives one job and one driver."""
    first, second = place.submit(), place.submit()
    assert first.job == second.job
    assert (second.is_new, second.is_resumed) == (False, False)
    assert len(place.launched) == 1, "its driver is about to begin"


def test_force_makes_another_which_the_key_means_from_then_on(place: Place) -> None:
    """``force`` makes a new job, to which the key refers from then on."""
    first, other = place.submit(), place.submit(force=True)
    assert other.is_new
    assert first.job != other.job
    assert place.submit().job == other.job


def test_a_key_outweighs_the_input(place: Place) -> None:
    """The same key gives the same job, even if the input has changed."""
    first = place.submit(key="nightly 2026-01-01")
    place.job = small_job(place.folder / "lake2", sink=str(place.folder / "out"))
    assert place.submit(key="nightly 2026-01-01").job == first.job
    assert place.submit().job != first.job


def test_a_success_is_given_back_as_it_is_though_its_output_is_there(place: Place) -> None:
    """A finished job is returned as is; with ``force``, its output raises `OutputExists`."""
    first = place.submit()
    job = place.open(first.job)
    for status in (Status.RUNNING, Status.PUBLISHING, Status.SUCCEEDED):
        job.set_status(status)
    (place.folder / "out").mkdir()
    (place.folder / "out/part-0.parquet").write_bytes(b"x")
    again = place.submit()
    assert (again.job, again.is_resumed, again.status) == (first.job, False, Status.SUCCEEDED)
    with pytest.raises(OutputExists):
        place.submit(force=True)


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED, Status.INTERRUPTED])
def test_unsuccessful_job_is_resumed(place: Place, dead: Callable[[], None], status: Status) -> None:
    """A failed, cancelled or interrupted job is resumed with a new submission and driver."""
    dead()
    first = place.submit()
    place.open(first.job).set_status(status)
    again = place.submit(priority=9)
    assert (again.job, again.is_new, again.is_resumed, again.status) == (first.job, False, True, Status.QUEUED)
    assert place.launched == [(first.job, 1), (first.job, 2)]
    submission = last_submission(place.open(first.job).store)
    assert submission is not None
    assert (submission.number, submission.priority) == (2, 9)
    assert [start.submission for start in find_starts(place.open(first.job).store)] == [1, 2]


def test_job_with_a_killed_driver_is_resumed(place: Place, dead: Callable[[], None]) -> None:
    """A RUNNING job whose driver was killed gets a new driver."""
    dead()
    first = place.submit()
    place.open(first.job).set_status(Status.RUNNING)
    again = place.submit()
    assert (again.is_resumed, again.status) == (True, Status.RUNNING)
    assert len(place.launched) == 2


def test_running_job_is_left_alone(place: Place, dead: Callable[[], None]) -> None:
    """A job whose driver holds the lease gets no second driver."""
    dead()
    first = place.submit()
    job = place.open(first.job)
    with hold_lease(job.store):
        job.set_status(Status.RUNNING)
        assert not place.submit().is_resumed
    assert len(place.launched) == 1


def test_an_id_of_another_job_is_refused_before_the_key_means_it(place: Place) -> None:
    """An id used by another plan raises `PlanMismatch`, and the key stays unused."""
    other = small_job(place.folder / "other", sink=str(place.folder / "out2"))
    JobDirectory.create(place.settings.directory, other.plan, job="mine")
    with pytest.raises(PlanMismatch):
        place.submit(job_id="mine")
    assert place.submit().job != "mine"


def test_a_job_that_was_run_is_gone_on_with_under_its_id(place: Place) -> None:
    """A job made by ``run`` is resumed when submitted under its id."""
    JobDirectory.create(place.settings.directory, place.job.plan, job="mine").set_status(Status.FAILED)
    made = place.submit(job_id="mine")
    assert made.job == "mine"
    assert place.launched == [("mine", 1)]


@pytest.mark.fault(13)
def test_racing_threads_give_one_job(place: Place) -> None:
    """Eight threads that submit one key get one job and one driver."""
    made: list[SubmitResult] = []
    barrier = threading.Barrier(8)

    def go() -> None:
        barrier.wait()
        made.append(place.submit(key="same"))

    threads = [threading.Thread(target=go) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len({one.job for one in made}) == 1
    assert [one.is_new for one in made].count(True) == 1
    assert place.jobs == [made[0].job]
    assert place.launched == [(made[0].job, 1)]


@pytest.mark.fault(13)
def test_after_a_crash_anywhere_the_next_call_makes_it_one_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dead: Callable[[], None]
) -> None:
    """After a crash at any system call, the next submission of the key gives exactly one job."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    dead()
    crashes = 0
    for number in range(1000):
        place = Place(tmp_path / str(number), monkeypatch)
        faults = Faults(fail_at=number)
        with suppress(Crash), faulty_os(faults):
            place.submit(key="firing 7")
        if not faults.has_failed:
            break
        crashes += 1
        # By now the input has changed, too: the firing is the one of then, or nothing of it is there.
        if (place.folder / "jobs").exists() and place.jobs:
            place.job = small_job(place.folder / "lake2", sink=str(place.folder / "out"))
        made = place.submit(key="firing 7")
        assert place.submit(key="firing 7").job == made.job
        assert [job for job in place.jobs if (place.folder / "jobs" / job / "job.json").exists()] == [made.job]
        assert {job for job, _ in place.launched} == {made.job}
        job = place.open(made.job)
        assert job.status() is Status.QUEUED
        assert job.plan.digest == job.record.plan
        assert queued_marks(open_store(place.settings.directory)) == [made.job]
    assert crashes > 40


@pytest.mark.parametrize("status", [Status.FAILED, Status.RUNNING])
def test_job_run_by_hand_is_resumed_in_the_background(place: Place, status: Status) -> None:
    """`submit_again` queues a job that was run by hand and starts a driver."""
    job = JobDirectory.create(place.settings.directory, place.job.plan, job="mine")
    job.set_status(status)
    made = submit_again(job, settings=place.settings)
    assert (made.job, made.is_resumed) == ("mine", True)
    assert place.launched == [("mine", 1)]
    assert queued_marks(open_store(place.settings.directory)) == ["mine"]
