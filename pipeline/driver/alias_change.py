"""Monitor the aliases that a job's model references name, and apply ``on_alias_change`` when one changes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.common.step_code import code_difference
from pipeline.driver.restart import open_restart_round, replan
from pipeline.driver.score_models import resolve_model
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
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.store import open_store

logger = logging.getLogger(__name__)


@dataclass
class AliasMonitor:
    """Monitor of the aliases of one job's models, with the policy of its spec.

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
    def _watches(self) -> dict[str, AliasWatch]:
        """Watch of each reference with an alias."""
        return {
            reference: AliasWatch(reference, seconds=self.settings.alias_poll, cache=self.settings.directory)
            for reference in aliases(self.job.plan)
        }

    @cached_property
    def _recorded(self) -> set[tuple[str, str, str]]:
        """Changes that are recorded as events: reference, pinned and found version."""
        events = (event for event in self.job.events.read() if event["event"] == EVENT)
        return {(str(event.get("reference")), str(event.get("pinned")), str(event.get("current"))) for event in events}

    def poll(self, round_: Round) -> None:
        """Check the aliases, at most every ``alias_poll`` seconds. Request a stop unless the policy is ``pin``."""
        if self.is_paused:
            return
        for watch, pinned in self._monitored(round_):
            change = None if self.stop.is_requested else watch.poll(pinned)
            if change is None:
                continue
            policy = self._policy(round_)
            if policy == "pin":
                self._record(change)
            else:
                # A job that rescores all rows has no use for the running partitions.
                self.stop.request(StopReason.ALIAS_CHANGE, message=change.description, now=policy == "restart")
                logger.warning("%s: no more partitions are started", change.description)

    def apply_policy(self, ledger: Ledger) -> None:
        """Check the aliases now: before anything runs, after a stop, and right before the commit.

        Under the policy ``restart``, a changed alias opens a round that rescores all rows.

        :raises ModelChanged: under the policy ``fail``, and when a job has restarted too often.
        :raises PipelineError: under ``fail`` and ``restart``, when the registry fails and every partition is done.
        """
        self.stop.settle(StopReason.ALIAS_CHANGE)
        round_ = ledger.last
        monitored = self._monitored(round_)
        if not monitored or self._is_committed(round_):
            return
        policy = self._policy(round_)
        is_optional = policy == "pin" or bool(ledger.todo)
        found = [watch.try_check(pinned) if is_optional else watch.check(pinned) for watch, pinned in monitored]
        changes = [change for change in found if change is not None]
        if changes and policy == "fail":
            raise changes[0].error()
        if changes and policy == "restart":
            self._open_restart_round(ledger, changes)
            return
        for change in changes:
            self._record(change)

    def _policy(self, round_: Round) -> str:
        return self.job.plan.spec.on_alias_change if round_.rescore_all else "pin"

    def _monitored(self, round_: Round) -> list[tuple[AliasWatch, ModelVersion]]:
        """Return the watch of each alias of a round, with the version that the round pins."""
        pinned = aliases(round_.plan)
        return [(watch, pinned[reference]) for reference, watch in self._watches.items() if reference in pinned]

    def _is_committed(self, round_: Round) -> bool:
        last = self.job.manifests.last()
        return last is not None and last.round == round_.number

    def _open_restart_round(self, ledger: Ledger, changes: Sequence[AliasChange]) -> None:
        rounds = self.job.rounds.all()
        if sum(round_.reason is RoundReason.ALIAS_CHANGE for round_ in rounds) >= MAX_RESTARTS:
            raise unstable_alias_error(changes[0])
        plan = self._replan(ledger)
        code = code_difference(ledger.last.plan.code, plan.code)
        moved = [(change, plan.pins[change.reference].version) for change in changes]
        texts = (*(f"{change.reference}: version {change.pinned} -> {version}" for change, version in moved), *code)
        open_restart_round(self.job, self.lease, plan, reason=RoundReason.ALIAS_CHANGE, changes=texts)
        for change, version in moved:
            logger.warning("%s: rescoring all rows with version %s", change.description, version)

    def _replan(self, ledger: Ledger) -> Plan:
        """Return the plan of all rows of the files that count, with the versions that the aliases name now."""
        pins = dict(ledger.last.plan.pins)
        for reference, version in aliases(ledger.last.plan).items():
            pins[reference] = resolve_model(reference, settings=replace(self.settings, registry=version.registry))
        return replan(self.job, ledger, pins=pins, settings=self.settings)

    def _record(self, change: AliasChange) -> None:
        """Record a change that the job ignores, as one event."""
        key = change.reference, change.pinned, change.current
        if key not in self._recorded:
            self._recorded.add(key)
            self.job.events.append(EVENT, reference=change.reference, pinned=change.pinned, current=change.current)
            logger.warning("%s; the job keeps version %s", change.description, change.pinned)


def aliases(plan: Plan) -> dict[str, ModelVersion]:
    """Return the pinned version of each model reference with an alias."""
    return {
        reference: version for reference, version in plan.pins.items() if version.registry and ModelRef(reference).alias
    }


def find_outdated(jobs: Sequence[JobDirectory], *, settings: Settings) -> list[JobDirectory]:
    """Return the jobs of which an alias moved, and whose policy is not to keep their version. Resolve each alias once.

    :raises PipelineError: when a registry fails.
    """
    watches: dict[tuple[str, str], AliasWatch] = {}
    resolved: dict[tuple[str, str], VersionRecord] = {}
    outdated = []
    for job in jobs:
        plan, policy = job.rounds.all()[-1].plan, job.plan.spec.on_alias_change
        is_outdated = False
        for reference, pinned in aliases(plan).items() if policy != "pin" else ():
            key = reference, pinned.registry
            watch = watches.setdefault(key, AliasWatch(reference, seconds=0.0, cache=settings.directory))
            if key not in resolved:
                resolved[key] = watch.resolve(pinned)
            is_outdated = is_outdated or watch.compare(pinned, resolved[key]) is not None
        if is_outdated:
            outdated.append(job)
    return outdated


def pinned_versions(spec: JobSpec, *, job: str | None, settings: Settings) -> dict[str, ModelVersion]:
    """Return the model versions pinned by an existing job of this id, for the aliases that ``spec`` names too.

    The driver of the job checks if an alias has changed since then.
    """
    references = {reference for reference in spec.references if ModelRef(reference).alias}
    if job is None or not references:
        return {}
    store = open_store(f"{settings.directory}/{check_job_id(job)}", private=True, fsync=settings.fsync)
    if not store.exists(layout.JOB_FILE):
        return {}
    pins = JobDirectory.open(store.root, store=store).plan.pins
    return {reference: pins[reference] for reference in references if reference in pins}
