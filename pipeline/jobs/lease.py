"""The lease of a job: one driver at a time works on a job directory, under a numbered epoch.

::

    lease/<epoch>.json   driver that acquired that epoch; created if absent, so each number belongs to one driver
    lease/<epoch>.beat   heartbeat counter of that driver; ends with ``released`` once the driver has released the lease

The highest epoch holds the job. Clocks of two machines are never compared. A lease is stale when its counter was *seen*
not to change for ``lease_seconds`` of the watcher's own monotonic clock. On the holder's machine, the end of its
process frees the lease at once. A driver that was paused and replaced finds the higher epoch before it commits
(`Lease.check`). If that check comes a moment too early, the manifest's number still prevents a second commit.
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
HEARTBEATS = 6
"""Heartbeats within the seconds of silence after which a lease is stale."""
_LOOK = 0.2
"""Maximum seconds between two reads of a lease that may be stale."""


@dataclass(frozen=True)
class Holder:
    """The content of ``lease/<epoch>.json``."""

    epoch: int
    name: str
    """Unique id of this acquisition."""
    host: str
    pid: int
    process: str
    """Boot, process name space and start time of the process: equal for the same process only. Empty: unknown."""
    started: str
    """UTC, ISO 8601. For people only: no decision uses this time."""
    lease_seconds: float
    """Seconds of silence after which another driver may take over."""
    rounds: int = 0
    """Highest number of a round that was opened when the epoch was acquired. Higher ones of older epochs are void."""

    def to_json_bytes(self) -> bytes:
        """The record as stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes) -> Holder | None:
        """Inverse of `to_json_bytes`; None for a damaged record. The heartbeat counter suffices to judge the lease."""
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
    """State of the lease of a job, read once."""

    epoch: int
    """Highest epoch; 0 if no driver ever acquired the lease."""
    holder: Holder | None = None
    heartbeat: str = ""

    @property
    def is_released(self) -> bool:
        """True if the holder has released the lease."""
        return self.heartbeat.endswith(" released")


class Verdict(StrEnum):
    """Next step for a lease."""

    FREE = "free"
    """Acquire the lease: no driver holds it."""
    DEAD = "dead"
    """Acquire the lease: the process of its holder has ended."""
    STALE = "stale"
    """Acquire the lease: its holder was silent for long enough."""
    LIVE = "live"
    """Leave the lease alone: its holder runs."""
    WAIT = "wait"
    """Read the lease again."""


def judge_lease(
    sight: LeaseSnapshot, *, first: LeaseSnapshot, waited: float, lease_seconds: float, is_dead: bool
) -> Verdict:
    """Decide what to do about the lease whose state is ``sight`` now. Pure.

    :param first: State of the lease when the watch began.
    :param waited: Seconds since then, by the watcher's monotonic clock.
    :param lease_seconds: Setting of the watcher. The holder's setting counts if it is longer.
    :param is_dead: True if the holder is known to be an ended process of this machine.
    """
    if sight.epoch == 0 or sight.is_released:
        return Verdict.FREE
    if is_dead:
        return Verdict.DEAD
    if (sight.epoch, sight.heartbeat) != (first.epoch, first.heartbeat):
        return Verdict.LIVE
    longest = max(lease_seconds, sight.holder.lease_seconds if sight.holder else 0.0)
    return Verdict.STALE if waited >= longest else Verdict.WAIT


def read_lease(store: Store) -> LeaseSnapshot:
    """Read the lease of the job directory ``store``."""
    epoch = highest_epoch(store)
    if epoch == 0:
        return LeaseSnapshot(0)
    holder, heartbeat = _read(store, layout.lease_path(epoch)), _read(store, layout.heartbeat_path(epoch))
    return LeaseSnapshot(epoch, Holder.from_json(holder), heartbeat.decode(errors="replace").strip())


def highest_epoch(store: Store) -> int:
    """Return the epoch that holds the job; 0 if no driver ever acquired the lease."""
    return max(layout.numbers_of(store.list(layout.LEASES)), default=0)


def rounds_seen_after(store: Store, epoch: int) -> list[int]:
    """Return `Holder.rounds` of all epochs above ``epoch``. Damaged records are left out."""
    epochs = [number for number in layout.numbers_of(store.list(layout.LEASES)) if number > epoch]
    holders = (Holder.from_json(_read(store, layout.lease_path(number))) for number in epochs)
    return [holder.rounds for holder in holders if holder is not None]


def has_ended(holder: Holder | None) -> bool:
    """True if ``holder`` was a process of this machine that has ended. False if unknown."""
    return holder is not None and is_process(holder.process, holder.pid) is False


def is_running(holder: Holder | None) -> bool:
    """True if ``holder`` is a running process of this machine. False if unknown."""
    return holder is not None and is_process(holder.process, holder.pid) is True


