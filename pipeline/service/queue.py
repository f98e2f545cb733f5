"""The queue of submitted jobs: their keys, their submissions, and each start of a driver.

::

    <root>/.submitted/<digest of the key>/<n>.json   the job of a key; the highest number counts
    <root>/.queue/<job>.json                         mark of a job that may need a driver; a cache
    <root>/<job>/submissions/<n>.json                the settings of the job; the highest number counts
    <root>/<job>/starts/<n>.json                     one start of a driver; created if absent: one driver per number
    <root>/<job>/starts/<n>.out                      stdout and stderr of that driver

The lease of a job decides who drives it. These files only keep two servers from starting the same driver.

`view_job` reads the state of a submitted job. `next_need` decides what it needs: a driver, time, or nothing.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from pipeline.common.digest import digest_json
from pipeline.common.units import iso_time, utc_now
from pipeline.errors import InfrastructureError, PipelineError, StateCorrupt
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

    def to_json_bytes(self) -> bytes:
        """The record as stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, *, where: str) -> Self:
        """Inverse of `to_json_bytes`.

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
                next_step="remove the file, then submit the job again",
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
    """User who submitted the job, as ``user@host``."""
    trigger: str
    """Origin of the submission: ``by hand``, or the name of a trigger."""
    key: str
    priority: int = 0
    """Priority among waiting jobs: higher numbers start first."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings given with the job by flags, variables or in Python, named as in `pipeline.settings`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Settings that ``dask.config`` held under ``pipeline:`` on submission."""


@dataclass(frozen=True)
class Start(_Numbered):
    """The content of ``starts/<n>.json``."""

    number: int
    submission: int
    """Number of the submission that the start is for."""
    time: str
    """UTC, ISO 8601."""
    by: str
    """``submit``, or the name of a server."""
    host: str
    pid: int = 0
    """Process id of the driver; until that is known, of its starter."""
    process: str = ""
    """Boot, name space and start time of that process."""
    output: str = ""
    """File on ``host`` for stdout and stderr, if not ``starts/<n>.out``."""
    is_claim: bool = False
    """True until the driver's process is known: ``pid`` and ``process`` are those of its starter."""


# Keys


def find_key(root: Store, key: str) -> KeyRecord | None:
    """Return the record of ``key``; None if the key was never used."""
    folder = _key_folder(key)
    number = _highest(root, folder)
    if number == 0:
        return None
    name = f"{folder}/{number}.json"
    return KeyRecord.from_json(root.read(name), where=root.url(name))


def claim_key(root: Store, key: str, job: str, *, force: bool = False) -> tuple[KeyRecord, bool]:
    """Assign ``key`` to ``job`` unless the key has a job. Concurrent callers with one key all get the same job.

    :param force: Reassign the key even if it has a job.
    :returns: the record of the key, and whether it is new.
    """
    folder = _key_folder(key)
    while True:
        number = _highest(root, folder)
        if number and not force:
            name = f"{folder}/{number}.json"
            return KeyRecord.from_json(root.read(name), where=root.url(name)), False
        record = KeyRecord(number + 1, key, job, iso_time(utc_now()))
        if root.put_if_absent(f"{folder}/{record.number}.json", record.to_json_bytes()):
            return record, True


def _key_folder(key: str) -> str:
    return f"{KEYS}/{digest_json(key)[:40]}"


# Submissions


def put_submission(store: Store, submission: Submission) -> Submission:
    """Store ``submission``. If another process stored that number first, return its submission instead."""
    name = layout.submission_path(submission.number)
    if store.put_if_absent(name, submission.to_json_bytes()):
        return submission
    return Submission.from_json(store.read(name), where=store.url(name))


def last_submission(store: Store) -> Submission | None:
    """Return the submission that counts; None for a job that was never submitted."""
    number = _highest(store, layout.SUBMISSIONS)
    if number == 0:
        return None
    name = layout.submission_path(number)
    return Submission.from_json(store.read(name), where=store.url(name))


def mark_queued(root: Store, job: str) -> None:
    """Mark ``job`` for servers, as a job that may need a driver."""
    root.replace(f"{QUEUE}/{job}.json", json.dumps({"schema_version": 1, "job": job}).encode() + b"\n")


def unmark_queued(root: Store, job: str) -> None:
    """Remove the mark of a job that no longer needs a driver."""
    root.remove(f"{QUEUE}/{job}.json")


