"""Drive one job: score the remaining partitions, decide on the rejects, commit, publish.

The chain: `Driver.drive`, `Driver.score_partitions`, `Driver.dispatch`, `pipeline.execution.dispatcher.Dispatcher.run`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from pipeline.common.rows import RowCounts
from pipeline.common.secrets import redact
from pipeline.common.step_output import OutputLine
from pipeline.devices.memory import DEVICE_MEMORY
from pipeline.driver.alias_change import AliasMonitor
from pipeline.driver.budget import BudgetMonitor
from pipeline.driver.job_run import JobRun, ParentContext
from pipeline.driver.live_job import LiveJob
from pipeline.driver.outcome import Outcome, outcome
from pipeline.driver.prepare import requested_device
from pipeline.driver.quarantine import open_quarantine_round
from pipeline.driver.round_progress import RoundProgress
from pipeline.driver.step_change import StepMonitor
from pipeline.errors import InputError, PipelineError, StepChanged
from pipeline.events import (
    AttemptOutcome,
    Callback,
    PartitionEnded,
    RoundStarted,
    RunningPartition,
    StepMessage,
    notify,
)
from pipeline.execution.clusters import ClusterAdapter, cluster_of, open_cluster
from pipeline.execution.clusters.client import shake_hands, supply_of
from pipeline.execution.clusters.devices import options_on, options_with
from pipeline.execution.dashboard_page import LivePage
from pipeline.execution.dispatcher import Dispatcher
from pipeline.execution.health import DispatchPolicy
from pipeline.execution.placement import Placement, Reports, place
from pipeline.execution.protocols import AttemptResult, Mitigation
from pipeline.execution.stragglers import StragglerPolicy
from pipeline.execution.task_set import TaskSet
from pipeline.execution.worker_events import SharedClusterState
from pipeline.jobs import layout
from pipeline.jobs.cancellation import Stop, StopReason, partitions_left, stop_checks
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.manifest import Manifest
from pipeline.jobs.receipts import SpooledReceipts
from pipeline.jobs.status import Status
from pipeline.models.device_options import DeviceOptions
from pipeline.plan.plan import Partition, Plan
from pipeline.plan.planner import dispatch_order
from pipeline.report.build import decide_status
from pipeline.report.gate import check_gate
from pipeline.report.rejects import first_examples, summarise
from pipeline.report.report import Report
from pipeline.sinks import publish
from pipeline.spec.model_ref import Device

logger = logging.getLogger(__name__)


@dataclass
class Driver(JobRun):
    """Driver of a job that has no children."""

    parent: ParentContext
    receipts: SpooledReceipts = field(default_factory=SpooledReceipts)
    """Receipts of all rounds."""
    task_set: TaskSet = field(init=False)
    """The partitions of the last round."""
    progress: RoundProgress = field(init=False)
    """Progress of the last round."""
    device: Device = field(default="cpu", init=False)
    """Device that workers use; known once they are connected."""
    placement: Placement = field(default_factory=Placement, init=False)
    """Workers that may take partitions; known once they are connected."""
    device_memory: float | int | str = field(default=DEVICE_MEMORY, init=False)
    """Share of the free memory of a GPU, or a size, that batches may use."""

    live: LiveJob | None = field(default=None, init=False)
    """The job's page on the dashboard; None before workers are connected."""

    @cached_property
    def alias_monitor(self) -> AliasMonitor:
        """Monitor of the alias that the model reference names."""
        return AliasMonitor(self.job, self.lease, self.settings, self.stop)

    @cached_property
    def step_monitor(self) -> StepMonitor:
        """Monitor of the code of the steps."""
        return StepMonitor(self.job, self.lease, self.settings)

    @property
    def has_service(self) -> bool:
        """True if a service scores rows."""
        return any(model.endpoint for model in self.job.plan.models)

    @cached_property
    def budget(self) -> BudgetMonitor:
        """Spending of the whole job."""
        return self.parent.budget or BudgetMonitor.open(self.job, epoch=self.lease.epoch, stop=self.stop)

    @property
    def stop(self) -> Stop:
        """The request to stop this run."""
        return self.parent.stop

    @property
    def ledger(self) -> Ledger:
        """Ledger of all rounds, from the receipts read so far."""
        return self.job.ledger(self.receipts)

    def drive(self) -> Report:
        """Score the remaining partitions, decide on the rejects, commit, publish."""
        self._read_receipts()
        if not self.parent.is_scored:
            self.alias_monitor.apply_policy(self.ledger)
            self.step_monitor.apply_policy(self.ledger)
        while pending := self._pending():
            self.score_partitions(pending)
            self.alias_monitor.apply_policy(self.ledger)
        # One ledger for all that follows: it caches its sums.
        ledger = self.ledger
        status = self._decide(ledger)
        if self.stop.is_cancel:
            raise self.stop.error(self.job.id, left=0)
        if self.parent.seals:
            self._commit(ledger)
        if not self.parent.publishes:
            return self._finish(Status.SCORED, ledger)
        status = self._check_gate(status, ledger)
        self._commit_and_publish(ledger)
        return self._finish(status, ledger)

    def _check_gate(self, status: Status, ledger: Ledger) -> Status:
        """Return the final status after the publish gate, which is not asked again once the output is committed.

        :raises GateFailed: if the output does not pass it.
        """
        last = self.job.manifests.last()
        if self.job.plan.spec.gate is None or self.parent.is_scored or (last and last.round == ledger.last.number):
            return status
        self.sketches = ledger.sketches()
        result = check_gate(self.job, self.sketches, rows=ledger.rows.output)
        return Status.SUCCEEDED_WITH_WARNINGS if result and result.failed else status

    def _commit_and_publish(self, ledger: Ledger) -> None:
        self.set_status(Status.PUBLISHING, reason="every partition is done")
        manifest = self._commit(ledger)
        self.lease.check()
        publish(manifest, self.job, check_lease=self.lease.check)
        self.job.events.append("published", manifest=manifest.number, rows=manifest.rows.output)

    def _commit(self, ledger: Ledger) -> Manifest:
        manifest = self.job.manifests.prepare(ledger)
        self.lease.check()
        committed = self.job.manifests.commit(manifest).manifest
        if self.has_service:
            # Parts of split partitions leave them to each other.
            for round_ in ledger.rounds:
                self.job.store.remove_folder(layout.round_file(round_.number, layout.ANSWERS))
        return committed

    def record_failure(self, error: BaseException) -> None:
        """Record why the run failed, unless the output is published: a resume then records the success."""
        if self._is_published():
            logger.error("job %s has published its output, but its end could not be recorded: resume it", self.job.id)
            return
        super().record_failure(error)

    def _is_published(self) -> bool:
        try:
            return self.job.status() is Status.PUBLISHING and outcome(self.job) is Outcome.PUBLISHED
        except (PipelineError, OSError):
            logger.exception("whether job %s has published cannot be determined", self.job.id)
            return False

    def _finish(self, status: Status, ledger: Ledger) -> Report:
        report = self.make_report(status, ledger=ledger)
        return self.finish(report, reason=f"published; {report.rows.rejected:,} rows were rejected")

    def finish(self, report: Report, *, reason: str = "", error: PipelineError | None = None) -> Report:
        """See `JobRun.finish`. The page of a scheduler that outlives the job gets its last state."""
        super().finish(report, reason=reason, error=error)
        if self.live is not None and not cluster_of(self.job.plan.spec, settings=self.settings).owns_workers:
            self.live.end(Status(report.status), report.reason)
        return report

    def probe(self, partitions: Sequence[Partition]) -> None:
        """Score only ``partitions``, as far as they are pending; the job is PLANNED afterwards."""
        self.alias_monitor.is_paused = True
        self._read_receipts()
        requested = {partition.id for partition in partitions}
        pending = tuple(partition for partition in self._pending() if partition.id in requested)
        if pending:
            self.score_partitions(pending)
        self.set_status(Status.PLANNED, reason="probed")

    def make_report(
        self, status: Status, *, ledger: Ledger | None = None, error: PipelineError | None = None
    ) -> Report:
        """Return the report of a run that ends with ``status``; by default with the receipts read so far."""
        return super().make_report(status, ledger=self.ledger if ledger is None else ledger, error=error)

    def page_ledger(self) -> Ledger | None:
        """Return the ledger over the receipts read so far."""
        return self.ledger

    def _read_receipts(self) -> None:
        self.receipts = SpooledReceipts(self.job.receipts.each())

    def _pending(self) -> tuple[Partition, ...]:
        return dispatch_order(self.ledger.todo)

    def score_partitions(self, pending: Sequence[Partition]) -> None:
        """Connect to the cluster and score ``pending``, until all are done or a stop is requested."""
        plan = self.ledger.last.plan
        cluster = None if self.parent.cluster else cluster_of(plan.spec, settings=self.settings)
        self.budget.check()
        self._check_stop()
        self.set_provisioning(cluster)
        # Nothing runs yet, so a stop has nothing to wait for.
        with stop_checks(self._check_stop), self._client(plan) as client:
            self._check_stop()
            self.live = LiveJob(self.record_cluster(client) if cluster is not None else LivePage(client))
            self.set_status(Status.RUNNING, reason=f"workers are there; {partitions_left(len(pending))}")
            while pending and not self.stop.is_requested:
                pending = self.dispatch(client, pending)
        self._check_stop()

    def _check_stop(self) -> None:
        """Raise if a stop was requested and partitions remain."""
        # A changed alias is handled by the alias monitor.
        is_alias_change = self.stop.reason is StopReason.ALIAS_CHANGE
        if self.stop.is_requested and not is_alias_change and (pending := self._pending()):
            raise self.stop.error(self.job.id, left=len(pending))

    def dispatch(self, client: Any, pending: Sequence[Partition]) -> Sequence[Partition]:
        """Run ``pending`` on the cluster and collect the receipts.

        :returns: the partitions that remain after a bad input file was quarantined, or the job started over; else none.
        """
        self.task_set = TaskSet(
            self.job,
            self.ledger.last,
            self.settings.partition_timeout,
            self.device,
            self.device_memory,
            self.placement.smallest_gpu,
            lambda: self.parent.siblings * len(client.scheduler_info(n_workers=-1)["workers"]),
        )
        self.progress = RoundProgress(self.job, self.callbacks, epoch=self.lease.epoch)
        self.progress.start(notify_round_started(self.job, self.ledger, pending, callbacks=self.callbacks))
        if self.live is not None:
            self.live.start(self.job, self.ledger, self.progress.tally)
        try:
            with self.task_set.learned_batches(client):
                for receipt in self._dispatcher(client).run(pending):
                    self.receipts.add(receipt)
                    self.budget.add(self.job.root, receipt)
                    if self.lease.is_lost:
                        self.lease.check()
        except StepChanged as error:
            if self.alias_monitor.is_paused or not self.step_monitor.after_failure(error, self.ledger):
                raise
            return self._pending()
        except InputError as error:
            self.lease.check()
            # A probe opens no rounds.
            is_probe = self.alias_monitor.is_paused
            if is_probe or open_quarantine_round(self.job, self.ledger, error, epoch=self.lease.epoch) is None:
                raise
            return self._pending()
        finally:
            self.budget.ended(self.job.root)
            if self.live is not None:
                self.live.finish()
        return ()

    @contextmanager
    def _client(self, plan: Plan) -> Iterator[Any]:
        """Yield a client of the fan-out's cluster, or else of a new cluster for this job."""
        cluster, shared = cluster_of(plan.spec, settings=self.settings), self.parent.cluster
        flavors, options = plan.flavors or ("",), self._device_options(plan, cluster)
        has_steps = bool(plan.spec.maps)
        self.device_memory = getattr(cluster, "device_memory", DEVICE_MEMORY)
        if shared is not None:
            with shared.client() as client:
                for flavor in flavors:
                    reports = shared.shake_hands(flavor, device=options.device, has_steps=has_steps)
                    self._choose_device(client, options, reports)
                yield client
            return
        cluster.preload(has_steps=has_steps)
        with open_cluster(cluster, directory=self.job.root) as client, self.budget.metering(client):
            timeout = self.settings.scheduler_timeout
            for flavor in flavors:
                reports = shake_hands(
                    client, flavor=flavor, timeout=timeout, device=options.device, has_steps=has_steps
                )
                self._choose_device(client, options, reports)
            yield client

    def _device_options(self, plan: Plan, cluster: ClusterAdapter) -> DeviceOptions:
        """Return the devices that may evaluate the models. A probe measures the CPU.

        :raises NoDevice: when a GPU is requested, and the cluster is known to have none.
        """
        if self.alias_monitor.is_paused:
            return DeviceOptions("cpu", ("a probe scores on the CPU",), is_given=False)
        return options_on(cluster, requested_device(plan.spec, plan.score_models, settings=self.settings))

    def _choose_device(self, client: Any, options: DeviceOptions, reports: Reports) -> None:
        """Choose device and workers by the reports of the workers. Record it, if somebody asked or there is a GPU.

        :raises NoDevice: when GPUs are requested, and a worker has none that is usable.
        """
        options = options_with(reports, options)
        self.device = options.device
        workers = client.scheduler_info(n_workers=-1)["workers"].values() if self.device == "cuda" else ()
        self.placement = place(self.device, workers=workers, reports=reports)
        known = {address: report.to_dict() for address, report in reports.items() if report is not None}
        if options.is_given or any(report is not None and report.gpu for report in reports.values()):
            self.job.events.append("device", requested=options.requested, reasons=list(options.reasons), workers=known)

    def _dispatcher(self, client: Any) -> Dispatcher:
        settings = self.settings
        return Dispatcher(
            client,
            self.task_set,
            listener=self,
            policy=DispatchPolicy(
                attempts=settings.attempts,
                no_workers_timeout=settings.no_workers_timeout,
                scheduler_timeout=settings.scheduler_timeout,
                grace=settings.drain_timeout,
                partition_timeout=settings.partition_timeout,
                may_restart=self._may_restart_workers(),
            ),
            stragglers=self._straggler_policy(),
            stop=self.stop,
            shared_state=(
                self.parent.cluster.shared_state if self.parent.cluster else SharedClusterState(supply_of(client))
            ),
            placement=self.placement,
            job=self.job.id,
        )

    def _may_restart_workers(self) -> bool:
        allowed = self.settings.restart_workers
        if allowed is None:
            return cluster_of(self.job.plan.spec, settings=self.settings).owns_workers
        return allowed

    def _straggler_policy(self) -> StragglerPolicy | None:
        # On a cluster shared with other children, their idle workers look the same as those of this child.
        shared = self.parent.cluster
        is_enabled = self.settings.stragglers and (shared is None or shared.is_exclusive)
        # A second attempt at the same rows would pay a service twice.
        return StragglerPolicy(may_repeat=not self.has_service) if is_enabled else None

    # DispatchListener

    def attempt_finished(self, result: AttemptResult, /) -> None:
        """Adapt the batch size, and report the end of an attempt."""
        self.task_set.adapt_batch(result)
        event = notify_attempt_finished(self.job, result, round=self.task_set.round.number, callbacks=self.callbacks)
        self.progress.ended(event)
        if self.live is not None:
            self.live.ended(result)

    def advanced(self, running: Sequence[RunningPartition], /) -> None:
        """Report progress inside partitions, and store it for other processes."""
        self.budget.advanced(self.job.root, running)
        self.progress.advanced(running)
        if self.live is not None:
            if self.budget.is_active:
                self.live.spent(self.budget.use)
            self.live.send(running)

    def mitigation(self, mitigation: Mitigation, /) -> None:
        """Record an action against a straggler."""
        self.job.events.append("straggler", **asdict(mitigation))
        if self.live is not None:
            self.live.add_event({"event": "straggler", **asdict(mitigation)})

    def step_message(self, line: OutputLine, /, *, worker: str, partition: str) -> None:
        """Tell the first print or warning of a place in the code of a step."""
        event = StepMessage(self.job.id, partition, worker, line.step, line.kind, line.place, redact(line.text))
        notify(self.callbacks, event)
        if self.live is not None:
            self.live.add_message(event)

    def poll(self) -> None:
        """Check the alias of the model."""
        self.alias_monitor.poll(self.task_set.round)

    def _decide(self, ledger: Ledger) -> Status:
        """Return the final status, decided by the number of rejected rows.

        :raises PipelineError: if too many rows are rejected.
        """
        examples = first_examples(summarise(self.job, ledger=ledger)) if ledger.rows.rejected else None
        return decide_status(ledger, job=self.parent.root or self.job.id, examples=examples)


