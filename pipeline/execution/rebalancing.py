"""Mitigate stragglers: measure attempts in flight, ask their workers, record the actions and the time they saved.

`pipeline.execution.stragglers` chooses the actions, and the dispatcher executes them.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.events import MitigationAction
from pipeline.execution.attempts import Attempt, InFlight
from pipeline.execution.health import ClusterHealth
from pipeline.execution.protocols import DispatchListener, Mitigation
from pipeline.execution.stragglers import (
    Action,
    Backup,
    PaceHistory,
    RunningAttempt,
    SplitAmong,
    StragglerPolicy,
    choose_actions,
)
from pipeline.execution.worker_events import ExecutionTracker
from pipeline.plan.plan import Partition
from pipeline.scoring import progress
from pipeline.scoring.progress import ProgressSnapshot

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProgressAnswer:
    """Answer of a worker that was asked for the progress of an attempt."""

    key: str
    snapshot: ProgressSnapshot


def start_thread(call: Callable[[], None]) -> None:
    """Run ``call`` in a daemon thread."""
    threading.Thread(target=call, name="ask-a-worker", daemon=True).start()


@dataclass(frozen=True)
class WorkerProbe:
    """Calls into worker processes about their attempts.

    Each call runs in the background, because a frozen worker never answers.
    """

    client: Any
    put: Callable[[ProgressAnswer], None]
    """Receives the answers, from any thread."""
    background: Callable[[Callable[[], None]], None] = start_thread

    def ask(self, key: str, *, worker: str) -> None:
        """Ask for the progress of an attempt."""
        self._call(
            worker,
            progress.progress_of,
            key,
            then=lambda snapshot: self.put(ProgressAnswer(key, snapshot or ProgressSnapshot(0, 0, 0.0))),
        )

    def request_split(self, key: str, *, worker: str, parts: int) -> None:
        """Ask an attempt to stop at its next batch boundary and split the rest."""
        self._call(
            worker,
            progress.request_split,
            key,
            parts,
            then=lambda snapshot: self.put(ProgressAnswer(key, snapshot)) if snapshot else None,
        )

    def request_drop(self, key: str, *, worker: str) -> None:
        """Ask a worker to drop an attempt."""
        self._call(worker, progress.request_drop, key)

    def _call(
        self, worker: str, function: Callable[..., Any], *arguments: Any, then: Callable[[Any], None] | None = None
    ) -> None:
        def call() -> None:
            try:
                answers = self.client.run(function, *arguments, workers=[worker], on_error="ignore")
            except Exception:
                # Ignore the error: `ClusterHealth` and the cluster events report a lost connection or worker.
                logger.debug("no answer from %s", worker, exc_info=True)
                return
            if then is not None and worker in answers:
                then(answers[worker])

        self.background(call)


@dataclass
class Tracked:
    """Measurements of an attempt in flight. Times are of the driver's clock."""

    asked_at: float | None = None
    """Time of the unanswered question; None: no question is open."""
    snapshot: ProgressSnapshot | None = None
    answered_at: float = 0.0
    split: SplitAmong | None = None
    """Split that was requested from the attempt."""
    split_at: float = 0.0


@dataclass
class _OpenMitigation:
    mitigation: Mitigation
    since: float
    pending: set[str]
    """Partitions that must be done before the mitigation is over."""


