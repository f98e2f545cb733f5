"""Protocols by which a dispatcher is wired to a job, and the values that pass through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pipeline.events import AttemptOutcome, MitigationAction, SplitReason
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended."""

    partition: Partition
    attempt: int
    outcome: AttemptOutcome
    receipt: Receipt | None = None
    reason: str = ""
    split_reason: SplitReason | None = None
    """Why the partition was split; None: it was not, or an earlier driver had split it."""


@dataclass(frozen=True)
class SplitResult:
    """A split on record."""

    receipt: Receipt
    """Receipt that counts; without ``splits`` when the partition was done meanwhile."""
    parts: tuple[Partition, ...] = ()
    """Partitions that take its place."""
    first: Receipt | None = None
    """Receipt of the first part, when the attempt that split the partition has done that part already."""


@dataclass(frozen=True)
class Mitigation:
    """Start or end of an action against a straggler."""

    partition: str
    action: MitigationAction
    worker: str
    """Worker on which the partition was slow; empty: it had not started."""
    seconds: float
    """Seconds the partition had taken by then."""
    remaining: float
    """Seconds it would still have taken, estimated."""
    split_reason: SplitReason | None = None
    is_over: bool = False
    won: bool = False
    """Whether the mitigation ended first. Only when it is over."""
    seconds_won: float = 0.0
    """Seconds saved, against ``remaining``."""


class TaskSource(Protocol):
    """The partitions of a job as tasks."""

    @property
    def round_folder(self) -> str:
        """Folder of the round: workers know their attempts by it."""

    def submit(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return one `dask.delayed` per partition, with a new key each time."""

    def submit_isolated(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return one `dask.delayed` per partition, each scored in a process of its own."""

    def split(self, partition: Partition, receipt: Receipt | None, /, *, parts: int = 2) -> SplitResult | None:
        """Replace a partition by ``parts`` others, on record; None when it is too small.

        :param receipt: receipt of the partition that says that it is split already.
        """

    def read(self, result: Any, /) -> Receipt:
        """Return the receipt in the result of a task."""


class DispatchListener(Protocol):
    """Observer of a dispatcher, called from the thread that runs it."""

    def attempt_finished(self, result: AttemptResult, /) -> None:
        """Handle the end of an attempt."""

    def mitigation(self, mitigation: Mitigation, /) -> None:
        """Handle the start or the end of an action against a straggler."""

    def poll(self) -> None:
        """Run whenever the dispatcher polls the cluster. A slow call delays new partitions."""
