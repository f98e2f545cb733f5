"""What a dispatcher runs for a job: its partitions as tasks, split on record, with the batch size learned so far.

How many rows a batch had at last, remembered for a model version on a class of workers, across jobs.

One small file for each pair, beside the job directories. It is a cache: it may be deleted at any time, of several
drivers that write it the last one wins, and what cannot be read or written is passed over.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.errors import PipelineError
from pipeline.execution.attempts import AttemptResult, SplitResult
from pipeline.execution.rebalancing import Mitigation, StragglerMitigator
from pipeline.execution.tasks import make_tasks
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.layout import receipt_path
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.rounds import Round
from pipeline.jobs.splits import MIN_SPLIT_ROWS, even_cuts, parts_of, split_receipt
from pipeline.models.model import ModelVersion
from pipeline.plan.memory import MemoryBatchLimit
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.isolation import Isolation
from pipeline.scoring.partition import round_folder
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name

ISOLATED_SECONDS = 600.0
"""Seconds for all rows of an isolated partition where there is no ``partition_timeout``."""


@dataclass
class TaskSet:
    """The partitions of one round of a job."""

    job: JobDirectory
    round: Round
    partition_timeout: float | None = None
    """Seconds a partition may take."""
    batch: MemoryBatchLimit = field(init=False)

    def __post_init__(self) -> None:
        self._recipe = self.job.recipe_of(self.round)
        self.batch = MemoryBatchLimit(self._recipe.batch_rows, self._recipe.batch_rows)

    @contextmanager
    def batches_on(self, client: Any) -> Iterator[None]:
        """Inside the block batches begin with the size that fitted workers like the client's last time, and what is
        learned there is remembered on leaving."""
        model, root = self.round.plan.model, open_store(self.job.root.rstrip("/").rpartition("/")[0], fsync=False)
        workers = WorkerClass.of(client.scheduler_info(n_workers=-1)["workers"].values())
        remembered = load_batch_size(root, model, workers)
        self.batch = MemoryBatchLimit(min(self.batch.planned, remembered or self.batch.planned), self.batch.planned)
        if remembered is not None:
            self.job.append_event("batch", planned=self.batch.planned, remembered=remembered)
        try:
            yield
        finally:
            if self.batch.rows != (remembered or self.batch.planned):
                save_batch_size(root, model, workers, rows=self.batch.rows, job=self.job.job)

    @property
    def recipe(self) -> StageRecipe:
        """What the next partitions are done with."""
        return replace(self._recipe, batch_rows=self.batch.rows)

    def submit(self, partitions: Sequence[Partition]) -> list[Any]:
        """One task each, with a key of its own each time."""
        return make_tasks(self.recipe, partitions, self.round.plan.versions)

    def isolate(self, partitions: Sequence[Partition]) -> list[Any]:
        """One task each, which scores in a process of its own."""
        isolation = Isolation(seconds=self.partition_timeout or ISOLATED_SECONDS)
        return make_tasks(self.recipe, partitions, self.round.plan.versions, isolation=isolation)

    def split(self, partition: Partition, receipt: Receipt | None, *, parts: int = 2) -> SplitResult | None:
        """Put ``parts`` of nearly equal size in the place of ``partition``, on record before anything of them runs.

        :param receipt: that of ``partition``, when it was split already: by another driver, or by an attempt that was
            asked to stop and leave the rest.
        :returns: None when it has too few rows.
        """
        cuts = even_cuts(0, partition.rows, parts=parts, smallest=max(1, MIN_SPLIT_ROWS // 2))
        if receipt is None and (partition.rows <= MIN_SPLIT_ROWS or not cuts):
            return None
        receipt = receipt or put_split(self.job, self.round, partition, cuts)
        if not receipt.splits:
            return SplitResult(receipt)
        found = parts_of(partition, receipt, {file.path: file for file in self.round.plan.files})
        first = read_receipt(self.job, self.round, found[0].id)
        return SplitResult(receipt, found, first if first and not first.splits else None)

    def relief(self, client: Any, *, on_mitigation: Callable[[Mitigation], None]) -> StragglerMitigator:
        """Help for its stragglers."""
        return StragglerMitigator(client, round_folder=round_folder(self.recipe), on_mitigation=on_mitigation)

    def learn(self, ended: AttemptResult) -> None:
        """Lower or raise the batch size by how an attempt ended."""
        if ended.outcome == "split":
            self.batch = self.batch.after_split()
        elif ended.receipt is not None and ended.receipt.batch_rows:
            self.batch = self.batch.after_partition(ended.receipt.batch_rows)


def put_split(job: JobDirectory, of: Round, partition: Partition, cuts: Sequence[int]) -> Receipt:
    """Record that ``partition`` is cut before the rows ``cuts``, unless it has a receipt: the one that counts."""
    made = split_receipt(
        partition.id, cuts, plan=of.digest, model=of.plan.model.digest, attempt=unique_name(), round=of.number
    )
    if job.store.put_if_absent(receipt_path(of.number, partition.id), made.to_json()):
        return made
    return read_receipt(job, of, partition.id) or made


def read_receipt(job: JobDirectory, of: Round, partition: str) -> Receipt | None:
    """The receipt of a partition of a round; None while it has none."""
    path = receipt_path(of.number, partition)
    try:
        return Receipt.from_json(job.store.read(path), where=job.store.url(path))
    except FileNotFoundError:
        return None


logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class WorkerClass:
    """Workers on which the same batches fit."""

    memory: int
    """Bytes a worker may use; 0: no limit."""
    threads: int
    """Tasks that run beside each other in one."""

    @staticmethod
    def of(workers: Iterable[Mapping[str, Any]]) -> WorkerClass:
        """The class of a cluster: that of its poorest worker.

        :param workers: as the scheduler describes them.
        """
        found = list(workers)
        limits = [int(one["memory_limit"] or 0) for one in found]
        return WorkerClass(
            memory=min((limit for limit in limits if limit), default=0),
            threads=max((int(one["nthreads"]) for one in found), default=1),
        )


def file_name(model: ModelVersion, workers: WorkerClass) -> str:
    """Where the size for that pair is kept, in the root of the job directories."""
    return f".batch-rows-{model.digest[:16]}-{workers.memory >> 20}MiB-{workers.threads}.json"


def load_batch_size(store: Store, model: ModelVersion, workers: WorkerClass) -> int | None:
    """Rows that fitted last time; None when that is not known.

    :param store: root of the job directories.
    """
    try:
        record = json.loads(store.read(file_name(model, workers)))
        rows = int(record["batch_rows"])
        known = record["schema_version"] == SCHEMA_VERSION and record["model"]["digest"] == model.digest
    except (OSError, PipelineError, ValueError, KeyError, TypeError):
        return None
    return rows if known and rows > 0 else None


def save_batch_size(store: Store, model: ModelVersion, workers: WorkerClass, *, rows: int, job: str) -> None:
    """Keep ``rows`` for the next job.

    :param job: id of the job that found out; for people.
    """
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": model.name, "version": model.version, "digest": model.digest},
        "workers": asdict(workers),
        "batch_rows": rows,
        "job": job,
    }
    try:
        store.replace(file_name(model, workers), json.dumps(record, indent=1).encode() + b"\n")
    except (OSError, PipelineError):
        logger.warning("the batch size of %s could not be remembered", model.name, exc_info=True)
