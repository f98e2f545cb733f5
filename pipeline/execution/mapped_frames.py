"""The Dask side of `pipeline.map_partitions`: partitions as files for a job, and its published rows as partitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dask.dataframe
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.execution.dask_config import override_config
from pipeline.execution.frame_checkpoint import DaskFrame, KeptFrame, keep
from pipeline.scoring.partition_step import PARTITION, POSITION, FrameType, hidden_columns, with_places
from pipeline.storage.store import open_store
from pipeline.storage.urls import own_storage_options, use_storage_options

# Dask DataFrame has no usable types.
dd: Any = dask.dataframe


def keep_with_places(frame: DaskFrame, path: str) -> KeptFrame:
    """Compute the partitions of ``frame`` once, and keep them in ``path`` with the place of each row."""
    numbers = dd.from_map(_number, range(frame.npartitions), meta=_number(0).iloc[:0], label="partition-number")
    # Partition by partition: nothing is aligned by the index.
    placed: DaskFrame = frame.map_partitions(
        _place,
        numbers,
        meta=with_places(frame._meta, 0),
        align_dataframes=False,
        enforce_metadata=False,
        clear_divisions=True,
    )
    return keep(placed, path)


def _number(partition: int) -> pd.DataFrame:
    return pd.DataFrame({"partition": np.array([partition], np.int32)})


def _place(part: pd.DataFrame, number: pd.DataFrame) -> pd.DataFrame:
    return with_places(part, int(number["partition"].iloc[0]) if len(number) else 0)


@dataclass(frozen=True)
class PublishedFile:
    """A file of results, and the partitions of which it has rows."""

    path: str
    first: int
    last: int


def published_files(paths: Sequence[str]) -> tuple[tuple[PublishedFile, ...], frozenset[str]]:
    """Return the files that have rows, and the names of the columns that have nulls, by the footers."""
    found, nullable = list[PublishedFile](), set[str]()
    for path in paths:
        folder, _, name = path.rpartition("/")
        with open_store(folder).open_input(name) as file:
            footer = pq.read_metadata(file)
        names = [footer.schema.column(number).path for number in range(footer.num_columns)]
        for group in range(footer.num_row_groups):
            columns = [footer.row_group(group).column(number) for number in range(footer.num_columns)]
            nullable |= {
                name
                for name, column in zip(names, columns, strict=True)
                if column.statistics is None or not column.statistics.has_null_count or column.statistics.null_count
            }
            numbers = columns[names.index(PARTITION)].statistics
            if footer.row_group(group).num_rows:
                found.append(PublishedFile(path, numbers.min, numbers.max))
    return tuple(found), frozenset(nullable)


def mapped_frame(
    files: Sequence[PublishedFile],
    kind: FrameType,
    *,
    divisions: Sequence[Any],
    storage: Mapping[str, Mapping[str, Any]],
) -> DaskFrame:
    """Return published rows as a lazy Dask DataFrame with the partitions that the rows came from.

    :param kind: type of the frame.
    :param divisions: those of the frame that the rows came from.
    """
    count = len(divisions) - 1
    parts = [tuple(dict.fromkeys(one.path for one in files if one.first <= n <= one.last)) for n in range(count)]
    meta = read_mapped((0, ()), kind=kind, storage=storage)
    # Strings have the type that they had: converting them again is a task more.
    with override_config({"dataframe.convert-string": False}):
        frame: DaskFrame = dd.from_map(
            read_mapped,
            list(enumerate(parts)),
            kind=kind,
            storage=storage,
            meta=meta,
            divisions=tuple(divisions),
            enforce_metadata=False,
            label="mapped",
        )
    return frame


@own_storage_options()
def read_mapped(
    part: tuple[int, tuple[str, ...]],
    *,
    kind: FrameType,
    storage: Mapping[str, Mapping[str, Any]],
    columns: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return the results of a partition, in the order of its rows.

    :param part: number of the partition, and the files with rows of it.
    :param columns: columns to read. Default: all.
    """
    use_storage_options(storage)
    number, paths = part
    names = [name for name, _ in kind.columns if columns is None or name in columns]
    wanted = FrameType(tuple(item for item in kind.columns if item[0] in names), kind.index)
    tables = [_rows_of(path, number, [*names, *hidden_columns(len(kind.index))]) for path in paths]
    if not tables:
        return wanted.empty().loc[:, list(columns) if columns is not None else names]
    table = pa.concat_tables(tables, promote_options="permissive")
    positions = table.column(POSITION).to_numpy()
    if (np.diff(positions) < 0).any():  # rows of a retry are in a later file
        table = table.take(np.argsort(positions, kind="stable"))
    return wanted.frame(table).loc[:, list(columns) if columns is not None else names]


def _rows_of(path: str, partition: int, columns: Sequence[str]) -> pa.Table:
    folder, _, name = path.rpartition("/")
    with (
        open_store(folder).open_input(name) as opened,
        pq.ParquetFile(opened, page_checksum_verification=True) as file,
    ):
        place = file.schema_arrow.names.index(PARTITION)
        groups = [
            group
            for group in range(file.num_row_groups)
            if (numbers := file.metadata.row_group(group).column(place).statistics) is None
            or numbers.min <= partition <= numbers.max
        ]
        table = file.read_row_groups(groups, columns=list(columns))
    return table.filter(pc.equal(table.column(PARTITION), partition))
