"""Select, compare and cast Arrow columns of every type; Arrow itself cannot take from view types."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa

from pipeline.scoring.value_text import value_text
from pipeline.sources.types import without_extensions

CONVERSION_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError)
"""Errors that pyarrow raises for values that do not fit a type."""
EXACT_FLOAT = 2**53
"""Integers beyond it are not all floats, so that a larger float may stand for another integer."""


class LossyCastError(ValueError):
    """A value cannot be cast to a type without loss."""

    def __init__(self, row: int, value: str, kind: pa.DataType, target: pa.DataType) -> None:
        super().__init__(f"{value} of type {kind} in row {row} is not a valid {target}")
        self.row = row
        """Position of the value in its column."""
        self.value = value
        """The value as text, at most 100 characters."""


def take_rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """Return the given rows, in the given order.

    :param rows: int64 [rows], positions in ``table``.
    """
    if not table.num_columns:
        return table.slice(0, len(rows))
    return pa.Table.from_arrays([take_values(column, rows) for column in table.columns], schema=table.schema)


def take_values(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """Return the given rows of one column; see `take_rows`."""
    try:
        return column.take(pa.array(rows))
    except pa.ArrowNotImplementedError:
        # Slicing works for every type: one slice for each run of adjacent rows.
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        stops = np.append(starts[1:], len(rows))
        parts = [column.slice(rows[a], b - a) for a, b in zip(starts, stops, strict=True)] if len(rows) else []
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=column.type)


def one_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return ``column`` as one array; dictionaries of several chunks are unified."""
    if isinstance(column, pa.Array):
        return column
    if column.num_chunks == 1:
        return column.chunk(0)
    if pa.types.is_dictionary(column.type):
        column = column.unify_dictionaries()
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.nulls(0, column.type)


def decoded(array: pa.Array) -> pa.Array:
    """Return ``array`` without extension type, dictionary and view: types of which Arrow can select rows."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return decoded(array.storage)
    if pa.types.is_dictionary(kind):
        return decoded(array.dictionary_decode())
    return array if (plain := decoded_type(kind)) == kind else array.cast(plain)


def decoded_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of `decoded` arrays of the type ``kind``."""
    if isinstance(kind, pa.BaseExtensionType):
        return decoded_type(kind.storage_type)
    if pa.types.is_dictionary(kind):
        return decoded_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.large_string()
    return pa.large_binary() if pa.types.is_binary_view(kind) else without_extensions(kind)


def cast_exactly(array: pa.Array, target: pa.DataType) -> pa.Array:
    """Cast ``array`` to ``target``: dictionaries, widths and units may change, values never do.

    Numbers become other numbers only, text only text, booleans only booleans. A float is no integer at 2**53 and
    beyond, where it may have been rounded before.

    :raises LossyCastError: for the first value that does not fit.
    """
    if array.type == target:
        return array
    if isinstance(target, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(target, cast_exactly(array, target.storage_type))
    if isinstance(array.type, pa.BaseExtensionType):
        return cast_exactly(array.storage, target)
    if pa.types.is_dictionary(array.type):
        return cast_exactly(array.dictionary_decode(), target)
    if array.null_count == len(array):
        return pa.nulls(len(array), target)
    if pa.types.is_dictionary(target):
        values = decoded(cast_exactly(array, target.value_type)).dictionary_encode()
        return values if values.type == target else _encoded(values, target)
    result = _try_cast(array, target)
    if result is not None:
        return result
    row = _first_failing(array, lambda part: _try_cast(part, target) is not None)
    raise LossyCastError(row, value_text(array, row), array.type, target)


def _encoded(values: pa.DictionaryArray, target: pa.DataType) -> pa.Array:
    parts = values.indices.cast(target.index_type), values.dictionary.cast(target.value_type)
    return pa.DictionaryArray.from_arrays(*parts, ordered=target.ordered)


def _try_cast(array: pa.Array, target: pa.DataType) -> pa.Array | None:
    """Return ``array`` as ``target``; None if a value would change."""
    if array.null_count == len(array):
        return pa.nulls(len(array), target)
    if array.type != target and not _is_same_kind(array.type, target):
        return None
    try:
        result = array.cast(target)
        if _loses_silently(array.type, target):
            back = result.cast(array.type, safe=False)
            return result if first_difference(array, back) is None else None
    except CONVERSION_ERRORS:
        return None
    if pa.types.is_floating(array.type) and pa.types.is_integer(target):
        values = np.abs(array.drop_null().to_numpy(zero_copy_only=False))
        return result if values.max(initial=0) < EXACT_FLOAT else None
    return result


def is_text(kind: pa.DataType) -> bool:
    """Return True for strings of any layout."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


_KINDS: tuple[Callable[[pa.DataType], bool], ...] = (
    lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind),
    pa.types.is_boolean,
    is_text,
    lambda kind: (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    ),
    lambda kind: pa.types.is_decimal(kind) or pa.types.is_integer(kind),
    lambda kind: pa.types.is_timestamp(kind) and kind.tz is None,
    lambda kind: pa.types.is_timestamp(kind) and kind.tz is not None,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_duration,
    lambda kind: pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind),
    pa.types.is_struct,
    pa.types.is_map,
)
"""Types within one line hold the same kind of values."""


def _is_same_kind(kind: pa.DataType, target: pa.DataType) -> bool:
    kind, target = without_extensions(kind), without_extensions(target)
    if not any(holds(kind) and holds(target) for holds in _KINDS):
        return False
    if pa.types.is_struct(kind):
        names = [[part.field(number).name for number in range(part.num_fields)] for part in (kind, target)]
        if names[0] != names[1]:
            return False
    pairs = [(kind.field(number).type, target.field(number).type) for number in range(kind.num_fields)]
    return all(one == other or pa.types.is_null(one) or _is_same_kind(one, other) for one, other in pairs)


def _loses_silently(kind: pa.DataType, target: pa.DataType) -> bool:
    """Return True where Arrow's safe cast may change values."""
    return bool((pa.types.is_floating(kind) and pa.types.is_floating(target)) or pa.types.is_nested(kind))


def _first_failing(array: pa.Array, works: Callable[[pa.Array], bool]) -> int:
    """Return the first row on which ``works`` fails; it fails on ``array``."""
    start, stop = 0, len(array)
    while stop - start > 1:
        middle = (start + stop) // 2
        if works(array.slice(start, middle - start)):
            start = middle
        else:
            stop = middle
    return start


def first_difference(one: pa.Array, other: pa.Array) -> int | None:
    """Return the first row in which two columns differ in value, null or NaN; None if they are equal.

    Bits count: 0.0 is not -0.0. All NaNs are equal. Dictionaries are compared by value.

    :param other: column of the same type and length.
    """
    one, other = decoded(one), decoded(other)
    if pa.types.is_floating(one.type):
        differs = one.is_valid().to_numpy(zero_copy_only=False) != other.is_valid().to_numpy(zero_copy_only=False)
        differs |= _bits(one) != _bits(other)
        return int(np.argmax(differs)) if differs.any() else None
    if one.equals(other):
        return None
    for row in range(len(one)):
        if not one[row].equals(other[row]) and value_text(one, row, limit=None) != value_text(other, row, limit=None):
            return row
    return None


def _bits(array: pa.Array) -> np.ndarray:
    values = np.array(array.to_numpy(zero_copy_only=False))
    values[np.isnan(values)] = np.nan
    return values.view(f"u{values.itemsize}")
