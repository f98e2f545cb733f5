"""Whether this process gets to run: it may be stopped, swapped out, or share its cores with too many others.

How far the partitions are that this process works on, and what their driver asks of them.

A driver that wonders about a slow partition asks its worker process, by a call to `progress_of`, `request_split` or
`request_drop` there. The attempt finds what it is asked at its next batch boundary, in memory: a partition that nobody
asks about pays for one comparison a batch, and storage is not touched. What is lost with the process was only a wish.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.errors import InfrastructureError

BEAT = 0.05
"""Seconds."""


class StallMonitor:
    """A thread that sleeps for a beat and looks how late it wakes: what holds it up holds up the process.

    Code that keeps the interpreter to itself for long looks the same from here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.missed = 0.0
        """Seconds by which it woke late, where that was a beat or more."""
        self._clock = clock
        self._stopped: threading.Event | None = None

    def start(self) -> None:
        """Begin, unless it beats already."""
        if self._stopped is None:
            self._stopped = threading.Event()
            threading.Thread(target=self._run, args=(self._stopped,), name="pulse", daemon=True).start()

    def stop(self) -> None:
        """End with the next beat."""
        if self._stopped is not None:
            self._stopped.set()
            self._stopped = None

    def _run(self, stopped: threading.Event) -> None:
        before = self._clock()
        while not stopped.wait(BEAT):
            now = self._clock()
            late = now - before - BEAT
            before = now
            self.missed += late if late > BEAT else 0.0


MIN_REST_ROWS = 64
"""Rows below which what is left of a partition is not worth a cut."""

_pulse = StallMonitor()


@dataclass(frozen=True)
class ProgressSnapshot:
    """How far an attempt is."""

    rows_done: int
    """Input rows read, scored and counted, filtered ones too."""
    batches: int
    """Batches these were."""
    seconds: float
    """Since the attempt began, by the worker's clock."""
    since: float = 0.0
    """Of these, seconds since its last batch ended."""
    starved: float = 0.0
    """Of all these, seconds for which its process did not get to run: it was stopped, or others had the processor."""


@dataclass
class AttemptProgress:
    """One attempt at a partition, as it sees itself."""

    rows: int
    """Input rows of the partition."""
    clock: Callable[[], float] = time.monotonic
    rows_done: int = 0
    batches: int = 0
    parts: int = 0
    """Parts into which to split the rest at the next batch boundary; 0: no split is requested."""
    is_unwanted: bool = False
    started: float = field(init=False)
    advanced: float = field(init=False)
    """When the last batch ended."""
    starved_before: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.advanced = self.clock()
        self.starved_before = _pulse.missed

    def advance(self, rows_done: int) -> bool:
        """A batch is done; whether to stop here and leave the rest to others.

        :param rows_done: input rows that are done so far.
        :raises InfrastructureError: when the partition is done elsewhere.
        """
        self.rows_done, self.batches, self.advanced = rows_done, self.batches + 1, self.clock()
        self.check()
        return bool(self.parts) and rows_done > 0 and self.rows - rows_done >= MIN_REST_ROWS

    def check(self) -> None:
        """:raises InfrastructureError: when the partition is done elsewhere."""
        if self.is_unwanted:
            raise InfrastructureError("the partition is done elsewhere: this copy of it is not wanted any more")

    @property
    def sight(self) -> ProgressSnapshot:
        """How far it is."""
        now, starved = self.clock(), _pulse.missed - self.starved_before
        return ProgressSnapshot(self.rows_done, self.batches, now - self.started, now - self.advanced, starved)


_lock = threading.Lock()
_running: dict[tuple[str, str], list[AttemptProgress]] = {}
"""By the folder of the round and the id of the partition."""


@contextmanager
def track_attempt(round_folder: str, partition: str, *, rows: int) -> Iterator[AttemptProgress]:
    """The attempt of this block can be asked about.

    :param round_folder: folder of the round: path or URL.
    """
    progress, key = AttemptProgress(rows), (round_folder, partition)
    with _lock:
        _running.setdefault(key, []).append(progress)
        _pulse.start()
    try:
        yield progress
    finally:
        with _lock:
            _running[key].remove(progress)
            if not _running[key]:
                del _running[key]
            if not _running:
                _pulse.stop()


def at_work() -> int:
    """Attempts this process is at."""
    with _lock:
        return sum(map(len, _running.values()))


def progress_of(round_folder: str, partition: str) -> ProgressSnapshot | None:
    """How far this process is with a partition; None when it is not at it."""
    with _lock:
        found = _running.get((round_folder, partition), ())
        return found[-1].sight if found else None


def request_split(round_folder: str, partition: str, parts: int) -> ProgressSnapshot | None:
    """Ask the attempt to stop at its next batch boundary, and to split the rest into ``parts``."""
    with _lock:
        for progress in _running.get((round_folder, partition), ()):
            progress.parts = parts
    return progress_of(round_folder, partition)


def request_drop(round_folder: str, partition: str) -> None:
    """Have the attempt end at its next batch boundary without a trace: its partition is done elsewhere."""
    with _lock:
        for progress in _running.get((round_folder, partition), ()):
            progress.is_unwanted = True
