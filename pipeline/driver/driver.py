"""One process's way through one job: score what is left, decide, commit, publish.

What observers and ``events.jsonl`` hear of a round that runs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import Any

from pipeline.common.rows import RowCounts
from pipeline.common.secrets import redact
from pipeline.driver.alias_change import AliasMonitor
from pipeline.driver.quarantine import open_quarantine_round
from pipeline.errors import InputError, PipelineError
from pipeline.events import Callback, JobEnded, PartitionEnded, RoundStarted, notify
from pipeline.execution.attempts import AttemptResult
from pipeline.execution.clusters import cluster_of, open_cluster
from pipeline.execution.clusters.client import SharedCluster, shake_hands
from pipeline.execution.dispatcher import Dispatcher
from pipeline.execution.health import DispatchPolicy
from pipeline.execution.rebalancing import Mitigation, StragglerMitigator
from pipeline.execution.task_set import TaskSet
from pipeline.execution.tasks import decode_receipt
from pipeline.execution.worker_events import SharedClusterState
from pipeline.jobs.cancellation import Stop, StopReason, stop_checks
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.receipts import SpooledReceipts
from pipeline.jobs.status import Status, status_after
from pipeline.plan.plan import Partition, Plan
from pipeline.plan.planner import dispatch_order
from pipeline.report.build import decide_status, make_report
from pipeline.report.rejects import first_examples, summarise
from pipeline.report.report import Report
from pipeline.settings import Settings
from pipeline.sinks import publish

logger = logging.getLogger(__name__)


@dataclass
class Driver:
    """One process's way through one job."""

    job: JobDirectory
    lease: Lease
    settings: Settings
    callbacks: tuple[Callback, ...]
    within: ParentContext
    receipts: SpooledReceipts = field(default_factory=SpooledReceipts)
    """Of all rounds."""
    started: float = field(default_factory=time.monotonic)
    task_set: TaskSet = field(init=False)
    """The partitions of the last round."""

    @cached_property
    def model(self) -> AliasMonitor:
        """What is done about a model whose alias moves."""
        return AliasMonitor(self.job, self.lease, self.settings, self.stop)

    @property
    def stop(self) -> Stop:
        """Who asks it to stop."""
        return self.within.stop

    @property
    def ledger(self) -> Ledger:
        """What counts so far, over all rounds."""
        return self.job.ledger(self.receipts)

    def drive(self) -> Report:
        """Score what is left, decide, commit, publish."""
        self._decode_receipts()
        self.model.follow(self.ledger)
        while todo := self._todo():
            self._score(todo)
            self.model.follow(self.ledger)
        # One for all that follows: what it has summed up it keeps.
        ledger = self.ledger
        status = self._decide(ledger)
        if self.stop.is_cancel:
            raise self.stop.error(self.job.job, left=0)
        if not self.within.publishes:
            return self._finish(Status.SCORED, ledger)
        self._go(Status.PUBLISHING, reason="every partition is done")
        manifest = self.job.next_manifest(ledger)
        self.lease.check()
        committed = self.job.commit_manifest(manifest)
        self.lease.check()
        publish(committed.manifest, self.job)
        self.job.append_event("published", manifest=manifest.number, rows=manifest.rows.out)
        return self._finish(status, ledger)

    def _finish(self, status: Status, ledger: Ledger) -> Report:
        report = self.report(status, ledger)
        self.lease.check()
        self.job.write_report(report.to_dict())
        self._go(status, reason=f"published; {report.rows.rejected:,} rows were rejected")
        self._end(report)
        return report

    def probe(self, partitions: Sequence[Partition]) -> None:
        """Score those of ``partitions`` that are left."""
        self.model.is_paused = True
        self._decode_receipts()
        wanted = {partition.id for partition in partitions}
        todo = tuple(partition for partition in self._todo() if partition.id in wanted)
        if todo:
            self._score(todo)
        self._go(Status.PLANNED, reason="probed")

    def report(self, status: Status, ledger: Ledger, *, error: PipelineError | None = None) -> Report:
        """The report of a job that ended like that."""
        return make_report(
            self.job,
            ledger=ledger,
            status=status,
            seconds=time.monotonic() - self.started,
            error=error,
        )

    def give_up(self, error: BaseException) -> None:
        """Record why the run ended. It must not hide ``error``, so what goes wrong here is only logged."""
        known = PipelineError.of(error)
        status = status_after(error)
        try:
            report = self.report(status, self.ledger, error=known)
            self.job.write_report(report.to_dict())
            self._go(status, reason=known.message)
            self._end(report, reason=known.message)
        except Exception:
            logger.exception("the end of job %s could not be recorded", self.job.job)

    def _decode_receipts(self) -> None:
        self.receipts = SpooledReceipts(self.job.each_receipt())

    def _todo(self) -> tuple[Partition, ...]:
        return dispatch_order(self.ledger.todo)

    def _score(self, todo: Sequence[Partition]) -> None:
        self._go(Status.PROVISIONING, reason=f"driver {self.lease.epoch} on {self.lease.holder.host} starts")
        # Nothing runs yet, so that there is nothing to wait for when the job is to stop.
        with stop_checks(self._check_stop), self._client(self.ledger.last.plan) as client:
            self._check_stop()
            self._go(Status.RUNNING, reason=f"workers are there; {len(todo):,} partitions are left")
            while todo and not self.stop.is_requested:
                todo = self._dispatch(client, todo)
        self._check_stop()

    def _check_stop(self) -> None:
        """What was asked for ends the run, when there is anything left to do."""
        # A model that has moved is for its follower to deal with.
        if self.stop.is_requested and self.stop.why is not StopReason.ALIAS_CHANGE and (todo := self._todo()):
            raise self.stop.error(self.job.job, left=len(todo))

    def _dispatch(self, client: Any, todo: Sequence[Partition]) -> Sequence[Partition]:
        """Do ``todo``; what is left when an input file turned out bad, and the job goes on without it."""
        self.task_set = TaskSet(self.job, self.ledger.last, self.settings.partition_timeout)
        notify_round_started(self.job, self.ledger, todo, callbacks=self.callbacks)
        try:
            with self.task_set.batches_on(client):
                for receipt in self._dispatcher(client).run(todo):
                    self.receipts.add(receipt)
                    if self.lease.is_lost:
                        self.lease.check()
        except InputError as error:
            self.lease.check()
            if (
                self.model.is_paused
                or open_quarantine_round(self.job, self.ledger, error, epoch=self.lease.epoch) is None
            ):
                raise
            return self._todo()
        return ()

    @contextmanager
    def _client(self, plan: Plan) -> Iterator[Any]:
        """A client of the cluster: of the one of its fan-out, or of one for this job."""
        if self.within.cluster is not None:
            with self.within.cluster.client(plan.model.flavor) as client:
                yield client
            return
        cluster = cluster_of(plan.spec, settings=self.settings)
        with open_cluster(cluster, directory=self.job.root) as client:
            shake_hands(client, flavor=plan.model.flavor, timeout=self.settings.scheduler_timeout)
            yield client

    def _dispatcher(self, client: Any) -> Dispatcher:
        settings, task_set = self.settings, self.task_set
        return Dispatcher(
            client,
            submit=task_set.submit,
            read=decode_receipt,
            isolate=task_set.isolate,
            split=task_set.split,
            relief=self._relief(client),
            policy=DispatchPolicy(
                attempts=settings.attempts,
                no_workers_timeout=settings.no_workers_timeout,
                scheduler_timeout=settings.scheduler_timeout,
                grace=settings.drain_timeout,
                partition_timeout=settings.partition_timeout,
            ),
            stop=self.stop,
            on_attempt_finished=self._partition_ended,
            on_poll=partial(self.model.poll, task_set.round),
            neighbours=self.within.cluster.neighbours if self.within.cluster else SharedClusterState(),
        )

    def _relief(self, client: Any) -> StragglerMitigator | None:
        # Which workers are idle cannot be told where other children have some of them.
        if not self.settings.stragglers or self.within.cluster is not None:
            return None
        return self.task_set.relief(client, on_mitigation=self._helped)

    def _decide(self, ledger: Ledger) -> Status:
        """How the job ends by its rejects.

        :raises PipelineError: when there are too many.
        """
        examples = first_examples(summarise(self.job, ledger=ledger)) if ledger.rows.rejected else None
        return decide_status(ledger, job=self.job.job, examples=examples)

    def _go(self, after: Status, *, reason: str = "") -> None:
        self.lease.check()
        notify(self.callbacks, self.job.set_status(after, reason=reason))

    def _partition_ended(self, ended: AttemptResult) -> None:
        self.task_set.learn(ended)
        notify_attempt_finished(self.job, ended, round=self.task_set.round.number, callbacks=self.callbacks)

    def _helped(self, helped: Mitigation) -> None:
        self.job.append_event("straggler", **asdict(helped))

    def _end(self, report: Report, *, reason: str = "") -> None:
        notify(
            self.callbacks,
            JobEnded(report.job, report.status, report.rows, report.output, report.directory, reason, report.to_dict()),
        )


