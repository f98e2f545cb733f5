"""The four events of a job, and the `Callback` that observers derive from.

The loop that runs a job knows none of its observers. An observer that raises is logged and left out, because watching
a job must not end it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pipeline.common.rows import RowCounts

logger = logging.getLogger(__name__)


class AttemptOutcome(StrEnum):
    """How an attempt at a partition ended."""

    DONE = "done"
    RETRY = "retry"
    SPLIT = "split"
    FAILED = "failed"


class SplitReason(StrEnum):
    """Why a partition was split."""

    MEMORY = "memory"
    """It took too much memory."""
    SLOW = "slow"
    """Its worker was slow: idle workers do the rest."""
    IDLE_WORKERS = "idle_workers"
    """Workers were idle: they and its own worker do the rest."""
    FROZEN = "frozen"
    """Its worker did not answer, or made no progress: idle workers do all of it."""


class MitigationAction(StrEnum):
    """What was done about a straggler."""

    BACKUP = "backup"
    SPLIT = "split"
    REASSIGN = "reassign"
    """It had not started: another worker got it."""


@dataclass(frozen=True)
class StatusChanged:
    """The job moved from one status to the next."""

    job: str
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True)
class RoundStarted:
    """A round begins, or goes on after a resume."""

    job: str
    round: int
    partitions: int
    """Partitions of the round."""
    done: int
    """Partitions that have a receipt already."""
    rows: int
    """Input rows of the round."""
    rows_done: int
    """Input rows of the partitions that are done."""


@dataclass(frozen=True)
class PartitionEnded:
    """An attempt at a partition ended."""

    job: str
    round: int
    partition: str
    outcome: AttemptOutcome
    rows: RowCounts = field(default_factory=RowCounts)
    seconds: float = 0.0
    """Wall time of the attempt on its worker."""
    attempt: int = 1
    worker: str = ""
    reason: str = ""
    """Why it was not done."""
    parts: int = 0
    """Partitions that took its place, when it was split."""
    split_reason: SplitReason | None = None
    """Why it was split; None: it was not, or an earlier driver had split it."""


@dataclass(frozen=True)
class JobEnded:
    """The job reached a final status."""

    job: str
    status: str
    rows: RowCounts
    output: str
    directory: str
    reason: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    """The report, as ``report.json`` holds it."""


Event = StatusChanged | RoundStarted | PartitionEnded | JobEnded


class Callback:
    """Derive from this and override what is of interest. Methods are called on the driver, one at a time."""

    def on_status(self, event: StatusChanged) -> None:
        """The status changed."""

    def on_round(self, event: RoundStarted) -> None:
        """A round begins."""

    def on_partition(self, event: PartitionEnded) -> None:
        """An attempt ended."""

    def on_end(self, event: JobEnded) -> None:
        """The job is over."""


def notify(callbacks: Sequence[Callback], event: Event) -> None:
    """Hand ``event`` to every callback."""
    method = {
        StatusChanged: "on_status",
        RoundStarted: "on_round",
        PartitionEnded: "on_partition",
        JobEnded: "on_end",
    }[type(event)]
    for callback in callbacks:
        try:
            getattr(callback, method)(event)
        except Exception:
            logger.exception("callback %s failed at %s; the job goes on", type(callback).__name__, method)
