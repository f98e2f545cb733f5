"""The tasks of a job, and the functions that a worker runs for a partition.

`pipeline.execution.graph` is a module of its own so that workers, scheduler and driver do not import
``dask.dataframe``, which takes longer than all their other imports together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import pandas as pd
from dask._task_spec import Task
from dask.delayed import Delayed

from pipeline.common.rows import Fragment
from pipeline.common.secrets import redact_error
from pipeline.errors import PipelineError
from pipeline.execution.worker_events import announce_start, memory_limit
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.frames import score_to_frame
from pipeline.scoring.isolation import Isolation
from pipeline.scoring.partition import score_partition
from pipeline.storage.urls import unique_name

Versions = dict[str, tuple[int, str]]
"""Planned size in bytes and version of each input file, by path."""

ISOLATED_SHARE = 0.8
"""Share of the worker's memory limit for the process of an isolated partition, which is alone on its worker."""

FRAGMENTS_META = pd.DataFrame(
    {
        "partition": pd.Series([], dtype="str"),
        "path": pd.Series([], dtype="str"),
        "size": pd.Series([], dtype="int64"),
        "version": pd.Series([], dtype="str"),
        "row_start": pd.Series([], dtype="int64"),
        "row_stop": pd.Series([], dtype="int64"),
        "group_start": pd.Series([], dtype="int64"),
        "group_stop": pd.Series([], dtype="int64"),
        "bytes": pd.Series([], dtype="int64"),
        "hive_keys": pd.Series([], dtype="object"),
        "rejected_from": pd.Series([], dtype="str"),
    }
)

_FRAGMENT_FIELDS = tuple(field.name for field in fields(Fragment))


def make_tasks(
    recipe: StageRecipe, partitions: Sequence[Partition], versions: Versions, *, isolation: Isolation | None = None
) -> list[Delayed]:
    """Return one `dask.delayed` per partition, in order: a single task with a unique key, which returns a receipt.

    ``map_partitions`` is fused to the same tasks, but takes three times as long on the driver.

    :param isolation: limits for scoring in a process of its own; None: score in the worker.
    """
    return [_task(recipe, partition, versions, isolation) for partition in partitions]


def _task(recipe: StageRecipe, partition: Partition, versions: Versions, isolation: Isolation | None) -> Delayed:
    key = f"score-{partition.id}-{unique_name()}"
    own_versions = {fragment.path: versions[fragment.path] for fragment in partition.fragments}
    return Delayed(key, {key: Task(key, partition_receipt, partition, own_versions, recipe, isolation)})


def partition_receipt(
    partition: Partition, versions: Versions, recipe: StageRecipe, isolation: Isolation | None = None
) -> str:
    """Read, score and write a partition; return its receipt as JSON.

    :param isolation: limits for scoring in a process of its own; None: score in the worker.
    """
    announce_start()
    if isolation is not None:
        isolation = replace(isolation, memory=round(ISOLATED_SHARE * memory_limit()))
    try:
        return score_partition(recipe, partition, versions=versions, isolation=isolation).to_json_bytes().decode()
    except Exception as error:
        raise _without_secrets(error) from None


def decode_receipt(result: str) -> Receipt:
    """Return the receipt in the result of a task of `make_tasks`."""
    return Receipt.from_json(result.encode(), where="the result of a task")


def fragment_frame(partition: Partition, versions: Versions) -> pd.DataFrame:
    """Return the fragments of a partition, with the planned sizes and versions of their files."""
    rows = [
        (
            *(partition.id, f.path, *versions[f.path]),
            *(f.row_start, f.row_stop, f.group_start, f.group_stop, f.bytes, f.hive_keys, f.rejected_from),
        )
        for f in partition.fragments
    ]
    return pd.DataFrame(rows, columns=list(FRAGMENTS_META.columns))


def _read_fragments(frame: pd.DataFrame) -> tuple[Partition, Versions]:
    rows: Any = frame.to_dict("records")
    fragments = tuple(Fragment(**{name: row[name] for name in _FRAGMENT_FIELDS}) for row in rows)
    return Partition(rows[0]["partition"], fragments), {row["path"]: (row["size"], row["version"]) for row in rows}


def score_frame(frame: pd.DataFrame, recipe: StageRecipe) -> pd.DataFrame:
    """Score the partition of these fragments."""
    partition, versions = _read_fragments(frame)
    try:
        return score_to_frame(recipe, partition, versions=versions)
    except Exception as error:
        raise _without_secrets(error) from None


def _without_secrets(error: Exception) -> BaseException:
    """Return ``error`` without secrets, because Dask logs the error and sends it to the driver."""
    masked = redact_error(error)
    if isinstance(masked, PipelineError):
        # Remove the cause: pickling or unpickling may fail, and the cause adds nothing to the message.
        masked.__cause__ = masked.__context__ = None
    return masked
