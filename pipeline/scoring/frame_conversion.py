"""Convert Arrow tables to the frames of steps and back, by rules that look at one row at a time.

The dtypes of a frame are decided once for a job, never by the rows of a batch. Batches are cut by time, so anything
that depended on a batch would differ from run to run.

- Integers and booleans that may be null have pandas' nullable dtypes, in which integers of 64 bits stay exact.
- A missing float is NaN in a frame. On the way back a column with a name of the source is NaN in the rows in which the
  source was NaN, and null in all others. In new columns every NaN is null.
- A cell of an object column that a step did not touch keeps its Arrow value, which may hold more than Python's.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StepFailed
from pipeline.scoring.arrow import (
    CONVERSION_ERRORS,
    LossyCastError,
    cast_exactly,
    decoded,
    decoded_type,
    first_difference,
    is_text,
    one_array,
    take_values,
)
from pipeline.scoring.bisection import RowsError
from pipeline.scoring.pandas_frame import pandas_type
from pipeline.sources.types import as_type

_NULLABLE_DTYPES: dict[pa.DataType, Any] = {
    pa.int8(): pd.Int8Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}
"""Dtype of a column that may be null, where NumPy's has no room for nulls."""


def to_frame(table: pa.Table, *, backend: str, never_null: Collection[str] = ()) -> pd.DataFrame:
    """Return ``table`` as a frame. Its dtypes depend on the types of ``table``, ``backend`` and ``never_null`` only.

    :param backend: ``numpy`` or ``pyarrow``; see `pipeline.spec.parts.MapStep`.
    :param never_null: columns planned without nulls; with ``numpy`` their integers have NumPy's dtypes.
    :raises RowsError: for values that the frame cannot hold.
    """
    columns = {name: _array_of(table, name, backend) for name in table.column_names}
    try:
        return _to_frame(columns, backend, never_null)
    except Exception:
        for name, column in columns.items():
            try:
                _to_frame({name: column}, backend, never_null)
            except Exception as error:
                raise RowsError(f"frame:{name}", _unfit(name, column, error)) from error
        raise


def _array_of(table: pa.Table, name: str, backend: str) -> pa.Array:
    column = table.column(name)
    try:
        array = decoded(one_array(column))
        return array if backend == "pyarrow" else as_type(array, pandas_type(array.type))
    except pa.ArrowInvalid as error:  # the offsets of texts, lists and maps have 32 bits
        unfit = ValueError(f"a frame cannot hold 2 GiB of the column {name!r} ({column.type}): {error}")
        raise RowsError(f"frame:{name}", unfit) from error


def _unfit(name: str, column: pa.Array, error: Exception) -> ValueError:
    return ValueError(
        f"pandas cannot hold a value of the column {name!r} ({column.type}): {error}. "
        "dtype_backend: pyarrow holds values of every type"
    )


def _to_frame(columns: dict[str, pa.Array], backend: str, never_null: Collection[str]) -> pd.DataFrame:
    if backend == "pyarrow":
        return _frame_of(columns, pd.ArrowDtype)
    nullable = {
        name: dtype
        for name, column in columns.items()
        if (dtype := _NULLABLE_DTYPES.get(column.type)) is not None and not _is_plain(name, column, never_null)
    }
    frame = _frame_of({name: column for name, column in columns.items() if name not in nullable}, None)
    if not nullable:
        return frame
    arrays = {name: dtype.__from_arrow__(columns[name]) for name, dtype in nullable.items()}
    if len(nullable) == len(columns):
        return pd.DataFrame(arrays, copy=False)
    for position, name in enumerate(columns):
        if name in arrays:
            frame.insert(position, name, arrays[name])
    return frame


def _is_plain(name: str, column: pa.Array, never_null: Collection[str]) -> bool:
    if name not in never_null:
        return False
    if column.null_count:
        raise ValueError("it is null, though the column has no nulls in the statistics of the planned files")
    return True


def _frame_of(columns: dict[str, pa.Array], types_mapper: Any) -> pd.DataFrame:
    frame: pd.DataFrame = pa.table(columns).to_pandas(types_mapper=types_mapper, ignore_metadata=True)
    return frame


