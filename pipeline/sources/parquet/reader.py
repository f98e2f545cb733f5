"""Read a partition batch by batch. Memory depends on the batch, not on row groups, files or the partition."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.common.rows import Fragment
from pipeline.errors import CorruptInput, InputError, StorageError
from pipeline.sources.batch import HasFragments, SourceBatch
from pipeline.sources.changes import input_changed, missing_is_changed, schema_changed, version_text
from pipeline.sources.filters.parse import Filter, parse_filter
from pipeline.sources.locate import current_version, hive_value
from pipeline.sources.parquet.decoding import (
    DecodedBytes,
    DecodingSize,
    decode_limited,
    split_by_bytes,
)
from pipeline.sources.parquet.fetching import fetch, is_small, small_files
from pipeline.sources.parquet.opening import LeanFile, open_parquet, parquet_errors
from pipeline.sources.types import as_type, has_inner_dictionary, same_kind
from pipeline.sources.versions import is_same_version

_Versions = Mapping[str, tuple[int, str]]
"""Path of a file -> its planned size in bytes, and version."""


def read_batches(
    partition: HasFragments | Sequence[Fragment],
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    filter: str | None = None,
    batch_rows: int,
    batch_bytes: int = 0,
    versions: _Versions | None = None,
) -> Generator[SourceBatch, None, None]:
    """Yield the rows of ``partition`` that ``filter`` keeps; see `pipeline.sources.read_batches`."""
    fragments = tuple(partition if isinstance(partition, Sequence) else partition.fragments)
    condition = parse_filter(filter) if filter is not None else None
    reading = _Reading(fragments, columns, schema, condition, batch_rows, batch_bytes)
    pending = _Pending(reading)
    for piece in _pieces(reading, versions):
        if pending.rows and not pending.has_room(piece):
            yield pending.take()
        pending.add(piece)
    if pending.rows or pending.filtered.any():
        yield pending.take()


@dataclass(frozen=True)
class _Reading:
    """The constants of one `read_batches` call."""

    fragments: tuple[Fragment, ...]
    columns: Sequence[str]
    schema: pa.Schema
    condition: Filter | None
    batch_rows: int
    batch_bytes: int
    """Limit for the decoded bytes of a batch; 0: no limit."""

    @cached_property
    def measure(self) -> DecodedBytes:
        """The measure of the decoded bytes of the physical columns."""
        return DecodedBytes(self.physical)

    @property
    def is_measured(self) -> bool:
        """True if the decoded bytes of rows are measured: they limit a batch, and are not known before."""
        return self.batch_bytes > 0 and not self.measure.is_fixed

    @cached_property
    def width(self) -> float:
        """Planned bytes of a decoded row."""
        rows = sum(fragment.rows for fragment in self.fragments)
        return sum(fragment.bytes for fragment in self.fragments) / max(rows, 1)

    @cached_property
    def physical(self) -> pa.Schema:
        """The fields of ``schema`` that are read from files."""
        physical = set(self.columns)
        return pa.schema([field for field in self.schema if field.name in physical])

    @cached_property
    def keys(self) -> list[pa.Field]:
        """Fields of ``schema`` that come from folder names."""
        physical = set(self.columns)
        return [field for field in self.schema if field.name not in physical]

    def with_keys(self, data: pa.Table, fragment: np.ndarray) -> pa.Table:
        """Return ``data`` with hive keys, in the order of ``schema``.

        :param data: physical columns of some rows.
        :param fragment: int32 [rows]: index of each row's fragment.
        """
        for field in self.keys:
            texts = [dict(fragment.hive_keys).get(field.name) for fragment in self.fragments]
            values = [None if text is None else hive_value(text, field.type) for text in texts]
            data = data.append_column(field, pa.array(values, field.type).take(pa.array(fragment)))
        return data.select(self.schema.names) if self.keys else data


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one fragment."""

    data: pa.RecordBatch
    """Physical columns."""
    number: int
    """Index of the fragment in the partition."""
    row: np.ndarray
    """int64 [rows]: each row's number in its file, from 0."""
    filtered: int
    bytes: int
    """Decoded bytes of ``data``; 0 if they are not measured."""


class _Pending:
    """The pieces of the next batch."""

    def __init__(self, reading: _Reading) -> None:
        self._reading = reading
        self._physical = reading.physical
        self._pieces: list[_Piece] = []
        self.rows = self._bytes = 0
        self.filtered = np.zeros(len(reading.fragments), np.int64)

    def has_room(self, piece: _Piece) -> bool:
        """True if ``piece`` fits in the same batch."""
        rows, size = self.rows + piece.data.num_rows, self._bytes + piece.bytes
        return rows <= self._reading.batch_rows and (not self._reading.batch_bytes or size <= self._reading.batch_bytes)

    def add(self, piece: _Piece) -> None:
        self.filtered[piece.number] += piece.filtered
        if piece.data.num_rows:
            self._pieces.append(piece)
            self.rows += piece.data.num_rows
            self._bytes += piece.bytes

    def take(self) -> SourceBatch:
        """Return all pending pieces as one batch, each column in one chunk if its type allows."""
        pieces, filtered = self._pieces, self.filtered
        self._pieces, self.rows, self._bytes, self.filtered = [], 0, 0, np.zeros_like(filtered)
        fragment = np.repeat(
            np.array([piece.number for piece in pieces], np.int32), [piece.data.num_rows for piece in pieces]
        )
        row = np.concatenate([piece.row for piece in pieces]) if pieces else np.empty(0, np.int64)
        data = _concatenate([piece.data for piece in pieces], self._physical)
        return SourceBatch(self._reading.with_keys(data, fragment), fragment, row, filtered)


