"""Assemble batches from pieces of input files: filter, hive keys, limits of a batch, and checks of versions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from pipeline.common.rows import Fragment
from pipeline.errors import InputError, StorageError
from pipeline.sources.batch import Problem, SourceBatch
from pipeline.sources.changes import input_changed, missing_is_changed, version_text
from pipeline.sources.decoded_bytes import DecodedBytes, split_by_bytes
from pipeline.sources.filters.parse import Filter
from pipeline.sources.locate import current_version, hive_value
from pipeline.sources.versions import is_same_version
from pipeline.storage.urls import storage_errors

Versions = Mapping[str, tuple[int, str]]
"""Path of a file -> its planned size in bytes, and version."""


@dataclass(frozen=True)
class Reading:
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
class Piece:
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
    problems: tuple[Problem | None, ...] = ()
    """See `SourceBatch.problems`."""


class Pending:
    """The pieces of the next batch."""

    def __init__(self, reading: Reading) -> None:
        self._reading = reading
        self._physical = reading.physical
        self._pieces: list[Piece] = []
        self.rows = self._bytes = 0
        self.filtered = np.zeros(len(reading.fragments), np.int64)

    def has_room(self, piece: Piece) -> bool:
        """True if ``piece`` fits in the same batch."""
        rows, size = self.rows + piece.data.num_rows, self._bytes + piece.bytes
        return rows <= self._reading.batch_rows and (not self._reading.batch_bytes or size <= self._reading.batch_bytes)

    def add(self, piece: Piece) -> None:
        """Add a piece that has room, or the first."""
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
        table = self._reading.with_keys(data, fragment)
        return SourceBatch(table, fragment, row, filtered, problems=_joined_problems(pieces))


def _joined_problems(pieces: list[Piece]) -> tuple[Problem | None, ...]:
    if not any(piece.problems for piece in pieces):
        return ()
    parts = (piece.problems or (None,) * piece.data.num_rows for piece in pieces)
    return tuple(problem for part in parts for problem in part)


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


def filtered_pieces(
    data: pa.RecordBatch,
    number: int,
    start: int,
    reading: Reading,
    problems: tuple[Problem | None, ...] = (),
) -> Iterator[Piece]:
    """Yield the rows of ``data`` that the filter keeps, as pieces that fit in a batch.

    :param number: index of the fragment.
    :param start: number of the first row in the file.
    :param problems: see `SourceBatch.problems`; the filter drops no row that could not be read.
    """
    row, filtered = np.arange(start, start + data.num_rows, dtype=np.int64), 0
    if reading.condition is not None:
        plain = pa.Table.from_batches([data]) if data.num_columns else pa.table({"": pa.nulls(data.num_rows)})
        table = reading.with_keys(plain, np.full(data.num_rows, number, np.int32))
        flags = np.asarray(reading.condition.mask(table))
        if problems:
            flags = flags | np.array([problem is not None for problem in problems])
        filtered = data.num_rows - int(np.count_nonzero(flags))
        if filtered:
            data, row = data.filter(pa.array(flags)), row[flags]
            problems = tuple(problem for problem, keep in zip(problems, flags, strict=True) if keep) if problems else ()
    if not reading.is_measured:
        yield Piece(data, number, row, filtered, 0, problems)
        return
    for part, size in split_by_bytes(data, reading.batch_bytes, measure=reading.measure):
        count = part.num_rows
        yield Piece(part, number, row[:count], filtered, size, problems[:count])
        row, problems, filtered = row[count:], problems[count:], 0


@contextmanager
def unchanged(path: str, versions: Versions | None) -> Iterator[None]:
    """Check before and after the block, which reads a file, that the file has its planned version.

    A file overwritten during reading, or an object replaced before it was opened, may decode without an error.
    """
    check_version(path, versions)
    try:
        yield
    except (InputError, StorageError):
        # A file that changes during reading causes many kinds of errors: report the change, not its effect.
        check_version(path, versions)
        raise
    check_version(path, versions)


def check_version(path: str, versions: Versions | None) -> None:
    """Check that a file has its planned size and version; None: no check.

    :raises InputChanged: if it was changed or removed.
    """
    if versions is None:
        return
    planned = versions[path]
    with missing_is_changed(path), storage_errors(path):
        current = current_version(path)
        is_same = is_same_version(path, planned, current)
    if not is_same:
        raise input_changed(path, found=version_text(*current), expected=version_text(*planned))