def queued_marks(root: Store) -> list[str]:
    """Return the ids of jobs that may need a driver."""
    return [name.removesuffix(".json") for name in root.list(QUEUE) if name.endswith(".json")]


# Starts


def find_starts(store: Store) -> tuple[Start, ...]:
    """Return all starts of a job, oldest first. An unreadable start counts, with empty fields."""
    starts = []
    for number in layout.numbers_of(store.list(layout.STARTS)):
        name = layout.start_path(number)
        try:
            starts.append(Start.from_json(store.read(name), where=store.url(name)))
        except (StateCorrupt, FileNotFoundError):
            starts.append(Start(number, 0, "", "", ""))
    return tuple(starts)


def claim_start(
    store: Store, *, number: int, submission: int, by: str, now: Callable[[], datetime] = utc_now
) -> Start | None:
    """Claim the right to start driver ``number``. Return None if another process has that right.

    The claim ends with `note_start` or `withdraw_start`, or by itself after `STARTING_SECONDS`.
    """
    start = Start(
        number=number,
        submission=submission,
        time=iso_time(now()),
        by=by,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=identify(os.getpid()),
        is_claim=True,
    )
    return start if store.put_if_absent(layout.start_path(number), start.to_json_bytes()) else None


def note_start(store: Store, start: Start, *, pid: int, output: str = "") -> Start:
    """Record the process of a started driver."""
    known = replace(start, pid=pid, process=identify(pid), output=output, is_claim=False)
    store.replace(layout.start_path(start.number), known.to_json_bytes())
    return known


def withdraw_start(store: Store, start: Start) -> None:
    """Withdraw a claim for which no driver was started."""
    store.remove(layout.start_path(start.number))


@contextmanager
def withdrawn_on_error(store: Store, start: Start) -> Iterator[None]:
    """Withdraw the claim ``start`` if the block, which starts its driver, raises.

    Where the storage fails too, the claim ends after `STARTING_SECONDS`.
    """
    try:
        yield
    except BaseException:
        with suppress(PipelineError, OSError):
            withdraw_start(store, start)
        raise


def _highest(store: Store, folder: str) -> int:
    return max(layout.numbers_of(store.list(folder)), default=0)


STARTING_SECONDS = 180.0
"""Seconds after which a claim ends, and after which a driver on another machine that never acquired the lease counts as
dead."""


@dataclass(frozen=True)
class RestartPolicy:
    """Number and delay of restarts of a job whose driver died."""

    starts: int = 5
    """Maximum number of drivers per submission, the first included."""
    delay: float = 10.0
    """Seconds before the first restart; doubled for each further restart."""
    longest: float = 600.0
    """Upper limit of the delay, in seconds."""

    def delay_after(self, starts: int) -> float:
        """Return the seconds between start number ``starts`` and the next start."""
        return float(min(self.delay * 2 ** max(0, starts - 1), self.longest)) if starts else 0.0


@dataclass(frozen=True)
class JobView:
    """State of a submitted job, read once."""

    job: str
    status: Status
    created: str = ""
    """UTC, ISO 8601."""
    priority: int = 0
    submission: int = 1
    """Number of the last submission."""
    last_start: int = 0
    """Highest number of a start; 0 when no driver was ever started."""
    starts: int = 0
    """Number of drivers started for the last submission."""
    since_start: float = 0.0
    """Seconds since the last start; see `LeaseWatch.age_of`. Used for back-off only."""
    is_starting: bool = False
    """True if a started driver may still acquire the lease."""
    lease: Verdict = Verdict.FREE
    """Verdict on the lease of the job."""
    exit_code: int = 0
    """Exit code of a failed job."""

    @property
    def is_driven(self) -> bool:
        """True if a driver runs or is starting, or if this is unknown."""
        return self.is_starting or self.lease in (Verdict.LIVE, Verdict.WAIT)


class Need(StrEnum):
    """Next step for a job."""

    DRIVER = "driver"
    TIME = "time"
    """A driver runs, or the next restart is not due yet."""
    NOTHING = "nothing"
    """The job has ended."""
    END = "end"
    """The drivers died too often: fail the job."""


