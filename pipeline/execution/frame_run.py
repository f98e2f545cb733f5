"""Compute partitions of a Dask DataFrame on a client, each once, whatever dies.

Every partition has a task behind it that keeps it and returns what is on record of it. The result is released at once,
so that no restart computes the partition again. Partitions are taken by the keys of the whole frame: a frame cut with
``partitions[…]`` shuffles its rows elsewhere.

Pieces of two runs fit only if every partition has the same rows in both. So when some are finished before others are
computed, on a later call or after a worker was lost, one of the finished ones is computed again and compared.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any

import dask
from distributed.scheduler import KilledWorker

from pipeline.common.content import Content
from pipeline.common.units import plural
from pipeline.errors import DiskFull, InfrastructureError, PartitionStuck
from pipeline.execution.counted_shuffles import lost_rows
from pipeline.execution.health import PING_TIMEOUT, ClusterHealth, DispatchPolicy
from pipeline.execution.worker_events import (
    ClusterEventListener,
    MemoryRanOut,
    WorkerLeft,
)
from pipeline.storage.urls import unique_name

logger = logging.getLogger("pipeline")

# Dask has no usable types.
_dask: Any = dask
TICK = 0.5
"""Seconds between two looks at the cluster while nothing ends."""
POLL = 3.0
"""Seconds between two looks at the tasks of the scheduler."""
BUSY_CPU = 10.0
"""Percent of a core above which a worker computes, and does not wait for something that never comes."""
MAX_OOM_KILLS = 2
"""Workers killed for their memory until a run ends."""


class DiffersError(Exception):
    """A finished partition, computed again, has other rows."""

    def __init__(self, partition: int, difference: str) -> None:
        super().__init__(f"partition {partition}, computed again, has {difference}")
        self.partition = partition
        self.difference = difference


class TooLittleMemoryError(Exception):
    """Workers were killed for their memory while they computed some partitions."""

    def __init__(self, partitions: Sequence[int]) -> None:
        super().__init__(f"workers ran out of memory at partitions {list(partitions)}")
        self.partitions = tuple(partitions)
        """Partitions that the last of them computed; empty if rows were on their way then."""


@dataclass(frozen=True)
class Kept:
    """What is on record of a finished partition."""

    partition: int
    content: Content | None
    receipt: Any
    """The receipt that counts."""


@dataclass
class FrameRun:
    """One computation of some partitions of a frame."""

    client: Any
    frame: Any
    """A Dask DataFrame."""
    keep: Callable[[Any, int], Kept]
    """Keeps a partition: called on a worker with its rows and number."""
    recall: Callable[[Any], Content]
    """Returns the content of a partition that was computed again, without keeping it."""
    policy: DispatchPolicy = field(default_factory=DispatchPolicy)
    stall_timeout: float = 120.0
    """Seconds without any task that ended and without a worker that computes, until everything is submitted again."""
    attempts: int = 3
    """Number of times that everything is submitted."""
    is_stopping: Callable[[], bool] = lambda: False
    """True if a stop was requested: nothing more is waited for."""
    sending: Callable[[], AbstractContextManager[None]] = nullcontext
    """Returns the context in which tasks are sent."""
    find: Callable[[Sequence[int]], Sequence[Kept]] = lambda _: ()
    """Returns those of some partitions that are on record. A lost worker may have kept some, and died before it could
    say so."""
    poll: Callable[[], None] = lambda: None
    """Is called at each turn; an error that it raises ends the run."""
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.checked = 0
        """Number of finished partitions that were computed again and had the same rows."""
        self.lost_workers = 0
        self.submissions = 0
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._parts: list[Any] = []
        self._futures: dict[Any, int] = {}
        self._finished: dict[int, Content] = {}
        self._check: Any = None
        self._checking: int | None = None
        self._oom_workers: set[str] = set()
        self._oom_kills = 0

    def run(self, missing: Sequence[int], finished: Mapping[int, Content | None]) -> Iterator[Kept]:
        """Compute the partitions ``missing``, and yield each as soon as it is kept.

        :param finished: content of the partitions that were kept before.
        :raises DiffersError: if one of the finished partitions has other rows when it is computed again.
        :raises TooLittleMemoryError: if workers are killed for their memory again and again.
        :raises PipelineError: if a shuffle lost rows, nothing executes, or the cluster is gone.
        :raises Exception: the error of the frame's own functions.
        """
        if not missing:
            return
        self._parts = self.frame.to_delayed()
        self._finished = {number: content for number, content in finished.items() if content is not None}
        self._health = ClusterHealth(self.client, self.policy, self.clock)
        self._progress = _Progress(self.client, self.clock)
        listener = ClusterEventListener(self.client, self._inbox.put)
        try:
            self._submit(missing)
            self._check_one()
            while (self._futures or self._check is not None) and not self.is_stopping():
                yield from self._step()
        finally:
            listener.close()
            self._cancel()

    def _step(self) -> Iterator[Kept]:
        timeout = TICK
        while True:
            try:
                item = self._inbox.get(timeout=timeout)
            except queue.Empty:
                break
            timeout = 0.0
            if isinstance(item, MemoryRanOut):
                self._oom_workers.add(item.worker)
            elif isinstance(item, WorkerLeft):
                self._on_worker_left(item)
                yield from self._find_kept()
                self._check_one()
            elif item is self._check:
                self._on_checked(item)
            elif item in self._futures:
                kept = self._on_done(item)
                if kept is not None:
                    yield kept
        self._health.check(True)
        self.poll()
        if self._progress.idle() > self.stall_timeout:
            self._submit_again(f"no task ended for {self._progress.idle():.0f} s, and no worker computes")

    # Submission

    def _submit(self, numbers: Sequence[int]) -> None:
        keep = _dask.delayed(self.keep, pure=False)
        name = unique_name()
        tasks = [keep(self._parts[number], number, dask_key_name=f"keep-{name}-{number}") for number in numbers]
        self.submissions += 1
        self._progress.record()
        with self.sending():
            futures = self.client.compute(tasks)
        for future, number in zip(futures, numbers, strict=True):
            self._futures[future] = number
            future.add_done_callback(self._inbox.put)

    def _check_one(self) -> None:
        """Compute one of the finished partitions again, if others are still to come."""
        if not self._finished or not self._futures or self._check is not None:
            return
        # The middle one by rows: an empty partition proves little. It is another one each time.
        in_order = sorted(self._finished, key=lambda number: (self._finished[number].rows, number))
        self._checking = in_order[len(in_order) // 2]
        recall = _dask.delayed(self.recall, pure=False)
        task = recall(self._parts[self._checking], dask_key_name=f"check-{unique_name()}-{self._checking}")
        with self.sending():
            self._check = self.client.compute(task)
        self._check.add_done_callback(self._inbox.put)

    def _cancel(self) -> list[int]:
        """Cancel all tasks; return the partitions that are still missing."""
        numbers = list(self._futures.values())
        futures = [*self._futures, *([] if self._check is None else [self._check])]
        self._futures, self._check = {}, None
        if futures:
            with suppress(Exception):
                self.client.cancel(futures, force=True)
        return numbers

    def _submit_again(self, reason: str) -> None:
        if self.submissions >= self.attempts:
            raise InfrastructureError(
                "a stage with shuffles makes no progress",
                found=f"{reason}; everything was submitted {plural(self.submissions, 'time')}",
                expected="workers that reach each other, with free memory and disk space",
                next_step="check the workers' logs; resume: finished partitions are kept",
            )
        logger.warning("submitting %s again: %s", plural(len(self._futures), "partition"), reason)
        self._submit(self._cancel())
        self._check_one()

    # Ends of tasks

    def _on_done(self, future: Any) -> Kept | None:
        number = self._futures[future]
        try:
            kept: Kept = future.result(timeout=PING_TIMEOUT)
        except Exception as error:
            self._health.check_alive()
            self._on_error(error, number)
            return None
        del self._futures[future]
        # What is released is forgotten by the scheduler, and not computed again when a worker dies.
        future.release()
        self._health.record_result()
        self._progress.record()
        if kept.content is not None:
            self._finished[number] = kept.content
        return kept

    def _on_error(self, error: Exception, number: int) -> None:
        found = lost_rows(error)
        if found is not None:
            raise found from error
        full = out_of_disk(error)
        if full is not None:
            raise full from error
        if isinstance(error, KilledWorker):
            if self._oom_kills:
                raise TooLittleMemoryError([number]) from error
            raise PartitionStuck(
                "a partition keeps killing its workers",
                where=f"partition {number}",
                found=str(error).splitlines()[0],
                next_step="fix the step that crashes, or give the workers more memory; then resume",
            ) from error
        if isinstance(error, (CancelledError, TimeoutError)) or is_of_shuffle(error):
            self._submit_again(f"{type(error).__name__}: {error}")
            return
        raise error

    def _on_checked(self, future: Any) -> None:
        number = self._checking
        assert number is not None
        try:
            content: Content = future.result(timeout=PING_TIMEOUT)
        except Exception as error:
            self._health.check_alive()
            self._check = None
            self._on_error(error, number)
            return
        self._check = None
        self._progress.record()
        expected = self._finished[number]
        if not content.agrees(expected):
            raise DiffersError(number, content.difference(expected))
        self.checked += 1

    # Lost workers

    def _on_worker_left(self, event: WorkerLeft) -> None:
        busy = self._numbers_of(event.processing)
        if event.worker in self._oom_workers:
            self._oom_workers.discard(event.worker)
            self._oom_kills += 1
            if self._oom_kills >= MAX_OOM_KILLS:
                raise TooLittleMemoryError(busy)
        self.lost_workers += 1
        self._progress.record()

    def _find_kept(self) -> Iterator[Kept]:
        """Yield the partitions that were kept, and do not wait for their tasks, which Dask may have to run again."""
        waiting = {number: future for future, number in self._futures.items()}
        for kept in self.find(list(waiting)):
            future = waiting[kept.partition]
            del self._futures[future]
            future.release()
            if kept.content is not None:
                self._finished[kept.partition] = kept.content
            yield kept

    def _numbers_of(self, keys: Sequence[Any]) -> list[int]:
        """Return the partitions that the tasks ``keys`` compute themselves."""
        numbers = {repr(part.key): number for number, part in enumerate(self._parts)}
        own = {f"{future.key}": number for future, number in self._futures.items()}
        named = (numbers.get(repr(key), own.get(str(key))) for key in keys)
        return sorted({number for number in named if number is not None})


class _Progress:
    """The time since anything happened on the cluster, seen from outside."""

    def __init__(self, client: Any, clock: Callable[[], float]) -> None:
        self._client = client
        self._clock = clock
        self._seen: Any = None
        self._since = self._polled = clock()

    def record(self) -> None:
        """Record that something happened."""
        self._since = self._clock()

    def idle(self) -> float:
        """Return the seconds without a change of the tasks' states and without a worker that computes."""
        now = self._clock()
        if now - self._polled >= POLL:
            self._polled = now
            try:
                states = self._client.sync(self._client.scheduler.get_task_prefix_states, callback_timeout=PING_TIMEOUT)
                workers = self._client.sync(self._client.scheduler.identity, callback_timeout=PING_TIMEOUT)["workers"]
            except (TimeoutError, OSError):
                return 0.0  # `ClusterHealth` has its own limit for that
            is_busy = any(worker.get("metrics", {}).get("cpu", 0.0) > BUSY_CPU for worker in workers.values())
            if states != self._seen or is_busy:
                self._seen = states
                self.record()
        return self._clock() - self._since


def is_of_shuffle(error: BaseException) -> bool:
    """Return True for an error of Dask's shuffles themselves, such as a worker that left during a broadcast."""
    from distributed.shuffle._exceptions import P2PConsistencyError, P2PIllegalStateError

    kinds = (P2PConsistencyError, P2PIllegalStateError)
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and str(error).startswith("P2P "))


def out_of_disk(error: BaseException) -> DiskFull | None:
    """Return the error of a shuffle for which a worker's disk is too small; None if ``error`` is another."""
    from distributed.shuffle._exceptions import P2POutOfDiskError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, P2POutOfDiskError):
            return DiskFull(
                "a worker's disk is too small for a shuffle",
                found=str(seen) or "P2POutOfDiskError",
                expected="space for the rows of the shuffle, in the workers' local directories",
                next_step="name a larger --local-directory for the workers; resume: finished partitions are kept",
            )
        seen = seen.__cause__
    return None
