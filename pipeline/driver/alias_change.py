"""What a driver does about the alias of its model: looks where it points, and acts when it has moved."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property

from pipeline.common.units import iso_time, utc_now
from pipeline.driver.prepare import check_output, draft, resolve_model
from pipeline.jobs import layout
from pipeline.jobs.cancellation import Stop, StopReason
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.record import check_job_id
from pipeline.jobs.rounds import ALIAS_CHANGE, Round, make_record
from pipeline.models.model import ModelVersion
from pipeline.models.registry.alias_watch import EVENT, MAX_RESTARTS, AliasChange, AliasWatch, unstable_alias_error
from pipeline.plan.plan import Plan
from pipeline.settings import Settings
from pipeline.spec.job_spec import JobSpec
from pipeline.spec.model_ref import ModelRef
from pipeline.storage.store import open_store

logger = logging.getLogger(__name__)


@dataclass
class AliasMonitor:
    """Follows the alias of one job's model, by the policy of its spec.

    A round that mends an earlier one (a retry) keeps its version whatever the alias does: it is part of an output that
    was scored with it. Once a manifest names the round, nothing is followed any more: the decision is made.
    """

    job: JobDirectory
    lease: Lease
    settings: Settings
    stop: Stop
    is_paused: bool = False
    """While a sample is scored, which nothing is published of."""

    @cached_property
    def _watch(self) -> AliasWatch:
        return AliasWatch(
            self.job.plan.spec.score.model, seconds=self.settings.alias_poll, cache=self.settings.directory
        )

    @cached_property
    def _noted(self) -> set[tuple[str, str]]:
        """Moves that are on record."""
        events = (event for event in self.job.events() if event["event"] == EVENT)
        return {(str(event.get("pinned")), str(event.get("found"))) for event in events}

    def poll(self, working: Round) -> None:
        """Look, when it is time to, while partitions run; ask to stop when they should not."""
        if self.is_paused or not self._is_followed(working) or self.stop.is_requested:
            return
        move = self._watch.poll(working.plan.model)
        if move is None:
            return
        policy = self._policy(working)
        if policy == "pin":
            self._note(move)
        else:
            # What still runs is of no use to a job that starts over.
            self.stop.request(StopReason.ALIAS_CHANGE, reason=move.said, now=policy == "restart")
            logger.warning("%s: no more partitions are started", move.said)

    def follow(self, ledger: Ledger) -> None:
        """Look now: before anything runs, after a stop, and right before the commit. Opens a round to start over.

        :raises ModelChanged: under the policy ``fail``, and when a job has started over too often.
        :raises PipelineError: under ``fail`` and ``restart``, when the registry cannot say and all the work is done.
        """
        self.stop.settle(StopReason.ALIAS_CHANGE)
        working = ledger.last
        if not self._is_followed(working) or self._is_committed(working):
            return
        policy, pinned = self._policy(working), working.plan.model
        may_not_know = policy == "pin" or bool(ledger.todo)
        move = self._watch.try_look(pinned) if may_not_know else self._watch.look(pinned)
        if move is None:
            return
        if policy == "fail":
            raise move.error()
        if policy == "restart":
            self._start_over(ledger, move)
        else:
            self._note(move)

    def _policy(self, working: Round) -> str:
        return self.job.plan.spec.on_alias_change if working.starts_over else "pin"

    def _is_followed(self, working: Round) -> bool:
        return bool(ModelRef(working.plan.spec.score.model).alias) and bool(working.plan.model.registry)

    def _is_committed(self, working: Round) -> bool:
        last = self.job.manifest()
        return last is not None and last.round == working.number

    def _start_over(self, ledger: Ledger, move: AliasChange) -> None:
        rounds = self.job.rounds()
        if sum(one.why == ALIAS_CHANGE for one in rounds) >= MAX_RESTARTS:
            raise unstable_alias_error(move)
        plan = self._plan_again(ledger)
        record = make_record(
            plan,
            number=rounds[-1].number + 1,
            why=ALIAS_CHANGE,
            epoch=self.lease.epoch,
            created=iso_time(utc_now()),
            takes={},
            changes=(f"{move.reference}: version {move.pinned} -> {plan.model.version}",),
            starts_over=True,
        )
        self.lease.check()
        self.job.open_round(record, plan)
        logger.warning("%s: starting over with version %s", move.said, plan.model.version)

    def _plan_again(self, ledger: Ledger) -> Plan:
        """The plan of all the work, of the very files that count, with the version that the alias points to now."""
        working = ledger.last.plan
        settings = replace(
            self.settings,
            registry=working.model.registry,
            import_paths=self.job.record.import_paths or self.settings.import_paths,
        )
        version = resolve_model(working.spec.score.model, settings=settings)
        drafted = draft(working.spec, settings=settings, version=version, planned=tuple(ledger.files.values()))
        check_output(drafted.plan, settings=settings, job=self.job.job)
        return replace(drafted.plan, rejected_files=ledger.rejected_files)

    def _note(self, move: AliasChange) -> None:
        """Put a move on record that the job goes on in spite of; once."""
        if (move.pinned, move.found) not in self._noted:
            self._noted.add((move.pinned, move.found))
            self.job.append_event(EVENT, reference=move.reference, pinned=move.pinned, found=move.found)
            logger.warning("%s; the job goes on with version %s", move.said, move.pinned)


def pinned_version(spec: JobSpec, *, job: str | None, settings: Settings) -> ModelVersion | None:
    """The model version that a job of that id has pinned, when it exists and names the same alias: whether the alias
    has moved since is for its driver to find out. Else None."""
    reference = spec.score.model
    if job is None or not ModelRef(reference).alias:
        return None
    store = open_store(f"{settings.directory}/{check_job_id(job)}", private=True, fsync=settings.fsync)
    if not store.exists(layout.JOB_FILE):
        return None
    plan = JobDirectory.open(store.root, store=store).plan
    return plan.model if plan.spec.score.model == reference else None
