"""Partitions in flight: a bounded window of tasks, and what is done about each end.

What an end means is decided in `pipeline.execution.failures`, who is to blame for a worker's death in
`pipeline.execution.worker_events`, and whether the cluster is alive in `pipeline.execution.health`; this module carries
it out. The facts about Dask are in ``docs/design/``.
"""

from __future__ import annotations

import heapq
import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.errors import PipelineError
from pipeline.execution.attempts import Attempt, AttemptResult, InFlight, SplitResult, Waiting
from pipeline.execution.failures import (
    Fail,
    Isolate,
    LeaveToDask,
    Retry,
    Split,
    after_failure,
    after_worker_loss,
    is_blamed,
    overdue,
    stuck,
)
from pipeline.execution.health import PROBE_TIMEOUT, ClusterHealth, DispatchPolicy
from pipeline.execution.rebalancing import ProgressAnswer, StragglerMitigator
from pipeline.execution.stragglers import Action, Ask, Cut, Divide, Reassign, Share
from pipeline.execution.worker_events import (
    ClusterEvent,
    ClusterEventListener,
    ExecutionTracker,
    LostExecution,
    MemoryRanOut,
    SharedClusterState,
    Started,
    WorkerLeft,
)
from pipeline.jobs.cancellation import Stop
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition

__all__ = ["AttemptResult", "DispatchPolicy", "Dispatcher", "SplitResult"]

logger = logging.getLogger(__name__)
TICK = 0.5
"""Seconds between two looks at the cluster while nothing ends."""


def _never(partition: Partition, receipt: Receipt | None, *, parts: int = 2) -> SplitResult | None:
    return None


