"""Who drives a job: a lease with an epoch, so that one driver works on a job directory at a time.

::

    lease/<epoch>.json   who took that epoch; made if absent, so that each number is one driver's
    lease/<epoch>.beat   a counter that this driver sets to another value as long as it lives, and its farewell

The highest epoch holds the job. No clock of one machine is compared with that of another: a lease is stale when its
counter was *seen* not to change for ``lease_seconds`` of the watcher's own monotonic clock. On the holder's machine a
process that is no more makes it stale at once. A driver that was paused and taken over from meets the higher epoch
before it commits (`Lease.check`). The manifest's number stays the last word, should that look come a moment too early.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path

from pipeline.errors import Fenced, JobLocked, PipelineError, StorageError
from pipeline.jobs import layout
from pipeline.storage.store import Store
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
LEASE_SECONDS = 30.0
BEATS = 6
"""Heartbeats in the time after which a silent lease is stale."""
_LOOK = 0.2
"""Seconds between two looks at a lease that may be stale."""


@dataclass(frozen=True)
class Holder:
    """The content of ``lease/<epoch>.json``."""

    epoch: int
    name: str
    """Unique; of this one taking."""
    host: str
    pid: int
    process: str
    """Boot, process name space and start time of the process: equal for the same process only. Empty: unknown."""
    started: str
    """UTC, ISO 8601; for people, nothing is decided by it."""
    lease_seconds: float
    """Seconds of silence after which others may take over."""

    def to_json_bytes(self) -> bytes:
        """As stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes) -> Holder | None:
        """Inverse of `to_json_bytes`; None for what is damaged, since nothing but its counter is needed to go on."""
        try:
            record = json.loads(data)
            record.pop("schema_version")
            return Holder(**record)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, started {self.started}"


@dataclass(frozen=True)
class LeaseSnapshot:
    """What one look at the lease of a job shows."""

    epoch: int
    """The highest; 0 when nobody ever took it."""
    holder: Holder | None = None
    beat: str = ""

    @property
    def is_released(self) -> bool:
        """Whether its holder has left in good order."""
        return self.beat.endswith(" released")


class Verdict(StrEnum):
    """What to do about a lease."""

    FREE = "free"
    """Take it."""
    DEAD = "dead"
    """Take it: the process that held it is no more."""
    STALE = "stale"
    """Take it: it was silent for long enough."""
    LIVE = "live"
    """Leave it: its holder is at work."""
    WAIT = "wait"
    """Look again."""


def judge_lease(
    sight: LeaseSnapshot, *, first: LeaseSnapshot, waited: float, lease_seconds: float, is_dead: bool
) -> Verdict:
    """What to do about a lease that looks like ``sight`` now.

    :param first: how it looked when one began to watch it.
    :param waited: seconds since then, by the watcher's monotonic clock.
    :param lease_seconds: the watcher's; of the holder's and this one the longer counts.
    :param is_dead: whether the holder is known to be a process of this machine that has ended.
    """
    if sight.epoch == 0 or sight.is_released:
        return Verdict.FREE
    if is_dead:
        return Verdict.DEAD
    if (sight.epoch, sight.beat) != (first.epoch, first.beat):
        return Verdict.LIVE
    patience = max(lease_seconds, sight.holder.lease_seconds if sight.holder else 0.0)
    return Verdict.STALE if waited >= patience else Verdict.WAIT


def read_lease(store: Store) -> LeaseSnapshot:
    """How the lease of the job directory ``store`` looks now."""
    epoch = highest_epoch(store)
    if epoch == 0:
        return LeaseSnapshot(0)
    holder, beat = _read(store, layout.lease_path(epoch)), _read(store, layout.heartbeat_path(epoch))
    return LeaseSnapshot(epoch, Holder.from_json(holder), beat.decode(errors="replace").strip())


def highest_epoch(store: Store) -> int:
    """The epoch that holds the job; 0 when nobody ever took it."""
    return max(layout.numbers_of(store.list(layout.LEASES)), default=0)


def has_ended(holder: Holder | None) -> bool:
    """Whether ``holder`` was a process of this machine, and it is no more. False also when that cannot be told."""
    return holder is not None and is_process(holder.process, holder.pid) is False


def is_running(holder: Holder | None) -> bool:
    """Whether ``holder`` is a process of this machine that runs. False also when that cannot be told."""
    return holder is not None and is_process(holder.process, holder.pid) is True


def is_process(process: str, pid: int) -> bool | None:
    """Whether the process that was `identify`-ed as ``process`` runs; None when that cannot be told from here."""
    place, _, _ = process.rpartition("/")
    if not place or place != _place():
        return None
    return identify(pid) == process


def identify(pid: int) -> str:
    """What no other process has had since this machine was started; empty for one that has ended or is unknown."""
    place = _place()
    try:
        # The name of the program may hold anything but comes first, in brackets (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    is_gone = fields[0] in ("Z", "X", "x")
    return f"{place}/{fields[19]}" if place and not is_gone else ""


