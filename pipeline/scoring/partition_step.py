"""Call a function of Dask partitions as a ``map`` step: with the index, the dtypes and the columns of the partition.

Rows travel with hidden columns: the number of their partition, their position in it, and the levels of its index. A
call gets rows of one partition only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.errors import StepFailed
from pipeline.scoring.arrow import CONVERSION_ERRORS
from pipeline.scoring.table_steps import ROW_COLUMN

PARTITION = "__partition__"
"""Hidden column: number of the row's partition, int32, from 0."""
POSITION = "__position__"
"""Hidden column: position of the row in its partition, int64, from 0."""
_INDEX = "__index_{}__"


def hidden_columns(levels: int) -> tuple[str, ...]:
    """Return the names of the hidden columns of frames whose index has so many levels."""
    return PARTITION, POSITION, *(_INDEX.format(level) for level in range(levels))


def with_places(part: pd.DataFrame, partition: int) -> pd.DataFrame:
    """Return a partition with its index as hidden columns, and the place of each row."""
    places = {
        PARTITION: np.full(len(part), partition, np.int32),
        POSITION: np.arange(len(part), dtype=np.int64),
    }
    levels = {_INDEX.format(level): part.index.get_level_values(level) for level in range(part.index.nlevels)}
    hidden = pd.DataFrame({**places, **{name: pd.Series(values) for name, values in levels.items()}})
    return pd.concat([part.reset_index(drop=True), hidden], axis=1)


@dataclass(frozen=True)
class FrameType:
    """Columns, dtypes and index of a frame, without rows; equal frames have equal bytes as a pickle."""

    columns: tuple[tuple[str, Any], ...]
    """Name and dtype of each column."""
    index: tuple[tuple[Any, Any], ...]
    """Name and dtype of each level of the index."""

    @staticmethod
    def of(meta: pd.DataFrame) -> FrameType:
        """Return the type of a frame."""
        levels = [meta.index.get_level_values(level) for level in range(meta.index.nlevels)]
        return FrameType(
            tuple((str(name), dtype) for name, dtype in meta.dtypes.items()),
            tuple((level.name, level.dtype) for level in levels),
        )

    def frame(self, table: pa.Table) -> pd.DataFrame:
        """Return the rows of a table with hidden columns as a frame of this type."""
        index = self.index_of(table)
        made = {name: _series(table.column(name), dtype) for name, dtype in self.columns}
        return pd.DataFrame({name: series.set_axis(index) for name, series in made.items()}, index=index)

    def empty(self) -> pd.DataFrame:
        """Return a frame of this type without rows."""
        levels = [pd.Index(pd.Series([], dtype=dtype), name=name) for name, dtype in self.index]
        index = levels[0] if len(levels) == 1 else pd.MultiIndex.from_arrays(levels)
        made = {name: pd.Series([], dtype=dtype, index=index) for name, dtype in self.columns}
        return pd.DataFrame(made, index=index, columns=list(made))

    def index_of(self, table: pa.Table) -> pd.Index[Any]:
        """Return the index of the rows of a table with hidden columns."""
        levels: list[pd.Index[Any]] = [
            # Not of the Series, whose name would be that of an index without one.
            pd.Index(_series(table.column(_INDEX.format(number)), dtype).array, name=name)
            for number, (name, dtype) in enumerate(self.index)
        ]
        if len(levels) == 1:
            return levels[0]
        return pd.MultiIndex.from_arrays(levels, names=[name for name, _ in self.index])


def _series(column: pa.ChunkedArray, dtype: Any) -> pd.Series[Any]:
    """Return a column as a Series of a dtype that holds its values; else of the dtype that pandas gives it."""
    if isinstance(dtype, pd.ArrowDtype):
        return pd.Series(pd.arrays.ArrowExtensionArray(column.cast(dtype.pyarrow_dtype)))
    if isinstance(dtype, pd.CategoricalDtype) and _is_open(dtype):
        return pd.Series(column.to_pandas()).astype("category")
    if not isinstance(dtype, np.dtype) and hasattr(dtype, "__from_arrow__"):
        return pd.Series(dtype.__from_arrow__(column))
    made = pd.Series(column.to_pandas())
    return made if made.dtype == dtype else made.astype(dtype)


def _is_open(dtype: pd.CategoricalDtype) -> bool:
    """True for categories that Dask does not know before it has computed them."""
    return dtype.categories is None or "__UNKNOWN_CATEGORIES__" in dtype.categories


class PartitionStep:
    """A function of partitions as a step of Arrow tables with hidden columns."""

    def __init__(self, function: Callable[..., Any], given: FrameType, made: FrameType | None) -> None:
        self.func = function
        """By this name, errors and reports find the name of the function."""
        self.given = given
        self.made = made

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the result for the rows of each partition in ``table``, with their hidden columns."""
        numbers = table.column(PARTITION).to_numpy()
        pieces = [self._call(table.take(np.flatnonzero(numbers == number))) for number in np.unique(numbers)]
        return pa.concat_tables(pieces or [self._call(table)], promote_options="permissive")

    def _call(self, table: pa.Table) -> pa.Table:
        # A step gets a row that is alone twice.
        first = np.sort(np.unique(table.column(POSITION).to_numpy(), return_index=True)[1])
        table = table if len(first) == table.num_rows else table.take(first)
        frame = self.given.frame(table)
        index = frame.index
        result = self.func(frame)
        if not isinstance(result, pd.DataFrame):
            raise self._broken("a function of partitions must return a DataFrame", found=type(result).__name__)
        rows = self._positions(result.index, index)
        hidden = [*hidden_columns(index.nlevels), ROW_COLUMN]
        if any(not isinstance(name, str) or name in hidden for name in result.columns) or not result.columns.is_unique:
            raise self._broken(
                "a function of partitions returned columns that cannot be written",
                found=repr(list(result.columns))[:200],
                expected="unique strings",
            )
        kept = table.select(hidden).take(pa.array(rows))
        columns = self._columns(result)
        return pa.Table.from_arrays([*columns.values(), *kept.columns], names=[*columns, *hidden])

    def _positions(self, returned: pd.Index[Any], given: pd.Index[Any]) -> np.ndarray:
        """Return the position among the given rows of each row that was returned."""
        if returned is given or (len(returned) == len(given) and returned.equals(given)):
            return np.arange(len(given), dtype=np.int64)
        if given.is_unique and returned.nlevels == given.nlevels:
            rows = np.asarray(given.get_indexer(returned), dtype=np.int64)
            if (rows >= 0).all() and len(np.unique(rows)) == len(rows):
                return rows
        raise self._broken(
            "a function of partitions lost the index: which of its rows is which is unknown",
            found=f"{len(returned)} rows from {len(given)}"
            + ("" if given.is_unique else ", in a partition in which a value of the index stands twice"),
            expected="the index it was given, less the rows it drops",
            next_step="keep the index, as assign, join and boolean masks do"
            if given.is_unique
            else "call reset_index() on the Dask frame before, or keep all rows",
        )

    def _columns(self, result: pd.DataFrame) -> Mapping[str, pa.Array | pa.ChunkedArray]:
        if self.made is not None:
            wanted = dict(self.made.columns)
            if list(result.columns) != list(wanted):
                raise self._broken(
                    "a function of partitions returned other columns than meta has",
                    found=", ".join(map(str, result.columns)),
                    expected=", ".join(wanted),
                    next_step="give the meta of what it returns, or leave meta out",
                )
            changed = {name: dtype for name, dtype in wanted.items() if result[name].dtype != dtype}
            closed = {name: dtype for name, dtype in changed.items() if not _is_open_category(dtype)}
            result = result.astype(closed) if closed else result
        try:
            return {name: _arrow(result[name]) for name in result.columns}
        except CONVERSION_ERRORS as error:
            raise self._broken(
                "a column of a function of partitions has no type in Parquet",
                found=str(error)[:300],
                expected="columns of one type each",
                next_step="convert the column in the function",
            ) from error

    def _broken(self, message: str, **details: str) -> StepFailed:
        return StepFailed(message, where=getattr(self.func, "__name__", type(self.func).__name__), **details)


def _is_open_category(dtype: Any) -> bool:
    return isinstance(dtype, pd.CategoricalDtype) and _is_open(dtype)


def _arrow(series: pd.Series[Any]) -> pa.Array | pa.ChunkedArray:
    made = pa.array(series, from_pandas=True)
    if pa.types.is_dictionary(made.type):
        return made.cast(made.type.value_type)
    if pa.types.is_null(made.type) and isinstance(series.dtype, pd.StringDtype):
        return made.cast(pa.string())
    return made


def is_async(function: Callable[..., Any]) -> bool:
    """True for a function whose calls have to be awaited."""
    called: Any = function if inspect.isroutine(function) else getattr(function, "__call__", function)  # noqa: B004
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(called)


def result_type(schema: pa.Schema, given: FrameType, made: FrameType | None, *, nullable: Sequence[str]) -> FrameType:
    """Return the type of the frame of results.

    :param schema: Arrow schema of the visible columns, as they are kept.
    :param made: type that the caller has given.
    :param nullable: columns with nulls.
    """
    if made is not None:
        return FrameType(made.columns, given.index)
    before = dict(given.columns)
    columns = [(field.name, _dtype(field, before.get(field.name), field.name in nullable)) for field in schema]
    return FrameType(tuple(columns), given.index)


def _dtype(field: pa.Field, before: Any, has_nulls: bool) -> Any:
    """Return the dtype of a column: that of the input's column of its name, if it holds the same type."""
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if before is not None and _arrow_type(before) in (kind, None) and not (has_nulls and _has_no_null(before)):
        return before
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pd.StringDtype("pyarrow")
    made = kind.to_pandas_dtype() if not pa.types.is_nested(kind) else object
    if pa.types.is_timestamp(kind) or pa.types.is_duration(kind):
        return pa.array([], kind).to_pandas().dtype
    if pa.types.is_boolean(kind):
        return pd.BooleanDtype() if has_nulls else np.dtype(bool)
    if pa.types.is_integer(kind):
        name = str(kind).replace("uint", "UInt").replace("int", "Int") if has_nulls else str(kind)
        return pd.Series([], dtype=name).dtype
    return np.dtype(made) if isinstance(made, type) and issubclass(made, np.generic) else np.dtype(object)


def _arrow_type(dtype: Any) -> pa.DataType | None:
    """Return the Arrow type of the values of a dtype; None: of object, and of categories that are not known."""
    if isinstance(dtype, pd.CategoricalDtype):
        if _is_open(dtype):
            return None
        dtype = dtype.categories.dtype
    kind = pa.array(pd.Series([], dtype=dtype), from_pandas=True).type
    if isinstance(dtype, pd.StringDtype):
        return pa.string()
    return None if dtype.kind == "O" else kind


def _has_no_null(dtype: Any) -> bool:
    return isinstance(dtype, np.dtype) and dtype.kind in "iub"
