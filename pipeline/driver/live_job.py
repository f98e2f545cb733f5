"""Keep the figures of a running job for the page on the dashboard."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.events import AttemptOutcome, RunningPartition, StepMessage
from pipeline.execution.dashboard_page import LivePage
from pipeline.execution.protocols import AttemptResult
from pipeline.jobs.budget import BudgetUse
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.status import Status
from pipeline.report.live_figures import LiveFigures
from pipeline.report.progress import Tally


@dataclass
class LiveJob:
    """The figures of a job, and the page that shows them. No error of either reaches the job."""

    page: LivePage
    _figures: LiveFigures | None = None
    _tally: Tally = field(default_factory=Tally)

    def start(self, job: JobDirectory, ledger: Ledger, tally: Tally) -> None:
        """Start with the receipts so far, and show the job.

        :param tally: rate of the round, kept up to date by its owner.
        """
        self._tally = tally

        def count() -> None:
            self._figures = LiveFigures.of(job, ledger, job.events.read())
            self._figures.started = time.time()

        self.page.guard(count)
        self.send(())

    def spent(self, use: BudgetUse) -> None:
        """Show what is spent of the budget."""
        if self._figures is not None:
            self._figures.budget = use

    def ended(self, result: AttemptResult) -> None:
        """Count the end of an attempt."""
        receipt = result.receipt
        if result.outcome is AttemptOutcome.DONE:
            if receipt is not None:
                self._count(lambda figures: figures.add(receipt))
            return
        event = {"outcome": result.outcome, "reason": result.reason, "split_reason": result.split_reason}
        self.add_event({"event": "partition", **event})
        if result.outcome is AttemptOutcome.SPLIT and receipt is not None:
            self._count(lambda figures: figures.add_parts(len(receipt.splits)))

    def add_event(self, event: Mapping[str, Any]) -> None:
        """Count an event of the job."""
        self._count(lambda figures: figures.add_event(event))

    def add_message(self, message: StepMessage) -> None:
        """Show a print or warning before its partition has ended."""
        self._count(lambda figures: figures.add_message(message))

    def _count(self, add: Callable[[LiveFigures], None]) -> None:
        figures = self._figures
        if figures is not None:
            self.page.guard(lambda: add(figures))

    def send(self, running: Sequence[RunningPartition]) -> None:
        """Send the figures to the scheduler, in the background."""
        self.page.send(lambda: self._to_dict(running, Status.RUNNING))

    def finish(self) -> None:
        """Send the figures of the end of the work on the cluster. A run that failed does not wait for the scheduler."""
        figures = self._figures
        is_done = figures is not None and figures.done >= figures.planned
        status = Status.PUBLISHING if is_done else Status.INTERRUPTED
        self.page.send(lambda: self._to_dict((), status), waits=is_done)

    def end(self, status: Status, reason: str) -> None:
        """Send the figures of the job's end to a scheduler that stays, such as one of the user's own."""
        self.page.send_last(lambda: self._last(status, reason))

    def _last(self, status: Status, reason: str) -> Mapping[str, Any]:
        figures, now = self._figures, time.time()
        if figures is None:
            raise RuntimeError("the receipts could not be counted")
        figures.status, figures.reason = str(status), "" if status.is_success else reason
        seconds = now - figures.started
        rate = figures.rows_done / seconds if seconds > 0 else 0.0
        return figures.to_dict(now=now, rows_done=figures.rows_done, rate=rate, left=None, is_running=False)

    def _to_dict(self, running: Sequence[RunningPartition], status: Status) -> Mapping[str, Any]:
        if self._figures is None:
            raise RuntimeError("the receipts could not be counted")
        self._figures.status = str(status)
        now = time.monotonic()
        return self._figures.to_dict(
            now=time.time(),
            rows_done=self._figures.rows_done + sum(part.rows_done for part in running),
            rate=self._tally.rate(now),
            left=self._tally.remaining(now),
            running=running,
            is_running=status is Status.RUNNING,
        )