def _place() -> str:
    """This machine since its start and this process name space, in which a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@dataclass
class Lease:
    """An epoch of a job that this process took."""

    store: Store
    holder: Holder
    taken: Verdict
    """Why it could be taken."""
    is_lost: bool = False
    """Whether a higher epoch has been seen."""
    _count: int = 0

    @property
    def epoch(self) -> int:
        """The fencing number."""
        return self.holder.epoch

    def fenced_as_far_as_known(self) -> Fenced | None:
        """What `fenced` gives, and None with a line in the log when that cannot be told: nothing of this driver's end
        may be recorded when another one has taken over."""
        try:
            return self.fenced()
        except (StorageError, OSError):
            logger.exception("whether another driver has taken %s over cannot be told", self.store.root)
            return None

    def fenced(self) -> Fenced | None:
        """What to raise when another driver has taken the job over; None while it is this one's.

        :raises StorageError: when that cannot be told.
        """
        there = highest_epoch(self.store)
        if there <= self.epoch:
            return None
        self.is_lost = True
        other = Holder.from_json(_read(self.store, layout.lease_path(there)))
        return Fenced(
            "another driver has taken this job over; nothing more was written",
            where=self.store.url(layout.lease_path(there)),
            found=f"epoch {there}, {other or 'by an unknown process'}",
            expected=f"epoch {self.epoch}, which this driver took; it was silent for {self.holder.lease_seconds:g} s",
            next_step=f"nothing: the other driver goes on; python -m pipeline status {_job(self.store)}",
        )

    def check(self) -> None:
        """Make sure that the job is still this driver's.

        :raises Fenced: when another one has taken it over.
        """
        fenced = self.fenced()
        if fenced is not None:
            raise fenced

    def beat(self) -> None:
        """Say that this driver lives, unless it was taken over from."""
        if self.is_lost or highest_epoch(self.store) > self.epoch:
            self.is_lost = True
            return
        self._count += 1
        self._say(str(self._count))

    def release(self) -> None:
        """Say that this driver is done with the job, however that ended. What fails is logged: others wait instead."""
        try:
            if not self.is_lost and highest_epoch(self.store) == self.epoch:
                self._say("released")
        except (PipelineError, OSError) as error:
            logger.warning("the lease of %s could not be released: %s", self.store.root, error)

    def _say(self, what: str) -> None:
        self.store.replace(layout.heartbeat_path(self.epoch), f"{self.holder.name} {what}\n".encode())


def wait_until_free(
    store: Store,
    *,
    lease_seconds: float = LEASE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> tuple[LeaseSnapshot, Verdict]:
    """Watch the lease until it can be taken; at once where nobody holds it or its process has ended.

    :raises JobLocked: as soon as its holder shows that it is at work.
    """
    first, begin, is_told = read_lease(store), clock(), False
    sight = first
    while True:
        verdict = judge_lease(
            sight,
            first=first,
            waited=clock() - begin,
            lease_seconds=lease_seconds,
            is_dead=has_ended(sight.holder),
        )
        if verdict is Verdict.LIVE:
            raise _locked(store, sight)
        if verdict is not Verdict.WAIT:
            return sight, verdict
        if not is_told:
            is_told = True
            logger.warning(
                "%s may be at work on this job; it is taken over when nothing is heard of it for %g s",
                sight.holder or "an unknown process",
                max(lease_seconds, sight.holder.lease_seconds if sight.holder else 0.0),
            )
        pause(min(_LOOK, lease_seconds / BEATS))
        sight = read_lease(store)


def acquire_lease(
    store: Store,
    *,
    lease_seconds: float = LEASE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> Lease:
    """Take the next epoch of the job directory ``store``, once it is free.

    :raises JobLocked: when another driver holds it.
    """
    sight, verdict = wait_until_free(store, lease_seconds=lease_seconds, clock=clock, pause=pause)
    holder = Holder(
        epoch=sight.epoch + 1,
        name=unique_name(),
        host=socket.gethostname(),
        pid=os.getpid(),
        process=identify(os.getpid()),
        started=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        lease_seconds=lease_seconds,
    )
    lease = Lease(store, holder, verdict)
    if not store.put_if_absent(layout.lease_path(holder.epoch), holder.to_json_bytes()) or lease.fenced():
        # Somebody was faster by a moment, and is at work.
        raise _locked(store, read_lease(store))
    lease.beat()
    return lease


@contextmanager
def hold_lease(store: Store, *, lease_seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold the job directory ``store`` while the block runs, and let it go however that ends.

    :raises JobLocked: when another driver holds it.
    """
    lease = acquire_lease(store, lease_seconds=lease_seconds)
    is_over = threading.Event()
    thread = threading.Thread(target=_keep, args=(lease, is_over), name="pipeline-lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        is_over.set()
        thread.join(lease_seconds)
        lease.release()


def _keep(lease: Lease, is_over: threading.Event) -> None:
    while not is_over.wait(lease.holder.lease_seconds / BEATS) and not lease.is_lost:
        try:
            lease.beat()
        except (StorageError, OSError) as error:
            logger.warning("a heartbeat of the lease failed: %s", error)


def _locked(store: Store, sight: LeaseSnapshot) -> JobLocked:
    job, holder = _job(store), sight.holder
    stop = f", or end it there (kill {holder.pid})," if holder else ""
    return JobLocked(
        "another driver is at work on this job",
        where=store.url(layout.lease_path(sight.epoch)),
        found=str(holder or "an unknown process"),
        expected="no other driver",
        next_step=f"watch it with python -m pipeline status {job}{stop} and then: python -m pipeline resume {job}",
    )


def _job(store: Store) -> str:
    return store.root.rstrip("/").rpartition("/")[2]


def _read(store: Store, name: str) -> bytes:
    try:
        return store.read(name)
    except FileNotFoundError:
        return b""