def is_process(process: str, pid: int) -> bool | None:
    """True if the process whose `identify` was ``process`` runs; None if unknown, as for another machine."""
    machine, _, _ = process.rpartition("/")
    if not machine or machine != _place():
        return None
    return identify(pid) == process


def identify(pid: int) -> str:
    """Return an id that no other process has had since this machine started. Empty for an ended or unknown process."""
    machine = _place()
    try:
        # The name of the program may contain any character, but comes first, in brackets (proc(5)).
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    is_gone = fields[0] in ("Z", "X", "x")
    return f"{machine}/{fields[19]}" if machine and not is_gone else ""


def _place() -> str:
    """Id of this machine since its start and of this process name space. Within both, a pid means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


@dataclass
class Lease:
    """An epoch of a job that this process acquired."""

    store: Store
    holder: Holder
    acquired: Verdict
    """Verdict that allowed the acquisition."""
    is_lost: bool = False
    """True if a higher epoch has been seen."""
    _count: int = 0

    @property
    def epoch(self) -> int:
        """Fencing number of this lease."""
        return self.holder.epoch

    def fenced_as_far_as_known(self) -> Fenced | None:
        """Return the result of `fenced`; None if storage fails, which is logged.

        A driver calls this before it records its own end: after a takeover, that must not be recorded.
        """
        try:
            return self.fenced()
        except (StorageError, OSError):
            logger.exception("whether another driver has taken %s over cannot be determined", self.store.root)
            return None

    def fenced(self) -> Fenced | None:
        """Return the error to raise if another driver has taken over the job; None if this driver holds the job.

        :raises StorageError: when the epoch cannot be read.
        """
        highest = highest_epoch(self.store)
        if highest <= self.epoch:
            return None
        self.is_lost = True
        other = Holder.from_json(_read(self.store, layout.lease_path(highest)))
        return Fenced(
            "another driver has taken over this job; this driver wrote nothing more",
            where=self.store.url(layout.lease_path(highest)),
            found=f"epoch {highest}, {other or 'by an unknown process'}",
            expected=f"epoch {self.epoch} of this driver, with a heartbeat within {self.holder.lease_seconds:g} s",
            next_step=f"none: the other driver continues the job; python -m pipeline status {_job(self.store)}",
        )

    def check(self) -> None:
        """Check that this driver still holds the job.

        :raises Fenced: when another driver has taken over the job.
        """
        fenced = self.fenced()
        if fenced is not None:
            raise fenced

    def write_heartbeat(self) -> None:
        """Write a heartbeat, unless another driver has taken over the job."""
        if self.is_lost or highest_epoch(self.store) > self.epoch:
            self.is_lost = True
            return
        self._count += 1
        self._say(str(self._count))

    def release(self) -> None:
        """Release the lease. An error is logged: the next driver then waits until the lease is stale."""
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
    """Watch the lease until it can be acquired: at once if no driver holds it, or the holder's process has ended.

    :raises JobLocked: as soon as a heartbeat shows that the holder runs.
    """
    first, begin, is_logged = read_lease(store), clock(), False
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
        if not is_logged:
            is_logged = True
            logger.warning(
                "%s may be running this job; this driver takes over after %g s without a heartbeat",
                sight.holder or "an unknown process",
                max(lease_seconds, sight.holder.lease_seconds if sight.holder else 0.0),
            )
        pause(min(_LOOK, lease_seconds / HEARTBEATS))
        sight = read_lease(store)


def acquire_lease(
    store: Store,
    *,
    lease_seconds: float = LEASE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> Lease:
    """Acquire the next epoch of the job directory ``store``, once its lease is free.

    :raises JobLocked: when another driver holds the lease.
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
        rounds=max(layout.numbers_of(store.list(layout.ROUNDS)), default=0),
    )
    lease = Lease(store, holder, verdict)
    if not store.put_if_absent(layout.lease_path(holder.epoch), holder.to_json_bytes()) or lease.fenced():
        # Another driver was faster, and runs.
        raise _locked(store, read_lease(store))
    lease.write_heartbeat()
    return lease


@contextmanager
def hold_lease(store: Store, *, lease_seconds: float = LEASE_SECONDS) -> Iterator[Lease]:
    """Hold the lease of the job directory ``store`` while the block runs; release it afterwards in any case.

    :raises JobLocked: when another driver holds the lease.
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
    while not is_over.wait(lease.holder.lease_seconds / HEARTBEATS) and not lease.is_lost:
        try:
            lease.write_heartbeat()
        except (StorageError, OSError) as error:
            logger.warning("a heartbeat of the lease failed: %s", error)


def _locked(store: Store, sight: LeaseSnapshot) -> JobLocked:
    job, holder = _job(store), sight.holder
    stop = f", or end it there (kill {holder.pid})," if holder else ""
    return JobLocked(
        "another driver runs this job",
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
