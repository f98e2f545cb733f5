"""A request to stop: made by a signal, a person who cancels, or a model that moved; read by what runs the job."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import StrEnum
from types import FrameType

from pipeline.errors import Cancelled, Interrupted, ModelChanged, PipelineError

logger = logging.getLogger(__name__)
SLICE_SECONDS = 1.0
"""Longest time for which a wait for workers does not look whether to stop."""
_check: ContextVar[Callable[[], object]] = ContextVar("check", default=lambda: None)


@contextmanager
def checked(check: Callable[[], object]) -> Iterator[None]:
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


class Why(StrEnum):
    """What a request to stop comes from; a later one in this order outranks an earlier one."""

    DRIFT = "drift"
    """The model reference means another version now."""
    SIGNAL = "signal"
    """The process was asked to end."""
    CANCEL = "cancel"
    """Somebody does not want the job any more."""


_RANK = {why: rank for rank, why in enumerate(Why)}


class Stop:
    """Whether to start no more partitions, and why. Any thread and any signal handler may ask."""

    def __init__(self) -> None:
        self.why: Why | None = None
        self.reason = ""
        """In words, for the status event."""
        self.signal_number: int | None = None
        self.now = False
        """Whether not even to wait for what runs."""
        # A signal handler may come while the thread it interrupts is in `request`.
        self._lock = threading.RLock()

    def request(self, why: Why, *, reason: str = "", signal_number: int | None = None, now: bool = False) -> None:
        """Ask to stop. A second signal means at once; the weightiest reason is kept."""
        with self._lock:
            is_second = why is Why.SIGNAL and self.signal_number is not None
            self.now = self.now or now or is_second
            self.signal_number = signal_number if signal_number is not None else self.signal_number
            if self.why is None or _RANK[why] > _RANK[self.why]:
                self.why, self.reason = why, reason

    def settle(self, why: Why) -> None:
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
        return self.why is Why.CANCEL

    def error(self, job: str, *, left: int) -> PipelineError:
        """What a run of ``job`` that stopped for this raises.

        :param left: partitions without a receipt.
        """
        resume = f"python -m pipeline resume {job}"
        if self.why is Why.CANCEL:
            said = f" ({self.reason})" if self.reason else ""
            return Cancelled(f"the job was cancelled{said}; {left:,} partitions are left", next_step=resume)
        if self.why is Why.DRIFT:
            return ModelChanged(
                self.reason or "the model reference means another version now",
                found=f"{left:,} partitions are left",
                next_step=resume,
            )
        number = self.signal_number or signal.SIGTERM
        return Interrupted(
            f"the run was interrupted by {signal.Signals(number).name}; {left:,} partitions are left",
            signal_number=number,
            next_step=resume,
        )


@contextmanager
def on_signals(stop: Stop) -> Iterator[None]:
    """SIGINT and SIGTERM ask ``stop`` to drain while the block runs; only the main thread may set handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.request(Why.SIGNAL, signal_number=number)
        logger.warning("%s: no more partitions are started; again to stop at once", signal.Signals(number).name)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