def to_table(
    after: pd.DataFrame,
    *,
    table: pa.Table,
    before: pd.DataFrame,
    rows: np.ndarray,
    planned: pa.Schema | None,
    where: str,
) -> pa.Table:
    """Return the frame that a step returned as a table.

    :param table: the step's input.
    :param before: ``table`` as the frame that the step got.
    :param rows: int64 [rows of ``after``], position in ``table`` of each row.
    :param planned: columns to return and their types. Default: found from ``after``.
    :param where: entrypoint of the step, for errors.
    :raises StepFailed: when a column is missing, or a value does not fit its column's type.
    """
    if not len(after.columns):
        raise StepFailed("a step returned no columns", where=where)
    names = list(after.columns) if planned is None else planned.names
    if missing := [name for name in names if name not in after.columns]:
        raise StepFailed(
            "a step returned other columns than for the sample",
            where=where,
            found=", ".join(after.columns),
            expected=", ".join(missing),
            next_step="return the same columns for every batch, whatever its values",
        )
    columns, fields = [], []
    for name in names:
        conversion = _Conversion(after[name], before, table, rows)
        target = None if planned is None else planned.field(name).type
        column = _convert(conversion, name, target, where=where)
        columns.append(column)
        fields.append(pa.field(name, column.type, nullable=not conversion.is_never_null))
    if planned is None:
        return pa.Table.from_arrays(columns, schema=pa.schema(fields))
    return pa.table(columns, names=names)


def _convert(conversion: _Conversion, name: str, target: pa.DataType | None, *, where: str) -> Any:
    try:
        return conversion.find_type() if target is None else conversion.to_type(target)
    except LossyCastError as error:
        raise StepFailed(
            f"the column {name!r} that a step made has another type than in the sample",
            where=where,
            found=f"{error.value}, dtype {conversion.series.dtype}",
            expected=f"{target}, or a value that converts to it without loss",
            next_step="set the dtype of the column in the step, so that it does not depend on the rows: "
            f"frame[{name!r}].astype(…)",
        ) from error
    except CONVERSION_ERRORS as error:
        raise StepFailed(
            f"the column {name!r} that a step made cannot be written",
            where=where,
            found=f"dtype {conversion.series.dtype}: {error}"[:300],
            expected="values of one type",
        ) from error


class _Conversion:
    """The conversion of one column that a step returned."""

    def __init__(self, series: pd.Series[Any], before: pd.DataFrame, table: pa.Table, rows: np.ndarray) -> None:
        self.series = series
        self._is_complete = len(rows) == table.num_rows
        self._rows = rows
        name = series.name
        is_known = name in before.columns
        self._given: pd.Series[Any] | None = before[name] if is_known else None
        self._source: pa.ChunkedArray | None = table.column(name) if is_known else None
        self._keeps_dtype = self._given is not None and series.dtype == self._given.dtype

    @property
    def is_never_null(self) -> bool:
        """True if the column is the source's, of an integer or boolean dtype without nulls."""
        return self._keeps_dtype and self.series.dtype.kind in "iub" and isinstance(self.series.dtype, np.dtype)

    def find_type(self) -> pa.Array | pa.ChunkedArray:
        """Return the column in the type that all batches get.

        A column that keeps its name and dtype keeps its type; a dictionary gets indices of 32 bits. Any other has the
        type of its dtype; where that is unknown, as of a column of None, that of the column of its name.
        """
        if self._source is None:
            return self._infer()
        kind = written_type(self._source.type)
        if self._keeps_dtype:
            try:
                return self.to_type(kind)
            except (LossyCastError, *CONVERSION_ERRORS):
                pass
        inferred = self._infer()
        return self.to_type(kind) if pa.types.is_null(inferred.type) else inferred

    def to_type(self, target: pa.DataType) -> pa.Array | pa.ChunkedArray:
        """Return the column in the type ``target``.

        :raises LossyCastError: for a value that does not fit.
        """
        if self._is_untouched() and self._source is not None and self._source.type == target:
            return self._source
        if self._given is None or self._source is None or not (self._keeps_dtype and self.series.dtype == object):
            return self._convert_values(self.series, target)
        if written_type(self._source.type) != target:
            return self._convert_values(self.series, target)
        source = self._source if self._is_complete else take_values(self._source, self._rows)
        return self._merge_cells(self._given.to_numpy()[self._rows], source, target)

    def _is_untouched(self) -> bool:
        """Return True if the column is the very memory that the step got: the rules would give the same bits."""
        if not (self._keeps_dtype and self._is_complete) or self._given is None:
            return False
        new, old = self.series.array, self._given.array
        if not isinstance(new, pd.arrays.NumpyExtensionArray) or self.series.dtype == object:
            return False
        values, originals = new.to_numpy(), old.to_numpy()
        return bool(values.ctypes.data == originals.ctypes.data and values.strides == originals.strides)

    def _merge_cells(
        self, given: np.ndarray, source: pa.ChunkedArray, target: pa.DataType
    ) -> pa.Array | pa.ChunkedArray:
        """Return the source's values for cells that the step did not touch, and converted ones for the others.

        :param given: cells that the step got for its rows.
        :param source: their Arrow values.
        """
        source = source if source.type == target else pa.chunked_array([cast_exactly(one_array(source), target)])
        cells = self.series.to_numpy()
        same = np.fromiter(map(operator.is_, cells, given), bool, len(cells))
        if pa.types.is_nested(target):
            same[same] = _unchanged_cells(cells[same], take_values(source, np.flatnonzero(same)))
        if same.all():
            return source
        changed = self._convert_values(pd.Series(cells[~same], dtype=object), target)
        order = np.empty(len(cells), np.int64)
        order[same], order[~same] = np.arange(same.sum()), same.sum() + np.arange((~same).sum())
        untouched = take_values(source, np.flatnonzero(same))
        return take_values(pa.chunked_array([*untouched.chunks, changed], type=target), order)

    def _convert_values(self, series: pd.Series[Any], target: pa.DataType) -> pa.Array:
        try:
            array = self._to_arrow(series)
        except CONVERSION_ERRORS:
            if series.dtype != object:
                raise
            # The types of some cells, such as the pairs of a map, cannot be found from the values.
            array = pa.array(series, type=decoded_type(target), from_pandas=True)
        if self._source is not None and self._source.type == target and pa.types.is_dictionary(target):
            return _encode_like(cast_exactly(array, target.value_type), one_array(self._source), target)
        return cast_exactly(array, target)

    def _infer(self) -> pa.Array:
        array = self._to_arrow(self.series)
        return cast_exactly(array, written_type(array.type, is_made=True))

    def _to_arrow(self, series: pd.Series[Any]) -> pa.Array:
        if not (isinstance(series.dtype, np.dtype) and series.dtype.kind == "f"):
            return one_array(pa.array(series, from_pandas=True))
        values = series.to_numpy()
        missing = np.isnan(values)
        if not missing.any():
            return pa.array(values)
        if self._source is not None:
            missing &= ~_is_nan(self._source, self._rows)
        return pa.array(values, mask=missing)


