"""Drive a job of several stages: run each as a job of its own on one cluster, then commit and publish the last one.

A stage is planned when the stage before it is sealed, from the files that its manifest names, so its partitions are of
about equal size whatever the stage before has made of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

from pipeline.driver.alias_change import AliasMonitor
from pipeline.driver.budget import BudgetMonitor
from pipeline.driver.job_run import JobRun, ParentContext, RunChild
from pipeline.driver.outcome import Outcome, outcome
from pipeline.driver.round_progress import RoundProgress
from pipeline.driver.stage_plan import open_upstream_round, plan_next_stage
from pipeline.errors import PipelineError
from pipeline.events import Callback, PartitionEnded, ProgressMade, RoundStarted, StepMessage, notify
from pipeline.execution.clusters import cluster_of, open_cluster
from pipeline.execution.clusters.client import SharedCluster
from pipeline.jobs.cancellation import Stop
from pipeline.jobs.stages import (
    SealedStage,
    commit_stages,
    create_stage,
    find_stage,
    folder_name,
    sealed_stage,
)
from pipeline.jobs.status import Status
from pipeline.plan.outline import Stage, outline
from pipeline.report.distributions import sketches_of
from pipeline.report.gate import check_gate
from pipeline.report.report import Report
from pipeline.report.stages import decide_stages
from pipeline.sinks import publish

logger = logging.getLogger(__name__)


@dataclass
class ChainDriver(JobRun):
    """Driver of a job of several stages."""

    parent: ParentContext
    run_child: RunChild
    _cluster: SharedCluster | None = field(default=None, init=False)

    @cached_property
    def budget(self) -> BudgetMonitor:
        """Spending of the whole job."""
        return self.parent.budget or BudgetMonitor.open(self.job, epoch=self.lease.epoch, stop=self.stop)

    @property
    def stop(self) -> Stop:
        """The request to stop this run."""
        return self.parent.stop

    def drive(self) -> Report:
        """Run the stages that are not sealed, commit, publish.

        :raises PipelineError: when a stage failed. The stages before it stay sealed.
        """
        sealed: list[SealedStage] = []
        with ExitStack() as stack:
            for stage in outline(self.job.plan.spec):
                sealed.append(self._seal(stage, sealed[-1] if sealed else None, stack))
        status = decide_stages(sealed)
        if self.stop.is_cancel:
            raise self.stop.error(self.job.id, left=0)
        self._check_aliases()
        if not self.parent.publishes:
            return self.finish(self.make_report(Status.SCORED))
        status = self._check_gate(status, sealed)
        self.set_status(Status.PUBLISHING, reason="every stage is sealed")
        self.lease.check()
        manifest = commit_stages(self.job, sealed)
        self.lease.check()
        publish(manifest, self.job, check_lease=self.lease.check)
        self.job.events.append("published", manifest=manifest.number, rows=manifest.rows.output)
        return self.finish(self.make_report(status), reason=f"published; {manifest.rows.rejected:,} rows were rejected")

    def _check_gate(self, status: Status, sealed: Sequence[SealedStage]) -> Status:
        """Return the final status after the publish gate; see `pipeline.driver.driver.Driver`.

        :raises GateFailed: if the output does not pass it.
        """
        last = self.job.manifests.last()
        is_committed = last is not None and last.inputs == tuple(stage.input for stage in sealed)
        if self.job.plan.spec.gate is None or self.parent.is_scored or is_committed:
            return status
        result = check_gate(self.job, sketches_of(self.job), rows=sealed[-1].manifest.rows.output)
        return Status.SUCCEEDED_WITH_WARNINGS if result and result.failed else status

    def _seal(self, stage: Stage, before: SealedStage | None, stack: ExitStack) -> SealedStage:
        """Return a stage with all its rows done: run what is left of it."""
        name = folder_name(stage, before.digest_for(stage) if before else "")
        directory = find_stage(self.job, name)
        if directory is not None and (done := sealed_stage(directory, before)) is not None:
            return done
        # Until here nothing of the stage ran, so a stop has nothing to wait for.
        self.budget.check()
        if self.stop.is_requested:
            raise self.stop.error(self.job.id, left=len(directory.ledger().todo) if directory else 1)
        if directory is None:
            # A retry of the stage before may have changed the code of the steps.
            code = before.job.ledger().last.plan.code if before else self.job.plan.code
            plan = plan_next_stage(replace(self.job.plan, code=code), stage, before, settings=self.settings)
            directory = create_stage(self.job, name, plan)
        elif before is not None and stage.kind == "narrow":
            open_upstream_round(directory, self.job.plan, stage, before, settings=self.settings)
        self.lease.check()
        if directory.ledger().todo:
            self._open_cluster(stack)
        if self.job.status() is not Status.RUNNING:
            self.set_status(Status.RUNNING, reason=f"stage {name}")
        self.job.events.append("stage", stage=name, partitions=directory.record.partitions, rows=directory.record.rows)
        context = replace(
            self.parent, budget=self.budget, cluster=self._cluster, publishes=False, seals=True, root=self.job.id
        )
        progress = RoundProgress(self.job, self.callbacks, epoch=self.lease.epoch)
        events = _StageEvents(self.job.id, name, self.callbacks, progress)
        self.run_child(directory, settings=self.settings, callbacks=(events,), parent=context)
        done = sealed_stage(directory, before)
        assert done is not None  # its driver has committed, or raised
        return done

    def _open_cluster(self, stack: ExitStack) -> None:
        """Open the cluster of the job for this and later stages, unless a fan-out shares its own."""
        self._cluster = self._cluster or self.parent.cluster
        if self._cluster is not None:
            return
        cluster = cluster_of(self.job.plan.spec, settings=self.settings)
        self.set_provisioning(cluster)
        cluster.preload(has_steps=bool(self.job.plan.spec.maps))
        client = stack.enter_context(open_cluster(cluster, directory=self.job.root))
        stack.enter_context(self.budget.metering(client))
        self.record_cluster(client)
        self._cluster = SharedCluster(client, timeout=self.settings.scheduler_timeout, is_exclusive=True)

    def _check_aliases(self) -> None:
        """Apply the policy of the spec if an alias has moved since the job was planned, right before the commit."""
        AliasMonitor(self.job, self.lease, self.settings, self.stop).apply_policy(self.job.ledger(()))

    def record_failure(self, error: BaseException) -> None:
        """Record why the run failed, unless the output is published: a resume then records the success."""
        try:
            is_published = self.job.status() is Status.PUBLISHING and outcome(self.job) is Outcome.PUBLISHED
        except (PipelineError, OSError):
            logger.exception("whether job %s has published cannot be determined", self.job.id)
            is_published = False
        if is_published:
            logger.error("job %s has published its output, but its end could not be recorded: resume it", self.job.id)
            return
        super().record_failure(error)


class _StageEvents(Callback):
    """A callback that forwards events of a stage to the callbacks of its job, with partitions named by the stage."""

    def __init__(self, job: str, stage: str, callbacks: Sequence[Callback], progress: RoundProgress) -> None:
        self._job = job
        self._stage = stage
        self._callbacks = callbacks
        self._progress = progress

    def on_round(self, event: RoundStarted) -> None:
        """Forward the start of a round."""
        named = replace(event, job=self._job)
        notify(self._callbacks, named)
        self._progress.start(named)

    def on_partition(self, event: PartitionEnded) -> None:
        """Forward the end of an attempt."""
        named = replace(event, job=self._job, partition=f"{self._stage}/{event.partition}")
        notify(self._callbacks, named)
        self._progress.ended(named)

    def on_message(self, event: StepMessage) -> None:
        """Forward a print or warning of a step."""
        notify(self._callbacks, replace(event, job=self._job, partition=f"{self._stage}/{event.partition}"))

    def on_progress(self, event: ProgressMade) -> None:
        """Forward the progress inside partitions."""
        self._progress.advanced(replace(part, partition=f"{self._stage}/{part.partition}") for part in event.running)
