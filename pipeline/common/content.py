"""`Content`: a digest of the rows of a table, equal for the same rows in any order and in files of any layout.

It tells whether a computation gave the same partition twice. Sums of floats depend on the order of their terms, and so
do columns that a groupby made of them: floats are compared by their sums, within what rounding can change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_types = pa.types
_NULL = np.uint64(0x9E3779B97F4A7C15)
_ROUNDING = {16: 1e-2, 32: 1e-4, 64: 1e-9}
"""Largest difference of two sums, as a share of the sum of the magnitudes, by bits of the type."""


@dataclass(frozen=True, slots=True)
class FloatSum:
    """The finite values of a column of floats, added up."""

    column: str
    bits: int
    total: float
    magnitude: float
    """Sum of the absolute values."""

    def agrees(self, other: FloatSum) -> bool:
        """Return True if rounding explains the difference of two sums."""
        tolerance = _ROUNDING[self.bits] * max(self.magnitude, other.magnitude)
        return self.column == other.column and abs(self.total - other.total) <= tolerance


@dataclass(frozen=True, slots=True)
class Content:
    """Rows of a table, their digest without floats, and the sums of floats."""

    rows: int
    digest: str
    """16 hexadecimal digits over names, types, nulls and all values but floats."""
    sums: tuple[FloatSum, ...] = ()

    def agrees(self, other: Content) -> bool:
        """Return True if both are of the same rows."""
        return (
            (self.rows, self.digest) == (other.rows, other.digest)
            and len(self.sums) == len(other.sums)
            and all(own.agrees(others) for own, others in zip(self.sums, other.sums, strict=True))
        )

    def difference(self, other: Content) -> str:
        """Return a text for people: how this content differs from ``other``."""
        if self.rows != other.rows:
            return f"{self.rows:,} rows, not {other.rows:,}"
        if self.digest != other.digest:
            return "other values in the same number of rows"
        both = zip(self.sums, other.sums, strict=False)
        names = [own.column for own, others in both if not own.agrees(others)]
        return f"other values of {', '.join(names)}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for storage as JSON."""
        sums = [[one.column, one.bits, one.total, one.magnitude] for one in self.sums]
        return {"rows": self.rows, "digest": self.digest, "sums": sums}

    @staticmethod
    def from_dict(record: Mapping[str, Any]) -> Content:
        """Inverse of `to_dict`."""
        return Content(record["rows"], record["digest"], tuple(FloatSum(*one) for one in record["sums"]))


def content_of(table: pa.Table) -> Content:
    """Return the content of a table. The order of its rows, and how it is chunked, change nothing.

    Columns of lists or structs with floats count by their number of nulls only.
    """
    rows = np.zeros(table.num_rows, np.uint64)
    sums, parts = [], []
    for field, column in zip(table.schema, table.columns, strict=True):
        values = _decoded(column)
        parts.append([field.name, str(values.type), values.null_count])
        if _types.is_floating(values.type):
            total, unusual = _float_sum(field.name, values)
            sums.append(total)
            parts[-1] += unusual
        elif not _holds_floats(values.type):
            rows = _mixed(rows * np.uint64(31) + _hashes(values))
    text = json.dumps([table.num_rows, int(rows.sum(dtype=np.uint64)), parts])
    return Content(table.num_rows, hashlib.sha256(text.encode()).hexdigest()[:16], tuple(sums))


def _decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(column.type.value_type) if _types.is_dictionary(column.type) else column


def _holds_floats(kind: pa.DataType) -> bool:
    return any(
        _types.is_floating(child) or _holds_floats(child)
        for child in (kind.field(number).type for number in range(kind.num_fields))
    )


def _float_sum(name: str, column: pa.ChunkedArray) -> tuple[FloatSum, list[int]]:
    values = np.asarray(column.drop_null().cast(pa.float64()))
    finite = values[np.isfinite(values)]
    unusual = [int(np.isnan(values).sum()), int(np.isposinf(values).sum()), int(np.isneginf(values).sum())]
    bits = column.type.bit_width
    return FloatSum(name, bits, float(finite.sum()), float(np.abs(finite).sum())), unusual


def _hashes(column: pa.ChunkedArray) -> np.ndarray:
    """Return 64 bits for each value."""
    kind = column.type
    if _types.is_null(kind):
        return np.full(len(column), _NULL)
    if _types.is_boolean(kind) or _types.is_integer(kind):
        found = _mixed(_numbers(column.cast(pa.uint8()) if _types.is_boolean(kind) else column))
    elif _types.is_temporal(kind) and kind.bit_width in (32, 64):
        # `view` takes arrays only.
        chunks = [chunk.view(pa.int64() if kind.bit_width == 64 else pa.int32()) for chunk in column.chunks]
        found = _mixed(_numbers(pa.chunked_array(chunks, pa.int64() if kind.bit_width == 64 else pa.int32())))
    else:
        found = _text_hashes(column)
    return np.where(np.asarray(column.is_null()), _NULL, found) if column.null_count else found


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(pc.fill_null(column, 0)).astype(np.uint64)


def _text_hashes(column: pa.ChunkedArray) -> np.ndarray:
    import pandas as pd  # slow to import, and not needed for numbers

    kind = column.type
    if _types.is_string(kind) or _types.is_large_string(kind):
        encoded = column.combine_chunks().dictionary_encode()
        texts = encoded.dictionary.to_pylist()
        codes = np.asarray(pc.fill_null(encoded.indices, 0))
    else:
        codes, unique = pd.factorize(np.array([repr(value) for value in column.to_pylist()], dtype=object))
        texts = list(unique)
    if not texts:
        return np.full(len(column), _NULL)
    found: np.ndarray = pd.util.hash_array(np.array(texts, dtype=object), categorize=False)[codes]
    return found


def _mixed(values: np.ndarray) -> np.ndarray:
    """Spread the bits of each value (splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed
