"""Attempts at partitions: waiting attempts, and attempts in flight by their futures."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from distributed import span

from pipeline.events import RunningPartition
from pipeline.execution.worker_events import ExecutionTracker
from pipeline.plan.plan import Partition


@dataclass
class Attempt:
    """One attempt at a partition."""

    partition: Partition
    number: int = 1
    crash_count: int = 0
    """Workers that died while this partition was executing."""
    oom_count: int = 0
    """Workers killed for their memory while this partition, or a partition it was split from, was executing."""
    unfinished: float = 0.0
    """Lifetimes of workers that were over before the partition had done a batch; a short part of one counts less."""
    is_isolated: bool = False
    workers: tuple[str, ...] = ()
    """Workers on which the attempt should execute; empty: any worker."""
    is_backup: bool = False
    """True if the attempt is the backup of another attempt. A backup must execute on one of ``workers``."""
    is_mitigated: bool = False
    """True if a backup or a split of the frozen partition was tried: no further action is taken against it."""
    submitted: float = 0.0
    """Time of submission by the driver's clock."""
    rows_done: int = 0
    """Input rows of its finished batches, as far as its worker has told."""
    cost: float = 0.0
    """Cost of the answers of services in them."""
    advanced: float = 0.0
    """Time of the last news of that; 0: none yet."""


class Waiting:
    """Attempts that have not been submitted: first the initial partitions, then attempts added later.

    Attempts at initial partitions are created when they are removed.
    """

    def __init__(self) -> None:
        self._partitions: Sequence[Partition] = ()
        self._next = 0
        self._later: deque[Attempt] = deque()

    def start(self, partitions: Sequence[Partition]) -> None:
        """Set the initial partitions."""
        self._partitions, self._next = partitions, 0

    def append(self, attempt: Attempt) -> None:
        """Add an attempt at the end."""
        self._later.append(attempt)

    def popleft(self) -> Attempt:
        """Remove and return the next attempt.

        :raises IndexError: when no attempt is left.
        """
        if self._next >= len(self._partitions):
            return self._later.popleft()
        self._next += 1
        return Attempt(self._partitions[self._next - 1])

    def __len__(self) -> int:
        return len(self._partitions) - self._next + len(self._later)


@dataclass
class InFlight:
    """Attempts that were submitted and have not ended. A partition may have several attempts."""

    client: Any
    tracker: ExecutionTracker
    put: Callable[[Any], None]
    """Receives a finished future, from another thread."""
    clock: Callable[[], float]
    resources: Mapping[str, float] = field(default_factory=dict)
    """Resources that an attempt asks for, unless it is isolated: then it needs no GPU."""
    job: str = ""
    """Id of the job, for the span of the tasks; empty: no span."""
    attempts: dict[Any, Attempt] = field(default_factory=dict)
    """Attempts by future."""
    _futures: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.attempts)

    def __contains__(self, future: object) -> bool:
        return future in self.attempts

    def has_key(self, key: str) -> bool:
        """True if a task with this key is in flight."""
        return key in self._futures

    def of_key(self, key: str) -> Any:
        """Return the future of a key."""
        return self._futures[key]

    def of_partition(self, partition: str) -> list[Any]:
        """Return the futures of all attempts at a partition."""
        return [future for future, attempt in self.attempts.items() if attempt.partition.id == partition]

    def not_started(self) -> list[Any]:
        """Return the futures of attempts that have not started to execute."""
        return [future for future in self.attempts if str(future.key) not in self.tracker.executing]

    def advance(self, key: str, rows_done: int, cost: float = 0.0) -> None:
        """Record the progress of a task, unless its attempt has ended."""
        if (future := self._futures.get(key)) is not None:
            attempt = self.attempts[future]
            attempt.rows_done, attempt.advanced = min(rows_done, attempt.partition.rows), self.clock()
            attempt.cost = cost

    def running(self, *, now: float) -> tuple[RunningPartition, ...]:
        """Return the progress of the partitions that execute, the longest first; of several attempts, the fastest."""
        fastest: dict[str, RunningPartition] = {}
        for key, execution in self.tracker.executing.items():
            if (future := self._futures.get(key)) is None:
                continue
            attempt = self.attempts[future]
            partition = attempt.partition
            since = max(attempt.advanced, execution.since)
            found = RunningPartition(
                partition.id,
                execution.worker,
                partition.rows,
                attempt.rows_done,
                now - execution.since,
                now - since,
                attempt.cost,
            )
            known = fastest.get(partition.id)
            if known is None or found.rows_done > known.rows_done:
                fastest[partition.id] = found
        return tuple(sorted(fastest.values(), key=lambda running: (-running.seconds, running.partition)))

    def start(self, attempts: Sequence[Attempt], tasks: Sequence[Any]) -> None:
        """Submit one task per attempt, to the attempt's ``workers`` if set."""
        for options, group in _by_workers(attempts, tasks):
            asked = {"resources": dict(self.resources)} if self.resources and not group[0][0].is_isolated else {}
            with span("pipeline", self.job) if self.job else nullcontext():
                futures = self.client.compute([task for _, task in group], retries=0, **asked, **options)
            for (attempt, _), future in zip(group, futures, strict=True):
                attempt.submitted, attempt.rows_done, attempt.advanced, attempt.cost = self.clock(), 0, 0.0, 0.0
                self.attempts[future] = attempt
                self._futures[str(future.key)] = future
                future.add_done_callback(self.put)

    def remove(self, future: Any) -> Attempt:
        """Remove the attempt of a future and return it."""
        key = str(future.key)
        self._futures.pop(key, None)
        self.tracker.remove(key)
        return self.attempts.pop(future)

    def release(self) -> None:
        """Release all futures."""
        for future in self.attempts:
            future.release()
        self.attempts.clear()


def _by_workers(
    attempts: Sequence[Attempt], tasks: Sequence[Any]
) -> Iterator[tuple[Mapping[str, Any], list[tuple[Attempt, Any]]]]:
    groups: dict[tuple[tuple[str, ...], bool, bool], list[tuple[Attempt, Any]]] = {}
    for attempt, task in zip(attempts, tasks, strict=True):
        groups.setdefault((attempt.workers, attempt.is_backup, attempt.is_isolated), []).append((attempt, task))
    for (workers, is_backup, _), group in groups.items():
        # A backup is useful on these workers only. A part may run on any worker, in case these workers leave.
        options = {"workers": list(workers), "allow_other_workers": not is_backup} if workers else {}
        yield options, group
