"""Read ranges of rows of text files. Memory depends on chunks of text and on the batch, not on files or partitions."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from itertools import groupby

import numpy as np
import pyarrow as pa

from pipeline.common.rows import ByteSpan, Fragment
from pipeline.errors import CorruptInput
from pipeline.sources.assembly import Pending, Piece, Reading, filtered_pieces, unchanged
from pipeline.sources.batch import HasFragments, Problem, SourceBatch
from pipeline.sources.changes import missing_is_changed
from pipeline.sources.filters.parse import parse_filter
from pipeline.sources.text.discover import check_names
from pipeline.sources.text.files import open_text, read_exactly, read_head, text_errors
from pipeline.sources.text.parser import Parsed, Parser, Unreadable
from pipeline.sources.text.scan import last_row_stop, row_stops

CHUNK_BYTES = 4 << 20
"""Bytes of text that are parsed at a time, but at least one row."""


def read_text(
    partition: HasFragments | Sequence[Fragment],
    parser: Parser,
    *,
    columns: Sequence[str],
    schema: pa.Schema,
    filter: str | None = None,
    batch_rows: int,
    batch_bytes: int = 0,
    versions: Mapping[str, tuple[int, str]] | None = None,
) -> Generator[SourceBatch, None, None]:
    """Yield the rows of ``partition`` that ``filter`` keeps; see `pipeline.sources.read_batches`."""
    fragments = tuple(partition if isinstance(partition, Sequence) else partition.fragments)
    condition = parse_filter(filter) if filter is not None else None
    reading = Reading(fragments, columns, schema, condition, batch_rows, batch_bytes)
    pending = Pending(reading)
    for path, numbers in groupby(range(len(fragments)), key=lambda number: fragments[number].path):
        with unchanged(path, versions), missing_is_changed(path), text_errors(path):
            for piece in _file_pieces(path, list(numbers), reading, parser):
                if pending.rows and not pending.has_room(piece):
                    yield pending.take()
                pending.add(piece)
    if pending.rows or pending.filtered.any():
        yield pending.take()


def _file_pieces(path: str, numbers: list[int], reading: Reading, parser: Parser) -> Iterator[Piece]:
    head = read_head(path, 1 << 16)
    names, prologue = parser.names(head), head[: parser.body(head)]
    check_names(names, reading.physical, path=path, like="the plan")
    for number in numbers:
        fragment = reading.fragments[number]
        done = fragment.row_start
        for start, parsed, problems in _chunks(
            path, fragment, reading.physical, parser, names=names, prologue=prologue
        ):
            low, high = max(fragment.row_start - start, 0), min(fragment.row_stop - start, parsed.table.num_rows)
            if low >= high:
                continue
            done = start + high
            for first, data in _cut(parsed.table, low, high, reading.batch_rows):
                chosen = problems[first : first + data.num_rows]
                yield from filtered_pieces(data, number, start + first, reading, chosen)
        if done != fragment.row_stop:
            raise _other_rows(path, f"rows up to {done:,}", f"rows {fragment.row_start:,} to {fragment.row_stop:,}")


def _cut(table: pa.Table, low: int, high: int, rows: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield the rows ``low`` to ``high`` of a chunk, at most ``rows`` at a time, with the number of the first."""
    for first in range(low, high, rows):
        part = table.slice(first, min(rows, high - first))
        yield first, pa.RecordBatch.from_arrays([_one(column) for column in part.columns], schema=part.schema)


def _one(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _chunks(
    path: str, fragment: Fragment, schema: pa.Schema, parser: Parser, *, names: Sequence[str] | None, prologue: bytes
) -> Iterator[tuple[int, Parsed, tuple[Problem | None, ...]]]:
    """Yield the number of the first row, the rows, and their problems, of each chunk that has rows of ``fragment``."""
    span = fragment.span
    if span is None or not fragment.rows:
        return
    skipped = prologue if span.start == 0 else b""
    row, line = span.row, span.line + skipped.count(b"\n")
    for data in _whole_rows(path, span, parser, skip=len(skipped)):
        if row < fragment.row_start:
            # Rows before the fragment are counted, not parsed.
            count = len(row_stops(data, parser.dialect))
            if row + count <= fragment.row_start:
                row, line = row + count, line + data.count(b"\n")
                continue
        parsed = parser.parse(data, schema, names)
        yield row, parsed, _problems(parsed, data, line, parser)
        row, line = row + parsed.table.num_rows, line + data.count(b"\n")
        if row >= fragment.row_stop and row < span.row + span.rows:
            return
    if row != span.row + span.rows:
        raise _other_rows(
            path, f"{row - span.row:,} rows", f"{span.rows:,} rows in bytes {span.start:,} to {span.stop:,}"
        )


def _whole_rows(path: str, span: ByteSpan, parser: Parser, *, skip: int) -> Iterator[bytes]:
    """Yield the bytes of ``span`` in chunks of whole rows, without the first ``skip`` bytes of the file."""
    with open_text(path, start=span.start) as source:
        is_compressed = isinstance(source, pa.CompressedInputStream)
        left = None if is_compressed else span.stop - span.start
        rest = b""
        if skip:
            read_exactly(source, skip)
            left = None if left is None else left - skip
        size = CHUNK_BYTES
        while True:
            data = read_exactly(source, size if left is None else min(size, left))
            left = None if left is None else left - len(data)
            is_last = len(data) < size or left == 0
            data = rest + data
            stop = len(data) if is_last else last_row_stop(data, parser.dialect)
            if stop:
                yield data[:stop]
            rest = data[stop:]
            if is_last:
                return
            # A row that is longer than a chunk: read more of it at a time.
            size = CHUNK_BYTES if stop else size * 2


def _problems(parsed: Parsed, data: bytes, line: int, parser: Parser) -> tuple[Problem | None, ...]:
    if not parsed.unreadable:
        return ()
    stops = row_stops(data, parser.dialect)
    starts = np.append(0, stops[:-1])
    found: list[Problem | None] = [None] * parsed.table.num_rows
    for one in parsed.unreadable:
        found[one.row] = one.problem(line + _lines_before(data, int(starts[one.row]), one))
    return tuple(found)


def _lines_before(data: bytes, start: int, one: Unreadable) -> int:
    """Return the number of lines before the row that begins at ``start``, or after empty lines there."""
    while data[start : start + 1] in (b"\n", b"\r"):
        start += 1
    return data.count(b"\n", 0, start)


def _other_rows(path: str, found: str, expected: str) -> CorruptInput:
    return CorruptInput(
        "an input file holds other rows than were counted when the job was planned",
        where=path,
        found=found,
        expected=expected,
        next_step="write the file anew (its quotes may be ambiguous), and run again",
    )