@dataclass(frozen=True)
class ParentContext:
    """What a job has of its parent's driver, when it is driven as a child."""

    stop: Stop
    cluster: SharedCluster | None
    """None when nothing is to be scored."""
    publishes: bool
    """Whether to publish. Else it ends as SCORED."""


def notify_round_started(
    job: JobDirectory, ledger: Ledger, todo: Sequence[Partition], *, callbacks: Sequence[Callback]
) -> None:
    """The last round begins, or goes on, with ``todo``."""
    partitions, round = ledger.partitions(ledger.last), ledger.last.number
    left, rows = sum(partition.rows for partition in todo), sum(partition.rows for partition in partitions)
    done = len(partitions) - len(todo)
    job.append_event("round_started", round=round, partitions=len(partitions), done=done)
    notify(callbacks, RoundStarted(job.job, round, len(partitions), done, rows, rows - left))


def notify_attempt_finished(
    job: JobDirectory, ended: AttemptResult, *, round: int, callbacks: Sequence[Callback]
) -> None:
    """An attempt at a partition ended."""
    receipt = ended.receipt
    event = PartitionEnded(
        job=job.job,
        round=round,
        partition=ended.partition.id,
        outcome=ended.outcome,
        rows=receipt.rows if receipt else RowCounts(),
        seconds=receipt.seconds.total if receipt else 0.0,
        attempt=ended.attempt,
        worker=receipt.worker if receipt else "",
        reason=redact(ended.reason),
        parts=len(receipt.splits) if receipt else 0,
    )
    if ended.outcome != "done":
        # What is done has a receipt; a line each would only cost an fsync.
        job.append_event(
            "partition",
            partition=event.partition,
            outcome=event.outcome,
            attempt=event.attempt,
            reason=event.reason,
        )
    notify(callbacks, event)