@dataclass
class Dispatcher:
    """Runs partitions on a client and gives their receipts as they come.

    ``submit`` turns partitions into one `dask.delayed` each, with new keys each time; ``read`` gets the receipt out of
    what a task returned.
    """

    client: Any
    submit: Callable[[Sequence[Partition]], list[Any]]
    read: Callable[[Any], Receipt]
    isolate: Callable[[Sequence[Partition]], list[Any]] | None = None
    """Like ``submit``, for partitions that are scored in a process of their own. None: they fail the job."""
    split: Callable[..., SplitResult | None] = _never
    """Puts two parts, or as many as ``parts`` says, in a partition's place, on record; None when it is too small. With
    a receipt that says so, it has happened already."""
    relief: StragglerMitigator | None = None
    """Helps stragglers. None: they take their time."""
    policy: DispatchPolicy = field(default_factory=DispatchPolicy)
    stop: Stop = field(default_factory=Stop)
    on_attempt_finished: Callable[[AttemptResult], None] = lambda ended: None
    on_poll: Callable[[], None] = lambda: None
    """Called whenever the dispatcher looks at the cluster; what takes long in it delays new partitions."""
    neighbours: SharedClusterState = field(default_factory=SharedClusterState)
    """All dispatchers on this cluster."""
    clock: Callable[[], float] = time.monotonic
    tick: float = TICK
    """Seconds to wait for an end before looking at the cluster."""

    def __post_init__(self) -> None:
        self._waiting = Waiting()
        self._suspects: deque[Attempt] = deque()
        self._later: list[tuple[float, str, Attempt]] = []
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ready: deque[Receipt] = deque()
        self._failure: PipelineError | None = None
        self._ledger = ExecutionTracker()
        self._flight = InFlight(self.client, self._ledger, self._inbox.put, self.clock)
        self._watch = ClusterHealth(self.client, self.policy, self.clock)
        self.retries = 0
        """Attempts that were repeated."""

    def run(self, todo: Sequence[Partition]) -> Iterator[Receipt]:
        """Receipts of ``todo``, in the order they end, those of partitions that were split too. Partitions start in
        the given order; suspects come last, when nothing else runs.

        :raises PipelineError: the first failure, after what was running has ended or ``grace`` is over.
        """
        self._waiting.begin(todo)
        if self.relief is not None:
            self.relief.begin(todo)
            self._flight.on_attempt_removed = self.relief.forget
        evidence = ClusterEventListener(self.client, self._inbox.put)
        self.neighbours.join(self._ledger)
        try:
            while self._waiting or self._later or self._flight.attempts or self._suspects:
                if self._is_closing():
                    yield from self._drain()
                    break
                self._fill()
                yield from self._collect(self.tick)
                self._look()
            yield from self._take_ready()
        finally:
            evidence.close()
            self.neighbours.leave(self._ledger)
            self._flight.release()
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
        if self._waiting and len(self._flight) <= threads + threads // 2:
            self._start(self._waiting, 2 * threads - len(self._flight), self.submit)
        # Suspects are alone: one a worker, and only once all others have ended.
        running = self._flight.attempts.values()
        is_quiet = not (self._waiting or self._later) and all(one.is_isolated for one in running)
        if self._suspects and is_quiet and self.isolate is not None:
            self._start(self._suspects, max(1, self._watch.workers) - len(self._flight), self.isolate)

    def _queue(self, attempt: Attempt) -> None:
        (self._suspects if attempt.is_isolated else self._waiting).append(attempt)

    def _start(
        self, source: deque[Attempt] | Waiting, room: int, submit: Callable[[Sequence[Partition]], list[Any]]
    ) -> None:
        batch = [source.popleft() for _ in range(min(room, len(source)))]
        if batch:
            self._flight.start(batch, submit([attempt.partition for attempt in batch]))

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
            elif isinstance(item, ProgressAnswer) and self.relief is not None:
                self.relief.answered(item, now=self.clock())
            elif item in self._flight:
                self._settle(item)
            yield from self._take_ready()

    def _take_ready(self) -> Iterator[Receipt]:
        while self._ready:
            yield self._ready.popleft()

    def _settle(self, future: Any) -> None:
        key = str(future.key)
        execution = self._ledger.executing.get(key)
        helpers = self.relief.helpers(key) if self.relief else ()
        reason = self.relief.reason(key) if self.relief and helpers else "it was split before"
        attempt = self._flight.forget(future)
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
            # It stopped because it was asked to, or another driver has split it.
            self._divide(attempt, reason, receipt, workers=helpers)
            return
        now = self.clock()
        if self.relief is not None and execution is not None:
            self.relief.measured(attempt, worker=execution.worker, seconds=now - execution.since)
        self._done(attempt, receipt)

    def _done(self, attempt: Attempt, receipt: Receipt) -> None:
        self._ready.append(receipt)
        self._end_others(attempt.partition)
        if self.relief is not None:
            self.relief.settled(attempt.partition.id, now=self.clock(), is_by_helper=attempt.is_backup)
        self.on_attempt_finished(AttemptResult(attempt.partition, attempt.number, "done", receipt))

    def _end_others(self, partition: Partition) -> None:
        """Its other attempts come too late: their receipts will find one there."""
        for future in self._flight.of_partition(partition.id):
            execution = self._ledger.executing.get(str(future.key))
            self._flight.take_back(future)
            if self.relief is not None and execution is not None:
                self.relief.drop(partition, worker=execution.worker, now=self.clock())

    def _react(self, error: Exception, attempt: Attempt) -> None:
        self._follow(
            after_failure(
                error,
                partition=attempt.partition.id,
                attempt=attempt.number,
                attempts=self.policy.attempts,
                is_isolated=attempt.is_isolated,
            ),
            attempt,
        )

    def _follow(self, decision: Retry | Fail | Split | Isolate, attempt: Attempt) -> None:
        if isinstance(decision, Retry) and self._flight.of_partition(attempt.partition.id):
            # The other attempt at it goes on alone.
            self._again(attempt, decision.reason)
        elif isinstance(decision, Split):
            self._divide(attempt, decision.reason)
        elif isinstance(decision, Fail):
            self._failure = self._failure or decision.error
            self.on_attempt_finished(
                AttemptResult(attempt.partition, attempt.number, "failed", reason=decision.error.message)
            )
        elif isinstance(decision, Isolate) and self.isolate is None:
            self._follow(Fail(stuck(attempt.partition.id, attempt.crash_count)), attempt)
        elif isinstance(decision, Isolate):
            self._end_others(attempt.partition)
            self._suspects.append(Attempt(attempt.partition, crash_count=attempt.crash_count, is_isolated=True))
            self._again(attempt, f"isolated: {decision.reason}")
        else:
            after = replace(attempt, number=attempt.number + 1, workers=(), is_backup=False)
            heapq.heappush(self._later, (self.clock() + decision.delay, attempt.partition.id, after))
            self._again(attempt, decision.reason)

    def _again(self, attempt: Attempt, reason: str) -> None:
        self.retries += 1
        self.on_attempt_finished(AttemptResult(attempt.partition, attempt.number, "retry", reason=reason))

    def _divide(
        self, attempt: Attempt, reason: str, receipt: Receipt | None = None, *, workers: tuple[str, ...] = ()
    ) -> None:
        """:param workers: that wait for the parts."""
        try:
            if receipt is None and workers:
                divided = self.split(attempt.partition, None, parts=len(workers))
            else:
                divided = self.split(attempt.partition, receipt)
        except PipelineError as error:
            self._follow(Fail(error), attempt)
            return
        if divided is None and workers:
            # It was only slow.
            return
        if divided is None:
            self._follow(Isolate(f"{reason}, and it is too small to be split"), attempt)
        elif not divided.receipt.splits:
            self._done(attempt, divided.receipt)
        else:
            self._end_others(attempt.partition)
            self._ready.append(divided.receipt)
            outcome = "cut" if workers else "split"
            self.on_attempt_finished(AttemptResult(attempt.partition, attempt.number, outcome, divided.receipt, reason))
            self._take_parts(attempt, divided, workers)

    def _take_parts(self, attempt: Attempt, divided: SplitResult, workers: tuple[str, ...]) -> None:
        todo = divided.parts
        if divided.first is not None:
            first, *rest = todo
            todo = tuple(rest)
            self._ready.append(divided.first)
            self.on_attempt_finished(AttemptResult(first, attempt.number, "done", divided.first))
        deaths = attempt.oom_count
        for part in todo:
            self._waiting.append(Attempt(part, workers=workers, oom_count=deaths))
        if self.relief is not None:
            self.relief.divided(attempt.partition.id, todo)

    # Deaths, deadlines, standstill

    def _learn(self, fact: ClusterEvent) -> None:
        if isinstance(fact, Started) and not self._flight.has_key(fact.key):
            return
        if isinstance(fact, Started) and self.relief is not None:
            self.relief.started(fact.worker)
        for death in self._ledger.learn(fact, now=self.clock()):
            self._bury(death)

    def _bury(self, death: LostExecution) -> None:
        future = self._flight.of_key(death.key)
        attempt = self._flight.attempts[future]
        attempt.crash_count += is_blamed(death.cause)
        attempt.oom_count += death.cause == "memory"
        for other in self._flight.of_partition(attempt.partition.id):
            # It is the rows that are blamed, whichever attempt had them.
            twin = self._flight.attempts[other]
            twin.crash_count, twin.oom_count = attempt.crash_count, attempt.oom_count
        decision = after_worker_loss(
            death.cause,
            partition=attempt.partition.id,
            crash_count=attempt.crash_count,
            attempts=self.policy.attempts,
            is_isolated=attempt.is_isolated,
            oom_count=attempt.oom_count,
        )
        if isinstance(decision, LeaveToDask):
            if attempt.is_backup:
                # It has no other worker to go to.
                self._flight.take_back(future)
            self._again(attempt, decision.reason)
            return
        self._flight.take_back(future)
        self._follow(decision, attempt)

    def _look(self) -> None:
        """At the clock and at the cluster."""
        self.on_poll()
        self._watch.check(bool(self._flight.attempts or self._waiting or self._suspects))
        self._end_overdue()
        self._relieve()
        busy = self.neighbours.busy_workers()
        if busy or not self._flight.attempts:
            self._watch.moved()
        gone = {*self._watch.paused(busy=busy), *self._watch.stalled()}
        self._recycle(gone)

    def _end_overdue(self) -> None:
        limit = self.policy.partition_timeout
        executing = dict(self._ledger.executing)
        keys = [key for key in self._ledger.overdue(now=self.clock(), limit=limit) if not self._is_isolated(key)]
        if limit is None or not keys:
            return
        attempts = [self._flight.take_back(self._flight.of_key(key)) for key in keys]
        self._recycle({executing[key].worker for key in keys})
        for attempt in attempts:
            self._react(overdue(attempt.partition.id, limit=limit), attempt)

    def _is_isolated(self, key: str) -> bool:
        # Those have deadlines of their own, for each range of rows.
        return self._flight.attempts[self._flight.of_key(key)].is_isolated

    def _recycle(self, workers: set[str]) -> None:
        if not workers:
            return
        for worker in workers:
            self.neighbours.will_recycle(worker)
        self._watch.recycle(workers)

    # Stragglers

    def _relieve(self) -> None:
        if self.relief is None or self._is_closing():
            return
        self._recycle(self.relief.lost(self._flight, self._ledger, now=self.clock()))
        if self._waiting:
            return
        for action in self.relief.look(self._flight, self._ledger, self._watch, now=self.clock()):
            self._help(action, self.relief)

    def _help(self, action: Action, relief: StragglerMitigator) -> None:
        now, future = self.clock(), self._flight.of_key(action.key)
        attempt, execution = self._flight.attempts[future], self._ledger.executing.get(action.key)
        worker, since = (execution.worker, execution.since) if execution else ("", attempt.submitted)
        if isinstance(action, Ask):
            relief.ask(action.key, attempt.partition, worker=worker, put=self._inbox.put, now=now)
            return
        if isinstance(action, Reassign):
            self._flight.take_back(future)
            moved = replace(attempt, workers=action.workers)
            self._flight.start([moved], self.submit([attempt.partition]))
            relief.moved(attempt.partition, seconds=now - since)
            return
        relief.help(attempt.partition, action, worker=worker, seconds=now - since, now=now)
        if isinstance(action, Cut | Share):
            parts = len(action.workers)
            relief.request_split(action.key, attempt.partition, worker=worker, parts=parts, put=self._inbox.put)
        elif isinstance(action, Divide):
            self._divide(attempt, "it was slow", workers=action.workers)
        else:
            copy = replace(attempt, workers=action.workers, is_backup=True)
            self._flight.start([copy], self.submit([attempt.partition]))

    # The end of the run

    def _drain(self) -> Iterator[Receipt]:
        """Let what runs end; what has not begun is taken back."""
        for future in [one for one in self._flight.attempts if str(one.key) not in self._ledger.executing]:
            self._flight.take_back(future)
        deadline = self.clock() + self.policy.grace
        while self._flight.attempts and not self.stop.now and self.clock() < deadline:
            yield from self._collect(self.tick)
            self._watch.check(True)
