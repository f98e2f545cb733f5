"""Requests to cancel a job, and requests to stop a run. `pipeline.driver.outcome` makes the former.

::

    cancel/<epoch>.json   request to cancel the job, for the driver that holds that epoch

A request names the epoch of its driver. A job that was resumed since is therefore not cancelled again.

`Stop` is a request to stop a run. A signal, a user who cancels, or a changed model alias makes it; the driver reads it.
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

from pipeline.common.units import plural
from pipeline.errors import BudgetExhausted, Cancelled, Interrupted, ModelChanged, PipelineError
from pipeline.jobs import layout
from pipeline.storage.store import Store

logger = logging.getLogger(__name__)
LOCAL_SECONDS = 1.0
"""Seconds between two polls for a request on a file system."""
REMOTE_SECONDS = 5.0
"""Seconds between two polls if each is a request to a service."""


@dataclass(frozen=True)
class CancelRequest:
    """The content of ``cancel/<epoch>.json``."""

    epoch: int
    """Epoch of the driver to stop."""
    time: str
    """UTC, ISO 8601."""
    by: str
    """User who asked, as ``user@host``."""
    now: bool = False
    """True: do not wait for running partitions either."""
    reason: str = ""

    def to_json_bytes(self) -> bytes:
        """The request as stored."""
        return json.dumps({"schema_version": 1, **asdict(self)}, indent=1).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, *, epoch: int) -> CancelRequest:
        """Inverse of `to_json_bytes`. A damaged file is a request, too: its existence counts."""
        try:
            record = json.loads(data)
            record.pop("schema_version")
            return CancelRequest(**record)
        except (ValueError, KeyError, TypeError, AttributeError):
            return CancelRequest(epoch, "", "somebody")

    @property
    def description(self) -> str:
        """User and reason, for a status event."""
        return f"by {self.by}" + (f": {self.reason}" if self.reason else "")


class CancelOutcome(StrEnum):
    """Outcome of a request to cancel a job."""

    CANCELLED = "cancelled"
    """The job has the status CANCELLED now."""
    ASKED = "asked"
    """The job has a driver, which was asked to stop."""
    ENDED = "ended"
    """The job had ended already; nothing was changed."""
    PUBLISHED = "published"
    """The job had published its output, and its driver died before it recorded that. The job has succeeded now."""
    COMMITTED = "committed"
    """The job has committed its output and has no driver. It cannot be cancelled: a resume publishes it."""


def who() -> str:
    """``user@host`` of this process."""
    user = "unknown"
    with suppress(KeyError, OSError):
        user = getpass.getuser()
    return f"{user}@{socket.gethostname()}"


def find_request(store: Store, epoch: int) -> CancelRequest | None:
    """Return the request to the driver that holds ``epoch``; None if there is none."""
    try:
        return CancelRequest.from_json(store.read(layout.cancel_path(epoch)), epoch=epoch)
    except FileNotFoundError:
        return None


@contextmanager
def watch_for_cancel(store: Store, epoch: int, stop: Stop) -> Iterator[None]:
    """Pass a request to cancel the driver that holds ``epoch`` on to ``stop``, while the block runs."""
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
            logger.warning("cannot find out whether job %s was cancelled: %s", store.root, error)
            continue
        if request is not None and not (stop.is_cancel and stop.now == request.now):
            stop.request(StopReason.CANCEL, message=request.description, now=request.now)
            logger.warning("cancelled %s: no more partitions are started", request.description)


SLICE_SECONDS = 1.0
"""Maximum seconds between two checks for a stop while workers are waited for."""
_check: ContextVar[Callable[[], object]] = ContextVar("check", default=lambda: None)


@contextmanager
def stop_checks(check: Callable[[], object]) -> Iterator[None]:
    """Call ``check`` before each slice of every `wait_in_slices` inside the block. ``check`` may raise."""
    token = _check.set(check)
    try:
        yield
    finally:
        _check.reset(token)


def wait_in_slices(
    wait: Callable[[float], object], *, timeout: float, clock: Callable[[], float] = time.monotonic
) -> None:
    """Call ``wait`` with at most `SLICE_SECONDS` at a time, again after each TimeoutError.

    :param timeout: Seconds in total.
    :raises TimeoutError: when ``timeout`` has passed.
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
    """Origin of a request to stop. A later member outranks an earlier one."""

    ALIAS_CHANGE = "alias_change"
    """The model reference resolves to another version now."""
    BUDGET = "budget"
    """The job has spent its budget."""
    SIGNAL = "signal"
    """A signal asked the process to end."""
    CANCEL = "cancel"
    """A user cancelled the job."""


_RANK = {reason: rank for rank, reason in enumerate(StopReason)}


class Stop:
    """A request to start no more partitions, and its reason. Any thread or signal handler may make the request."""

    def __init__(self) -> None:
        self.reason: StopReason | None = None
        self.message = ""
        """The reason in words, for the status event."""
        self.signal_number: int | None = None
        self.now = False
        """True: do not wait for running partitions either."""
        # A signal handler may run while the thread that it interrupts is in `request`.
        self._lock = threading.RLock()

    def request(
        self, reason: StopReason, *, message: str = "", signal_number: int | None = None, now: bool = False
    ) -> None:
        """Request a stop. A second signal means to stop now. The highest-ranking reason is kept."""
        with self._lock:
            is_second = reason is StopReason.SIGNAL and self.signal_number is not None
            self.now = self.now or now or is_second
            self.signal_number = signal_number if signal_number is not None else self.signal_number
            if self.reason is None or _RANK[reason] > _RANK[self.reason]:
                self.reason, self.message = reason, message

    def settle(self, reason: StopReason) -> None:
        """Withdraw the request once its reason was dealt with. A request for any other reason stays."""
        with self._lock:
            if self.reason is reason:
                self.reason, self.message, self.now = None, "", False

    @property
    def is_requested(self) -> bool:
        """True if a stop was requested."""
        return self.reason is not None

    @property
    def is_cancel(self) -> bool:
        """True if the job was cancelled: it must not succeed any more, even if no partition is left."""
        return self.reason is StopReason.CANCEL

    def error(self, job: str, *, left: int) -> PipelineError:
        """Return the error of a run of ``job`` that this request stopped.

        :param left: Number of partitions without a receipt.
        """
        resume = f"python -m pipeline resume {job}"
        if self.reason is StopReason.CANCEL:
            message = f" ({self.message})" if self.message else ""
            return Cancelled(f"the job was cancelled{message}; {partitions_left(left)}", next_step=resume)
        if self.reason is StopReason.ALIAS_CHANGE:
            return ModelChanged(
                self.message or "the model reference means another version now",
                found=partitions_left(left),
                next_step=resume,
            )
        if self.reason is StopReason.BUDGET:
            return BudgetExhausted(
                f"the budget is used up; {partitions_left(left)}, and nothing was published",
                found=self.message,
                expected="a budget for all rows; it counts all runs of the job",
                next_step=f"{resume} --budget cost=AMOUNT or node_hours=HOURS, a higher limit for all runs together",
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
    """Turn SIGINT and SIGTERM into requests to ``stop`` while the block runs.

    Only the main thread may set handlers: in any other thread, do nothing.
    """
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
