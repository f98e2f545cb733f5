"""What observers and ``events.jsonl`` hear of a round that runs."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.common.rows import RowCounts
from pipeline.common.secrets import redact
from pipeline.events import Callback, PartitionEnded, StageStarted, notify
from pipeline.execution.attempts import Ended
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.ledger import Ledger
from pipeline.plan.plan import Partition


def tell_start(job: JobDirectory, ledger: Ledger, todo: Sequence[Partition], *, callbacks: Sequence[Callback]) -> None:
    """The last round begins, or goes on, with ``todo``."""
    partitions, stage = ledger.partitions(ledger.last), ledger.last.number
    left, rows = sum(partition.rows for partition in todo), sum(partition.rows for partition in partitions)
    done = len(partitions) - len(todo)
    job.append_event("stage", stage=stage, partitions=len(partitions), done=done)
    notify(callbacks, StageStarted(job.job, stage, len(partitions), done, rows, rows - left))


def tell_end(job: JobDirectory, ended: Ended, *, stage: int, callbacks: Sequence[Callback]) -> None:
    """An attempt at a partition ended."""
    receipt = ended.receipt
    event = PartitionEnded(
        job=job.job,
        stage=stage,
        partition=ended.partition.id,
        outcome=ended.outcome,
        rows=receipt.rows if receipt else RowCounts(),
        seconds=receipt.seconds.total if receipt else 0.0,
        attempt=ended.attempt,
        worker=receipt.worker if receipt else "",
        reason=redact(ended.reason),
        parts=len(receipt.splits) if receipt else 0,
    )
    if ended.outcome != "done":
        # What is done has a receipt; a line each would only cost an fsync.
        job.append_event(
            "partition",
            partition=event.partition,
            outcome=event.outcome,
            attempt=event.attempt,
            reason=event.reason,
        )
    notify(callbacks, event)
