"""A plan as a Dask DataFrame. The only module that builds collections; it holds no logic.

``from_map`` over the stored partitions gives the frame of their fragments, one Dask partition each. The same chain is
cut at two places: `receipts` (what a job runs: every partition read, scored and written by one fused task that returns
a row) and `scored` (what a notebook gets: the scored rows, lazily).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import dask
import dask.dataframe
import pandas as pd

from pipeline import evidence
from pipeline.errors import PipelineError
from pipeline.isolation import Isolation
from pipeline.partition import run_partition, scored_frame
from pipeline.plan import Partition
from pipeline.receipt import Receipt
from pipeline.recipe import StageRecipe
from pipeline.redaction import redact_error
from pipeline.rows import Fragment

# Dask DataFrame has no usable types.
dd: Any = dask.dataframe

Versions = dict[str, tuple[int, str]]
"""Path of an input file -> its size in bytes and version, as planned."""

ISOLATED_SHARE = 0.8
"""Share of the worker's memory limit that the process of an isolated partition may have; it is alone on its worker."""

# Strings stay as they are built: a conversion would be one more task in every partition before fusing.
_CONFIG = {"dataframe.convert-string": False}

_FRAGMENTS_META = pd.DataFrame(
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

_RECEIPTS_META = pd.DataFrame(
    {
        "partition": pd.Series([], dtype="str"),
        "rows_in": pd.Series([], dtype="int64"),
        "out": pd.Series([], dtype="int64"),
        "rejected": pd.Series([], dtype="int64"),
        "filtered": pd.Series([], dtype="int64"),
        "receipt": pd.Series([], dtype="str"),
    }
)


def fragments(partitions: Sequence[Partition], versions: Versions) -> Any:
    """The fragments of ``partitions`` as a Dask DataFrame, one Dask partition each, in the given order."""
    with dask.config.set(_CONFIG):
        return dd.from_map(
            _fragment_frame,
            list(partitions),
            [{fragment.path: versions[fragment.path] for fragment in part.fragments} for part in partitions],
            meta=_FRAGMENTS_META,
            enforce_metadata=False,
            label="fragments",
        )


def receipts(
    recipe: StageRecipe,
    partitions: Sequence[Partition],
    versions: Versions,
    *,
    isolation: Isolation | None = None,
    copy: int = 0,
) -> Any:
    """The frame of receipts: computing a Dask partition reads, scores and writes it.

    :param isolation: score in a process of its own, with these limits.
    :param copy: tasks of another number have other keys: Dask runs a key once.
    """
    with dask.config.set(_CONFIG):
        return fragments(partitions, versions).map_partitions(
            _receipt_frame, recipe, isolation, copy, meta=_RECEIPTS_META, enforce_metadata=False
        )


def scored(recipe: StageRecipe, partitions: Sequence[Partition], versions: Versions, *, meta: pd.DataFrame) -> Any:
    """The scored rows as a lazy Dask DataFrame, one Dask partition per plan partition, in source order.

    :param meta: empty frame with the columns and dtypes of the output.
    """
    with dask.config.set(_CONFIG):
        return fragments(partitions, versions).map_partitions(_score_frame, recipe, meta=meta, enforce_metadata=False)


def tasks(
    recipe: StageRecipe,
    partitions: Sequence[Partition],
    versions: Versions,
    *,
    isolation: Isolation | None = None,
    copy: int = 0,
) -> list[Any]:
    """One `dask.delayed` of a frame of receipts per partition, in order: a single fused task each."""
    with dask.config.set(_CONFIG):
        return list(receipts(recipe, partitions, versions, isolation=isolation, copy=copy).to_delayed())


def read_receipt(frame: pd.DataFrame) -> Receipt:
    """The receipt in the frame a task of `tasks` returned."""
    return Receipt.from_json(str(frame["receipt"].iloc[0]).encode(), where="the result of a task")


def _fragment_frame(partition: Partition, versions: Versions) -> pd.DataFrame:
    rows = [
        (
            *(partition.id, f.path, *versions[f.path]),
            *(f.row_start, f.row_stop, f.group_start, f.group_stop, f.bytes, f.keys, f.origin),
        )
        for f in partition.fragments
    ]
    return pd.DataFrame(rows, columns=list(_FRAGMENTS_META.columns))


def _read_fragments(frame: pd.DataFrame) -> tuple[Partition, Versions]:
    rows: Any = frame.to_dict("records")
    parts = tuple(Fragment(**{name: row[name] for name in _FRAGMENT_FIELDS}) for row in rows)
    return Partition(rows[0]["partition"], parts), {row["path"]: (row["size"], row["version"]) for row in rows}


def _receipt_frame(frame: pd.DataFrame, recipe: StageRecipe, isolation: Isolation | None, copy: int) -> pd.DataFrame:
    evidence.announce()
    partition, versions = _read_fragments(frame)
    if isolation is not None:
        isolation = replace(isolation, memory=round(ISOLATED_SHARE * evidence.memory_limit()))
    try:
        receipt = run_partition(recipe, partition, versions=versions, isolation=isolation)
    except Exception as error:
        raise _ready_to_travel(error) from None
    counts = receipt.rows
    row = (receipt.partition, counts.rows_in, counts.out, counts.rejected, counts.filtered, receipt.to_json().decode())
    return pd.DataFrame([row], columns=list(_RECEIPTS_META.columns))


def _score_frame(frame: pd.DataFrame, recipe: StageRecipe) -> pd.DataFrame:
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
