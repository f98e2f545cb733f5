"""Drive a fan-out: run its children side by side on one cluster, each as a separate job, then combine the results."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from pipeline.driver.alias_change import find_outdated
from pipeline.driver.budget import BudgetMonitor
from pipeline.driver.job_run import JobRun, ParentContext, RunChild
from pipeline.driver.outcome import has_output
from pipeline.driver.round_progress import RoundProgress
from pipeline.driver.step_change import StepMonitor
from pipeline.errors import ChildrenFailed, InfrastructureError, PipelineError
from pipeline.events import Callback, Event, PartitionEnded, ProgressMade, RoundStarted, StepMessage, notify
from pipeline.execution.clusters import cluster_of, open_cluster
from pipeline.execution.clusters.client import SharedCluster
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.fan_out import commit_fan_out
from pipeline.jobs.stages import is_done, output_rows, progress_of
from pipeline.jobs.status import Status
from pipeline.report.distributions import sketches_of
from pipeline.report.gate import check_gate, read_gate
from pipeline.report.report import Report
from pipeline.storage.urls import with_storage_options

logger = logging.getLogger(__name__)
LEASE_CHECK_SECONDS = 0.5
"""Seconds between two checks of the lease while children run."""
_SHOWN = 3


class FanOutStop(Stop):
    """A request to stop that is forwarded to the running children."""

    def __init__(self) -> None:
        super().__init__()
        self._child_stops: list[Stop] = []

    def child_stop(self) -> Stop:
        """Return a stop for one child. Requests to the fan-out, also earlier ones, are forwarded to it, not back."""
        stop = Stop()
        with self._lock:
            self._child_stops.append(stop)
            if self.reason is not None:
                stop.request(self.reason, message=self.message, signal_number=self.signal_number, now=self.now)
        return stop

    def request(
        self, reason: StopReason, *, message: str = "", signal_number: int | None = None, now: bool = False
    ) -> None:
        """Request a stop of the fan-out and of all its children."""
        with self._lock:
            super().request(reason, message=message, signal_number=signal_number, now=now)
            for stop in self._child_stops:
                stop.request(reason, message=message, signal_number=signal_number, now=self.now)


def is_ready(child: JobDirectory) -> bool:
    """Return True if a child has ended, or is scored and only waits to be published with the others."""
    if child.record.publishes_itself or child.status() is not Status.SCORED:
        return child.is_ended
    return is_done(child)


@dataclass
class FanOutDriver(JobRun):
    """Driver of a fan-out."""

    run_child: RunChild
    stop: FanOutStop = field(default_factory=FanOutStop)
    budget: BudgetMonitor | None = field(default=None, init=False)
    """Spending of all children, while they run."""

    def drive(self) -> Report:
        """Run the children that are not ready, publish, and sum up.

        :raises ChildrenFailed: when some children failed. The other children stay done.
        """
        children = self.job.children()
        pending = [child for child in children if not is_ready(child)]
        self.budget = BudgetMonitor.open(self.job, epoch=self.lease.epoch, stop=self.stop)
        self.budget.check()
        while True:
            failures = {} if self.stop.is_requested else self._score_children(pending)
            remaining = [child for child in children if child.id in failures or not is_ready(child)]
            if self.stop.is_cancel or (self.stop.is_requested and remaining):
                raise self.stop.error(self.job.id, left=sum(progress_of(child).left for child in remaining))
            if remaining:
                raise _children_failed(self.job, remaining, failures)
            if not (pending := self._find_outdated(children)):
                break
            if self.stop.is_requested:
                raise self.stop.error(self.job.id, left=sum(child.record.partitions for child in pending))
        self._check_gate(children)
        self.set_status(Status.PUBLISHING)
        self.lease.check()
        failures = self._publish([child for child in children if not child.is_ended])
        remaining = [child for child in children if not child.is_ended]
        if remaining:
            raise _children_failed(self.job, remaining, failures)
        return self.commit(children)

    def _check_gate(self, children: Sequence[JobDirectory]) -> None:
        """Check the publish gate on all children together, before any has committed; else each checks its own.

        :raises GateFailed: if their output does not pass it.
        """
        is_committed = any(child.manifests.numbers() for child in children)
        if self.job.plan.spec.gate is None or not self.job.record.publishes_children_together or is_committed:
            return
        check_gate(self.job, sketches_of(self.job), rows=sum(map(output_rows, children)))

    def commit(self, children: Sequence[JobDirectory]) -> Report:
        """Commit the published manifests of all children, and record the end of the fan-out."""
        if self.job.status() is not Status.PUBLISHING:
            self.set_status(Status.PUBLISHING, reason="the output of a child changed")
        self.lease.check()
        commit = commit_fan_out(self.job, children)
        self.job.events.append("published", manifest=commit.number, rows=commit.rows.output)
        gate = read_gate(self.job)
        has_warnings = any(child.status() is Status.SUCCEEDED_WITH_WARNINGS for child in children)
        has_warnings |= gate is not None and bool(gate.failed)
        status = Status.SUCCEEDED_WITH_WARNINGS if has_warnings else Status.SUCCEEDED
        return self.finish(self.make_report(status))

    def _find_outdated(self, children: Sequence[JobDirectory]) -> list[JobDirectory]:
        """Return scored children whose model or step code is another one now. They apply their own policy.

        Each model reference is resolved once, so that all children see the same version. Nothing is checked once a
        child has committed: from then on, the family keeps what it was scored with.
        """
        if not self.job.record.publishes_children_together or any(child.manifests.numbers() for child in children):
            return []
        outdated = find_outdated(children, settings=self.settings)
        monitors = {child.id: StepMonitor(child, self.lease, self.settings) for child in children}
        return [child for child in children if child in outdated or monitors[child.id].is_outdated(child.ledger())]

    def _score_children(self, pending: Sequence[JobDirectory]) -> dict[str, BaseException]:
        """Score ``pending``, at most ``fan_out.max_parallel`` at a time. Return the errors by job id."""
        if not pending:
            return {}
        events = _ChildEvents(self.job.id, self.callbacks)
        with ExitStack() as stack:
            shared = None
            if not all(map(is_done, pending)):
                cluster = cluster_of(self.job.plan.spec, settings=self.settings)
                self.set_provisioning(cluster)
                client = stack.enter_context(open_cluster(cluster, directory=self.job.root))
                if self.budget is not None:
                    stack.enter_context(self.budget.metering(client))
                self.record_cluster(client)
                shared = SharedCluster(client, timeout=self.settings.scheduler_timeout)
            self.set_status(Status.RUNNING)
            self._notify_started(events)
            fan_out = self.job.plan.spec.fan_out
            width = fan_out.max_parallel if fan_out else 1
            return _ChildPool(self, events, shared).run(pending, width=width)

    def _publish(self, children: Sequence[JobDirectory]) -> dict[str, BaseException]:
        return _ChildPool(self, _ChildEvents(self.job.id, ()), None, publishes=True).run(children, width=1)

    def _notify_started(self, events: _ChildEvents) -> None:
        parts = [progress_of(child) for child in self.job.children()]
        partitions, done = sum(part.partitions for part in parts), sum(part.done for part in parts)
        pending, rows = sum(part.rows_pending for part in parts), sum(part.rows for part in parts)
        self.job.events.append(
            "round_started", round=0, partitions=partitions, done=done, rows_done=max(0, rows - pending)
        )
        progress = RoundProgress(self.job, self.callbacks, epoch=self.lease.epoch)
        events.start(progress, RoundStarted(self.job.id, 0, partitions, done, rows, max(0, rows - pending)))


class _ChildPool:
    """Threads that run the children, each thread one child after the other."""

    def __init__(
        self, driver: FanOutDriver, events: _ChildEvents, cluster: SharedCluster | None, *, publishes: bool = False
    ) -> None:
        self._driver = driver
        self._events = events
        self._cluster = cluster
        self._publishes = publishes
        self._failures: dict[str, BaseException] = {}
        self._width = 1

    def run(self, children: Sequence[JobDirectory], *, width: int) -> dict[str, BaseException]:
        """Run all ``children``. Return the errors by job id.

        :raises Fenced: when another driver has taken over the fan-out.
        """
        self._width = max(1, min(width, len(children)))
        with ThreadPoolExecutor(width, thread_name_prefix="child") as pool:
            run_child = with_storage_options(self._run_child)
            running: set[Future[None]] = {pool.submit(run_child, child) for child in children}
            try:
                while running:
                    _, running = wait(running, timeout=LEASE_CHECK_SECONDS, return_when=FIRST_COMPLETED)
                    if self._driver.lease.is_lost:
                        self._driver.lease.check()
            except BaseException:
                self._driver.stop.request(StopReason.SIGNAL, message="the driver of the fan-out ended", now=True)
                raise
        return self._failures

    def _run_child(self, child: JobDirectory) -> None:
        driver = self._driver
        is_hopeless = any(isinstance(error, InfrastructureError) for error in self._failures.values())
        if driver.stop.is_requested or is_hopeless:
            return
        parent = ParentContext(
            driver.stop.child_stop(),
            self._cluster,
            publishes=self._publishes or child.record.publishes_itself,
            is_scored=self._publishes,
            siblings=self._width,
            budget=driver.budget,
        )
        try:
            driver.run_child(child, settings=driver.settings, callbacks=(self._events,), parent=parent)
        except BaseException as error:
            logger.warning("child %s failed: %s", child.id, error)
            self._failures[child.id] = error


class _ChildEvents(Callback):
    """A callback that forwards events in children to the callbacks of the fan-out, one event at a time."""

    def __init__(self, job: str, callbacks: Sequence[Callback]) -> None:
        self._job = job
        self._callbacks = callbacks
        self._lock = threading.Lock()
        self._progress: RoundProgress | None = None

    def start(self, progress: RoundProgress, event: RoundStarted) -> None:
        """Notify the callbacks of the start, and count the rows of the children from now on."""
        with self._lock:
            self._progress = progress
            notify(self._callbacks, event)
            progress.start(event)

    def notify(self, event: Event) -> None:
        """Notify the callbacks of an event of the fan-out."""
        with self._lock:
            notify(self._callbacks, event)

    def on_partition(self, event: PartitionEnded) -> None:
        """Forward an event of a child, with the partition named by child and partition."""
        named = replace(event, job=self._job, partition=self._named(event.job, event.partition))
        self.notify(named)
        with self._lock:
            if self._progress is not None:
                self._progress.ended(named)

    def on_message(self, event: StepMessage) -> None:
        """Forward a print or warning of a step in a child."""
        self.notify(replace(event, job=self._job, partition=self._named(event.job, event.partition)))

    def on_progress(self, event: ProgressMade) -> None:
        """Add the running partitions of a child to those of the others."""
        running = [replace(part, partition=self._named(event.job, part.partition)) for part in event.running]
        with self._lock:
            if self._progress is not None:
                self._progress.advanced(running, group=event.job)

    def _named(self, job: str, partition: str) -> str:
        return f"{job.removeprefix(f'{self._job}.')}/{partition}"


def _children_failed(
    job: JobDirectory, unfinished: Sequence[JobDirectory], failures: dict[str, BaseException]
) -> ChildrenFailed:
    """Return the error of a fan-out whose children ``unfinished`` failed, with the first known exit code of theirs."""
    known = [failures[child.id] for child in unfinished if child.id in failures]
    shown = [
        f"{child.id.removeprefix(f'{job.id}.')}: {_failure_text(child, failures)}" for child in unfinished[:_SHOWN]
    ]
    more = f"; and {len(unfinished) - _SHOWN:,} more" if len(unfinished) > _SHOWN else ""
    publishes_each = job.plan.spec.fan_out is not None and job.plan.spec.fan_out.publish == "each"
    is_unpublished = not publishes_each and not has_output(job)
    noun = "child" if job.record.children == 1 else "children"
    error = ChildrenFailed(
        f"{len(unfinished):,} of {job.record.children:,} {noun} failed"
        + ("; nothing was published" if is_unpublished else ""),
        where=f"job {job.id}",
        found="; ".join(shown) + more,
        next_step=f"python -m pipeline resume {job.id}",
    )
    codes = [failure.exit_code for failure in known if isinstance(failure, PipelineError)]
    error.exit_code = codes[0] if codes else ChildrenFailed.exit_code
    return error


def _failure_text(child: JobDirectory, failures: dict[str, BaseException]) -> str:
    error = failures.get(child.id)
    if error is None:
        return f"{child.status()}"
    return error.message if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
