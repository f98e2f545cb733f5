"""The attempts at partitions that the cluster has now, by their futures; a partition may have several."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.execution.worker_events import ExecutionTracker
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition


@dataclass
class Attempt:
    """One try at a partition."""

    partition: Partition
    number: int = 1
    crash_count: int = 0
    """Workers that died while this partition was executing."""
    oom_count: int = 0
    """Workers that were killed for their memory while this partition, or what it is a part of, was executing."""
    is_isolated: bool = False
    workers: tuple[str, ...] = ()
    """Where it should execute; empty: anywhere."""
    is_backup: bool = False
    """Whether it is the backup of another attempt; it must execute on one of ``workers``."""
    submitted: float = 0.0
    """When, by the driver's clock."""


class Waiting:
    """Attempts that have not been submitted: first those at partitions that were to be done from the start, which are
    made when it is their turn, then those that came later."""

    def __init__(self) -> None:
        self._todo: Sequence[Partition] = ()
        self._next = 0
        self._later: deque[Attempt] = deque()

    def begin(self, todo: Sequence[Partition]) -> None:
        """With these."""
        self._todo, self._next = todo, 0

    def append(self, attempt: Attempt) -> None:
        """One more."""
        self._later.append(attempt)

    def popleft(self) -> Attempt:
        """The next one.

        :raises IndexError: when there is none.
        """
        if self._next >= len(self._todo):
            return self._later.popleft()
        self._next += 1
        return Attempt(self._todo[self._next - 1])

    def __len__(self) -> int:
        return len(self._todo) - self._next + len(self._later)


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended, for observers."""

    partition: Partition
    attempt: int
    outcome: str
    """``done``, ``retry``, ``split`` (for its memory), ``cut`` (for its time) or ``failed``."""
    receipt: Receipt | None = None
    reason: str = ""


@dataclass(frozen=True)
class SplitResult:
    """A partition that was cut, on record."""

    receipt: Receipt
    """The one that counts; without ``splits`` when the partition was done meanwhile."""
    parts: tuple[Partition, ...] = ()
    """What takes its place."""
    first: Receipt | None = None
    """That of the first part, when the attempt that cut the partition has done it already."""


@dataclass
class InFlight:
    """What was submitted and has not ended."""

    client: Any
    ledger: ExecutionTracker
    put: Callable[[Any], None]
    """Takes a future that has ended, from another thread."""
    clock: Callable[[], float]
    on_attempt_removed: Callable[[str], None] = lambda key: None
    """Told the keys of attempts that have ended or were taken back."""
    attempts: dict[Any, Attempt] = field(default_factory=dict)
    """By future."""
    _futures: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.attempts)

    def __contains__(self, future: object) -> bool:
        return future in self.attempts

    def has_key(self, key: str) -> bool:
        """Whether a task with that key is in flight."""
        return key in self._futures

    def of_key(self, key: str) -> Any:
        """The future of a key."""
        return self._futures[key]

    def of_partition(self, partition: str) -> list[Any]:
        """The futures of all attempts at a partition."""
        return [future for future, attempt in self.attempts.items() if attempt.partition.id == partition]

    def start(self, attempts: Sequence[Attempt], tasks: Sequence[Any]) -> None:
        """Submit one task for each attempt; those that want workers of their own go there."""
        for where, group in _by_place(attempts, tasks):
            futures = self.client.compute([task for _, task in group], retries=0, **where)
            for (attempt, _), future in zip(group, futures, strict=True):
                attempt.submitted = self.clock()
                self.attempts[future] = attempt
                self._futures[str(future.key)] = future
                future.add_done_callback(self.put)

    def forget(self, future: Any) -> Attempt:
        """It has ended."""
        key = str(future.key)
        self._futures.pop(key, None)
        self.ledger.ended(key)
        self.on_attempt_removed(key)
        return self.attempts.pop(future)

    def take_back(self, future: Any) -> Attempt:
        """Dask is not to run it any more; where it runs already, what it writes comes too late to count."""
        attempt = self.forget(future)
        future.cancel(force=True)
        return attempt

    def release(self) -> None:
        """Let go of all."""
        for future in self.attempts:
            future.release()
        self.attempts.clear()


def _by_place(
    attempts: Sequence[Attempt], tasks: Sequence[Any]
) -> Iterator[tuple[Mapping[str, Any], list[tuple[Attempt, Any]]]]:
    groups: dict[tuple[tuple[str, ...], bool], list[tuple[Attempt, Any]]] = {}
    for attempt, task in zip(attempts, tasks, strict=True):
        groups.setdefault((attempt.workers, attempt.is_backup), []).append((attempt, task))
    for (workers, is_backup), group in groups.items():
        # A copy is of use on these workers only; a part must be done by somebody, whoever leaves.
        where = {"workers": list(workers), "allow_other_workers": not is_backup} if workers else {}
        yield where, group
