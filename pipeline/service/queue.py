"""What is on record of a job that was submitted: under which key, how it is to run, and each start of a driver.

::

    <root>/.submitted/<digest of the key>/<n>.json   which job a key means; the highest number counts
    <root>/.queue/<job>.json                         a mark: this job may need a driver. A cache
    <root>/<job>/submissions/<n>.json                how the job is to run; the highest number counts
    <root>/<job>/starts/<n>.json                     who starts a driver, made if absent: one driver for each number
    <root>/<job>/starts/<n>.out                      what that driver wrote to stdout and stderr

Nothing here decides who drives a job: that is its lease. It only keeps two from starting the same driver.

What a submitted job needs next: a driver, patience, or nothing any more. `view_job` looks, `next_need` is pure.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from pipeline.common.digest import digest_json
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import InfrastructureError, StateCorrupt
from pipeline.jobs import layout, lease
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS, LeaseSnapshot, Verdict, has_ended, identify, is_running
from pipeline.jobs.status import Status
from pipeline.storage.store import Store

KEYS = ".submitted"
QUEUE = ".queue"


@dataclass(frozen=True)
class _Numbered:
    """A file ``<folder>/<n>.json``."""

    def to_json(self) -> bytes:
        """As stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> Self:
        """Inverse of `to_json`.

        :raises StateCorrupt: for anything else.
        """
        try:
            record = json.loads(data)
            if record.pop("schema_version") != 1:
                raise ValueError("unknown schema_version")
            return cls(**record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StateCorrupt(
                "a record of a submission is damaged",
                where=where,
                found=f"{type(error).__name__}: {error}",
                expected="the JSON that was written there",
                next_step="remove that file, then submit the job again",
            ) from error


@dataclass(frozen=True)
class KeyRecord(_Numbered):
    """The content of ``.submitted/<digest>/<n>.json``."""

    number: int
    key: str
    job: str
    time: str
    """UTC, ISO 8601."""


@dataclass(frozen=True)
class Submission(_Numbered):
    """The content of ``submissions/<n>.json``."""

    number: int
    time: str
    """UTC, ISO 8601."""
    by: str
    """Who submitted it: user@host."""
    trigger: str
    """What made them: ``by hand``, or the name of a trigger."""
    key: str
    priority: int = 0
    """Higher ones start first."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that were given with the job: by flags, variables or in Python, as `pipeline.settings` names them."""
    config: dict[str, Any] = field(default_factory=dict)
    """Those that ``dask.config`` held under ``pipeline:`` where it was submitted."""


@dataclass(frozen=True)
class Start(_Numbered):
    """The content of ``starts/<n>.json``."""

    number: int
    submission: int
    """Number of the submission it is for."""
    time: str
    """UTC, ISO 8601."""
    by: str
    """``submit``, or the name of a server."""
    host: str
    pid: int = 0
    """Of the driver; of who starts it until that is known."""
    process: str = ""
    """Boot, name space and start time of that process."""
    output: str = ""
    """Where on ``host`` its stdout and stderr go, when that is not ``starts/<n>.out``."""


# Keys


def find_key(root: Store, key: str) -> KeyRecord | None:
    """The job that ``key`` means; None when it was never used."""
    folder = _key_folder(key)
    number = _highest(root, folder)
    if number == 0:
        return None
    name = f"{folder}/{number}.json"
    return KeyRecord.from_json(root.read(name), where=root.url(name))


def claim_key(root: Store, key: str, job: str, *, force: bool = False) -> tuple[KeyRecord, bool]:
    """Let ``key`` mean ``job`` unless it means another one already. Of several that claim it, all get the same.

    :param force: whatever it means: from now on it is ``job``.
    :returns: what it means, and whether that is new.
    """
    folder = _key_folder(key)
    while True:
        number = _highest(root, folder)
        if number and not force:
            name = f"{folder}/{number}.json"
            return KeyRecord.from_json(root.read(name), where=root.url(name)), False
        record = KeyRecord(number + 1, key, job, iso_time(utc_now()))
        if root.put_if_absent(f"{folder}/{record.number}.json", record.to_json()):
            return record, True


def _key_folder(key: str) -> str:
    return f"{KEYS}/{digest_json(key)[:40]}"


# Submissions


def put_submission(store: Store, submission: Submission) -> Submission:
    """Put the next one; when somebody else has put that number meanwhile, theirs counts."""
    name = layout.submission_path(submission.number)
    if store.put_if_absent(name, submission.to_json()):
        return submission
    return Submission.from_json(store.read(name), where=store.url(name))


def last_submission(store: Store) -> Submission | None:
    """How the job is to run; None for one that was never submitted."""
    number = _highest(store, layout.SUBMISSIONS)
    if number == 0:
        return None
    name = layout.submission_path(number)
    return Submission.from_json(store.read(name), where=store.url(name))


def mark_queued(root: Store, job: str) -> None:
    """Note for servers that ``job`` may need a driver."""
    root.replace(f"{QUEUE}/{job}.json", json.dumps({"schema_version": 1, "job": job}).encode() + b"\n")


def unmark_queued(root: Store, job: str) -> None:
    """Nobody needs to look at ``job`` any more."""
    root.remove(f"{QUEUE}/{job}.json")


def queued_marks(root: Store) -> list[str]:
    """Ids of the jobs that may need a driver."""
    return [name.removesuffix(".json") for name in root.list(QUEUE) if name.endswith(".json")]


# Starts


def find_starts(store: Store) -> tuple[Start, ...]:
    """All of a job, oldest first. One that cannot be read counts, as one that nobody knows more of."""
    found = []
    for number in layout.numbers_of(store.list(layout.STARTS)):
        name = layout.start_path(number)
        try:
            found.append(Start.from_json(store.read(name), where=store.url(name)))
        except (StateCorrupt, FileNotFoundError):
            found.append(Start(number, 0, "", "", ""))
    return tuple(found)


def claim_start(store: Store, *, number: int, submission: int, by: str) -> Start | None:
    """The right to start driver ``number``; None when somebody else has it."""
    start = Start(
        number=number,
        submission=submission,
        time=iso_time(utc_now()),
        by=by,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=identify(os.getpid()),
    )
    return start if store.put_if_absent(layout.start_path(number), start.to_json()) else None


def note_start(store: Store, start: Start, *, pid: int, output: str = "") -> Start:
    """Write down which process it became."""
    known = replace(start, pid=pid, process=identify(pid), output=output)
    store.replace(layout.start_path(start.number), known.to_json())
    return known


def withdraw_start(store: Store, start: Start) -> None:
    """Give the right back: no driver was started."""
    store.remove(layout.start_path(start.number))


def _highest(store: Store, folder: str) -> int:
    return max(layout.numbers_of(store.list(folder)), default=0)


STARTING_SECONDS = 180.0
"""Seconds after which a driver that was started on another machine, and never took the lease, is given up."""


@dataclass(frozen=True)
class RestartPolicy:
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


def next_need(view: JobView, patience: RestartPolicy) -> Need:
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
    _first: dict[str, tuple[LeaseSnapshot, float]] = field(default_factory=dict)

    def look(self, job: JobDirectory) -> tuple[LeaseSnapshot, Verdict]:
        """The lease of ``job``, and what it means."""
        sight = lease.read_lease(job.store)
        if is_running(sight.holder) and not sight.is_released:
            return sight, Verdict.LIVE
        now = self.clock()
        first, since = self._first.get(job.root, (sight, now))
        verdict = lease.judge_lease(
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


def view_job(job: JobDirectory, watch: LeaseWatch, *, now: datetime) -> JobView | None:
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
        job=job.id,
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


def _is_starting(start: Start, sight: LeaseSnapshot, *, now: datetime) -> bool:
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
