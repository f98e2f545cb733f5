"""The next need of a submitted job: the decision for every kind of view, and views of real directories."""

from __future__ import annotations

import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from pipeline.errors import NoWorkers, SchemaDrift
from pipeline.jobs.directory import JobDirectory, JobOptions
from pipeline.jobs.layout import heartbeat_path, lease_path
from pipeline.jobs.lease import Holder, Verdict, acquire_lease, identify
from pipeline.jobs.status import Status
from pipeline.report.build import make_report
from pipeline.service.queue import (
    STARTING_SECONDS,
    JobView,
    LeaseWatch,
    Need,
    RestartPolicy,
    Start,
    Submission,
    claim_start,
    exit_code,
    find_starts,
    next_need,
    note_start,
    put_submission,
    view_job,
)
from pipeline.testing.jobs import small_job

POLICY = RestartPolicy(starts=3, delay=10.0, longest=15.0)
NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


def view(status: Status, **fields: object) -> JobView:
    return replace(JobView("job-1", status, since_start=1e9), **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("seen", "need"),
    [
        (view(Status.QUEUED), Need.DRIVER),
        (view(Status.PLANNED), Need.DRIVER),
        (view(Status.QUEUED, is_starting=True), Need.TIME),
        (view(Status.QUEUED, starts=1, since_start=9.0), Need.TIME),
        (view(Status.QUEUED, starts=1, since_start=10.0), Need.DRIVER),
        (view(Status.QUEUED, starts=2, since_start=14.9), Need.TIME),
        (view(Status.QUEUED, starts=2, since_start=15.0), Need.DRIVER),
        (view(Status.QUEUED, starts=3), Need.END),
        (view(Status.RUNNING, starts=1, lease=Verdict.LIVE), Need.TIME),
        (view(Status.RUNNING, starts=1, lease=Verdict.WAIT), Need.TIME),
        (view(Status.RUNNING, starts=1, lease=Verdict.DEAD), Need.DRIVER),
        (view(Status.PUBLISHING, starts=1, lease=Verdict.STALE), Need.DRIVER),
        (view(Status.RUNNING, starts=3, lease=Verdict.DEAD), Need.END),
        (view(Status.INTERRUPTED, starts=1), Need.DRIVER),
        (view(Status.INTERRUPTED, starts=3), Need.NOTHING),
        (view(Status.FAILED, starts=1, exit_code=75), Need.DRIVER),
        (view(Status.FAILED, starts=3, exit_code=75), Need.NOTHING),
        (view(Status.FAILED, starts=1, exit_code=4), Need.NOTHING),
        (view(Status.CANCELLED, starts=1), Need.NOTHING),
        (view(Status.SUCCEEDED, starts=1), Need.NOTHING),
        (view(Status.SUCCEEDED_WITH_WARNINGS, starts=0), Need.NOTHING),
    ],
)
def test_need_of_a_job(seen: JobView, need: Need) -> None:
    """The next need depends on status, starts, lease, exit code and the time since the last start."""
    assert next_need(seen, POLICY) is need


def test_back_off_doubles_up_to_a_limit() -> None:
    policy = RestartPolicy(delay=10, longest=60)
    assert [policy.delay_after(starts) for starts in range(6)] == [0, 10, 20, 40, 60, 60]


@pytest.fixture
def job(tmp_path: Path) -> JobDirectory:
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    made = JobDirectory.create(
        tmp_path / "jobs", small.plan, job="small-1", options=JobOptions(first_status=Status.QUEUED)
    )
    put_submission(made.store, Submission(1, "", "me", "by hand", "key", priority=4))
    return made


def look(job: JobDirectory, *, now: datetime = NOW, watch: LeaseWatch | None = None) -> JobView:
    found = view_job(job, watch or LeaseWatch(), now=now)
    assert found is not None
    return found


def test_a_queued_job(job: JobDirectory) -> None:
    """The view of a new queued job has its priority, no start and no driver."""
    found = look(job)
    assert (found.status, found.priority, found.last_start, found.is_driven) == (Status.QUEUED, 4, 0, False)


def test_job_without_submission_is_ignored(tmp_path: Path) -> None:
    """A job without a submission has no view: servers ignore it."""
    small = small_job(tmp_path / "lake", sink=str(tmp_path / "out"))
    assert view_job(JobDirectory.create(tmp_path / "jobs", small.plan, job="x"), LeaseWatch(), now=NOW) is None


def test_a_start_by_a_living_process_is_waited_for(job: JobDirectory) -> None:
    """A start is claimed once, and is starting while the claiming process lives, for `STARTING_SECONDS` at most."""
    assert claim_start(job.store, number=1, submission=1, by="a", now=lambda: NOW)
    assert claim_start(job.store, number=1, submission=1, by="b", now=lambda: NOW) is None
    assert look(job).is_starting
    assert not look(job, now=NOW + timedelta(seconds=STARTING_SECONDS)).is_starting


