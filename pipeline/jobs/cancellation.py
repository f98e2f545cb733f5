"""Cancelling a job: a request that its driver looks for, or, where there is no driver, the status itself.

::

    cancel/<epoch>.json   somebody does not want the job any more; meant for the driver that holds that epoch

A request names the epoch it is meant for, so that it does not cancel a job again that was resumed since.
"""

from __future__ import annotations

import getpass
import json
import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from enum import StrEnum

from pipeline.common.units import iso_time, utc_now
from pipeline.errors import JobLocked, PipelineError
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS, held, highest_epoch
from pipeline.jobs.status import Status
from pipeline.jobs.stop import Stop, Why
from pipeline.storage.store import Store

logger = logging.getLogger(__name__)
FOLDER = "cancel"
LOCAL_SECONDS = 1.0
"""Seconds between two looks for a request on a file system."""
REMOTE_SECONDS = 5.0
"""The same where each look is a request to a service."""


@dataclass(frozen=True)
class CancelRequest:
    """The content of ``cancel/<epoch>.json``."""

    epoch: int
    """Of the driver that is meant."""
    time: str
    """UTC, ISO 8601."""
    by: str
    """Who asked, as ``user@host``."""
    now: bool = False
    """Whether not even to wait for the partitions that run."""
    reason: str = ""

    def to_json(self) -> bytes:
        """As stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, epoch: int) -> CancelRequest:
        """Inverse of `to_json`. What is damaged is a request all the same: its presence is what counts."""
        try:
            record = json.loads(data)
            record.pop("schema_version")
            return CancelRequest(**record)
        except (ValueError, KeyError, TypeError, AttributeError):
            return CancelRequest(epoch, "", "somebody")

    @property
    def said(self) -> str:
        """Who asked and why, for a status event."""
        return f"by {self.by}" + (f": {self.reason}" if self.reason else "")


class Cancelling(StrEnum):
    """What came of asking to cancel a job."""

    CANCELLED = "cancelled"
    """It has that status now."""
    ASKED = "asked"
    """Its driver is at work, and was asked."""
    ENDED = "ended"
    """It had ended already; nothing was changed."""


def who() -> str:
    """``user@host`` of this process."""
    user = "unknown"
    with suppress(KeyError, OSError):
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"


def cancel_job(
    job: JobDirectory, *, now: bool = False, reason: str = "", lease_seconds: float = LEASE_SECONDS
) -> Cancelling:
    """Ask the driver of ``job`` to stop, or give it its last status where there is none.

    Where the driver may be dead on another machine, it is waited for at most ``lease_seconds``.
    """
    if job.status().is_final:
        return Cancelling.ENDED
    request = CancelRequest(highest_epoch(job.store), iso_time(utc_now()), who(), now, reason)
    # Before the look at the lease: a driver that lives finds it, however that look turns out.
    job.store.replace(f"{FOLDER}/{request.epoch}.json", request.to_json())
    try:
        with held(job.store, lease_seconds=lease_seconds):
            status = job.status()
            if status.is_final:
                # Its driver may have done so meanwhile, as it was asked.
                return Cancelling.CANCELLED if status is Status.CANCELLED else Cancelling.ENDED
            job.set_status(Status.CANCELLED, reason=request.said)
            for child in job.children():
                cancel_job(child, now=now, reason=reason, lease_seconds=lease_seconds)
            return Cancelling.CANCELLED
    except JobLocked:
        # A driver that has taken the job in between holds a higher epoch than the request names.
        epoch = highest_epoch(job.store)
        if epoch != request.epoch:
            moved = CancelRequest(epoch, request.time, request.by, now, reason)
            job.store.replace(f"{FOLDER}/{epoch}.json", moved.to_json())
        return Cancelling.ASKED


def find_request(store: Store, epoch: int) -> CancelRequest | None:
    """What the driver that holds ``epoch`` was asked; None when it was not."""
    try:
        return CancelRequest.from_json(store.read(f"{FOLDER}/{epoch}.json"), epoch=epoch)
    except FileNotFoundError:
        return None


@contextmanager
def watched(store: Store, epoch: int, stop: Stop) -> Iterator[None]:
    """While the block runs, a request to cancel the driver that holds ``epoch`` is handed on to ``stop``."""
    is_over = threading.Event()
    seconds = LOCAL_SECONDS if store.is_local else REMOTE_SECONDS
    thread = threading.Thread(
        target=_watch, args=(store, epoch, stop, seconds, is_over), name="pipeline-cancel", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join(seconds)


def _watch(store: Store, epoch: int, stop: Stop, seconds: float, is_over: threading.Event) -> None:
    while not (stop.is_cancel and stop.now) and not is_over.wait(seconds):
        try:
            request = find_request(store, epoch)
        except (PipelineError, OSError) as error:
            logger.warning("whether job %s was cancelled cannot be told: %s", store.root, error)
            continue
        if request is not None and not (stop.is_cancel and stop.now == request.now):
            stop.request(Why.CANCEL, reason=request.said, now=request.now)
            logger.warning("cancelled %s: no more partitions are started", request.said)
