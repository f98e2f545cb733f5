"""Call map steps with pandas frames, and convert the results to Arrow without loss.

pandas cannot hold all that Arrow can (a null in an integer column, a decimal's scale, a nested type). Columns that a
step did not change are therefore not converted back: their Arrow originals are used.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import StepFailed
from pipeline.scoring.arrow import CONVERSION_ERRORS, take_values
from pipeline.scoring.bisection import blame_rows
from pipeline.scoring.rows import Rows
from pipeline.scoring.steps import Step

ROW_INDEX = "row"
"""Name of the index of a step's frame: position in the batch, int64, from 0. It identifies the remaining rows."""


def run_steps(steps: Sequence[Step], rows: Rows) -> Rows:
    """Run ``steps`` one after the other. Return the rows that they keep, in input order.

    :raises RowsError: when a step raises an exception that rows may have caused.
    :raises StepFailed: when the result of a step is not a frame of these rows.
    """
    table, position = rows.table, rows.position
    for backend, group in _by_backend(steps):
        before = _to_pandas(table, backend)
        # Writing into a shallow copy copies first (pandas' copy-on-write), so that `before` stays as it is.
        after = before.copy(deep=False)
        kept = np.arange(table.num_rows, dtype=np.int64)
        for step in group:
            index = pd.Index(np.arange(len(after), dtype=np.int64), name=ROW_INDEX)
            after, remaining = _call_step(step, after.set_axis(index, axis=0))
            kept = kept[remaining]
        table, position = _to_arrow(after, table, before, kept, where=group[-1].entrypoint), position[kept]
    return Rows(table, position)


def _by_backend(steps: Sequence[Step]) -> list[tuple[str, list[Step]]]:
    """Group consecutive steps of one backend, which pass the frame on without conversion."""
    groups: list[tuple[str, list[Step]]] = []
    for step in steps:
        if groups and groups[-1][0] == step.dtype_backend:
            groups[-1][1].append(step)
        else:
            groups.append((step.dtype_backend, [step]))
    return groups


def _to_pandas(table: pa.Table, backend: str) -> pd.DataFrame:
    frame: pd.DataFrame = table.to_pandas(
        types_mapper=_arrow_dtype if backend == "pyarrow" else None, ignore_metadata=True
    )
    return frame


def _arrow_dtype(kind: pa.DataType) -> pd.ArrowDtype:
    # Arrow cannot select rows of view types, which would make a step fail at its first filter.
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    return pd.ArrowDtype(views.get(kind, kind))


