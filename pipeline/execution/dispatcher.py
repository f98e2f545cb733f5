"""Run partitions on a cluster: a bounded window of tasks in flight, and the reaction to the end of each.

`pipeline.execution.failures` decides about failures, `pipeline.execution.worker_events` finds the task to blame for a
lost worker, and `pipeline.execution.health` checks that the cluster is alive. ``docs/design/`` lists the facts about
Dask that this module relies on.
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
from pipeline.events import AttemptOutcome, SplitReason
from pipeline.execution.attempts import Attempt, InFlight, Waiting
from pipeline.execution.failures import (
    MAX_UNFINISHED,
    Fail,
    Isolate,
    LeaveToDask,
    Retry,
    Split,
    after_failure,
    after_worker_loss,
    lifetimes_lost,
    overdue,
    too_long,
)
from pipeline.execution.health import PING_TIMEOUT, ClusterHealth, DispatchPolicy
from pipeline.execution.placement import Placement
from pipeline.execution.protocols import AttemptResult, DispatchListener, SplitResult, TaskSource
from pipeline.execution.rebalancing import ProgressAnswer, StragglerMitigator, WorkerProbe, start_thread
from pipeline.execution.step_messages import StepMessage
from pipeline.execution.stragglers import Action, Ask, Backup, Reassign, SplitAmong, StragglerPolicy
from pipeline.execution.worker_events import (
    Advanced,
    ClusterEvent,
    ClusterEventListener,
    ExecutionTracker,
    LossCause,
    LostExecution,
    MemoryRanOut,
    SharedClusterState,
    Started,
    WorkerLeaving,
    WorkerLeft,
)
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition

logger = logging.getLogger(__name__)
TICK = 0.5
"""Seconds between two polls of the cluster while no attempt ends."""
HAND_ON_SECONDS = 8.0
"""Seconds in which running partitions may end after a request to stop; then they commit what is done. Batch systems
kill a driver about 30 s after SIGTERM."""
BUDGET_GRACE = 120.0
"""Seconds in which running partitions may reach their next batch boundary once the budget is used up."""
ADVANCED_SECONDS = 1.0
"""Shortest time between two notifications of progress inside partitions."""
_SPLIT_REASONS = {
    SplitReason.MEMORY: "it took too much memory",
    SplitReason.SLOW: "its worker was slow",
    SplitReason.IDLE_WORKERS: "other workers were idle",
    SplitReason.FROZEN: "its worker did not answer",
    SplitReason.HANDED_ON: "its worker had to leave",
}


@dataclass
class Dispatcher:
    """Runs partitions on a client and yields their receipts as they arrive."""

    client: Any
    source: TaskSource
    listener: DispatchListener
    policy: DispatchPolicy = field(default_factory=DispatchPolicy)
    stragglers: StragglerPolicy | None = None
    """Limits for stragglers. None: stragglers are not mitigated."""
    stop: Stop = field(default_factory=Stop)
    shared_state: SharedClusterState = field(default_factory=SharedClusterState)
    """State of all dispatchers on this cluster."""
    placement: Placement = field(default_factory=Placement)
    """Workers that may take the partitions."""
    job: str = ""
    """Id of the job, for the span of its tasks on the dashboard; empty: no span."""
    clock: Callable[[], float] = time.monotonic
    tick: float = TICK
    """Seconds a turn waits for the end of an attempt."""
    background: Callable[[Callable[[], None]], None] = start_thread
    """Runs a call that may never return."""

    def __post_init__(self) -> None:
        self.retries = 0
        """Number of attempts that were repeated."""
        self._waiting = Waiting()
        self._suspects: deque[Attempt] = deque()
        self._delayed: list[tuple[float, str, Attempt]] = []
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._ready: deque[Receipt] = deque()
        self._failure: PipelineError | None = None
        self._advanced_at: float | None = None
        self._kept: set[str] = set()
        """Workers that are not restarted, because they may be used by others; each is logged once."""
        self._told: set[tuple[str, str, str]] = set()
        """Kinds of step warnings that were logged."""
        self._events: ClusterEventListener | None = None
        self._tracker = ExecutionTracker()
        self._flight = InFlight(
            self.client, self._tracker, self._inbox.put, self.clock, self.placement.resources, job=self.job
        )
        self._supply = self.shared_state.supply
        self._taken_back: set[str] = set()
        """Keys of tasks that were cancelled before they had started, as far as was known."""
        self._left_behind: set[str] = set()
        """Partitions whose workers left: the receipt of a split may be there, although its task did not return it."""
        self._unexplained: list[LostExecution] = []
        """Losses of workers of which the cause is not known yet."""
        self._health = ClusterHealth(self.client, self.policy, self.clock, self.placement, self._supply)
        self._mitigator = StragglerMitigator(
            self._flight,
            self._tracker,
            self._health,
            WorkerProbe(self.client, self._inbox.put, self.background),
            self.listener,
            self.clock,
            self.stragglers or StragglerPolicy(),
        )

    def run(self, partitions: Sequence[Partition]) -> Iterator[Receipt]:
        """Yield the receipts of ``partitions`` and of their parts, in the order they end.

        Partitions start in the given order. Suspects come last, when nothing else runs.

        :raises PipelineError: the first failure, after running attempts have ended or ``grace`` is over.
        """
        self.start(partitions)
        try:
            while self.has_work and not self.is_closing:
                yield from self.step()
            if self.is_closing:
                yield from self._drain()
            yield from self._take_ready()
        finally:
            self.close()
        if self._failure is not None:
            raise self._failure

    def start(self, partitions: Sequence[Partition]) -> None:
        """Subscribe to the cluster's events and queue ``partitions``. `close` ends the subscription."""
        self._waiting.start(partitions)
        self._mitigator.start(partitions)
        self._events = ClusterEventListener(self.client, self._inbox.put)
        self.shared_state.join(self._tracker)

    def step(self) -> Iterator[Receipt]:
        """Run one turn: submit attempts, handle ended attempts, poll the cluster. Yield the receipts that arrived."""
        self._submit_waiting()
        yield from self._handle_inbox(self.tick)
        self._poll_cluster()

    def close(self) -> None:
        """Unsubscribe from the cluster's events and release all futures."""
        if self._events is not None:
            self._events.close()
        self.shared_state.leave(self._tracker)
        if self._supply is not None:
            self._supply.set_demand(id(self), 0)
        self._flight.release()

    @property
    def has_work(self) -> bool:
        """True if partitions wait or run."""
        return bool(self._waiting or self._delayed or self._flight.attempts or self._suspects)

    @property
    def is_closing(self) -> bool:
        """True if no more partitions are started: a partition failed the job, or a stop was requested."""
        return self._failure is not None or self.stop.is_requested

    # Submission

    def _submit_waiting(self) -> None:
        now = self.clock()
        while self._delayed and self._delayed[0][0] <= now:
            attempt = heapq.heappop(self._delayed)[2]
            if attempt.is_isolated:
                self._suspects.append(attempt)
            else:
                self._waiting.append(attempt)
        threads = max(1, self._health.threads)
        if self._waiting and len(self._flight) <= threads + threads // 2:
            self._submit_next(self._waiting, 2 * threads - len(self._flight), self.source.submit)
        # Suspects run alone: one per worker, once all other attempts have ended.
        running = self._flight.attempts.values()
        is_quiet = not (self._waiting or self._delayed) and all(attempt.is_isolated for attempt in running)
        if self._suspects and is_quiet:
            room = max(1, self._health.workers) - len(self._flight)
            self._submit_next(self._suspects, room, self.source.submit_isolated)

    def _submit_next(
        self, attempts: deque[Attempt] | Waiting, room: int, submit: Callable[[Sequence[Partition]], list[Any]]
    ) -> None:
        batch = [attempts.popleft() for _ in range(min(room, len(attempts)))]
        if batch:
            self._flight.start(batch, submit([attempt.partition for attempt in batch]))

    def _remove(self, future: Any) -> Attempt:
        self._mitigator.forget(str(future.key))
        return self._flight.remove(future)

    def _cancel(self, future: Any) -> Attempt:
        """Cancel a task. If it is already running, its output is ignored."""
        if str(future.key) not in self._tracker.executing:
            self._taken_back.add(str(future.key))
        attempt = self._remove(future)
        future.cancel(force=True)
        return attempt

    # Ends of attempts

    def _handle_inbox(self, timeout: float) -> Iterator[Receipt]:
        """Handle all events that have arrived. Wait up to ``timeout`` seconds for the first event."""
        yield from self._take_ready()
        while True:
            try:
                item = self._inbox.get(timeout=timeout)
            except queue.Empty:
                return
            timeout = 0.0
            if isinstance(item, StepMessage):
                self._on_step_message(item)
            elif isinstance(item, (Started, MemoryRanOut, WorkerLeaving, WorkerLeft)):
                self._on_cluster_event(item)
            elif isinstance(item, Advanced):
                self._flight.advance(item.key, item.rows_done, item.cost)
            elif isinstance(item, ProgressAnswer):
                self._mitigator.progress_answered(item)
            elif item in self._flight:
                self._on_future_done(item)
            yield from self._take_ready()

    def _take_ready(self) -> Iterator[Receipt]:
        while self._ready:
            yield self._ready.popleft()

    def _on_future_done(self, future: Any) -> None:
        key = str(future.key)
        execution = self._tracker.executing.get(key)
        requested = self._mitigator.requested_split(key)
        attempt = self._remove(future)
        try:
            receipt = self.source.read(future.result(timeout=PING_TIMEOUT))
        except Exception as error:
            self._health.check_alive()
            self._on_error(error, attempt)
            return
        finally:
            future.release()
        self._health.record_result()
        if receipt.splits:
            # The driver asked the attempt to stop, or an earlier driver has split the partition.
            is_leaving = execution is not None and self._tracker.is_leaving(execution.worker)
            is_handed_on = self.is_closing or is_leaving or attempt.partition.id in self._left_behind
            self._on_split(attempt, receipt, requested, is_handed_on=is_handed_on)
            return
        if execution is not None:
            self._mitigator.attempt_measured(attempt, worker=execution.worker, since=execution.since)
        self._on_done(attempt, receipt)

    def _on_done(self, attempt: Attempt, receipt: Receipt) -> None:
        self._ready.append(receipt)
        self._cancel_others(attempt.partition)
        self._mitigator.partition_done(attempt.partition.id, is_by_backup=attempt.is_backup)
        self._report(attempt, AttemptOutcome.DONE, receipt)

    def _cancel_others(self, partition: Partition) -> None:
        """Cancel all attempts at a partition. A late one is harmless: the first receipt wins."""
        for future in self._flight.of_partition(partition.id):
            execution = self._tracker.executing.get(str(future.key))
            self._cancel(future)
            if execution is not None:
                self._mitigator.abandon(str(future.key), worker=execution.worker)

    def _on_error(self, error: Exception, attempt: Attempt) -> None:
        decision = after_failure(
            error,
            partition=attempt.partition.id,
            attempt=attempt.number,
            attempts=self.policy.attempts,
            is_isolated=attempt.is_isolated,
        )
        self._apply(decision, attempt)

    def _apply(self, decision: Retry | Fail | Split | Isolate, attempt: Attempt) -> None:
        if isinstance(decision, Split):
            self._split(attempt, SplitReason.MEMORY, cause=decision.reason)
        elif isinstance(decision, Fail):
            self._failure = self._failure or decision.error
            self._report(attempt, AttemptOutcome.FAILED, reason=decision.error.message)
        elif isinstance(decision, Isolate):
            self._cancel_others(attempt.partition)
            self._suspects.append(Attempt(attempt.partition, crash_count=attempt.crash_count, is_isolated=True))
            self._report_retry(attempt, f"isolated: {decision.reason}")
        else:
            if not self._flight.of_partition(attempt.partition.id):
                # Otherwise another attempt at the partition is still running: do not retry.
                again = replace(attempt, number=attempt.number + 1, workers=(), is_backup=False)
                heapq.heappush(self._delayed, (self.clock() + decision.delay, attempt.partition.id, again))
            self._report_retry(attempt, decision.reason)

    def _report_retry(self, attempt: Attempt, reason: str) -> None:
        self.retries += 1
        self._report(attempt, AttemptOutcome.RETRY, reason=reason)

    def _report(
        self, attempt: Attempt, outcome: AttemptOutcome, receipt: Receipt | None = None, *, reason: str = ""
    ) -> None:
        self.listener.attempt_finished(AttemptResult(attempt.partition, attempt.number, outcome, receipt, reason))

    # Splits

    def _split(self, attempt: Attempt, reason: SplitReason, *, cause: str, workers: tuple[str, ...] = ()) -> None:
        """Split a partition in halves, or in one part for each of ``workers``."""
        try:
            result = self.source.split(attempt.partition, None, parts=len(workers) or 2)
        except PipelineError as error:
            self._apply(Fail(error), attempt)
            return
        if result is not None:
            self._apply_split(attempt, result, reason, text=cause, workers=workers)
        elif not workers:
            self._apply(Isolate(f"{cause}, and it is too small to be split"), attempt)
        # Otherwise the partition is too small to split, and only slow: let the running attempt finish.

    def _on_split(
        self, attempt: Attempt, receipt: Receipt, requested: SplitAmong | None, *, is_handed_on: bool
    ) -> None:
        """Handle the receipt of a split partition.

        :param requested: split that was requested from the attempt; None: another driver or a split for memory wrote
            the receipt, or the attempt had to end.
        :param is_handed_on: True if worker or driver ask their attempts to end.
        """
        reason = requested.reason if requested else SplitReason.HANDED_ON if is_handed_on else None
        text = _SPLIT_REASONS[reason] if reason else "it was split before"
        try:
            result = self.source.split(attempt.partition, receipt)
        except PipelineError as error:
            self._apply(Fail(error), attempt)
            return
        if result is not None:
            self._apply_split(attempt, result, reason, text=text, workers=requested.workers if requested else ())

    def _apply_split(
        self, attempt: Attempt, result: SplitResult, reason: SplitReason | None, *, text: str, workers: tuple[str, ...]
    ) -> None:
        """Queue the parts of a partition for ``workers``; empty: for any worker."""
        if not result.receipt.splits:
            self._on_done(attempt, result.receipt)
            return
        self._cancel_others(attempt.partition)
        self._ready.append(result.receipt)
        self.listener.attempt_finished(
            AttemptResult(attempt.partition, attempt.number, AttemptOutcome.SPLIT, result.receipt, text, reason)
        )
        parts = result.parts
        if result.first is not None:
            self._ready.append(result.first)
            self.listener.attempt_finished(
                AttemptResult(parts[0], attempt.number, AttemptOutcome.DONE, result.first),
            )
            parts = parts[1:]
        for part in parts:
            self._waiting.append(Attempt(part, workers=workers, oom_count=attempt.oom_count))
        self._mitigator.partition_split(attempt.partition.id, parts)

    # Cluster events and deadlines

    def _on_cluster_event(self, event: ClusterEvent) -> None:
        if isinstance(event, Started):
            if not self._flight.has_key(event.key):
                if event.key in self._taken_back:
                    # It started in the moment in which it was cancelled: its worker is busy with it all the same.
                    self._taken_back.discard(event.key)
                    self._mitigator.abandon(event.key, worker=event.worker)
                return
            self._mitigator.task_started(event.worker)
        for lost in self._tracker.record(event, now=self.clock()):
            if lost.cause is LossCause.CRASH and self._supply is not None:
                # Dask runs the task again meanwhile.
                self._unexplained.append(lost)
            else:
                self._on_worker_death(lost)

    def _explain_losses(self) -> None:
        """Handle the losses of workers that the source of the workers can explain by now."""
        if self._supply is None:
            return
        unexplained, self._unexplained = self._unexplained, []
        for lost in unexplained:
            cause = self._supply.loss_cause(lost.worker)
            if cause is None:
                self._unexplained.append(lost)
            elif self._flight.has_key(lost.key):
                self._on_worker_death(replace(lost, cause=cause))

    def _on_step_message(self, message: StepMessage) -> None:
        """Tell the first line of a place in the code. Other jobs on this cluster have their own tasks."""
        line = message.line
        place = (line.step, line.kind, line.place)
        if self._flight.has_key(message.key) and place not in self._told:
            self._told.add(place)
            partition = self._flight.attempts[self._flight.of_key(message.key)].partition
            self.listener.step_message(line, worker=message.worker, partition=partition.id)

    def _on_worker_death(self, lost: LostExecution) -> None:
        future = self._flight.of_key(lost.key)
        attempt = self._flight.attempts[future]
        attempt.crash_count += lost.cause is LossCause.CRASH
        attempt.oom_count += lost.cause is LossCause.MEMORY
        if lost.cause is LossCause.LEFT:
            self._left_behind.add(attempt.partition.id)
        if lost.lifetime is not None and self._is_too_long(attempt, lost, lost.lifetime):
            self._cancel(future)
            return
        for other in self._flight.of_partition(attempt.partition.id):
            # Blame the rows: all attempts at the partition get the same counts.
            sibling = self._flight.attempts[other]
            sibling.crash_count, sibling.oom_count = attempt.crash_count, attempt.oom_count
        decision = after_worker_loss(
            lost.cause,
            partition=attempt.partition.id,
            crash_count=attempt.crash_count,
            attempts=self.policy.attempts,
            is_isolated=attempt.is_isolated,
            oom_count=attempt.oom_count,
        )
        if isinstance(decision, LeaveToDask):
            if attempt.is_backup:
                # A backup may not run on another worker.
                self._cancel(future)
            self._report_retry(attempt, decision.reason)
            return
        self._cancel(future)
        self._apply(decision, attempt)

    def _is_too_long(self, attempt: Attempt, lost: LostExecution, lifetime: float) -> bool:
        """Count a lifetime of a worker in which a partition has done no batch; fail if it fits into none."""
        seconds = self.clock() - lost.since
        attempt.unfinished += lifetimes_lost(seconds, lifetime=lifetime)
        if attempt.unfinished < MAX_UNFINISHED:
            return False
        self._apply(Fail(too_long(attempt.partition.id, seconds=seconds, lifetime=lifetime)), attempt)
        return True

    def _poll_cluster(self) -> None:
        self.listener.poll()
        self._report_progress()
        self._explain_losses()
        if self._supply is not None:
            waiting = len(self._waiting) + len(self._delayed) + len(self._suspects)
            self._supply.set_demand(id(self), waiting + len(self._flight))
        self._health.check(bool(self._flight.attempts or self._waiting or self._suspects))
        self._end_overdue()
        self._mitigate_stragglers()
        busy = self.shared_state.busy_workers()
        if busy or not self._flight.attempts:
            self._health.record_progress()
        self._restart({*self._health.paused(busy=busy | self._tracker.leaving_workers()), *self._health.stalled()})

    def _end_overdue(self) -> None:
        limit = self.policy.partition_timeout
        executing = dict(self._tracker.executing)
        keys = [key for key in self._tracker.overdue(now=self.clock(), limit=limit) if not self._is_isolated(key)]
        if limit is None or not keys:
            return
        attempts = [self._cancel(self._flight.of_key(key)) for key in keys]
        self._restart({executing[key].worker for key in keys})
        for attempt in attempts:
            self._on_error(overdue(attempt.partition.id, limit=limit), attempt)

    def _report_progress(self) -> None:
        now = self.clock()
        if self._advanced_at is not None and now - self._advanced_at < ADVANCED_SECONDS:
            return
        running = self._flight.running(now=now)
        if running:
            self._advanced_at = now
            self.listener.advanced(running)

    def _is_isolated(self, key: str) -> bool:
        # Isolated attempts have a deadline for each range of rows.
        return self._flight.attempts[self._flight.of_key(key)].is_isolated

    def _restart(self, workers: set[str]) -> None:
        if not self.policy.may_restart:
            if new := workers - self._kept:
                self._kept |= new
                logger.warning(
                    "%s would be restarted, but may be used by others: restart them, or set restart-workers: true",
                    ", ".join(sorted(new)),
                )
            return
        if not workers:
            return
        for worker in workers:
            self.shared_state.expect_restart(worker)
        self._health.restart(workers)

    # Stragglers

    def _mitigate_stragglers(self) -> None:
        if self.stragglers is None or self.is_closing:
            return
        self._restart(self._mitigator.take_blocked_workers())
        if self._waiting:
            return
        for action in self._mitigator.choose():
            self._act(action)

    def _act(self, action: Action) -> None:
        if isinstance(action, Ask):
            self._mitigator.ask(action.key)
            return
        future = self._flight.of_key(action.key)
        attempt = self._flight.attempts[future]
        if isinstance(action, Reassign):
            self._cancel(future)
            self._flight.start([replace(attempt, workers=action.workers)], self.source.submit([attempt.partition]))
            self._mitigator.report_reassigned(attempt)
            return
        self._mitigator.begin(action)
        if isinstance(action, Backup):
            backup = replace(attempt, workers=action.workers, is_backup=True)
            self._flight.start([backup], self.source.submit([attempt.partition]))
        elif not action.is_by_attempt:
            self._split(attempt, action.reason, cause=_SPLIT_REASONS[action.reason], workers=action.workers)

    # End of the run

    def _drain(self) -> Iterator[Receipt]:
        """Let running attempts end, and cancel attempts that have not started.

        After a while, attempts commit what they have done at their next batch boundary.
        """
        for future in self._flight.not_started():
            self._cancel(future)
        is_budget = self.stop.reason is StopReason.BUDGET
        deadline = self.clock() + (max(self.policy.grace, BUDGET_GRACE) if is_budget else self.policy.grace)
        wait = 0.0 if is_budget else min(HAND_ON_SECONDS, self.policy.grace / 3)
        hand_on_at: float | None = self.clock() + wait
        while self._flight.attempts and not self.stop.now and self.clock() < deadline:
            if hand_on_at is not None and self.clock() >= hand_on_at:
                hand_on_at = None
                self._mitigator.hand_on()
            yield from self._handle_inbox(self.tick)
            self._health.check(True)
