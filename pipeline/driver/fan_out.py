"""The way through a fan-out: its children side by side on one cluster, each a job of its own; then all are added up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from pipeline.driver.driver import ParentContext
from pipeline.errors import ChildrenFailed, InfrastructureError, PipelineError
from pipeline.events import Callback, JobEnded, PartitionEnded, RoundStarted, notify
from pipeline.execution.clusters import cluster_of, open_cluster
from pipeline.execution.clusters.client import SharedCluster
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.fan_out import commit_fan_out
from pipeline.jobs.lease import Lease
from pipeline.jobs.status import Status, status_after
from pipeline.report.build import make_report
from pipeline.report.report import Report
from pipeline.settings import Settings

logger = logging.getLogger(__name__)
LOOK_SECONDS = 0.5
"""Seconds between two looks at the lease while children run."""
_SHOWN = 3


class FanOutStop(Stop):
    """A request to stop that is handed on to the children at work."""

    def __init__(self) -> None:
        super().__init__()
        self._followers: list[Stop] = []

    def follower(self) -> Stop:
        """One for a child: it may be asked by itself, and hears what this one is asked, also before."""
        stop = Stop()
        with self._lock:
            self._followers.append(stop)
            if self.why is not None:
                stop.request(self.why, reason=self.reason, signal_number=self.signal_number, now=self.now)
        return stop

    def request(
        self, why: StopReason, *, reason: str = "", signal_number: int | None = None, now: bool = False
    ) -> None:
        """Ask to stop, and all children with it."""
        with self._lock:
            super().request(why, reason=reason, signal_number=signal_number, now=now)
            for stop in self._followers:
                stop.request(why, reason=reason, signal_number=signal_number, now=self.now)


DriveChild = Callable[[JobDirectory, ParentContext, Sequence[Callback]], Report]


def is_ready(child: JobDirectory) -> bool:
    """Whether a child is done, or waits for nothing but being published with the others."""
    if child.record.publishes or child.status() is not Status.SCORED:
        return child.is_ended
    return not child.ledger().todo


@dataclass
class FanOutDriver:
    """One process's way through a fan-out."""

    job: JobDirectory
    lease: Lease
    settings: Settings
    callbacks: tuple[Callback, ...]
    drive_child: DriveChild
    stop: FanOutStop = field(default_factory=FanOutStop)
    started: float = field(default_factory=time.monotonic)

    def drive(self) -> Report:
        """Do what is left of each child, publish, add up.

        :raises ChildrenFailed: when some did not end well; the others are done, and stay so.
        """
        children = self.job.children()
        failures = self._score([child for child in children if not is_ready(child)])
        left = [child for child in children if not is_ready(child)]
        if self.stop.is_cancel or (self.stop.is_requested and left):
            raise self.stop.error(self.job.job, left=sum(len(child.ledger().todo) for child in left))
        if left:
            raise _failed(self.job, left, failures)
        self._go(Status.PUBLISHING)
        self.lease.check()
        failures = self._publish([child for child in children if not child.is_ended])
        left = [child for child in children if not child.is_ended]
        if left:
            raise _failed(self.job, left, failures)
        commit = commit_fan_out(self.job, children)
        self.job.append_event("published", manifest=commit.number, rows=commit.rows.out)
        warned = any(child.status() is Status.SUCCEEDED_WITH_WARNINGS for child in children)
        return self._end(Status.SUCCEEDED_WITH_WARNINGS if warned else Status.SUCCEEDED)

    def give_up(self, error: BaseException) -> None:
        """Record why the run ended; what goes wrong here is only logged."""
        known = PipelineError.of(error)
        try:
            self._end(status_after(error), error=known)
        except Exception:
            logger.exception("the end of job %s could not be recorded", self.job.job)

    def _score(self, todo: Sequence[JobDirectory]) -> dict[str, BaseException]:
        """Have ``todo`` scored, as many at a time as the spec says; how those ended that did not end well."""
        if not todo:
            return {}
        events = _ChildEvents(self.job.job, self.callbacks)
        with ExitStack() as stack:
            shared = None
            if any(child.ledger().todo for child in todo):
                self._go(Status.PROVISIONING)
                cluster = cluster_of(self.job.plan.spec, settings=self.settings)
                client = stack.enter_context(open_cluster(cluster, directory=self.job.root))
                shared = SharedCluster(client, timeout=self.settings.scheduler_timeout)
            self._go(Status.RUNNING)
            self._announce(events)
            fan_out = self.job.plan.spec.fan_out
            width = fan_out.max_parallel if fan_out else 1
            return _ChildPool(self, events, shared).run(todo, width=width)

    def _publish(self, children: Sequence[JobDirectory]) -> dict[str, BaseException]:
        return _ChildPool(self, _ChildEvents(self.job.job, ()), None, publishes=True).run(children, width=1)

    def _announce(self, events: _ChildEvents) -> None:
        ledgers = [child.ledger() for child in self.job.children()]
        partitions, done = sum(one.planned for one in ledgers), sum(len(one.done) for one in ledgers)
        left = sum(partition.rows for one in ledgers for partition in one.todo)
        rows = sum(part.rows for one in ledgers for part in one.base.plan.partitions)
        self.job.append_event("round_started", round=0, partitions=partitions, done=done)
        events.tell(RoundStarted(self.job.job, 0, partitions, done, rows, max(0, rows - left)))

    def _go(self, after: Status, *, reason: str = "") -> None:
        self.lease.check()
        notify(self.callbacks, self.job.set_status(after, reason=reason))

    def _end(self, status: Status, *, error: PipelineError | None = None) -> Report:
        report = make_report(self.job, status=status, seconds=time.monotonic() - self.started, error=error)
        self.lease.check()
        self.job.write_report(report.to_dict())
        reason = error.message if error else ""
        self._go(status, reason=reason)
        ended = JobEnded(
            report.job, report.status, report.rows, report.output, report.directory, reason, report.to_dict()
        )
        notify(self.callbacks, ended)
        return report