def _call_step(step: Step, frame: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Call a step. Return its frame in the order of the rows, and the position in ``frame`` of each row."""
    count = len(frame)
    with blame_rows(f"step:{step.entrypoint}"), _show_warnings():
        result: Any = step.function(frame)
    if not isinstance(result, pd.DataFrame):
        raise _broken(step, "a step must return a DataFrame", found=type(result).__name__)
    names = list(result.columns)
    if any(not isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise _broken(
            step, "a step returned columns that cannot be written", found=repr(names)[:200], expected="unique strings"
        )
    return _remaining_rows(step, result, count)


def _show_warnings() -> AbstractContextManager[Any]:
    """Show warnings of the user's code, and never turn them into errors, under any filters of the process."""
    if all(action != "error" for action, *_ in warnings.filters):
        return nullcontext()  # filters belong to the process, and other threads use them
    return warnings.catch_warnings(action="default")


def _remaining_rows(step: Step, result: pd.DataFrame, count: int) -> tuple[pd.DataFrame, np.ndarray]:
    index = result.index
    if index.name != ROW_INDEX or index.nlevels != 1:
        if len(result) == count:
            return result, np.arange(count, dtype=np.int64)
        raise _broken(
            step,
            f"a step lost the index {ROW_INDEX!r} and returned another number of rows: which ones is unknown",
            found=f"{len(result)} of {count} rows, index {index.name!r}",
            expected=f"the index {ROW_INDEX!r} it was given, less the rows it drops",
            next_step="do not reset the index, or set it again with frame.set_index('row')",
        )
    if not pd.api.types.is_integer_dtype(index.dtype):
        raise _broken(step, f"a step changed the index {ROW_INDEX!r}", found=str(index.dtype), expected="int64")
    rows = index.to_numpy(dtype=np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= count or not index.is_unique):
        raise _broken(
            step,
            "a step added rows: it may change and drop them only",
            found=f"{len(rows)} rows from {count}, {len(rows) - index.nunique()} of them twice",
            expected=f"each value of the index {ROW_INDEX!r} at most once",
        )
    if not index.is_monotonic_increasing:
        order = np.argsort(rows, kind="stable")
        return result.iloc[order], rows[order]
    return result, rows


def _broken(step: Step, message: str, **details: str) -> StepFailed:
    return StepFailed(message, where=step.entrypoint, **details)


def _to_arrow(after: pd.DataFrame, table: pa.Table, before: pd.DataFrame, rows: np.ndarray, *, where: str) -> pa.Table:
    """Convert ``after`` to Arrow. For a column equal to ``before`` at ``rows``, use the original one of ``table``."""
    is_complete = len(rows) == table.num_rows
    columns = []
    for position, name in enumerate(after.columns):
        series = after.iloc[:, position]
        column = None
        if name in before.columns and _is_unchanged(series, before[name], None if is_complete else rows):
            column = table.column(name) if is_complete else take_values(table.column(name), rows)
            if pa.types.is_nested(column.type) and not _has_same_cells(column, series):
                column = None
        columns.append(_convert(series, name, where=where) if column is None else column)
    if not columns:
        raise StepFailed("a step returned no columns", where=where)
    return pa.table(columns, names=list(after.columns))


def _is_unchanged(after: pd.Series[Any], before: pd.Series[Any], rows: np.ndarray | None) -> bool:
    if after.dtype != before.dtype:
        return False
    values, originals = after.array, before.array
    if not isinstance(values, pd.arrays.NumpyExtensionArray):
        originals = originals if rows is None else originals.take(rows)
        return bool(values.equals(originals))
    new, old = values.to_numpy(), originals.to_numpy()
    if rows is None and new.ctypes.data == old.ctypes.data and new.strides == old.strides:
        return True
    old = old if rows is None else old[rows]
    if new.dtype == object:
        return all(map(operator.is_, new, old))
    # Bits, not values: 0.0 in place of -0.0 is a change, and a NaN that stayed is none.
    bits = f"u{new.dtype.itemsize}"
    return bool(np.array_equal(np.ascontiguousarray(new).view(bits), np.ascontiguousarray(old).view(bits)))


def _has_same_cells(column: pa.ChunkedArray, series: pd.Series[Any]) -> bool:
    """Return False if a step changed lists or dicts of ``series`` in place; ``column`` has the original ones."""
    if series.dtype != object:
        return True
    try:
        cells = [pa.array(cells, type=column.type, from_pandas=True) for cells in (series, column.to_pandas())]
    except CONVERSION_ERRORS:
        return False
    return bool(cells[0].equals(cells[1]))


def _convert(series: pd.Series[Any], name: str, *, where: str) -> pa.Array:
    try:
        column = pa.array(series, from_pandas=True)
    except CONVERSION_ERRORS as error:
        raise StepFailed(
            f"the column {name!r} that a step made cannot be written",
            where=where,
            found=f"dtype {series.dtype}: {error}"[:300],
            expected="values of one type",
        ) from error
    # pandas makes large strings and dictionaries of any width: use one type for all batches.
    kind = plain_type(column.type)
    return column if kind == column.type else pc.cast(column, kind)


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type in which a column of pandas is written."""
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_dictionary(kind):
        return pa.dictionary(pa.int32(), plain_type(kind.value_type), ordered=kind.ordered)
    return kind
