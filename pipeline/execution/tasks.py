"""The tasks of a job, and the functions that a worker runs for a partition.

`pipeline.execution.graph` and `pipeline.execution.fragment_frames` are modules of their own so that workers, scheduler
and driver import ``dask.dataframe`` and pandas only for what needs them: they take longer than all other imports.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from dask._task_spec import Task
from dask.delayed import Delayed
from distributed.metrics import context_meter

from pipeline.common.secrets import redact_error
from pipeline.errors import DeviceLost, PipelineError
from pipeline.execution.device_loss import leave_after_loss, prepare_process, without_lost_device
from pipeline.execution.step_messages import TASK_PREFIX, install, message_forwarder
from pipeline.execution.worker_events import announce_start, memory_limit, progress_reporter
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.isolation import Isolation
from pipeline.scoring.partition import score_partition
from pipeline.storage.urls import unique_name

Versions = dict[str, tuple[int, str]]
"""Planned size in bytes and version of each input file, by path."""

ISOLATED_SHARE = 0.8
"""Share of the worker's memory limit for the process of an isolated partition, which is alone on its worker."""


def make_tasks(
    recipe: StageRecipe,
    partitions: Sequence[Partition],
    versions: Versions,
    *,
    isolation: Isolation | None = None,
    is_queued: bool = False,
) -> list[Delayed]:
    """Return one `dask.delayed` per partition, in order: a single task with a unique key, which returns a receipt.

    ``map_partitions`` is fused to the same tasks, but takes three times as long on the driver.

    :param isolation: limits for scoring in a process of its own; None: score in the worker.
    :param is_queued: True: the scheduler keeps each task until a thread is free. Else it gives the first two tasks a
        thread to workers at once.
    """
    return [_task(recipe, partition, versions, isolation, is_queued=is_queued) for partition in partitions]


def _task(
    recipe: StageRecipe, partition: Partition, versions: Versions, isolation: Isolation | None, *, is_queued: bool
) -> Delayed:
    key = f"{TASK_PREFIX}{recipe.job}-{partition.id}-{unique_name()}"
    own_versions = {fragment.path: versions[fragment.path] for fragment in partition.fragments}
    task = Task(key, partition_receipt, partition, own_versions, recipe, key, isolation, _data_producer=is_queued)
    return Delayed(key, {key: task})


def partition_receipt(
    partition: Partition, versions: Versions, recipe: StageRecipe, key: str, isolation: Isolation | None = None
) -> str:
    """Read, score and write a partition; return its receipt as JSON.

    :param key: key of the task, by which the driver asks for its progress.
    :param isolation: limits for scoring in a process of its own; None: score in the worker.
    """
    announce_start()
    if isolation is not None:
        isolation = replace(isolation, memory=round(ISOLATED_SHARE * memory_limit()))
    prepare_process()
    install()  # a worker of the user's own that joined late has not done it
    try:
        used = without_lost_device(recipe)
        receipt = score_partition(
            used,
            partition,
            versions=versions,
            key=key,
            isolation=isolation,
            report=progress_reporter(),
            on_message=message_forwarder(recipe.job),
        )
        meter_phases(receipt)
        return receipt.to_json_bytes().decode()
    except Exception as error:
        if isinstance(error, DeviceLost):
            leave_after_loss(recipe)
        raise without_secrets(error) from None


def meter_phases(receipt: Receipt) -> None:
    """Tell Dask the seconds of each phase, for its fine performance metrics, where it has them."""
    # They are for people only, and an interface of Dask's that may change.
    with suppress(Exception):
        for phase in ("read", "steps", "score", "write", "model_load"):
            if seconds := getattr(receipt.seconds, phase):
                context_meter.digest_metric(f"pipeline-{phase}", seconds, "seconds")
        context_meter.digest_metric("pipeline-rows", receipt.rows.input, "count")


def decode_receipt(result: str) -> Receipt:
    """Return the receipt in the result of a task of `make_tasks`."""
    return Receipt.from_json(result.encode(), where="the result of a task")


def without_secrets(error: Exception) -> BaseException:
    """Return ``error`` without secrets, because Dask logs the error and sends it to the driver."""
    masked = redact_error(error)
    if isinstance(masked, PipelineError):
        # Remove the cause: pickling or unpickling may fail, and the cause adds nothing to the message.
        masked.__cause__ = masked.__context__ = None
    return masked
