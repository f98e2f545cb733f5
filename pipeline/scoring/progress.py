"""Progress of the partitions that this process runs, requests of their driver, and stalls of the process.

To learn about a slow partition, or to change it, a driver calls `progress_of`, `request_split` or `request_drop` on its
worker process. The attempt reads the request from memory at its next batch boundary: without a request this costs one
comparison a batch and no access to storage. If the process dies the request is lost, which is harmless.

A process that is stopped, swapped out or short of cores stalls; `StallMonitor` measures for how long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.errors import InfrastructureError

BEAT_SECONDS = 0.05


class StallMonitor:
    """A thread that sleeps for a beat and measures how late it wakes, since all threads of a process stall together.

    Code that holds the interpreter lock for long has the same effect.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.missed = 0.0
        """Sum of all delays of a beat or more, in seconds."""
        self._clock = clock
        self._stopped: threading.Event | None = None

    def start(self) -> None:
        """Start the thread, if it does not run yet."""
        if self._stopped is None:
            self._stopped = threading.Event()
            threading.Thread(target=self._run, args=(self._stopped,), name="stall-monitor", daemon=True).start()

    def stop(self) -> None:
        """Stop the thread at its next beat."""
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None

    def _run(self, stopped: threading.Event) -> None:
        before = self._clock()
        while not stopped.wait(BEAT_SECONDS):
            now = self._clock()
            late = now - before - BEAT_SECONDS
            before = now
            self.missed += late if late > BEAT_SECONDS else 0.0


MIN_REST_ROWS = 64
"""Minimum remaining rows of a partition for a split."""

_stalls = StallMonitor()


@dataclass(frozen=True)
class ProgressSnapshot:
    """Progress of an attempt."""

    rows_done: int
    """Input rows read, scored and counted, filtered ones too."""
    batches: int
    """Number of completed batches."""
    seconds: float
    """Seconds since the attempt started, by the worker's clock."""
    since: float = 0.0
    """Seconds since the last batch ended, part of ``seconds``."""
    stalled_seconds: float = 0.0
    """Seconds for which its process did not run (stopped, or other processes had the cores), part of ``seconds``."""


@dataclass
class AttemptProgress:
    """Progress and requests of one attempt at a partition."""

    rows: int
    """Input rows of the partition."""
    clock: Callable[[], float] = time.monotonic
    rows_done: int = 0
    batches: int = 0
    parts: int = 0
    """Parts into which to split the rest at the next batch boundary; 0: no split is requested."""
    is_dropped: bool = False
    report: Callable[[int], None] | None = None
    """Called with ``rows_done`` at the end of each batch."""
    started: float = field(init=False)
    advanced: float = field(init=False)
    """Time at which the last batch ended."""
    stalled_before: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.advanced = self.clock()
        self.stalled_before = _stalls.missed

    def advance(self, rows_done: int) -> bool:
        """Record that a batch is done. Return True if the attempt must stop here, and split off the rest.

        :param rows_done: input rows that are done so far.
        :raises InfrastructureError: when another attempt has finished the partition.
        """
        self.rows_done, self.batches, self.advanced = rows_done, self.batches + 1, self.clock()
        if self.report is not None:
            self.report(rows_done)
        self.check()
        return bool(self.parts) and rows_done > 0 and self.rows - rows_done >= MIN_REST_ROWS

    def check(self) -> None:
        """Fail the attempt if the driver dropped it.

        :raises InfrastructureError: when another attempt has finished the partition.
        """
        if self.is_dropped:
            raise InfrastructureError("another attempt has finished the partition; this one is dropped")

    @property
    def snapshot(self) -> ProgressSnapshot:
        """Progress at this moment."""
        now, stalled = self.clock(), _stalls.missed - self.stalled_before
        return ProgressSnapshot(self.rows_done, self.batches, now - self.started, now - self.advanced, stalled)


_lock = threading.Lock()
_running: dict[str, list[AttemptProgress]] = {}
"""Progress of the running attempts, by their key."""


@contextmanager
def track_attempt(key: str, *, rows: int, report: Callable[[int], None] | None = None) -> Iterator[AttemptProgress]:
    """Track the attempt of this block, so that its driver can ask about it.

    :param key: the attempt's own name. A request may arrive late: it must not reach the next attempt at the partition.
    :param report: called with the rows that are done, at the end of each batch.
    """
    progress = AttemptProgress(rows, report=report)
    with _lock:
        _running.setdefault(key, []).append(progress)
        _stalls.start()
    try:
        yield progress
    finally:
        with _lock:
            _running[key].remove(progress)
            if not _running[key]:
                del _running[key]
            if not _running:
                _stalls.stop()


def running_attempts() -> int:
    """Return the number of attempts that this process runs."""
    with _lock:
        return sum(map(len, _running.values()))


def progress_of(key: str) -> ProgressSnapshot | None:
    """Return the progress of an attempt; None when this process does not run it."""
    with _lock:
        attempts = _running.get(key, ())
        return attempts[-1].snapshot if attempts else None


def request_split(key: str, parts: int) -> ProgressSnapshot | None:
    """Ask the attempt to stop at its next batch boundary, and to split the rest into ``parts``."""
    with _lock:
        for progress in _running.get(key, ()):
            progress.parts = parts
    return progress_of(key)


def hand_on() -> None:
    """Ask all attempts of this process to stop at their next batch boundary, and to leave the rest to others."""
    with _lock:
        for attempts in _running.values():
            for progress in attempts:
                progress.parts = progress.parts or 1


def seconds_per_batch() -> float:
    """Return the most seconds that a batch has taken in a running attempt of this process; 0 before the first one."""
    with _lock:
        snapshots = [progress.snapshot for attempts in _running.values() for progress in attempts]
    return max((one.seconds / one.batches for one in snapshots if one.batches), default=0.0)


def request_drop(key: str) -> None:
    """Ask the attempt to end at its next batch boundary and to remove its files: it is needed no more."""
    with _lock:
        for progress in _running.get(key, ()):
            progress.is_dropped = True
