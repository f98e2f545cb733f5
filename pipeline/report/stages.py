"""Results of the stages of a job, and of all of them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipeline.common.rows import RowCounts
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.jobs.receipts import Totals
from pipeline.jobs.stages import SealedStage, StageState, chain_rows, stage_states
from pipeline.jobs.status import Status
from pipeline.report.figures import StageReport


@dataclass(frozen=True)
class StageResult:
    """A stage with its receipts."""

    state: StageState
    job: JobDirectory
    ledger: Ledger

    def report(self) -> StageReport:
        """Return the figures of the stage."""
        totals, rows = self.ledger.totals, self.ledger.rows
        return StageReport(
            stage=self.state.name,
            steps=self.state.stage.slug,
            status="sealed" if self.state.sealed else str(self.job.status()),
            rows=rows,
            done=len(self.ledger.done),
            planned=self.ledger.planned,
            seconds=round(totals.seconds.total, 3),
            bytes=totals.output_bytes,
        )


@dataclass(frozen=True)
class ChainResult:
    """All stages of a job that were planned so far."""

    stages: tuple[StageResult, ...]
    planned: int
    """Partitions of the stages that are planned, and the estimated ones of the others."""

    @staticmethod
    def of(job: JobDirectory) -> ChainResult:
        """Read the receipts of all stages of a job."""
        stages = tuple(
            StageResult(state, state.job, state.job.ledger()) for state in stage_states(job) if state.job is not None
        )
        planned = sum(stage.ledger.planned for stage in stages)
        return ChainResult(stages, planned + sum(stage.partitions for stage in job.plan.stages[len(stages) :]))

    @cached_property
    def rows(self) -> RowCounts:
        """Rows into the first stage, and out of the last one; none are out before that is planned."""
        return chain_rows([stage.ledger.rows for stage in self.stages]) if self.stages else RowCounts()

    @cached_property
    def totals(self) -> Totals:
        """Sums over the receipts of all stages."""
        return Totals.of(receipt for stage in self.stages for receipt in stage.ledger.done)

    @property
    def reasons(self) -> dict[str, int]:
        """Number of rows that are still rejected, per reason, most frequent first."""
        counts: dict[str, int] = {}
        for stage in self.stages:
            for reason, count in stage.ledger.reasons.items():
                counts[reason] = counts.get(reason, 0) + count
        return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))

    @property
    def done(self) -> int:
        """Number of partitions that are done."""
        return sum(len(stage.ledger.done) for stage in self.stages)

    def reports(self) -> tuple[StageReport, ...]:
        """Return the figures of each stage that was planned."""
        return tuple(stage.report() for stage in self.stages)

    def events(self, job: JobDirectory) -> list[dict[str, Any]]:
        """Return the events of the job and of its stages, in the order of their times."""
        found = [event for part in (job, *(stage.job for stage in self.stages)) for event in part.events.read()]
        return sorted(found, key=lambda event: str(event.get("time")))


def decide_stages(stages: Iterable[SealedStage]) -> Status:
    """Return the status of a job whose stages are all sealed, which each was only within the limits of ``errors``."""
    manifests = [stage.manifest for stage in stages]
    has_warnings = any(manifest.rows.rejected or manifest.quarantined_files for manifest in manifests)
    return Status.SUCCEEDED_WITH_WARNINGS if has_warnings else Status.SUCCEEDED
