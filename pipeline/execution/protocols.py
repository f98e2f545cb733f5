"""Protocols between a dispatcher and a job, and the values passed through these protocols."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.common.step_output import OutputLine
from pipeline.events import AttemptOutcome, MitigationAction, RunningPartition, SplitReason
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition


@dataclass(frozen=True)
class AttemptResult:
    """End of an attempt."""

    partition: Partition
    attempt: int
    outcome: AttemptOutcome
    receipt: Receipt | None = None
    reason: str = ""
    split_reason: SplitReason | None = None
    """Reason of the split; None: the partition was not split, or an earlier driver had split it."""


@dataclass(frozen=True)
class SplitResult:
    """A recorded split."""

    receipt: Receipt
    """Valid receipt of the partition; without ``splits`` if the partition was done before the split."""
    parts: tuple[Partition, ...] = ()
    """Partitions that replace the split partition."""
    first: Receipt | None = None
    """Receipt of the first part, if the attempt that split the partition has already done this part."""


@dataclass(frozen=True)
class Mitigation:
    """Start or end of an action against a straggler."""

    partition: str
    action: MitigationAction
    worker: str
    """Worker on which the partition was slow; empty: the partition had not started."""
    seconds: float
    """Seconds the partition had taken when the mitigation started."""
    remaining: float
    """Seconds the partition would still have taken without the mitigation, estimated."""
    split_reason: SplitReason | None = None
    is_over: bool = False
    won: bool = False
    """True if the mitigation ended first and saved time. Set at the end only."""
    seconds_won: float = 0.0
    """Seconds saved, against ``remaining``."""


class TaskSource(Protocol):
    """The partitions of a job as tasks."""

    def submit(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return one `dask.delayed` per partition, with a new key each time."""

    def submit_isolated(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return one `dask.delayed` per partition, each scored in a process of its own."""

    def split(self, partition: Partition, receipt: Receipt | None, /, *, parts: int = 2) -> SplitResult | None:
        """Replace a partition by ``parts`` parts and record the split; return None if the partition is too small.

        :param receipt: receipt of a split that is already recorded; None: record a new split.
        """

    def read(self, result: Any, /) -> Receipt:
        """Return the receipt in the result of a task."""


class DispatchListener(Protocol):
    """Observer of a dispatcher, called from the thread that runs it."""

    def attempt_finished(self, result: AttemptResult, /) -> None:
        """Handle the end of an attempt."""

    def mitigation(self, mitigation: Mitigation, /) -> None:
        """Handle the start or the end of an action against a straggler."""

    def advanced(self, running: Sequence[RunningPartition], /) -> None:
        """Handle progress inside the partitions that run; called at most once a second."""

    def step_message(self, line: OutputLine, /, *, worker: str, partition: str) -> None:
        """Handle the first print or warning of a place in the code of a step."""

    def poll(self) -> None:
        """Run each time the dispatcher polls the cluster. A slow call delays new partitions."""
