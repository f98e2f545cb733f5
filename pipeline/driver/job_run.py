"""Common parts of all drivers: set the status, and record the end or the failure of a run."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.common.sketch import Sketches
from pipeline.driver.budget import BudgetMonitor
from pipeline.errors import PipelineError
from pipeline.events import Callback, JobEnded, notify
from pipeline.execution.clusters import ClusterAdapter, describe_start
from pipeline.execution.clusters.client import SharedCluster, cluster_ready
from pipeline.execution.dashboard_page import LivePage
from pipeline.jobs.cancellation import Stop
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.status import Status, status_after
from pipeline.report.build import make_report
from pipeline.report.distributions import write_sketches
from pipeline.report.report import Report
from pipeline.settings import Settings

logger = logging.getLogger(__name__)


class RunChild(Protocol):
    """`pipeline.runner.run_job`, for a child of a fan-out, or a stage."""

    def __call__(
        self, job: JobDirectory, /, *, settings: Settings, callbacks: Sequence[Callback], parent: ParentContext
    ) -> Report:
        """Run ``job`` to its end."""


class JobDriver(Protocol):
    """A driver, as `pipeline.runner` uses it."""

    @property
    def job(self) -> JobDirectory:
        """The job to drive."""

    @property
    def lease(self) -> Lease:
        """The lease of the job, held by this process."""

    @property
    def stop(self) -> Stop:
        """The request to stop, to which signals and cancel requests are forwarded."""

    def drive(self) -> Report:
        """Drive the job to its end."""

    def record_failure(self, error: BaseException) -> None:
        """Record why the run failed."""


@dataclass(frozen=True)
class ParentContext:
    """Objects that a child gets from the driver of its fan-out, or a stage from that of its job. A job without a parent
    has its own stop."""

    stop: Stop = field(default_factory=Stop)
    cluster: SharedCluster | None = None
    """Cluster of the fan-out. None: the driver opens a cluster if partitions are pending."""
    publishes: bool = True
    """True: publish. False: the job ends as SCORED."""
    is_scored: bool = False
    """True: the fan-out has checked that every row is scored, and with which model version. Only publish."""
    budget: BudgetMonitor | None = None
    """Spending of the whole job, which the driver of the fan-out, or of the job with stages, adds up."""
    siblings: int = 1
    """Children of the fan-out that run at the same time."""
    seals: bool = False
    """True: commit the manifest of a stage, whose files the next stage reads."""
    root: str = ""
    """Id of the job whose stage it is, for messages; empty for any other job."""


@dataclass
class JobRun:
    """One run of a job in this process, from the lease to the final status."""

    job: JobDirectory
    lease: Lease
    settings: Settings
    callbacks: tuple[Callback, ...]
    started: float = field(default_factory=time.monotonic, init=False)
    """Start of the run, by the monotonic clock."""
    sketches: Sketches | None = field(default=None, init=False)
    """Distributions of the job's columns, once its report is made."""

    def set_status(self, status: Status, *, reason: str = "", error: PipelineError | None = None) -> None:
        """Record a new status and notify the callbacks.

        :param error: error that ended the run.
        :raises Fenced: when another driver has taken over the job.
        """
        self.lease.check()
        notify(self.callbacks, self.job.set_status(status, reason=reason, error=error.to_dict() if error else None))

    def set_provisioning(self, cluster: ClusterAdapter | None) -> None:
        """Record that the driver starts ``cluster``, or connects to it; None: it uses the cluster of its fan-out."""
        workers = "workers of the fan-out"
        if cluster is not None:
            workers = ""
            # What is wrong with the cluster is an error when it is opened.
            with suppress(PipelineError):
                workers = describe_start(cluster)
        reason = f"driver {self.lease.epoch} on {self.lease.holder.host} starts"
        self.set_status(Status.PROVISIONING, reason=f"{reason}: {workers}" if workers else reason)

    def record_cluster(self, client: Any) -> LivePage:
        """Record the workers that are connected, with their dashboard, and notify the callbacks.

        :returns: the page of jobs on the dashboard.
        """
        page = LivePage(client)
        page.install()
        event = cluster_ready(client, job=self.job.id, page=page.url)
        self.job.events.append("cluster", workers=event.workers, threads=event.threads, dashboard=event.dashboard)
        notify(self.callbacks, event)
        return page

    def make_report(
        self, status: Status, *, ledger: Ledger | None = None, error: PipelineError | None = None
    ) -> Report:
        """Return the report of a run that ends with ``status``."""
        if ledger is not None and self.sketches is None:
            self.sketches = ledger.sketches()
        seconds = time.monotonic() - self.started
        return make_report(self.job, ledger=ledger, status=status, seconds=seconds, error=error, sketches=self.sketches)

    def finish(self, report: Report, *, reason: str = "", error: PipelineError | None = None) -> Report:
        """Store ``report``, set its status and notify the callbacks of the end.

        :param reason: reason in the status event of a run that did not fail.
        :param error: error that ended the run, if the run failed.
        :raises Fenced: when another driver has taken over the job.
        """
        message = error.message if error else ""
        self.lease.check()
        self._write_report(report)
        self.set_status(Status(report.status), reason=message or reason, error=error)
        ended = JobEnded(
            report.job, report.status, report.rows, report.output, report.directory, message, report.to_dict()
        )
        notify(self.callbacks, ended)
        return report

    def _write_report(self, report: Report) -> None:
        """Store ``report``. After a success, an error is only logged: the output is published, with or without it."""
        try:
            if self.sketches is not None:
                write_sketches(self.job, self.sketches)
            self.job.write_report(report.to_dict())
        except (PipelineError, OSError) as error:
            if not Status(report.status).is_success:
                raise
            logger.warning("job %s has succeeded, but its report could not be stored: %s", self.job.id, error)
        if not self.job.record.parent:
            self._write_page(report)

    def page_ledger(self) -> Ledger | None:
        """Return the ledger, if it was read already, for the HTML report."""
        return None

    def _write_page(self, report: Report) -> None:
        """Store the HTML report. It is for people: an error is only logged."""
        try:
            from pipeline.report.html.page import write_page

            write_page(self.job, report, ledger=self.page_ledger(), sketches=self.sketches)
        except Exception:
            logger.warning("report.html of job %s could not be written", self.job.id, exc_info=True)

    def record_failure(self, error: BaseException) -> None:
        """Record why the run failed. Errors raised here are logged, not raised: they must not mask ``error``."""
        known = PipelineError.of(error)
        try:
            self.finish(self.make_report(status_after(error), error=known), error=known)
        except Exception:
            logger.exception("the end of job %s could not be recorded", self.job.id)
