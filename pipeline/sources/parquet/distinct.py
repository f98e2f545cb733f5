"""The values of one column of a source, and what of the source has each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.common.rows import InputFile
from pipeline.errors import SpecError
from pipeline.sources.parquet.discover import Discovery
from pipeline.sources.parquet.footers import Footer, key_value
from pipeline.sources.parquet.opening import open_parquet

THREADS = 8
"""Files that are read at a time."""
_BATCH_ROWS = 1 << 16


@dataclass
class Occurrence:
    """Where one value is."""

    rows: int = 0
    """Rows of the source that have it."""
    groups: dict[str, set[int]] = field(default_factory=dict)
    """Row groups that have such a row, by file."""


Occurrences = dict[Any, Occurrence]
"""By value, as Python has it; None for null."""


def key_values(discovery: Discovery, key: str) -> Occurrences:
    """The values of a hive key, from the paths alone."""
    arrow_type = discovery.schema.field(key).type
    found: Occurrences = {}
    for file in discovery.files:
        text = dict(file.keys)[key]
        one = found.setdefault(key_value(text, arrow_type), Occurrence())
        one.rows += file.rows
        one.groups[file.path] = set(range(len(file.row_groups)))
    return found


def column_values(discovery: Discovery, column: str, *, limit: int) -> Occurrences:
    """The values of a column, from statistics where they tell, else by reading that column and no other.

    :raises SpecError: for a type that has no plain values, or more than ``limit`` values.
    """
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
    found: Occurrences = {}
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fan-out") as pool:
        for path, counts in pool.map(lambda file: _values_of(file, column, limit=limit), discovery.files):
            for value, (rows, groups) in counts.items():
                one = found.setdefault(value, Occurrence())
                one.rows += rows
                one.groups[path] = groups
            check_count(len(found), column=column, limit=limit)
    return found


def check_count(count: int, *, column: str, limit: int) -> None:
    """:raises SpecError: when there are more than ``limit`` values."""
    if count > limit:
        raise SpecError(
            "a fan-out would have too many children",
            where="fan_out.by",
            found=f"more than {limit:,} values of {column}",
            expected=f"at most {limit:,} (fan_out.max_children)",
            next_step="fan out by a column with fewer values, or raise fan_out.max_children",
        )


def narrow(discovery: Discovery, occurrence: Occurrence, *, filter: str) -> Discovery:
    """``discovery`` without the files in which a value is not, and with no wish for row groups in which it is not.

    :param filter: the row filter for what is left.
    """
    groups = occurrence.groups
    return replace(
        discovery,
        files=tuple(_narrow_file(file, groups[file.path]) for file in discovery.files if file.path in groups),
        footers=tuple(
            _narrow_footer(one, groups[one.file.path]) for one in discovery.footers if one.file.path in groups
        ),
        filter=filter,
    )


def _narrow_file(file: InputFile, kept: Collection[int]) -> InputFile:
    groups = (replace(one, wanted=one.wanted and number in kept) for number, one in enumerate(file.row_groups))
    return replace(file, row_groups=tuple(groups))


def _narrow_footer(footer: Footer, kept: Collection[int]) -> Footer:
    return replace(footer, wanted=tuple(one and number in kept for number, one in enumerate(footer.wanted)))


def _is_plain(arrow_type: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_boolean)
    return any(test(arrow_type) for test in (*tests, types.is_date))


def _values_of(file: InputFile, column: str, *, limit: int) -> tuple[str, Mapping[Any, tuple[int, set[int]]]]:
    counts: dict[Any, tuple[int, set[int]]] = {}
    with open_parquet(file.path, columns=1) as parquet:
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
        values = batch.column(0)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        for one in pc.value_counts(values).to_pylist():
            counts[one["values"]] = counts.get(one["values"], 0) + one["counts"]
        check_count(len(counts), column=column, limit=limit)
    return counts


def _only_value(parquet: pq.ParquetFile, number: int, column: str) -> int | None:
    """The value of a whole row group, where statistics prove that it has no other. Of texts they may be cut short."""
    group = parquet.metadata.row_group(number)
    names = [group.column(leaf).path_in_schema for leaf in range(group.num_columns)]
    if column not in names or parquet.schema_arrow.field(column).type not in _EXACT:
        return None
    statistics = group.column(names.index(column)).statistics
    if statistics is None or not statistics.has_min_max or not statistics.has_null_count or statistics.null_count:
        return None
    return statistics.min if statistics.min == statistics.max else None


_EXACT = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32())