def test_a_started_driver_is_starting_as_long_as_it_lives(job: JobDirectory) -> None:
    """A driver of this machine that waits for storage has no time limit."""
    start = claim_start(job.store, number=1, submission=1, by="a", now=lambda: NOW)
    assert start
    note_start(job.store, start, pid=os.getpid())
    assert look(job, now=NOW + timedelta(days=1)).is_starting


@pytest.mark.fault(105)
@pytest.mark.parametrize("set_by", [timedelta(days=-1), timedelta(days=1)])
def test_a_clock_that_is_set_changes_no_back_off(job: JobDirectory, set_by: timedelta) -> None:
    """The age of a start that was seen before follows the monotonic clock."""
    start = Start(1, 1, "2026-01-01T12:00:00.000Z", "a", "elsewhere", 7, "boot/pid:[1]/5")
    job.store.replace("starts/1.json", start.to_json_bytes())
    seconds = [0.0]
    watch = LeaseWatch(clock=lambda: seconds[0])
    assert look(job, watch=watch).since_start == 0
    seconds[0] = 20.0
    assert look(job, watch=watch, now=NOW + set_by).since_start == 20.0


def test_a_start_by_a_process_that_is_gone_is_not(job: JobDirectory) -> None:
    """A start whose process is gone is counted, but no longer starting."""
    start = claim_start(job.store, number=1, submission=1, by="a")
    assert start
    gone = replace(start, process=identify(os.getpid()).rpartition("/")[0] + "/0")
    job.store.replace("starts/1.json", gone.to_json_bytes())
    found = look(job)
    assert (found.is_starting, found.starts, found.last_start) == (False, 1, 1)


@pytest.mark.parametrize(("age", "is_starting"), [(STARTING_SECONDS - 1, True), (STARTING_SECONDS + 1, False)])
def test_a_start_on_another_machine_is_waited_for_in_time(job: JobDirectory, age: float, is_starting: bool) -> None:
    """A start on another machine is starting for `STARTING_SECONDS`."""
    start = Start(1, 1, "2026-01-01T12:00:00.000Z", "a", "elsewhere", 7, "boot/pid:[1]/5")
    job.store.replace("starts/1.json", start.to_json_bytes())
    assert look(job, now=NOW + timedelta(seconds=age)).is_starting is is_starting


def test_a_driver_of_this_machine_lives_without_a_heartbeat(job: JobDirectory) -> None:
    """A lease is live without a heartbeat if its process runs on this machine."""
    start = claim_start(job.store, number=1, submission=1, by="a")
    assert start
    note_start(job.store, start, pid=os.getpid())
    acquire_lease(job.store)
    found = look(job)
    assert (found.lease, found.is_starting) == (Verdict.LIVE, False)


def test_a_driver_of_another_machine_is_watched(job: JobDirectory) -> None:
    """A driver on another machine is stale after 30 s without a heartbeat."""
    holder = Holder(1, "n", "elsewhere", 7, "boot/pid:[1]/5", "", lease_seconds=30)
    job.store.replace(lease_path(1), holder.to_json_bytes())
    job.store.replace(heartbeat_path(1), b"n 1\n")
    now = [0.0]
    watch = LeaseWatch(30, clock=lambda: now[0])

    def seen(seconds: float) -> Verdict:
        now[0] = seconds
        return look(job, watch=watch).lease

    assert seen(0.0) is Verdict.WAIT
    assert seen(29.0) is Verdict.WAIT
    job.store.replace(heartbeat_path(1), b"n 2\n")
    assert seen(31.0) is Verdict.LIVE
    assert seen(60.0) is Verdict.WAIT, "after a sign of life it is waited for anew"
    assert seen(61.0) is Verdict.STALE


def test_starts_are_counted_for_each_submission(job: JobDirectory) -> None:
    """A new submission has zero starts; the numbers of starts continue."""
    for number in (1, 2):
        job.store.replace(f"starts/{number}.json", Start(number, 1, "", "a", "h").to_json_bytes())
    put_submission(job.store, Submission(2, "", "me", "by hand", "key"))
    job.store.replace("starts/3.json", b"{")
    found = look(job)
    assert (found.starts, found.last_start, found.submission) == (0, 3, 2)
    assert [start.number for start in find_starts(job.store)] == [1, 2, 3]


@pytest.mark.parametrize(("error", "code"), [(NoWorkers("x"), 75), (SchemaDrift("x"), 4)])
def test_the_exit_code_is_that_of_the_error(job: JobDirectory, error: NoWorkers | SchemaDrift, code: int) -> None:
    """The exit code is that of the report's error, or that of the status."""
    job.write_report(make_report(job, status=Status.FAILED, error=error).to_dict())
    job.set_status(Status.FAILED)
    assert look(job).exit_code == code
    assert exit_code(job, Status.CANCELLED) == 8, "a report of another status says nothing"
    assert exit_code(job, Status.SUCCEEDED) == 0
