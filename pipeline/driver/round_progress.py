"""Count the rows of a round that are done, inside its partitions too, and tell callbacks and other processes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from pipeline.events import Callback, PartitionEnded, ProgressMade, RoundStarted, RunningPartition, notify
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import highest_epoch
from pipeline.jobs.progress_file import ProgressRecord, write_progress
from pipeline.report.progress import Tally
from pipeline.storage.store import open_store

logger = logging.getLogger(__name__)
LOCAL_SECONDS = 2.0
"""Seconds between two writes of ``progress.json`` to a file system."""
REMOTE_SECONDS = 15.0
"""Seconds between two writes to an object store."""


@dataclass
class RoundProgress:
    """Progress of a round that runs."""

    job: JobDirectory
    callbacks: Sequence[Callback]
    epoch: int
    clock: Callable[[], float] = time.monotonic
    tally: Tally = field(default_factory=Tally)
    _round: int = 0
    _running: dict[str, tuple[RunningPartition, ...]] = field(default_factory=dict)
    """Running partitions by group."""
    _written: float = 0.0
    _writer: threading.Thread | None = None

    def start(self, event: RoundStarted) -> None:
        """Start to count with what was done before."""
        now = self.clock()
        self.tally.begin(event, now=now)
        self._round, self._written = event.round, now
        self._running.clear()

    def ended(self, event: PartitionEnded) -> None:
        """Count the end of an attempt."""
        self.tally.add(event, now=self.clock())
        for group, running in self._running.items():
            self._running[group] = tuple(part for part in running if part.partition != event.partition)

    def advanced(self, running: Iterable[RunningPartition], *, group: str = "") -> None:
        """Take over which partitions run, and tell it.

        :param group: the driver that reports them, where several share a round.
        """
        self._running[group] = tuple(running)
        everything = [part for parts in self._running.values() for part in parts]
        everything.sort(key=lambda part: (-part.seconds, part.partition))
        tally = self.tally
        event = ProgressMade(
            self.job.id,
            self._round,
            tally.rows,
            min(tally.rows, tally.rows_done + sum(part.rows_done for part in everything)),
            tally.partitions,
            tally.done,
            tuple(everything),
        )
        now = self.clock()
        tally.update(event, now=now)
        notify(self.callbacks, event)
        self._write(event, now)

    def _write(self, event: ProgressMade, now: float) -> None:
        is_local = self.job.store.is_local
        if now - self._written < (LOCAL_SECONDS if is_local else REMOTE_SECONDS):
            return
        self._written = now
        record = ProgressRecord.make(
            event,
            epoch=self.epoch,
            rows_per_second=self.tally.rate(now),
            seconds_left=self.tally.remaining(now),
        )
        if is_local:
            self._store(record)
        elif self._writer is None or not self._writer.is_alive():
            # A slow store must not delay new partitions.
            self._writer = threading.Thread(target=self._store, args=(record,), name="pipeline-progress", daemon=True)
            self._writer.start()

    def _store(self, record: ProgressRecord) -> None:
        try:
            if highest_epoch(self.job.store) > self.epoch:
                return  # another driver has taken the job over
            write_progress(open_store(self.job.root, private=True, fsync=False), record)
        except Exception:
            logger.debug("progress.json could not be written", exc_info=True)