def _concatenate(pieces: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    if not schema:
        # A table without columns has no number of rows: one extra column keeps the number until keys are added.
        rows = sum(piece.num_rows for piece in pieces)
        return pa.table({"": pa.nulls(rows)})
    data = pa.Table.from_batches(pieces, schema=schema)
    if len(pieces) < 2:
        return data
    try:
        return data.combine_chunks()
    except pa.ArrowInvalid:
        # Dictionaries of several files whose union needs a wider index: such a column stays in chunks.
        return data


def _pieces(reading: _Reading, versions: _Versions | None) -> Iterator[_Piece]:
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
            with _unchanged(path, versions):
                yield from _file_pieces(path, numbers, reading, size)


def _fetch_unchanged(path: str, versions: _Versions) -> bytes:
    """Return the content of a small remote file in its planned version."""
    with _unchanged(path, versions), missing_is_changed(path), parquet_errors(path):
        return fetch(path, versions[path][0])


@contextmanager
def _unchanged(path: str, versions: _Versions | None) -> Iterator[None]:
    """Check before and after the block, which reads a file, that the file has its planned version.

    A file overwritten during reading, or an object replaced before it was opened, may decode without an error.
    """
    _check_version(path, versions)
    try:
        yield
    except (InputError, StorageError):
        # A file that changes during reading causes many kinds of errors: report the change, not its effect.
        _check_version(path, versions)
        raise
    _check_version(path, versions)


def _file_pieces(
    path: str, numbers: list[int], reading: _Reading, size: DecodingSize, content: bytes | None = None
) -> Iterator[_Piece]:
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
                yield from _filtered(align(data), number, start, reading)
            if done != fragment.row_stop:
                raise CorruptInput(
                    "an input file holds other rows than its footer says",
                    where=path,
                    found=f"rows up to {done:,}",
                    expected=f"rows {fragment.row_start:,} to {fragment.row_stop:,}",
                    next_step="write the file anew, and run again",
                )


def _decoded(
    file: LeanFile, fragment: Fragment, reading: _Reading, size: DecodingSize
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


def _batches(file: LeanFile, groups: range, reading: _Reading, size: DecodingSize) -> Iterator[pa.RecordBatch]:
    """Yield the batches of ``groups``, in which no row group is held as a whole."""
    columns = _known(file, reading.columns)
    for part in (range(group, group + 1) for group in groups) if _is_apart(file, groups, reading) else [groups]:
        if reading.is_measured:
            yield from decode_limited(file, part, columns=columns, size=size)
        else:
            yield from file.iter_batches(reading.batch_rows, row_groups=part, columns=columns, use_threads=False)


def _is_apart(file: LeanFile, groups: range, reading: _Reading) -> bool:
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


def _filtered(data: pa.RecordBatch, number: int, start: int, reading: _Reading) -> Iterator[_Piece]:
    """Yield the rows of ``data`` that the filter keeps, as pieces that fit in a batch."""
    row, filtered = np.arange(start, start + data.num_rows, dtype=np.int64), 0
    if reading.condition is not None:
        plain = pa.Table.from_batches([data]) if data.num_columns else pa.table({"": pa.nulls(data.num_rows)})
        table = reading.with_keys(plain, np.full(data.num_rows, number, np.int32))
        keep = reading.condition.mask(table)
        filtered = data.num_rows - int(pc.sum(keep, min_count=0).as_py() or 0)
        if filtered:
            flags = np.asarray(keep)
            data, row = data.filter(pa.array(flags)), row[flags]
    if not reading.is_measured:
        yield _Piece(data, number, row, filtered, 0)
        return
    for part, size in split_by_bytes(data, reading.batch_bytes, measure=reading.measure):
        yield _Piece(part, number, row[: part.num_rows], filtered, size)
        row, filtered = row[part.num_rows :], 0


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


def _check_version(path: str, versions: _Versions | None) -> None:
    if versions is None:
        return
    planned = versions[path]
    with missing_is_changed(path), parquet_errors(path):
        current = current_version(path)
        is_same = is_same_version(path, planned, current)
    if not is_same:
        raise input_changed(path, found=version_text(*current), expected=version_text(*planned))
