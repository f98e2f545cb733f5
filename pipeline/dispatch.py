"""Partitions in flight: a bounded window of tasks, and what is done about each end.

What an end means is decided in `pipeline.outcome`, who is to blame for a worker's death in `pipeline.blame`, and
whether the cluster is alive in `pipeline.watch`; this module carries it out. Its facts about Dask are in
``docs/design/dask.md``.
"""

from __future__ import annotations

import heapq
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.blame import Death, Fact, Ledger, MemoryRanOut, Started, WorkerLeft
from pipeline.errors import PipelineError
from pipeline.evidence import Evidence
from pipeline.outcome import Fail, Isolate, Leave, Retry, Split, decide, decide_death, is_blamed, overdue, stuck
from pipeline.plan import Partition
from pipeline.receipt import Receipt
from pipeline.stop import Stop
from pipeline.watch import PROBE_TIMEOUT, Policy, Watch

__all__ = ["Dispatcher", "Divided", "Ended", "Policy"]

logger = logging.getLogger(__name__)
TICK = 0.5
"""Seconds between two looks at the cluster while nothing ends."""


@dataclass
class _Attempt:
    partition: Partition
    number: int = 1
    blames: int = 0
    """Workers that died while this partition was executing."""
    is_isolated: bool = False


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, for observers."""

    partition: Partition
    attempt: int
    outcome: str
    """``done``, ``retry``, ``split`` or ``failed``."""
    receipt: Receipt | None = None
    reason: str = ""


@dataclass(frozen=True)
class Divided:
    """A partition that was cut, on record."""

    receipt: Receipt
    """The one that counts; without ``splits`` when the partition was done meanwhile."""
    parts: tuple[Partition, ...] = ()
    """What to do in its place."""
    first: Receipt | None = None
    """That of the first part, when the attempt that cut the partition had done it already."""


def _never(partition: Partition, receipt: Receipt | None) -> Divided | None:
    return None


@dataclass
class Dispatcher:
    """Runs partitions on a client and gives their receipts as they come.

    ``submit`` turns partitions into one `dask.delayed` each; ``read`` gets the receipt out of what a task returned.
    """

    client: Any
    submit: Callable[[Sequence[Partition]], list[Any]]
    read: Callable[[Any], Receipt]
    isolate: Callable[[Sequence[Partition]], list[Any]] | None = None
    """Like ``submit``, for partitions that are scored in a process of their own. None: they fail the job."""
    split: Callable[[Partition, Receipt | None], Divided | None] = _never
    """Puts parts in a partition's place, on record; None when it is too small. With a receipt that says so, it has
    happened already."""
    policy: Policy = field(default_factory=Policy)
    stop: Stop = field(default_factory=Stop)
    on_ended: Callable[[Ended], None] = lambda ended: None
    clock: Callable[[], float] = time.monotonic
    tick: float = TICK
    """Seconds to wait for an end before looking at the cluster."""

    def __post_init__(self) -> None:
        self._waiting: deque[_Attempt] = deque()
        self._suspects: deque[_Attempt] = deque()
        self._later: list[tuple[float, str, _Attempt]] = []
        self._running: dict[Any, _Attempt] = {}
        self._futures: dict[str, Any] = {}
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ready: deque[Receipt] = deque()
        self._failure: PipelineError | None = None
        self._ledger = Ledger()
        self._watch = Watch(self.client, self.policy, self.clock)
        self.retries = 0
        """Attempts that were repeated."""

    def run(self, todo: Sequence[Partition]) -> Iterator[Receipt]:
        """Receipts of ``todo``, in the order they end, those of partitions that were split too. Partitions start in
        the given order; suspects come last, when nothing else runs.

        :raises PipelineError: the first failure, after what was running has ended or ``grace`` is over.
        """
        self._waiting.extend(_Attempt(partition) for partition in todo)
        evidence = Evidence(self.client, self._inbox.put)
        try:
            while self._waiting or self._later or self._running or self._suspects:
                if self._is_closing():
                    yield from self._drain()
                    break
                self._fill()
                yield from self._collect(self.tick)
                self._look()
            yield from self._take_ready()
        finally:
            evidence.close()
            self._release()
        if self._failure is not None:
            raise self._failure

    def _is_closing(self) -> bool:
        return self._failure is not None or self.stop.is_requested

    # Starting

    def _fill(self) -> None:
        now = self.clock()
        while self._later and self._later[0][0] <= now:
            self._queue(heapq.heappop(self._later)[2])
        threads = max(1, self._watch.threads)
        if self._waiting and len(self._running) <= threads + threads // 2:
            self._start(self._waiting, 2 * threads - len(self._running), self.submit)
        # Suspects are alone: one a worker, and only once all others have ended.
        is_quiet = not (self._waiting or self._later) and all(one.is_isolated for one in self._running.values())
        if self._suspects and is_quiet and self.isolate is not None:
            self._start(self._suspects, max(1, self._watch.workers) - len(self._running), self.isolate)

    def _queue(self, attempt: _Attempt) -> None:
        (self._suspects if attempt.is_isolated else self._waiting).append(attempt)

    def _start(self, source: deque[_Attempt], room: int, submit: Callable[[Sequence[Partition]], list[Any]]) -> None:
        batch = [source.popleft() for _ in range(min(room, len(source)))]
        if not batch:
            return
        futures = self.client.compute(submit([attempt.partition for attempt in batch]), retries=0)
        for attempt, future in zip(batch, futures, strict=True):
            self._running[future] = attempt
            self._futures[str(future.key)] = future
            future.add_done_callback(self._inbox.put)

    # Ends

    def _collect(self, timeout: float) -> Iterator[Receipt]:
        """Everything that has ended; waits up to ``timeout`` seconds for the first."""
        yield from self._take_ready()
        while True:
            try:
                item = self._inbox.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = 0.0
            if isinstance(item, (Started, MemoryRanOut, WorkerLeft)):
                self._learn(item)
            elif item in self._running:
                self._settle(item, self._forget(item))
            yield from self._take_ready()

    def _take_ready(self) -> Iterator[Receipt]:
        while self._ready:
            yield self._ready.popleft()

    def _forget(self, future: Any) -> _Attempt:
        key = str(future.key)
        self._futures.pop(key, None)
        self._ledger.ended(key)
        return self._running.pop(future)

    def _settle(self, future: Any, attempt: _Attempt) -> None:
        try:
            receipt = self.read(future.result(timeout=PROBE_TIMEOUT))
        except Exception as error:
            self._watch.check_alive()
            self._react(error, attempt)
            return
        finally:
            future.release()
        self._watch.moved()
        if getattr(receipt, "splits", ()):
            # Another driver has cut it.
            self._divide(attempt, "it was split before", receipt)
            return
        self._done(attempt, receipt)

    def _done(self, attempt: _Attempt, receipt: Receipt) -> None:
        self._ready.append(receipt)
        self.on_ended(Ended(attempt.partition, attempt.number, "done", receipt))

    def _react(self, error: Exception, attempt: _Attempt) -> None:
        self._follow(
            decide(
                error,
                partition=attempt.partition.id,
                attempt=attempt.number,
                attempts=self.policy.attempts,
                is_isolated=attempt.is_isolated,
            ),
            attempt,
        )

    def _follow(self, decision: Retry | Fail | Split | Isolate, attempt: _Attempt) -> None:
        if isinstance(decision, Split):
            self._divide(attempt, decision.reason)
        elif isinstance(decision, Fail):
            self._failure = self._failure or decision.error
            self.on_ended(Ended(attempt.partition, attempt.number, "failed", reason=decision.error.message))
        elif isinstance(decision, Isolate) and self.isolate is None:
            self._follow(Fail(stuck(attempt.partition.id, attempt.blames)), attempt)
        elif isinstance(decision, Isolate):
            self._suspects.append(_Attempt(attempt.partition, 1, attempt.blames, is_isolated=True))
            self._again(attempt, f"isolated: {decision.reason}")
        else:
            after = _Attempt(attempt.partition, attempt.number + 1, attempt.blames, attempt.is_isolated)
            heapq.heappush(self._later, (self.clock() + decision.delay, attempt.partition.id, after))
            self._again(attempt, decision.reason)

    def _again(self, attempt: _Attempt, reason: str) -> None:
        self.retries += 1
        self.on_ended(Ended(attempt.partition, attempt.number, "retry", reason=reason))

    def _divide(self, attempt: _Attempt, reason: str, receipt: Receipt | None = None) -> None:
        try:
            divided = self.split(attempt.partition, receipt)
        except PipelineError as error:
            self._follow(Fail(error), attempt)
            return
        if divided is None:
            self._follow(Isolate(f"{reason}, and it is too small to be split"), attempt)
        elif not divided.receipt.splits:
            self._done(attempt, divided.receipt)
        else:
            self._ready.append(divided.receipt)
            self._ready.extend((divided.first,) if divided.first else ())
            self._waiting.extend(_Attempt(part) for part in divided.parts)
            self.on_ended(Ended(attempt.partition, attempt.number, "split", divided.receipt, reason))

    # Deaths, deadlines, standstill

    def _learn(self, fact: Fact) -> None:
        if isinstance(fact, Started) and fact.key not in self._futures:
            return
        for death in self._ledger.learn(fact, now=self.clock()):
            self._bury(death)

    def _bury(self, death: Death) -> None:
        future = self._futures[death.key]
        attempt = self._running[future]
        attempt.blames += is_blamed(death.cause)
        decision = decide_death(
            death.cause,
            partition=attempt.partition.id,
            blames=attempt.blames,
            attempts=self.policy.attempts,
            is_isolated=attempt.is_isolated,
        )
        if isinstance(decision, Leave):
            self._again(attempt, decision.reason)
            return
        self._take_back(future)
        self._follow(decision, attempt)

    def _take_back(self, future: Any) -> _Attempt:
        """Dask is not to run it any more; where it runs already, what it writes comes too late to count."""
        attempt = self._forget(future)
        future.cancel(force=True)
        return attempt

    def _look(self) -> None:
        """At the clock and at the cluster."""
        self._watch.check(bool(self._running or self._waiting or self._suspects))
        self._end_overdue()
        if self._ledger.executing or not self._running:
            self._watch.moved()
        gone = {*self._watch.paused(busy=self._ledger.busy_workers()), *self._watch.stalled()}
        self._recycle(gone)

    def _end_overdue(self) -> None:
        limit = self.policy.partition_timeout
        executing = dict(self._ledger.executing)
        keys = [key for key in self._ledger.overdue(now=self.clock(), limit=limit) if not self._is_isolated(key)]
        if limit is None or not keys:
            return
        attempts = [self._take_back(self._futures[key]) for key in keys]
        self._recycle({executing[key].worker for key in keys})
        for attempt in attempts:
            self._react(overdue(attempt.partition.id, limit=limit), attempt)

    def _is_isolated(self, key: str) -> bool:
        # Those have deadlines of their own, for each range of rows.
        return self._running[self._futures[key]].is_isolated

    def _recycle(self, workers: set[str]) -> None:
        if not workers:
            return
        for worker in workers:
            self._ledger.will_recycle(worker)
        self._watch.recycle(workers)

    # The end of the run

    def _drain(self) -> Iterator[Receipt]:
        """Let what runs end; what has not begun is taken back."""
        for future in [one for one in self._running if str(one.key) not in self._ledger.executing]:
            self._take_back(future)
        deadline = self.clock() + self.policy.grace
        while self._running and not self.stop.now and self.clock() < deadline:
            yield from self._collect(self.tick)
            self._watch.check(True)

    def _release(self) -> None:
        for future in self._running:
            future.release()
        self._running.clear()
