"""What a worker does for a Dask partition: to its receipt, or to scored rows; and the tasks that a job is made of.

Apart from `pipeline.execution.graph`, so that neither workers nor scheduler nor the driver of a job import
``dask.dataframe``, which would take them longer than all else together.
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
from pipeline.execution import worker_events as evidence
from pipeline.jobs.receipts import Receipt
from pipeline.plan.plan import Partition
from pipeline.plan.recipe import StageRecipe
from pipeline.scoring.frames import scored_frame
from pipeline.scoring.isolation import Isolation
from pipeline.scoring.partition import score_partition
from pipeline.storage.urls import unique_name

Versions = dict[str, tuple[int, str]]
"""Path of an input file -> its size in bytes and version, as planned."""

ISOLATED_SHARE = 0.8
"""Share of the worker's memory limit that the process of an isolated partition may have; it is alone on its worker."""

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
        "keys": pd.Series([], dtype="object"),
        "origin": pd.Series([], dtype="str"),
    }
)

_FRAGMENT_FIELDS = tuple(field.name for field in fields(Fragment))


def make_tasks(
    recipe: StageRecipe, partitions: Sequence[Partition], versions: Versions, *, isolation: Isolation | None = None
) -> list[Delayed]:
    """One `dask.delayed` per partition, in order, each of a single task with a key of its own, which gives a receipt.

    It is what ``map_partitions`` over the partitions would be fused to, at a third of the driver's time.

    :param isolation: score in a process of its own, with these limits.
    """
    return [_task(recipe, partition, versions, isolation) for partition in partitions]


def _task(recipe: StageRecipe, partition: Partition, versions: Versions, isolation: Isolation | None) -> Delayed:
    key = f"score-{partition.id}-{unique_name()}"
    mine = {fragment.path: versions[fragment.path] for fragment in partition.fragments}
    return Delayed(key, {key: Task(key, partition_receipt, partition, mine, recipe, isolation)})


def partition_receipt(
    partition: Partition, versions: Versions, recipe: StageRecipe, isolation: Isolation | None = None
) -> str:
    """Read, score and write a partition; its receipt as JSON.

    :param isolation: score in a process of its own, with these limits.
    """
    evidence.announce_start()
    if isolation is not None:
        isolation = replace(isolation, memory=round(ISOLATED_SHARE * evidence.memory_limit()))
    try:
        return score_partition(recipe, partition, versions=versions, isolation=isolation).to_json().decode()
    except Exception as error:
        raise _ready_to_travel(error) from None


def decode_receipt(result: str) -> Receipt:
    """The receipt that a task of `make_tasks` returned."""
    return Receipt.from_json(result.encode(), where="the result of a task")


def fragment_frame(partition: Partition, versions: Versions) -> pd.DataFrame:
    """The fragments of a partition, with size and version of their files as planned."""
    rows = [
        (
            *(partition.id, f.path, *versions[f.path]),
            *(f.row_start, f.row_stop, f.group_start, f.group_stop, f.bytes, f.keys, f.origin),
        )
        for f in partition.fragments
    ]
    return pd.DataFrame(rows, columns=list(FRAGMENTS_META.columns))


def _read_fragments(frame: pd.DataFrame) -> tuple[Partition, Versions]:
    rows: Any = frame.to_dict("records")
    parts = tuple(Fragment(**{name: row[name] for name in _FRAGMENT_FIELDS}) for row in rows)
    return Partition(rows[0]["partition"], parts), {row["path"]: (row["size"], row["version"]) for row in rows}


def score_frame(frame: pd.DataFrame, recipe: StageRecipe) -> pd.DataFrame:
    """The scored rows of the partition of these fragments."""
    partition, versions = _read_fragments(frame)
    try:
        return scored_frame(recipe, partition, versions=versions)
    except Exception as error:
        raise _ready_to_travel(error) from None


def _ready_to_travel(error: Exception) -> BaseException:
    """``error`` as it may leave the worker: without secrets, which Dask would log and send."""
    masked = redact_error(error)
    if isinstance(masked, PipelineError):
        # It says all there is to say. What it came from may not survive the way to the driver, and would take it along.
        masked.__cause__ = masked.__context__ = None
    return masked
