"""Choose how many rows of a file are decoded at a time, so that a batch has at most a number of decoded bytes.

A footer does not tell the decoded bytes of texts: a value that repeats is stored once. A plan measures the width of
rows on a sample, and rows of other files and row groups may be wider. So each row group starts with few rows, and the
number grows while they are as narrow as planned. Columns of fixed width have no surprises.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FIRST_ROWS = 2048
"""Rows of a row group that are decoded first."""
GROWTH = 8
"""Largest ratio of the rows of two consecutive pieces of a row group."""
_SMALL_GROUP_ROWS = 16_384
"""Row groups with fewer rows are decoded without a start of their own: their rows are few."""


class DecodedBytes:
    """The measure of the decoded bytes of batches with one schema.

    Columns of fixed width count by their types: asking Arrow for the bytes of a column takes longer than decoding a
    few thousand numbers.
    """

    def __init__(self, schema: pa.Schema) -> None:
        bits = [_bits(field.type) for field in schema]
        self._row_bytes = sum(width + 1 for width in bits if width is not None) / 8
        self._measured = [number for number, width in enumerate(bits) if width is None]

    @property
    def is_fixed(self) -> bool:
        """True if every row takes the same bytes."""
        return not self._measured

    def __call__(self, data: pa.RecordBatch) -> int:
        """Return the bytes of ``data``, with dictionary columns counted as if they were decoded."""
        measured = sum(_column_bytes(data.column(number)) for number in self._measured)
        return int(data.num_rows * self._row_bytes) + measured


class DecodingSize:
    """The number of rows to decode next in one partition."""

    def __init__(self, *, rows: int, most_bytes: int, width: float) -> None:
        """Start without a measurement.

        :param rows: largest number of rows.
        :param most_bytes: decoded bytes that the rows may have; 0: no limit.
        :param width: planned bytes of a decoded row.
        """
        self.most_rows = rows
        self.most_bytes = most_bytes
        self._width = max(width, 1.0)
        self.rows = rows

    def start_group(self) -> None:
        """Start a row group, whose rows may be wider than those before."""
        self.rows = min(self._fitting(), FIRST_ROWS)

    def after(self, rows: int, size: int) -> None:
        """Choose the next number of rows, after ``rows`` rows had ``size`` decoded bytes."""
        if rows:
            self._width = max(self._width, size / rows)
            self.rows = min(self._fitting(), GROWTH * max(rows, self.rows))

    def _fitting(self) -> int:
        return max(1, min(self.most_rows, int(self.most_bytes / self._width)))


def decode_limited(
    file: pq.ParquetFile, groups: range, *, columns: list[str] | None, size: DecodingSize
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of ``groups``, as many at a time as ``size`` says before each piece.

    No piece holds the last rows of a row group and the first rows of a large one.
    """
    edges = _edges(file.metadata, groups)
    done, measure = 0, None
    size.start_group()
    for data in file.iter_batches(size.rows, row_groups=groups, columns=columns, use_threads=False):
        done, measure = done + data.num_rows, measure or DecodedBytes(data.schema)
        size.after(data.num_rows, measure(data))
        yield data
        # Not kept here while the next one is decoded: it may be large.
        del data
        while edges and edges[0] <= done:
            size.start_group()
            del edges[0]
        _set_rows(file, min(size.rows, edges[0] - done) if edges else size.rows)


def split_by_bytes(
    data: pa.RecordBatch, most_bytes: int, *, measure: DecodedBytes
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Cut ``data`` into batches of at most ``most_bytes`` decoded bytes, or of one row. Yield them with their bytes.

    Nothing is copied.
    """
    size = measure(data)
    if data.num_rows < 2 or size <= most_bytes:
        yield data, size
        return
    half = data.num_rows // 2
    yield from split_by_bytes(data.slice(0, half), most_bytes, measure=measure)
    yield from split_by_bytes(data.slice(half), most_bytes, measure=measure)


def _edges(metadata: pq.FileMetaData, groups: range) -> list[int]:
    """Return the first row of each large row group but the first, counted from the first row of ``groups``."""
    edges, row = list[int](), 0
    for group in groups:
        rows = metadata.row_group(group).num_rows
        if row and rows >= _SMALL_GROUP_ROWS:
            edges.append(row)
        row += rows
    return edges


def _set_rows(file: Any, rows: int) -> None:
    """Set the rows of the next piece of an iterator of ``file``.

    Arrow's reader asks for this number before each piece. A pyarrow without the method keeps the first, small number.
    """
    change = getattr(file.reader, "set_batch_size", None)
    if change is not None:
        change(rows)


@lru_cache(maxsize=1024)
def _bits(kind: pa.DataType) -> int | None:
    """Return the bits of a value, without that for null; None if values differ."""
    types = pa.types
    if isinstance(kind, pa.BaseExtensionType):
        return _bits(kind.storage_type)
    if types.is_struct(kind):
        inner = [_bits(field.type) for field in kind]
        return None if None in inner else sum(bits + 1 for bits in inner if bits is not None)
    if types.is_fixed_size_list(kind):
        bits = _bits(kind.value_type)
        return None if bits is None else kind.list_size * (bits + 1)
    if types.is_null(kind):
        return 0
    if types.is_primitive(kind) or types.is_decimal(kind) or types.is_fixed_size_binary(kind):
        return int(kind.bit_width)
    return None


def _column_bytes(column: pa.Array) -> int:
    """Return the decoded bytes of a column.

    A dictionary is that of a whole row group, whatever the rows of the column: its values count by their mean width.
    """
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    values = column.dictionary
    return int(column.indices.nbytes + len(column) * values.nbytes / max(len(values), 1))
