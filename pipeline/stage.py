"""What a dispatcher runs for a job: its partitions as tasks, split on record, with the batch size learned so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline import graph
from pipeline.checkpoint import JobDirectory
from pipeline.dispatch import Divided, Ended
from pipeline.files import unique_name
from pipeline.isolation import Isolation
from pipeline.memory import BatchSize
from pipeline.plan import Partition
from pipeline.receipt import Receipt
from pipeline.recipe import StageRecipe
from pipeline.splits import SPLIT_FLOOR_ROWS, halves, split_receipt

STAGE = 0
"""Number of the only stage."""
ISOLATED_SECONDS = 600.0
"""Seconds for all rows of an isolated partition where there is no ``partition_timeout``."""


@dataclass
class Stage:
    """The partitions of one job."""

    job: JobDirectory
    partition_timeout: float | None = None
    """Seconds a partition may take."""
    batch: BatchSize = field(init=False)

    def __post_init__(self) -> None:
        self.batch = BatchSize(self.job.recipe.batch_rows, self.job.recipe.batch_rows)

    @property
    def recipe(self) -> StageRecipe:
        """What the next partitions are done with."""
        return replace(self.job.recipe, batch_rows=self.batch.rows)

    def submit(self, partitions: Sequence[Partition]) -> list[Any]:
        """One task each."""
        return graph.tasks(self.recipe, partitions, self.job.plan.versions)

    def isolate(self, partitions: Sequence[Partition]) -> list[Any]:
        """One task each, which scores in a process of its own."""
        isolation = Isolation(seconds=self.partition_timeout or ISOLATED_SECONDS)
        return graph.tasks(self.recipe, partitions, self.job.plan.versions, isolation=isolation)

    def split(self, partition: Partition, receipt: Receipt | None) -> Divided | None:
        """Put two halves in the place of ``partition``, on record before anything of them runs.

        :param receipt: that of ``partition``, when another driver has split it already.
        :returns: None when it has too few rows.
        """
        pair = halves(partition, {file.path: file for file in self.job.plan.files})
        if pair is None or (receipt is None and partition.rows <= SPLIT_FLOOR_ROWS):
            return None
        receipt = receipt or put_split(self.job, partition, pair)
        return Divided(receipt, pair if receipt.splits else ())

    def learn(self, ended: Ended) -> None:
        """Lower or raise the batch size by how an attempt ended."""
        if ended.outcome == "split":
            self.batch = self.batch.after_split()
        elif ended.receipt is not None and ended.receipt.batch_rows:
            self.batch = self.batch.after_partition(ended.receipt.batch_rows)


def put_split(job: JobDirectory, partition: Partition, pair: tuple[Partition, Partition]) -> Receipt:
    """Record that ``pair`` takes the place of ``partition``, unless it has a receipt: the one that counts."""
    place = f"stages/{STAGE}/receipts/{partition.id}.json"
    made = split_receipt(partition, pair, plan=job.record.plan, model=job.plan.model.digest, attempt=unique_name())
    if job.store.put_if_absent(place, made.to_json()):
        return made
    return Receipt.from_json(job.store.read(place), where=job.store.url(place))
