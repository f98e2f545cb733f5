"""Cancelling a job: a request that its driver looks for, or, where there is no driver, the status itself.

::

    cancel/<epoch>.json   somebody does not want the job any more; meant for the driver that holds that epoch

A request names the epoch it is meant for, so that it does not cancel a job again that was resumed since.

A request to stop: made by a signal, a person who cancels, or a model that moved; read by what runs the job.
"""

from __future__ import annotations

import getpass
import json
import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import FrameType

from pipeline.common.units import iso_time, plural, utc_now
from pipeline.errors import Cancelled, Interrupted, JobLocked, ModelChanged, PipelineError
from pipeline.jobs import layout
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import LEASE_SECONDS, highest_epoch, hold_lease
from pipeline.jobs.status import Status
from pipeline.storage.store import Store

logger = logging.getLogger(__name__)
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

    def to_json_bytes(self) -> bytes:
        """As stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, epoch: int) -> CancelRequest:
        """Inverse of `to_json_bytes`. What is damaged is a request all the same: its presence is what counts."""
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


class CancelOutcome(StrEnum):
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
) -> CancelOutcome:
    """Ask the driver of ``job`` to stop, or give it its last status where there is none.

    Where the driver may be dead on another machine, it is waited for at most ``lease_seconds``.
    """
    if job.status().is_final:
        return CancelOutcome.ENDED
    request = CancelRequest(highest_epoch(job.store), iso_time(utc_now()), who(), now, reason)
    # Before the look at the lease: a driver that lives finds it, however that look turns out.
    job.store.replace(layout.cancel_path(request.epoch), request.to_json_bytes())
    try:
        with hold_lease(job.store, lease_seconds=lease_seconds):
            status = job.status()
            if status.is_final:
                # Its driver may have done so meanwhile, as it was asked.
                return CancelOutcome.CANCELLED if status is Status.CANCELLED else CancelOutcome.ENDED
            job.set_status(Status.CANCELLED, reason=request.said)
            for child in job.children():
                cancel_job(child, now=now, reason=reason, lease_seconds=lease_seconds)
            return CancelOutcome.CANCELLED
    except JobLocked:
        # A driver that has taken the job in between holds a higher epoch than the request names.
        epoch = highest_epoch(job.store)
        if epoch != request.epoch:
            moved = CancelRequest(epoch, request.time, request.by, now, reason)
            job.store.replace(layout.cancel_path(epoch), moved.to_json_bytes())
        return CancelOutcome.ASKED


def find_request(store: Store, epoch: int) -> CancelRequest | None:
    """What the driver that holds ``epoch`` was asked; None when it was not."""
    try:
        return CancelRequest.from_json(store.read(layout.cancel_path(epoch)), epoch=epoch)
    except FileNotFoundError:
        return None


@contextmanager
def watch_for_cancel(store: Store, epoch: int, stop: Stop) -> Iterator[None]:
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
            stop.request(StopReason.CANCEL, reason=request.said, now=request.now)
            logger.warning("cancelled %s: no more partitions are started", request.said)


SLICE_SECONDS = 1.0
"""Longest time for which a wait for workers does not look whether to stop."""
_check: ContextVar[Callable[[], object]] = ContextVar("check", default=lambda: None)


@contextmanager
def stop_checks(check: Callable[[], object]) -> Iterator[None]:
    """Inside the block, whoever waits by `wait_in_slices` calls ``check`` now and then, which may raise."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def wait_in_slices(
    wait: Callable[[float], object], *, timeout: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Call ``wait`` with a few seconds at a time, as long as it raises TimeoutError.

    :param timeout: seconds in all.
    :raises TimeoutError: when they are over.
    """
    deadline = clock() + timeout
    while True:
        _check.get()()
        try:
            wait(min(SLICE_SECONDS, max(deadline - clock(), 0.01)))
            return
        except TimeoutError:
            if clock() >= deadline:
                raise


class StopReason(StrEnum):
    """What a request to stop comes from; a later one in this order outranks an earlier one."""

    ALIAS_CHANGE = "alias_change"
    """The model reference means another version now."""
    SIGNAL = "signal"
    """The process was asked to end."""
    CANCEL = "cancel"
    """Somebody does not want the job any more."""


_RANK = {why: rank for rank, why in enumerate(StopReason)}


class Stop:
    """Whether to start no more partitions, and why. Any thread and any signal handler may ask."""

    def __init__(self) -> None:
        self.why: StopReason | None = None
        self.reason = ""
        """In words, for the status event."""
        self.signal_number: int | None = None
        self.now = False
        """Whether not even to wait for what runs."""
        # A signal handler may come while the thread it interrupts is in `request`.
        self._lock = threading.RLock()

    def request(
        self, why: StopReason, *, reason: str = "", signal_number: int | None = None, now: bool = False
    ) -> None:
        """Ask to stop. A second signal means at once; the weightiest reason is kept."""
        with self._lock:
            is_second = why is StopReason.SIGNAL and self.signal_number is not None
            self.now = self.now or now or is_second
            self.signal_number = signal_number if signal_number is not None else self.signal_number
            if self.why is None or _RANK[why] > _RANK[self.why]:
                self.why, self.reason = why, reason

    def settle(self, why: StopReason) -> None:
        """Take back what was asked for that reason, which is dealt with; what outranks it stands."""
        with self._lock:
            if self.why is why:
                self.why, self.reason, self.now = None, "", False

    @property
    def is_requested(self) -> bool:
        """Whether anybody has asked."""
        return self.why is not None

    @property
    def is_cancel(self) -> bool:
        """Whether the job is not to end well any more, even if nothing is left to do."""
        return self.why is StopReason.CANCEL

    def error(self, job: str, *, left: int) -> PipelineError:
        """What a run of ``job`` that stopped for this raises.

        :param left: partitions without a receipt.
        """
        resume = f"python -m pipeline resume {job}"
        if self.why is StopReason.CANCEL:
            said = f" ({self.reason})" if self.reason else ""
            return Cancelled(f"the job was cancelled{said}; {partitions_left(left)}", next_step=resume)
        if self.why is StopReason.ALIAS_CHANGE:
            return ModelChanged(
                self.reason or "the model reference means another version now",
                found=partitions_left(left),
                next_step=resume,
            )
        number = self.signal_number or signal.SIGTERM
        return Interrupted(
            f"the run was interrupted by {signal.Signals(number).name}; {partitions_left(left)}",
            signal_number=number,
            next_step=resume,
        )


def partitions_left(count: int) -> str:
    """Return ``1 partition is left``, ``2 partitions are left``."""
    return f"{plural(count, 'partition')} {'is' if count == 1 else 'are'} left"


@contextmanager
def on_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask ``stop`` to drain while the block runs; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.request(StopReason.SIGNAL, signal_number=number)
        logger.warning("%s: no more partitions are started; again to stop at once", signal.Signals(number).name)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
