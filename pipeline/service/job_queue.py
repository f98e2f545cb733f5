"""What a submitted job needs next: a driver, patience, or nothing any more. `observe` looks, `decide` is pure."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from pipeline.errors import InfrastructureError
from pipeline.jobs import lease
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS, Sight, Verdict, has_ended, is_running
from pipeline.jobs.status import Status
from pipeline.service.queue import Start, find_starts, last_submission

STARTING_SECONDS = 180.0
"""Seconds after which a driver that was started on another machine, and never took the lease, is given up."""


@dataclass(frozen=True)
class Patience:
    """How often, and how soon, a job whose driver died is started again."""

    starts: int = 5
    """Drivers a submission gets, the first one included."""
    delay: float = 10.0
    """Seconds after the first death; twice as many after each further one."""
    longest: float = 600.0
    """Seconds, at most."""

    def delay_after(self, starts: int) -> float:
        """Seconds between start number ``starts`` and the next one."""
        return float(min(self.delay * 2 ** max(0, starts - 1), self.longest)) if starts else 0.0


@dataclass(frozen=True)
class JobView:
    """What one look at a submitted job shows."""

    job: str
    status: Status
    created: str = ""
    """UTC, ISO 8601."""
    priority: int = 0
    submission: int = 1
    """Number of the last one."""
    last_start: int = 0
    """Highest number of a start; 0: no driver was ever started."""
    starts: int = 0
    """Drivers that were started for the last submission."""
    since_start: float = 0.0
    """Seconds since the last start, by the clocks of both machines: nothing but back-off is decided by it."""
    is_starting: bool = False
    """Whether a driver that was started may yet take the lease."""
    lease: Verdict = Verdict.FREE
    """Whether a driver is at work."""
    exit_code: int = 0
    """Of a job that failed."""

    @property
    def is_driven(self) -> bool:
        """Whether a driver is at work on it, or is about to be, as far as can be told."""
        return self.is_starting or self.lease in (Verdict.LIVE, Verdict.WAIT)


class Need(StrEnum):
    """What a job needs."""

    DRIVER = "driver"
    PATIENCE = "patience"
    """It is being driven, or is to be started later."""
    NOTHING = "nothing"
    """It has ended."""
    END = "end"
    """Its drivers died too often: it is to be failed."""


def decide(view: JobView, patience: Patience) -> Need:
    """What the job needs now."""
    if view.is_driven:
        return Need.PATIENCE
    if view.status.is_success or view.status is Status.CANCELLED:
        return Need.NOTHING
    if view.status is Status.FAILED and view.exit_code != InfrastructureError.exit_code:
        return Need.NOTHING
    if view.starts >= patience.starts:
        # What has failed is told already; a job whose drivers died says nothing itself.
        return Need.NOTHING if view.status.is_final else Need.END
    return Need.DRIVER if view.since_start >= patience.delay_after(view.starts) else Need.PATIENCE


@dataclass
class LeaseWatch:
    """Remembers how leases looked before, since only a counter that was seen to stand still tells a death."""

    lease_seconds: float = LEASE_SECONDS
    clock: Callable[[], float] = time.monotonic
    _first: dict[str, tuple[Sight, float]] = field(default_factory=dict)

    def look(self, job: JobDirectory) -> tuple[Sight, Verdict]:
        """The lease of ``job``, and what it means."""
        sight = lease.look(job.store)
        if is_running(sight.holder) and not sight.is_released:
            return sight, Verdict.LIVE
        now = self.clock()
        first, since = self._first.get(job.root, (sight, now))
        verdict = lease.decide(
            sight,
            first=first,
            waited=now - since,
            lease_seconds=self.lease_seconds,
            is_dead=has_ended(sight.holder),
        )
        # After a sign of life the wait begins anew; what is stale stays so until it is taken.
        self._first[job.root] = (sight, now) if verdict is Verdict.LIVE else (first, since)
        return sight, verdict

    def forget(self, job: JobDirectory) -> None:
        """It has ended."""
        self._first.pop(job.root, None)


def observe(job: JobDirectory, watch: LeaseWatch, *, now: datetime) -> JobView | None:
    """How ``job`` stands; None when it was never submitted: it is somebody's at a terminal.

    :param now: UTC.
    """
    submission = last_submission(job.store)
    if submission is None:
        return None
    sight, verdict = watch.look(job)
    starts = find_starts(job.store)
    mine = [start for start in starts if start.submission == submission.number]
    last = starts[-1] if starts else None
    status = job.status()
    return JobView(
        job=job.job,
        status=status,
        created=job.record.created,
        priority=submission.priority,
        submission=submission.number,
        last_start=last.number if last else 0,
        starts=len(mine),
        since_start=_age(last.time, now) if last else 0.0,
        is_starting=last is not None and _is_starting(last, sight, now=now),
        lease=verdict,
        exit_code=exit_code(job, status) if status is Status.FAILED else 0,
    )


def exit_code(job: JobDirectory, status: Status) -> int:
    """Exit status of a job that has ended like that."""
    if status.is_success:
        return 0
    report = job.read_report() or {}
    error = report.get("error") if report.get("status") == str(status) else None
    code = error.get("exit_code") if isinstance(error, dict) else None
    if isinstance(code, int):
        return code
    return {Status.CANCELLED: 8, Status.INTERRUPTED: 130}.get(status, 1)


def _is_starting(start: Start, sight: Sight, *, now: datetime) -> bool:
    holder = sight.holder
    if holder is not None and start.process and holder.process == start.process:
        # It has taken the lease; that one tells what became of it.
        return False
    # Where the machine is another one, or gives no identity, only time can tell.
    is_there = lease.is_process(start.process, start.pid)
    return _age(start.time, now) < STARTING_SECONDS if is_there is None else is_there


def _age(moment: str, now: datetime) -> float:
    try:
        return max(0.0, (now - datetime.fromisoformat(moment)).total_seconds())
    except (ValueError, TypeError):
        return float("inf")
