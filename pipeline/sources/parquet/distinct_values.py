"""Find the distinct values of a physical column, from statistics if they suffice, else by reading the column."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.common.rows import InputFile
from pipeline.errors import SpecError
from pipeline.sources.discovery import Discovery
from pipeline.sources.distinct import Occurrence, Occurrences, check_count
from pipeline.sources.parquet.opening import open_parquet
from pipeline.sources.types import as_type, read_type
from pipeline.storage.urls import with_storage_options

THREADS = 8
"""Files that are read at the same time."""
_BATCH_ROWS = 1 << 16


def column_values(discovery: Discovery, column: str, *, limit: int) -> Occurrences:
    """Return the values of a column; see `pipeline.sources.adapter.SourceAdapter.distinct_values`."""
    arrow_type = discovery.schema.field(column).type
    if pa.types.is_dictionary(arrow_type):
        arrow_type = arrow_type.value_type
    if not _is_plain(arrow_type):
        raise SpecError(
            "a column of that type cannot be fanned out by",
            where="fan_out.by",
            found=f"column {column!r} of type {arrow_type}",
            expected="text, whole numbers, true and false, or dates",
        )
    occurrences: Occurrences = {}
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fan-out") as pool:
        read = with_storage_options(partial(_file_values, column=column, limit=limit))
        for path, counts in pool.map(read, discovery.files):
            for value, (rows, groups) in counts.items():
                occurrence = occurrences.setdefault(value, Occurrence())
                occurrence.rows += rows
                occurrence.groups[path] = groups
            check_count(len(occurrences), column=column, limit=limit)
    return occurrences


def _is_plain(arrow_type: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_boolean)
    return any(test(arrow_type) for test in (*tests, types.is_date))


def _file_values(file: InputFile, column: str, *, limit: int) -> tuple[str, Mapping[Any, tuple[int, set[int]]]]:
    counts: dict[Any, tuple[int, set[int]]] = {}
    with open_parquet(file.path, columns=[column], groups=range(len(file.row_groups))) as parquet:
        for number, group in enumerate(file.row_groups):
            for value, rows in _group_values(parquet, number, column, rows=group.rows, limit=limit).items():
                before, groups = counts.get(value, (0, set()))
                counts[value] = (before + rows, groups | {number})
            check_count(len(counts), column=column, limit=limit)
    return file.path, counts


def _group_values(parquet: pq.ParquetFile, number: int, column: str, *, rows: int, limit: int) -> dict[Any, int]:
    only = _only_value(parquet, number, column)
    if only is not None:
        return {only: rows}
    counts: dict[Any, int] = {}
    for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[number], columns=[column]):
        values = as_type(batch.column(0), read_type(batch.column(0).type))
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        for item in pc.value_counts(values).to_pylist():
            counts[item["values"]] = counts.get(item["values"], 0) + item["counts"]
        check_count(len(counts), column=column, limit=limit)
    return counts


def _only_value(parquet: pq.ParquetFile, number: int, column: str) -> int | None:
    """Return the only value of a row group, if statistics prove it. Integers only: statistics of texts may be cut."""
    group = parquet.metadata.row_group(number)
    names = [group.column(leaf).path_in_schema for leaf in range(group.num_columns)]
    if column not in names or parquet.schema_arrow.field(column).type not in _EXACT:
        return None
    statistics = group.column(names.index(column)).statistics
    if statistics is None or not statistics.has_min_max or not statistics.has_null_count or statistics.null_count:
        return None
    return statistics.min if statistics.min == statistics.max else None


_EXACT = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32())