def notify_round_started(
    job: JobDirectory, ledger: Ledger, pending: Sequence[Partition], *, callbacks: Sequence[Callback]
) -> RoundStarted:
    """Report that the last round starts, or resumes, with ``pending``. Return the event."""
    partitions, round = ledger.partitions(ledger.last), ledger.last.number
    rows, rows_pending = (sum(partition.rows for partition in group) for group in (partitions, pending))
    done = len(partitions) - len(pending)
    job.events.append(
        "round_started", round=round, partitions=len(partitions), done=done, rows_done=rows - rows_pending
    )
    event = RoundStarted(job.id, round, len(partitions), done, rows, rows - rows_pending)
    notify(callbacks, event)
    return event


def notify_attempt_finished(
    job: JobDirectory, ended: AttemptResult, *, round: int, callbacks: Sequence[Callback]
) -> PartitionEnded:
    """Report that an attempt at a partition ended. Return the event."""
    receipt = ended.receipt
    event = PartitionEnded(
        job=job.id,
        round=round,
        partition=ended.partition.id,
        outcome=ended.outcome,
        rows=receipt.rows if receipt else RowCounts(),
        seconds=receipt.seconds.total if receipt else 0.0,
        attempt=ended.attempt,
        worker=receipt.worker if receipt else "",
        reason=redact(ended.reason),
        parts=len(receipt.splits) if receipt else 0,
        split_reason=ended.split_reason,
        messages=receipt.messages if receipt else (),
    )
    if ended.outcome is not AttemptOutcome.DONE:
        # A completed partition has a receipt: an event each would only cost an fsync.
        job.events.append(
            "partition",
            partition=event.partition,
            outcome=event.outcome,
            attempt=event.attempt,
            reason=event.reason,
            **({"split_reason": event.split_reason} if event.split_reason else {}),
        )
    notify(callbacks, event)
    return event
