"""The seven events of a job, and the `Callback` that observers derive from.

The loop that runs a job knows none of its observers. The error of an observer is logged and ignored: watching a job
must not fail the job.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pipeline.common.rows import RowCounts
from pipeline.common.step_output import WARNING, MessageCount

logger = logging.getLogger(__name__)


class AttemptOutcome(StrEnum):
    """Outcome of an attempt at a partition."""

    DONE = "done"
    RETRY = "retry"
    SPLIT = "split"
    FAILED = "failed"


class SplitReason(StrEnum):
    """Why a partition was split."""

    MEMORY = "memory"
    """The partition took too much memory."""
    SLOW = "slow"
    """The worker of the partition was slow: idle workers do the rest."""
    IDLE_WORKERS = "idle_workers"
    """Workers were idle: they and the worker of the partition do the rest."""
    HANDED_ON = "handed_on"
    """The worker or the driver had to end: the partition committed what was done, and others do the rest."""
    FROZEN = "frozen"
    """The worker did not answer, or made no progress: idle workers do the whole partition."""


class MitigationAction(StrEnum):
    """Action against a straggler."""

    BACKUP = "backup"
    SPLIT = "split"
    REASSIGN = "reassign"
    """The partition had not started: another worker got the partition."""


@dataclass(frozen=True)
class StatusChanged:
    """A change of the job's status."""

    job: str
    before: str
    after: str
    reason: str = ""


@dataclass(frozen=True)
class ClusterReady:
    """The workers of the job are connected."""

    job: str
    workers: int
    threads: int
    """Threads of all workers: partitions that run at a time."""
    dashboard: str = ""
    """URL of the scheduler's dashboard; empty without one."""


@dataclass(frozen=True)
class RoundStarted:
    """The start of a round, or its continuation after a resume."""

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
class RunningPartition:
    """An attempt at a partition that runs now."""

    partition: str
    worker: str
    """Address of the worker."""
    rows: int
    """Input rows of the partition."""
    rows_done: int
    """Input rows of the attempt's finished batches."""
    seconds: float
    """Seconds since the attempt started."""
    quiet_seconds: float
    """Seconds since the driver last heard of a finished batch, or since the start."""
    cost: float = 0.0
    """Cost of the answers of services in its finished batches."""


@dataclass(frozen=True)
class ProgressMade:
    """The progress of a round, inside its partitions too; at most one event a second."""

    job: str
    round: int
    rows: int
    """Input rows of the round."""
    rows_done: int
    """Input rows of completed partitions, and of finished batches of running ones. Less than before after an attempt
    was lost."""
    partitions: int
    done: int
    """Completed partitions."""
    running: tuple[RunningPartition, ...] = ()
    """Partitions that run now, the longest first."""


@dataclass(frozen=True)
class PartitionEnded:
    """The end of an attempt at a partition."""

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
    """Reason why the partition was not done."""
    parts: int = 0
    """Number of parts that replace the partition, if the attempt split the partition."""
    split_reason: SplitReason | None = None
    """Reason of the split; None without a split, or if an earlier driver made the split."""
    messages: tuple[MessageCount, ...] = ()
    """Prints and warnings of steps and models in a completed attempt, by their place in the code."""


@dataclass(frozen=True)
class StepMessage:
    """The first print or warning of a place in the code of steps and models. Later ones are only counted."""

    job: str
    partition: str
    worker: str
    """Address of the worker."""
    step: str
    """Entrypoint of the step or name of the model; empty while code is imported."""
    kind: str
    """``print`` or ``warning``."""
    place: str
    """File and line, such as ``features.py:9``."""
    message: str

    @property
    def line(self) -> str:
        """The message in one line."""
        return message_line(self.step, self.kind, self.place, self.message)


@dataclass(frozen=True)
class JobEnded:
    """The end of the job, with a final status."""

    job: str
    status: str
    rows: RowCounts
    output: str
    directory: str
    reason: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    """The report, as ``report.json`` holds it."""


Event = StatusChanged | ClusterReady | RoundStarted | ProgressMade | PartitionEnded | StepMessage | JobEnded


def message_line(step: str, kind: str, place: str, message: str) -> str:
    """Return a print or warning in one line: ``features:build prints (features.py:9): 3 rows``."""
    who = step or "a step"
    # The text of a warning begins with its place.
    return f"{who} warns: {message}" if kind == WARNING else f"{who} prints ({place}): {message}"


class Callback:
    """Base class of observers: override methods of interest. Methods are called on the driver, one at a time."""

    def on_status(self, event: StatusChanged) -> None:
        """Handle a change of the status."""

    def on_cluster(self, event: ClusterReady) -> None:
        """Handle the connection of the workers."""

    def on_round(self, event: RoundStarted) -> None:
        """Handle the start of a round."""

    def on_progress(self, event: ProgressMade) -> None:
        """Handle progress inside partitions."""

    def on_partition(self, event: PartitionEnded) -> None:
        """Handle the end of an attempt."""

    def on_message(self, event: StepMessage) -> None:
        """Handle the first print or warning of a place in the code of a step."""

    def on_end(self, event: JobEnded) -> None:
        """Handle the end of the job."""


def notify(callbacks: Sequence[Callback], event: Event) -> None:
    """Call every callback with ``event``."""
    method = {
        StatusChanged: "on_status",
        ClusterReady: "on_cluster",
        RoundStarted: "on_round",
        ProgressMade: "on_progress",
        PartitionEnded: "on_partition",
        StepMessage: "on_message",
        JobEnded: "on_end",
    }[type(event)]
    for callback in callbacks:
        try:
            getattr(callback, method)(event)
        except Exception:
            logger.exception("callback %s failed at %s; the job continues", type(callback).__name__, method)