def _encode_like(values: pa.Array, source: pa.DictionaryArray, target: pa.DictionaryType) -> pa.Array:
    """Return ``values`` with the dictionary of ``source``, which keeps the order of categories, and new ones after."""
    if not is_text(target.value_type):
        return cast_exactly(values, target)
    dictionary = source.dictionary
    indices = pc.index_in(values, value_set=dictionary, skip_nulls=True)
    if indices.null_count > values.null_count:
        dictionary = pa.concat_arrays([dictionary, values.filter(indices.is_null()).drop_null().unique()])
        indices = pc.index_in(values, value_set=dictionary, skip_nulls=True)
    return pa.DictionaryArray.from_arrays(indices.cast(target.index_type), dictionary, ordered=target.ordered)


def _is_nan(column: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """Return bool [rows]: True where ``column`` is NaN, and not null."""
    if not pa.types.is_floating(decoded_type(column.type)):
        return np.zeros(len(rows), dtype=bool)
    array = decoded(one_array(column))
    values: np.ndarray = np.isnan(array.to_numpy(zero_copy_only=False))
    values &= array.is_valid().to_numpy(zero_copy_only=False)
    chosen: np.ndarray = values[rows]
    return chosen


def _unchanged_cells(cells: np.ndarray, source: pa.ChunkedArray) -> np.ndarray:
    """Return bool [cells]: False for lists and dicts that a step changed in place."""
    array = decoded(one_array(source))
    originals = as_type(array, pandas_type(array.type)).to_pandas().to_numpy()
    converted = [_converted(values, source.type) for values in (cells, originals)]
    if converted[0] is not None and converted[1] is not None and converted[0].equals(converted[1]):
        return np.ones(len(cells), dtype=bool)
    pairs = zip(cells, originals, strict=True)
    return np.array([_is_equal_cell(cell, original, source.type) for cell, original in pairs], dtype=bool)


def _is_equal_cell(cell: object, original: object, kind: pa.DataType) -> bool:
    pair = [np.empty(1, dtype=object), np.empty(1, dtype=object)]
    pair[0][0], pair[1][0] = cell, original
    converted = [_converted(value, kind) for value in pair]
    if converted[0] is None or converted[1] is None:
        return False
    return first_difference(converted[0], converted[1]) is None


def _converted(cells: np.ndarray, kind: pa.DataType) -> pa.Array | None:
    try:
        return pa.array(cells, type=decoded_type(kind), from_pandas=True)
    except (*CONVERSION_ERRORS, TypeError, ValueError):
        return None


def written_type(kind: pa.DataType, *, is_made: bool = False) -> pa.DataType:
    """Return the type in which a column of the type ``kind`` leaves a step.

    :param is_made: True for a type that was found from values: other batches may have wider ones.
    """
    if pa.types.is_dictionary(kind):
        value_type = written_type(kind.value_type, is_made=is_made)
        return pa.dictionary(pa.int32(), value_type, ordered=kind.ordered and not is_made)
    if is_made and pa.types.is_large_string(kind):
        return pa.string()
    if is_made and pa.types.is_decimal128(kind):
        return pa.decimal128(38, kind.scale)
    return kind