def next_need(view: JobView, restart_policy: RestartPolicy) -> Need:
    """Decide what the job needs now. Pure."""
    if view.is_driven:
        return Need.TIME
    if view.status.is_success or view.status in (Status.CANCELLED, Status.INCOMPLETE):
        return Need.NOTHING
    if view.status is Status.FAILED and view.exit_code != InfrastructureError.exit_code:
        return Need.NOTHING
    if view.starts >= restart_policy.starts:
        # A failed job has its final status already; a job whose drivers died has none yet.
        return Need.NOTHING if view.status.is_final else Need.END
    return Need.DRIVER if view.since_start >= restart_policy.delay_after(view.starts) else Need.TIME


@dataclass
class LeaseWatch:
    """Judge of leases by their history: only a heartbeat counter seen to stand still shows that a driver died."""

    lease_seconds: float = LEASE_SECONDS
    clock: Callable[[], float] = time.monotonic
    _first: dict[str, tuple[LeaseSnapshot, float]] = field(default_factory=dict)
    _starts: dict[str, tuple[Start, float, float]] = field(default_factory=dict)
    """Job -> its last start, the time of the first sight by ``clock``, and the age of the start at that time."""

    def judge(self, job: JobDirectory) -> tuple[LeaseSnapshot, Verdict]:
        """Read the lease of ``job``. Return its state, and the verdict on its driver."""
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
        # A heartbeat restarts the wait; a stale lease stays stale until a driver acquires the lease.
        self._first[job.root] = (sight, now) if verdict is Verdict.LIVE else (first, since)
        return sight, verdict

    def age_of(self, start: Start, *, job: JobDirectory, now: datetime) -> float:
        """Return the seconds since ``start`` of ``job``.

        The wall clock counts at first sight only, and ``clock`` from then on: a wall clock that is set later changes
        nothing.
        """
        known = self._starts.get(job.root)
        if known is None or (known[0].number, known[0].time) != (start.number, start.time):
            known = self._starts[job.root] = start, self.clock(), _age(start.time, now)
        _, first_seen, age = known
        return age + self.clock() - first_seen

    def forget(self, job: JobDirectory) -> None:
        """Drop the history of a job that has ended."""
        self._first.pop(job.root, None)
        self._starts.pop(job.root, None)


def view_job(job: JobDirectory, watch: LeaseWatch, *, now: datetime) -> JobView | None:
    """Read the state of ``job``. Return None for a job that was never submitted, but is run from a terminal.

    :param now: UTC.
    """
    submission = last_submission(job.store)
    if submission is None:
        return None
    sight, verdict = watch.judge(job)
    starts = find_starts(job.store)
    current = [start for start in starts if start.submission == submission.number]
    last = starts[-1] if starts else None
    age = watch.age_of(last, job=job, now=now) if last else 0.0
    status = job.status()
    return JobView(
        job=job.id,
        status=status,
        created=job.record.created,
        priority=submission.priority,
        submission=submission.number,
        last_start=last.number if last else 0,
        starts=len(current),
        since_start=age,
        is_starting=last is not None and _is_starting(last, sight, age=age),
        lease=verdict,
        exit_code=exit_code(job, status) if status is Status.FAILED else 0,
    )


def exit_code(job: JobDirectory, status: Status) -> int:
    """Return the exit status of a job that ended with ``status``."""
    if status.is_success:
        return 0
    report = job.read_report() or {}
    error = report.get("error") if report.get("status") == str(status) else None
    code = error.get("exit_code") if isinstance(error, dict) else None
    if isinstance(code, int):
        return code
    return {Status.CANCELLED: 8, Status.INCOMPLETE: 9, Status.INTERRUPTED: 130}.get(status, 1)


def _is_starting(start: Start, sight: LeaseSnapshot, *, age: float) -> bool:
    holder = sight.holder
    if holder is not None and start.process and holder.process == start.process:
        # The driver acquired the lease, which shows whether the driver lives.
        return False
    is_running = lease.is_process(start.process, start.pid)
    if start.is_claim:
        # The process is the starter's. A server lives long, also when the start failed and the claim is still there.
        return is_running is not False and age < STARTING_SECONDS
    # For another machine, or a process without identity, only time can tell.
    return age < STARTING_SECONDS if is_running is None else is_running


def _age(moment: str, now: datetime) -> float:
    """Return the seconds between two times. A time in the future is of a clock that was set back, and as old."""
    try:
        return abs((now - datetime.fromisoformat(moment)).total_seconds())
    except (ValueError, TypeError):
        return float("inf")