class _ChildPool:
    """Threads that each drive one child after the other."""

    def __init__(
        self, driver: FanOutDriver, events: _ChildEvents, cluster: SharedCluster | None, *, publishes: bool = False
    ) -> None:
        self._driver = driver
        self._events = events
        self._cluster = cluster
        self._publishes = publishes
        self._failures: dict[str, BaseException] = {}

    def run(self, children: Sequence[JobDirectory], *, width: int) -> dict[str, BaseException]:
        """Drive all of them; how those ended that did not end well, by job id.

        :raises Fenced: when another driver has taken the fan-out over.
        """
        with ThreadPoolExecutor(width, thread_name_prefix="child") as pool:
            left: set[Future[None]] = {pool.submit(self._drive, child) for child in children}
            try:
                while left:
                    _, left = wait(left, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
                    if self._driver.lease.is_lost:
                        self._driver.lease.check()
            except BaseException:
                self._driver.stop.request(StopReason.SIGNAL, reason="the driver of the fan-out ended", now=True)
                raise
        return self._failures

    def _drive(self, child: JobDirectory) -> None:
        driver = self._driver
        is_hopeless = any(isinstance(error, InfrastructureError) for error in self._failures.values())
        if driver.stop.is_requested or is_hopeless:
            return
        within = ParentContext(driver.stop.follower(), self._cluster, self._publishes or child.record.publishes)
        try:
            driver.drive_child(child, within, (self._events,))
        except BaseException as error:
            logger.warning("child %s did not end well: %s", child.job, error)
            self._failures[child.job] = error


class _ChildEvents(Callback):
    """Tells the observers of the fan-out what happens in its children, one at a time."""

    def __init__(self, job: str, callbacks: Sequence[Callback]) -> None:
        self._job = job
        self._callbacks = callbacks
        self._lock = threading.Lock()

    def tell(self, event: Any) -> None:
        """Hand on an event of the fan-out itself."""
        with self._lock:
            notify(self._callbacks, event)

    def on_partition(self, event: PartitionEnded) -> None:
        """As one of the fan-out, named by child and partition."""
        child = event.job.removeprefix(f"{self._job}.")
        fields = {**event.__dict__, "job": self._job, "partition": f"{child}/{event.partition}"}
        self.tell(PartitionEnded(**fields))


def _failed(job: JobDirectory, left: Sequence[JobDirectory], failures: dict[str, BaseException]) -> ChildrenFailed:
    """What a fan-out raises of which ``left`` did not end well."""
    known = [failures[child.job] for child in left if child.job in failures]
    shown = [f"{child.job.removeprefix(f'{job.job}.')}: {_said(child, failures)}" for child in left[:_SHOWN]]
    more = f"; and {len(left) - _SHOWN:,} more" if len(left) > _SHOWN else ""
    kept = "" if job.plan.spec.fan_out and job.plan.spec.fan_out.publish == "each" else "; nothing was published"
    if any(child.status().is_success for child in job.children()):
        kept = ""
    noun = "child" if job.record.children == 1 else "children"
    error = ChildrenFailed(
        f"{len(left):,} of {job.record.children:,} {noun} did not end well{kept}",
        where=f"job {job.job}",
        found="; ".join(shown) + more,
        next_step=f"python -m pipeline resume {job.job}",
    )
    codes = [one.exit_code for one in known if isinstance(one, PipelineError)]
    error.exit_code = codes[0] if codes else ChildrenFailed.exit_code
    return error


def _said(child: JobDirectory, failures: dict[str, BaseException]) -> str:
    error = failures.get(child.job)
    if error is None:
        return f"{child.status()}"
    return error.message if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}"
