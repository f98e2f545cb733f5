"""Compare the code of a job's steps with the plan, and apply ``step_change`` when the code changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from pipeline.common.code_search import find_code
from pipeline.common.step_code import StepCode, changed_modules, code_difference, step_changed
from pipeline.common.travel import changed_since, shown_name
from pipeline.driver.restart import open_restart_round, replan
from pipeline.errors import StepChanged
from pipeline.jobs.code_archive import remember_packed
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.lease import Lease
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.rounds import STEP_EVENT, Round, RoundReason
from pipeline.settings import Settings

logger = logging.getLogger(__name__)
MAX_RESTARTS = 5
"""Maximum of restarts of a job after changes of its code; one more change fails the job."""


@dataclass
class StepMonitor:
    """Monitor of the code of one job's steps, with the policy of its spec.

    The code is compared when a driver starts, and when a worker finds other code. Work that is done never mixes with
    that of other code, unless a retry asks for it.
    """

    job: JobDirectory
    lease: Lease
    settings: Settings

    def apply_policy(self, ledger: Ledger) -> None:
        """Compare the code now. Under the policy ``restart``, changed code opens a round that scores all rows again.

        :raises StepChanged: under the policy ``fail``, if rows are left to score; and when a job restarted too often.
        """
        round_ = ledger.last
        changed = self._changed(round_)
        if ledger.todo:
            self._tell_of_redefinitions(round_)
        policy = self._policy(round_)
        if not changed or self._is_committed(round_):
            return
        if policy == "restart":
            self._restart(ledger, changed)
        elif policy == "pin":
            self._record(changed)
        elif ledger.todo:
            raise self._error(changed)

    def _tell_of_redefinitions(self, round_: Round) -> None:
        """Log which functions that travel by value are defined differently by now: the job keeps the stored ones."""
        for step in round_.plan.code:
            if difference := changed_since(step.module):
                logger.warning(
                    "%s since job %s was planned; the job goes on with the function that it keeps",
                    difference,
                    self.job.id,
                )

    def after_failure(self, error: StepChanged, ledger: Ledger) -> bool:
        """Return True if the job continues after a worker found other code: a new round scores all rows again.

        :raises StepChanged: when a job restarted too often.
        """
        changed = self._changed(ledger.last)
        if self._policy(ledger.last) != "restart" or not changed:
            return False
        self._restart(ledger, changed)
        return True

    def is_outdated(self, ledger: Ledger) -> bool:
        """Return True if the job would start over with other code, once a driver runs it."""
        return self._policy(ledger.last) == "restart" and bool(self._changed(ledger.last))

    def _policy(self, round_: Round) -> str:
        # Rows of a retry belong to an output of other rounds: they cannot start over alone.
        policy = self.job.plan.spec.step_change
        return "fail" if policy == "restart" and not round_.rescore_all else policy

    def _is_committed(self, round_: Round) -> bool:
        last = self.job.manifests.last()
        return last is not None and last.round == round_.number

    def _changed(self, round_: Round) -> list[tuple[StepCode, StepCode]]:
        """Return the planned and the present code of each step that changed."""
        planned = round_.plan.code
        if not planned:
            return []
        remember_packed(self.job.root, round_.plan)
        paths = self.job.record.import_paths or self.settings.import_paths
        actual = {step.module: step for step in find_code([step.module for step in planned], import_paths=paths).steps}
        return [(step, actual[step.module]) for step in planned if step.digest != actual[step.module].digest]

    def _error(self, changed: list[tuple[StepCode, StepCode]], *, expected: str = "") -> StepChanged:
        planned, actual = changed[0]
        return step_changed(changed_modules(planned, actual), step=planned.module, job=self.job.id, expected=expected)

    def _restart(self, ledger: Ledger, changed: list[tuple[StepCode, StepCode]]) -> None:
        if sum(round_.reason is RoundReason.STEP_CHANGE for round_ in self.job.rounds.all()) >= MAX_RESTARTS:
            raise self._error(changed, expected=f"code that stays as it is, after {MAX_RESTARTS} restarts")
        plan = replan(self.job, ledger, pins=ledger.last.plan.pins, settings=self.settings)
        changes = code_difference(ledger.last.plan.code, plan.code)
        open_restart_round(self.job, self.lease, plan, reason=RoundReason.STEP_CHANGE, changes=changes)
        logger.warning("%s: rescoring all rows with the new code", "; ".join(changes))

    def _record(self, changed: list[tuple[StepCode, StepCode]]) -> None:
        """Record a change that the job ignores, as an event."""
        for planned, actual in changed:
            self.job.events.append(STEP_EVENT, step=planned.module, planned=planned.digest, found=actual.digest)
            logger.warning(
                "the code of step %s changed; the job keeps the code it was planned with", shown_name(planned.module)
            )
