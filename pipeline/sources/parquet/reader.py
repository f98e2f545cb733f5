"""Read a partition batch by batch. Memory depends on the batch, not on row groups, files or the partition."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from functools import partial
from itertools import groupby

import pyarrow as pa

from pipeline.common.rows import Fragment
from pipeline.errors import CorruptInput
from pipeline.sources.assembly import Pending, Piece, Reading, Versions, filtered_pieces, unchanged
from pipeline.sources.batch import HasFragments, SourceBatch
from pipeline.sources.changes import missing_is_changed, schema_changed
from pipeline.sources.filters.parse import parse_filter
from pipeline.sources.parquet.decoding import (
    DecodingSize,
    decode_limited,
)
from pipeline.sources.parquet.fetching import fetch, is_small, small_files
from pipeline.sources.parquet.opening import LeanFile, open_parquet, parquet_errors
from pipeline.sources.types import as_type, has_inner_dictionary, same_kind


def read_batches(
    partition: HasFragments | Sequence[Fragment],
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    filter: str | None = None,
    batch_rows: int,
    batch_bytes: int = 0,
    versions: Versions | None = None,
) -> Generator[SourceBatch, None, None]:
    """Yield the rows of ``partition`` that ``filter`` keeps; see `pipeline.sources.read_batches`."""
    fragments = tuple(partition if isinstance(partition, Sequence) else partition.fragments)
    condition = parse_filter(filter) if filter is not None else None
    reading = Reading(fragments, columns, schema, condition, batch_rows, batch_bytes)
    pending = Pending(reading)
    for piece in _pieces(reading, versions):
        if pending.rows and not pending.has_room(piece):
            yield pending.take()
        pending.add(piece)
    if pending.rows or pending.filtered.any():
        yield pending.take()


def _pieces(reading: Reading, versions: Versions | None) -> Iterator[Piece]:
    fragments = reading.fragments
    size = DecodingSize(rows=reading.batch_rows, most_bytes=reading.batch_bytes, width=reading.width)
    files = [(path, list(numbers)) for path, numbers in groupby(range(len(fragments)), key=lambda n: fragments[n].path)]
    known = versions or {}
    small = {path for path, _ in files if path in known and is_small(path, known[path][0])}
    ahead = [path for path, _ in files if path in small]
    with small_files(ahead, partial(_fetch_unchanged, versions=known)) as contents:
        for path, numbers in files:
            if path in small:
                yield from _file_pieces(path, numbers, reading, size, contents.take(path))
                continue
            with unchanged(path, versions):
                yield from _file_pieces(path, numbers, reading, size)


def _fetch_unchanged(path: str, versions: Versions) -> bytes:
    """Return the content of a small remote file in its planned version."""
    with unchanged(path, versions), missing_is_changed(path), parquet_errors(path):
        return fetch(path, versions[path][0])


def _file_pieces(
    path: str, numbers: list[int], reading: Reading, size: DecodingSize, content: bytes | None = None
) -> Iterator[Piece]:
    parts = [reading.fragments[number] for number in numbers]
    groups = range(min(part.group_start for part in parts), max(part.group_stop for part in parts))
    with missing_is_changed(path), open_parquet(path, columns=reading.columns, groups=groups, content=content) as file:
        align: _Aligner | None = None
        for number, fragment in zip(numbers, parts, strict=True):
            done = fragment.row_start
            for start, data in _decoded(file, fragment, reading, size):
                align = align or _Aligner(data.schema, reading.physical, path)
                if start != done:
                    break
                done += data.num_rows
                yield from filtered_pieces(align(data), number, start, reading)
            if done != fragment.row_stop:
                raise CorruptInput(
                    "an input file holds other rows than its footer says",
                    where=path,
                    found=f"rows up to {done:,}",
                    expected=f"rows {fragment.row_start:,} to {fragment.row_stop:,}",
                    next_step="write the file anew, and run again",
                )


def _decoded(
    file: LeanFile, fragment: Fragment, reading: Reading, size: DecodingSize
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the number of the first row, and the rows, of each batch of ``fragment``."""
    if fragment.rows == 0:
        return
    metadata = file.metadata
    if fragment.group_stop > metadata.num_row_groups:
        return
    position = sum(metadata.row_group(group).num_rows for group in range(fragment.group_start))
    for batch in _batches(file, range(fragment.group_start, fragment.group_stop), reading, size):
        low, high = max(fragment.row_start - position, 0), min(fragment.row_stop - position, batch.num_rows)
        if low < high:
            yield position + low, batch if high - low == batch.num_rows else batch.slice(low, high - low)
        position += batch.num_rows
        if position >= fragment.row_stop:
            return


def _batches(file: LeanFile, groups: range, reading: Reading, size: DecodingSize) -> Iterator[pa.RecordBatch]:
    """Yield the batches of ``groups``, in which no row group is held as a whole."""
    columns = _known(file, reading.columns)
    for part in (range(group, group + 1) for group in groups) if _is_apart(file, groups, reading) else [groups]:
        if reading.is_measured:
            yield from decode_limited(file, part, columns=columns, size=size)
        else:
            yield from file.iter_batches(reading.batch_rows, row_groups=part, columns=columns, use_threads=False)


def _is_apart(file: LeanFile, groups: range, reading: Reading) -> bool:
    """True if each row group is decoded alone: it is read whole, or holds dictionaries that pyarrow cannot join."""
    if len(groups) < 2:
        return False
    chosen = set(reading.columns)
    return file.is_read_by_group or any(
        has_inner_dictionary(field.type) for field in file.schema_arrow if field.name in chosen
    )


def _known(file: LeanFile, columns: Sequence[str]) -> list[str] | None:
    """Return ``columns``, or None if these are all columns of the file, which saves their look-up."""
    return None if len(columns) == len(file.metadata.schema) else list(columns)


class _Aligner:
    """Convert the columns of one file to the order and the types of the plan."""

    def __init__(self, actual: pa.Schema, planned: pa.Schema, path: str) -> None:
        self._planned = planned
        self._same = actual.equals(planned)
        if not self._same:
            self._check(actual, path)

    def _check(self, actual: pa.Schema, path: str) -> None:
        names = set(actual.names)
        for field in self._planned:
            expected = f"column {field.name!r} of type {field.type}"
            if field.name not in names:
                raise schema_changed(path, found=f"no column {field.name!r}", expected=expected)
            if not same_kind(field.type, actual.field(field.name).type):
                raise schema_changed(
                    path, found=f"column {field.name!r} of type {actual.field(field.name).type}", expected=expected
                )

    def __call__(self, data: pa.RecordBatch) -> pa.RecordBatch:
        if self._same:
            return data
        arrays = [as_type(data.column(field.name), field.type) for field in self._planned]
        return pa.RecordBatch.from_arrays(arrays, schema=self._planned) if arrays else data.select([])