@dataclass
class StragglerMitigator:
    """Measures attempts, chooses actions against stragglers, and reports the seconds saved."""

    flight: InFlight
    tracker: ExecutionTracker
    health: ClusterHealth
    probe: WorkerProbe
    listener: DispatchListener
    clock: Callable[[], float]
    policy: StragglerPolicy = field(default_factory=StragglerPolicy)
    _rows: int = 1
    _bytes: int = 1
    _history: PaceHistory = field(default_factory=PaceHistory)
    _tracked: dict[str, Tracked] = field(default_factory=dict)
    """Measurements by key of the task."""
    _open: dict[str, _OpenMitigation] = field(default_factory=dict)
    """Open mitigations by partition."""
    _abandoned: dict[str, float] = field(default_factory=dict)
    """Workers with an abandoned attempt, and the time of abandoning, until another task starts on the worker."""

    def start(self, partitions: Sequence[Partition]) -> None:
        """Set the unit of work: all rows, or all bytes, of ``partitions``."""
        self._rows = max(1, sum(partition.rows for partition in partitions))
        self._bytes = max(1, sum(partition.bytes for partition in partitions))

    def work(self, partition: Partition) -> float:
        """Return the work of a partition: half in proportion to its rows (scoring), half to its bytes (reading)."""
        return partition.rows / self._rows + partition.bytes / self._bytes

    # Notifications

    def task_started(self, worker: str) -> None:
        """Record that a worker has a free thread again."""
        self._abandoned.pop(worker, None)

    def progress_answered(self, answer: ProgressAnswer) -> None:
        """Store the answer of a worker, unless its attempt has ended."""
        if (tracked := self._tracked.get(answer.key)) is not None:
            tracked.asked_at, tracked.snapshot, tracked.answered_at = None, answer.snapshot, self.clock()

    def attempt_measured(self, attempt: Attempt, *, worker: str, since: float) -> None:
        """Add an attempt that brought a receipt to the history."""
        if not attempt.is_isolated:
            self._history = replace(self._history, classes=self.health.classes).with_ended(
                attempt.partition.id,
                worker,
                seconds=self.clock() - since,
                work=self.work(attempt.partition),
                policy=self.policy,
            )

    def partition_done(self, partition: str, *, is_by_backup: bool) -> None:
        """Close the mitigations that waited for this partition only."""
        for name, entry in list(self._open.items()):
            if partition not in entry.pending:
                continue
            entry.pending.discard(partition)
            if not entry.pending:
                del self._open[name]
                self._report_end(entry, won=is_by_backup if partition == name else True)

    def partition_split(self, partition: str, parts: Sequence[Partition]) -> None:
        """Let mitigations that waited for a partition wait for its parts instead."""
        for entry in self._open.values():
            if partition in entry.pending:
                entry.pending.discard(partition)
                entry.pending.update(part.id for part in parts)

    def forget(self, key: str) -> None:
        """Forget an attempt that ended or was cancelled."""
        self._tracked.pop(key, None)

    def _report_end(self, entry: _OpenMitigation, *, won: bool) -> None:
        gain = entry.mitigation.remaining - (self.clock() - entry.since) if won else 0.0
        self.listener.mitigation(
            replace(entry.mitigation, is_over=True, won=won and gain > 0, seconds_won=max(0.0, gain))
        )

    # Decisions

    def choose(self) -> tuple[Action, ...]:
        """Return the actions to take now, provided that nothing waits to be submitted."""
        idle = self._idle_workers()
        if not idle:
            return ()
        attempts = [
            self._measure(future, attempt)
            for future, attempt in self.flight.attempts.items()
            if not attempt.is_isolated
        ]
        history = replace(self._history, classes=self.health.classes)
        return choose_actions(attempts, idle=idle, history=history, policy=self.policy)

    def take_blocked_workers(self) -> set[str]:
        """Return the workers to restart: an abandoned attempt holds them, and a partition waits for a worker.

        An abandoned attempt may never end. Each worker is returned once.
        """
        now = self.clock()
        waits = (now - self.flight.attempts[future].submitted for future in self.flight.not_started())
        if not any(seconds > self.policy.start_timeout for seconds in waits):
            return set()
        busy = self.tracker.busy_workers()
        limit = self.policy.abandoned_timeout
        blocked = {name for name, since in self._abandoned.items() if name not in busy and now - since > limit}
        for name in blocked:
            del self._abandoned[name]
        return blocked

    def _idle_workers(self) -> list[str]:
        executing, now = self.tracker.executing, self.clock()
        busy = Counter(execution.worker for execution in executing.values())
        idle = [
            name
            for name, threads in self.health.slots.items()
            if name not in self._abandoned
            for _ in range(threads - busy[name])
        ]
        # Exclude workers that wait for the rest of an attempt that was asked to stop.
        for key, tracked in self._tracked.items():
            execution = executing.get(key)
            for name in tracked.split.workers if tracked.split else ():
                if name in idle and (execution is None or name != execution.worker):
                    idle.remove(name)
        # Some of these workers are about to start attempts that were submitted a moment ago.
        submitted = [self.flight.attempts[future].submitted for future in self.flight.not_started()]
        starting = sum(now - since <= self.policy.start_timeout for since in submitted)
        return sorted(idle, key=lambda name: busy[name])[: max(0, len(idle) - starting)]

    def _measure(self, future: Any, attempt: Attempt) -> RunningAttempt:
        key, now = str(future.key), self.clock()
        execution = self.tracker.executing.get(key)
        tracked = self._tracked.get(key, Tracked())
        return RunningAttempt(
            key=key,
            work=self.work(attempt.partition),
            rows=attempt.partition.rows,
            worker=execution.worker if execution else "",
            seconds=now - (execution.since if execution else attempt.submitted),
            snapshot=tracked.snapshot,
            snapshot_age=now - tracked.answered_at if tracked.snapshot else 0.0,
            unanswered=None if tracked.asked_at is None else now - tracked.asked_at,
            split_requested=None if tracked.split is None else now - tracked.split_at,
            attempt_count=len(self.flight.of_partition(attempt.partition.id)),
            # A partition that killed a worker is not a straggler, and must not kill two workers at a time.
            is_mitigated=attempt.is_mitigated or attempt.crash_count > 0 or attempt.oom_count > 0,
        )

    # Actions

    def ask(self, key: str) -> None:
        """Ask the worker of an attempt for its progress."""
        self._tracked.setdefault(key, Tracked()).asked_at = self.clock()
        _, worker, _ = self._locate(key)
        self.probe.ask(key, worker=worker)

    def begin(self, action: Backup | SplitAmong) -> None:
        """Report the start of an action. If the action requires a stop, ask the attempt to stop."""
        attempt, worker, since = self._locate(action.key)
        partition, now = attempt.partition.id, self.clock()
        reason = action.reason if isinstance(action, SplitAmong) else None
        name = MitigationAction.SPLIT if isinstance(action, SplitAmong) else MitigationAction.BACKUP
        mitigation = Mitigation(partition, name, worker, now - since, action.remaining, reason)
        self._open[partition] = _OpenMitigation(mitigation, now, {partition})
        logger.info("straggler: partition %s on %s: %s", partition, worker, f"{name} {reason or ''}".strip())
        self.listener.mitigation(mitigation)
        if not (isinstance(action, SplitAmong) and action.is_by_attempt):
            attempt.is_mitigated = True
            return
        if action.expensive_pace:
            self._history = self._history.with_expensive(partition, worker=worker, pace=action.expensive_pace)
        tracked = self._tracked.setdefault(action.key, Tracked())
        tracked.split, tracked.split_at = action, now
        self.probe.request_split(action.key, worker=worker, parts=len(action.workers))

    def report_reassigned(self, attempt: Attempt) -> None:
        """Report that an attempt that had not started was moved to another worker."""
        seconds = self.clock() - attempt.submitted
        self.listener.mitigation(Mitigation(attempt.partition.id, MitigationAction.REASSIGN, "", seconds, 0.0))

    def abandon(self, key: str, *, worker: str) -> None:
        """Ask a worker to drop an attempt. The worker counts as busy until it starts another task."""
        self._abandoned[worker] = self.clock()
        self.probe.request_drop(key, worker=worker)

    def hand_on(self) -> None:
        """Ask all attempts that run to stop at their next batch boundary, and to leave the rest."""
        for key, execution in self.tracker.executing.items():
            if self.flight.has_key(key):
                self.probe.request_split(key, worker=execution.worker, parts=1)

    def requested_split(self, key: str) -> SplitAmong | None:
        """Return the split that was requested from an attempt; None if no split was requested."""
        tracked = self._tracked.get(key)
        return tracked.split if tracked else None

    def _locate(self, key: str) -> tuple[Attempt, str, float]:
        """Return the attempt of a task, its worker, and the time at which it started or was submitted."""
        attempt = self.flight.attempts[self.flight.of_key(key)]
        execution = self.tracker.executing.get(key)
        return (attempt, execution.worker, execution.since) if execution else (attempt, "", attempt.submitted)
