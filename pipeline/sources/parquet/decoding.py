"""Choose how many rows of a file are decoded at a time, so that a batch has at most a number of decoded bytes.

A footer does not tell the decoded bytes of texts: a value that repeats is stored once. A plan measures the width of
rows on a sample, and rows of other files and row groups may be wider. So each row group starts with few rows, and the
number grows while they are as narrow as planned. Columns of fixed width have no surprises.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sources.decoded_bytes import DecodedBytes

FIRST_ROWS = 2048
"""Rows of a row group that are decoded first."""
GROWTH = 8
"""Largest ratio of the rows of two consecutive pieces of a row group."""
_SMALL_GROUP_ROWS = 16_384
"""Row groups with fewer rows are decoded without a start of their own: their rows are few."""


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
