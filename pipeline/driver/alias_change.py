"""Monitor the alias that a job's model reference names, and apply ``on_alias_change`` when it changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.driver.prepare import resolve_model
from pipeline.driver.restart import open_restart_round, replan
from pipeline.jobs import layout
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.record import check_job_id
from pipeline.jobs.rounds import Round, RoundReason
from pipeline.models.model import ModelVersion
from pipeline.models.registry.alias_watch import EVENT, MAX_RESTARTS, AliasChange, AliasWatch, unstable_alias_error
from pipeline.models.registry.records import VersionRecord
from pipeline.plan.plan import Plan
from pipeline.plan.step_code import code_difference
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.store import open_store

logger = logging.getLogger(__name__)


@dataclass
class AliasMonitor:
    """Monitor of the alias of one job's model, with the policy of its spec.

    The round of a retry keeps its version: its rows belong to an output that was scored with it. Once a manifest names
    a round, its alias is no longer checked.
    """

    job: JobDirectory
    lease: Lease
    settings: Settings
    stop: Stop
    is_paused: bool = False
    """True while a probe runs, whose results are not published."""

    @cached_property
    def _watch(self) -> AliasWatch:
        return AliasWatch(
            self.job.plan.spec.score.model, seconds=self.settings.alias_poll, cache=self.settings.directory
        )

    @cached_property
    def _recorded(self) -> set[tuple[str, str]]:
        """Changes that are recorded as events: pinned and found version."""
        events = (event for event in self.job.events.read() if event["event"] == EVENT)
        return {(str(event.get("pinned")), str(event.get("current"))) for event in events}

    def poll(self, round_: Round) -> None:
        """Check the alias, at most every ``alias_poll`` seconds. Request a stop unless the policy is ``pin``."""
        if self.is_paused or not self._is_monitored(round_) or self.stop.is_requested:
            return
        change = self._watch.poll(round_.plan.model)
        if change is None:
            return
        policy = self._policy(round_)
        if policy == "pin":
            self._record(change)
        else:
            # A job that rescores all rows has no use for the running partitions.
            self.stop.request(StopReason.ALIAS_CHANGE, message=change.description, now=policy == "restart")
            logger.warning("%s: no more partitions are started", change.description)

    def apply_policy(self, ledger: Ledger) -> None:
        """Check the alias now: before anything runs, after a stop, and right before the commit.

        Under the policy ``restart``, a changed alias opens a round that rescores all rows.

        :raises ModelChanged: under the policy ``fail``, and when a job has restarted too often.
        :raises PipelineError: under ``fail`` and ``restart``, when the registry fails and every partition is done.
        """
        self.stop.settle(StopReason.ALIAS_CHANGE)
        round_ = ledger.last
        if not self._is_monitored(round_) or self._is_committed(round_):
            return
        policy, pinned = self._policy(round_), round_.plan.model
        is_optional = policy == "pin" or bool(ledger.todo)
        change = self._watch.try_check(pinned) if is_optional else self._watch.check(pinned)
        if change is None:
            return
        if policy == "fail":
            raise change.error()
        if policy == "restart":
            self._open_restart_round(ledger, change)
        else:
            self._record(change)

    def _policy(self, round_: Round) -> str:
        return self.job.plan.spec.on_alias_change if round_.rescore_all else "pin"

    def _is_monitored(self, round_: Round) -> bool:
        return bool(ModelRef(round_.plan.spec.score.model).alias) and bool(round_.plan.model.registry)

    def _is_committed(self, round_: Round) -> bool:
        last = self.job.manifests.last()
        return last is not None and last.round == round_.number

    def _open_restart_round(self, ledger: Ledger, change: AliasChange) -> None:
        rounds = self.job.rounds.all()
        if sum(round_.reason is RoundReason.ALIAS_CHANGE for round_ in rounds) >= MAX_RESTARTS:
            raise unstable_alias_error(change)
        plan = self._replan(ledger)
        code = code_difference(ledger.last.plan.code, plan.code)
        changes = (f"{change.reference}: version {change.pinned} -> {plan.model.version}", *code)
        open_restart_round(self.job, self.lease, plan, reason=RoundReason.ALIAS_CHANGE, changes=changes)
        logger.warning("%s: rescoring all rows with version %s", change.description, plan.model.version)

    def _replan(self, ledger: Ledger) -> Plan:
        """Return the plan of all rows of the files that count, with the version that the alias names now."""
        last = ledger.last.plan
        settings = replace(self.settings, registry=last.model.registry)
        version = resolve_model(last.spec.score.model, settings=settings)
        return replan(self.job, ledger, version=version, settings=settings)

    def _record(self, change: AliasChange) -> None:
        """Record a change that the job ignores, as one event."""
        if (change.pinned, change.current) not in self._recorded:
            self._recorded.add((change.pinned, change.current))
            self.job.events.append(EVENT, reference=change.reference, pinned=change.pinned, current=change.current)
            logger.warning("%s; the job keeps version %s", change.description, change.pinned)


def find_outdated(jobs: Sequence[JobDirectory], *, settings: Settings) -> list[JobDirectory]:
    """Return the jobs whose alias moved, and whose policy is not to keep their version. Resolve each alias once.

    :raises PipelineError: when a registry fails.
    """
    watches: dict[tuple[str, str], AliasWatch] = {}
    resolved: dict[tuple[str, str], VersionRecord] = {}
    outdated = []
    for job in jobs:
        plan, policy = job.rounds.all()[-1].plan, job.plan.spec.on_alias_change
        reference, registry = plan.spec.score.model, plan.model.registry
        if policy == "pin" or not registry or not ModelRef(reference).alias:
            continue
        key = reference, registry
        watch = watches.setdefault(key, AliasWatch(reference, seconds=0.0, cache=settings.directory))
        if key not in resolved:
            resolved[key] = watch.resolve(plan.model)
        if watch.compare(plan.model, resolved[key]) is not None:
            outdated.append(job)
    return outdated


def pinned_version(spec: JobSpec, *, job: str | None, settings: Settings) -> ModelVersion | None:
    """Return the model version pinned by an existing job of this id, if the job names the same alias; else None.

    The driver of the job checks if the alias has changed since then.
    """
    reference = spec.score.model
    if job is None or not ModelRef(reference).alias:
        return None
    store = open_store(f"{settings.directory}/{check_job_id(job)}", private=True, fsync=settings.fsync)
    if not store.exists(layout.JOB_FILE):
        return None
    plan = JobDirectory.open(store.root, store=store).plan
    return plan.model if plan.spec.score.model == reference else None
