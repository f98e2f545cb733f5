"""Measure and limit the decoded bytes of batches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pyarrow as pa


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
