"""The partitions of a round as tasks, and the batch size learned from them.

The last batch size of a model version on a class of workers is saved across jobs: one small file for each pair, beside
the job directories. These files are a cache and may be deleted at any time. If several drivers write the same file, the
last write wins. Read and write errors are ignored.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from pipeline.devices.inventory import Gpu
from pipeline.devices.memory import DEVICE_MEMORY
from pipeline.errors import PipelineError
from pipeline.events import AttemptOutcome, SplitReason
from pipeline.execution.protocols import AttemptResult, SplitResult
from pipeline.execution.tasks import decode_receipt, make_tasks
from pipeline.jobs.directory import JobDirectory
from pipeline.jobs.receipts import Receipt
from pipeline.jobs.rounds import Round
from pipeline.jobs.splits import MIN_SPLIT_ROWS, even_split_points, parts_of, split_receipt
from pipeline.models.model import ModelVersion
from pipeline.plan.memory import MemoryBatchLimit
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.isolation import Isolation
from pipeline.spec.model_ref import Device
from pipeline.storage.store import Store, open_store
from pipeline.storage.urls import unique_name

logger = logging.getLogger(__name__)
SCHEMA_VERSION = 1
SERVICE_SECONDS = 24 * 3600.0
"""The same where a service scores, which may put requests off for long."""
ISOLATED_SECONDS = 600.0
"""Seconds for all rows of an isolated partition without ``partition_timeout``."""


@dataclass
class TaskSet:
    """The partitions of one round of a job: a `pipeline.execution.protocols.TaskSource`."""

    job: JobDirectory
    round: Round
    partition_timeout: float | None = None
    """Seconds an attempt may execute; None: no limit."""
    device: Device = "cpu"
    """Device that workers use for partitions that are not isolated."""
    device_memory: float | int | str = DEVICE_MEMORY
    """Share of a GPU's free memory that batches may use, or a size."""
    gpu: Gpu | None = None
    """The smallest GPU of the workers, for which batch sizes are remembered."""
    sharers: Callable[[], int] = lambda: 1
    """Return the worker processes that share the limits of a service now."""
    batch: MemoryBatchLimit = field(init=False)
    """Batch size of partitions that CPUs score."""
    device_batch: MemoryBatchLimit = field(init=False)
    """Batch size of partitions that GPUs score."""

    def __post_init__(self) -> None:
        recipe = self.job.recipe_of(self.round)
        self._recipe = replace(recipe, device=self.device, device_memory=self.device_memory)
        self.batch = MemoryBatchLimit(recipe.batch_rows, recipe.batch_rows)
        device_rows = recipe.device_batch_rows or recipe.batch_rows
        self.device_batch = MemoryBatchLimit(device_rows, device_rows)

    @contextmanager
    def learned_batches(self, client: Any) -> Iterator[None]:
        """Start batches with the size saved for workers like the client's. After the block, save the last size."""
        models = self.round.plan.models
        if len(models) != 1:  # sizes are remembered by model
            yield
            return
        model, root = models[0], open_store(self.job.root.rstrip("/").rpartition("/")[0], fsync=False)
        workers = WorkerClass.from_scheduler(client.scheduler_info(n_workers=-1)["workers"].values())
        saved = load_batch_size(root, model, workers)
        self.batch = self.batch.remembering(saved)
        on_gpu = workers.with_gpu(self.gpu) if self.gpu is not None else None
        saved_on_gpu = load_batch_size(root, model, on_gpu) if on_gpu else None
        self.device_batch = self.device_batch.remembering(saved_on_gpu)
        for limit, rows in ((self.batch, saved), (self.device_batch, saved_on_gpu)):
            if rows is not None:
                self.job.events.append("batch", planned=limit.planned, remembered=rows)
        try:
            yield
        finally:
            if self.batch.rows != (saved or self.batch.planned):
                save_batch_size(root, model, workers, rows=self.batch.rows, job=self.job.id)
            if on_gpu and self.device_batch.rows != (saved_on_gpu or self.device_batch.planned):
                save_batch_size(root, model, on_gpu, rows=self.device_batch.rows, job=self.job.id)

    @property
    def recipe(self) -> StageRecipe:
        """Recipe for the next partitions, with the current batch size."""
        most_bytes = self._recipe.batch_bytes * self.batch.rows // self.batch.planned
        device_rows = 0 if self.device == "cpu" else self.device_batch.rows
        return replace(
            self._recipe,
            batch_rows=self.batch.rows,
            batch_bytes=most_bytes,
            device_batch_rows=device_rows,
            service_share=1.0 / max(1, self.sharers()),
        )

    def submit(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return one task per partition, with a new key each time.

        Workers with and without GPUs take them from one queue: nothing waits at a slow worker while a fast one is idle.
        """
        return make_tasks(self.recipe, partitions, self.round.plan.versions, is_queued=self.device == "auto")

    def submit_isolated(self, partitions: Sequence[Partition], /) -> list[Any]:
        """Return one task per partition, which scores in a process of its own, on the CPU."""
        usual = SERVICE_SECONDS if self._recipe.service_rows else ISOLATED_SECONDS
        isolation = Isolation(seconds=self.partition_timeout or usual)
        recipe = replace(self.recipe, device="cpu")
        return make_tasks(recipe, partitions, self.round.plan.versions, isolation=isolation)

    def read(self, result: Any, /) -> Receipt:
        """Return the receipt in the result of a task."""
        return decode_receipt(result)

    def split(self, partition: Partition, receipt: Receipt | None, /, *, parts: int = 2) -> SplitResult | None:
        """Replace a partition by ``parts`` parts of nearly equal size. Record the split before any part runs.

        :param receipt: receipt of a split that another driver or the attempt has recorded; None: record a new split.
        :returns: None if the partition has too few rows.
        """
        split_points = even_split_points(0, partition.rows, parts=parts, smallest=max(1, MIN_SPLIT_ROWS // 2))
        if receipt is None and (partition.rows <= MIN_SPLIT_ROWS or not split_points):
            return None
        receipt = receipt or put_split(self.job, self.round, partition, split_points)
        if not receipt.splits:
            return SplitResult(receipt)
        split_parts = parts_of(partition, receipt, {file.path: file for file in self.round.plan.files})
        first = self.job.receipts.find(self.round.number, split_parts[0].id)
        return SplitResult(receipt, split_parts, first if first and not first.splits else None)

    def adapt_batch(self, result: AttemptResult) -> None:
        """Lower or raise the batch size after an attempt."""
        is_split = result.outcome is AttemptOutcome.SPLIT
        receipt = result.receipt
        if is_split and result.split_reason in (None, SplitReason.MEMORY):
            self.batch, self.device_batch = self.batch.after_split(), self.device_batch.after_split()
        elif receipt is not None and receipt.batch_rows and receipt.device:
            self.device_batch = self.device_batch.after_partition(receipt.batch_rows)
        elif receipt is not None and receipt.batch_rows:
            self.batch = self.batch.after_partition(receipt.batch_rows)


def put_split(job: JobDirectory, round_: Round, partition: Partition, split_points: Sequence[int]) -> Receipt:
    """Record a split before the rows ``split_points``. Return the receipt that counts: an earlier one, if any."""
    receipt = split_receipt(
        partition.id,
        split_points,
        plan=round_.digest,
        model=round_.plan.model_digest,
        attempt=unique_name(),
        round=round_.number,
    )
    return job.receipts.put(receipt)


@dataclass(frozen=True)
class WorkerClass:
    """Class of workers on which the same batches fit."""

    memory: int
    """Bytes a worker may use; 0: no limit."""
    threads: int
    """Threads of a worker."""
    gpu: str = ""
    """Name of its GPU; empty: the batches are those that CPUs score."""
    gpu_memory: int = 0
    """Bytes of device memory."""

    def with_gpu(self, gpu: Gpu) -> WorkerClass:
        """Return the class of workers like these that have a GPU like ``gpu``."""
        return replace(self, gpu=gpu.name, gpu_memory=gpu.memory)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON; those of a GPU only if there is one."""
        return {name: value for name, value in asdict(self).items() if value or not name.startswith("gpu")}

    @staticmethod
    def from_scheduler(workers: Iterable[Mapping[str, Any]]) -> WorkerClass:
        """Return the class with the least memory and the most threads of all workers.

        :param workers: descriptions of the workers from the scheduler.
        """
        listed = list(workers)
        limits = [int(worker["memory_limit"] or 0) for worker in listed]
        return WorkerClass(
            memory=min((limit for limit in limits if limit), default=0),
            threads=max((int(worker["nthreads"]) for worker in listed), default=1),
        )


def file_name(model: ModelVersion, workers: WorkerClass) -> str:
    """Return the name of the file for a model and a class of workers, in the root of the job directories."""
    gpu = re.sub(r"[^A-Za-z0-9]+", "-", workers.gpu).strip("-")
    on_gpu = f"-{gpu}-{workers.gpu_memory >> 20}MiB" if gpu else ""
    return f".batch-rows-{model.digest[:16]}-{workers.memory >> 20}MiB-{workers.threads}{on_gpu}.json"


def load_batch_size(store: Store, model: ModelVersion, workers: WorkerClass) -> int | None:
    """Return the saved batch size in rows; None if no size is saved.

    :param store: root of the job directories.
    """
    try:
        record = json.loads(store.read(file_name(model, workers)))
        rows = int(record["batch_rows"])
        is_valid = record["schema_version"] == SCHEMA_VERSION and record["model"]["digest"] == model.digest
    except (OSError, PipelineError, ValueError, KeyError, TypeError):
        return None
    return rows if is_valid and rows > 0 else None


def save_batch_size(store: Store, model: ModelVersion, workers: WorkerClass, *, rows: int, job: str) -> None:
    """Save ``rows`` for the next job.

    :param job: id of the job that learned the size; informative.
    """
    record = {
        "schema_version": SCHEMA_VERSION,
        "model": {"name": model.name, "version": model.version, "digest": model.digest},
        "workers": workers.to_dict(),
        "batch_rows": rows,
        "job": job,
    }
    try:
        store.replace(file_name(model, workers), json.dumps(record, indent=1).encode() + b"\n")
    except (OSError, PipelineError):
        logger.warning("could not save the batch size of %s", model.name, exc_info=True)
