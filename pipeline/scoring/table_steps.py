"""Call steps that take Arrow tables or Polars frames. A column says which rows a step returned, as an index does."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from pipeline.errors import StepFailed
from pipeline.scoring.arrow import CONVERSION_ERRORS, LossyCastError, cast_exactly, decoded, one_array, take_rows

FrameKind = Literal["pandas", "arrow", "polars"]
ROW_COLUMN = "__row__"
"""Column of a step's table: position in the batch, int64, from 0. It identifies the remaining rows."""
_ANNOTATIONS: dict[str, FrameKind] = {
    "pa.Table": "arrow",
    "pyarrow.Table": "arrow",
    "pyarrow.lib.Table": "arrow",
    "pl.DataFrame": "polars",
    "polars.DataFrame": "polars",
    "polars.dataframe.frame.DataFrame": "polars",
}


def frame_kind(function: Callable[..., Any]) -> FrameKind:
    """Return what a step takes, by the annotation of its first parameter; without one, a pandas frame."""
    try:
        first = next(iter(inspect.signature(function).parameters.values()), None)
    except (TypeError, ValueError):
        return "pandas"
    if first is None or first.annotation is inspect.Parameter.empty:
        return "pandas"
    annotation = first.annotation
    if isinstance(annotation, str):
        try:
            called = function if inspect.isroutine(function) else function.__call__  # type: ignore[operator]
            annotation = typing.get_type_hints(called).get(first.name, annotation)
        except Exception:  # a name that exists for type checkers only
            return _ANNOTATIONS.get(annotation, "pandas")
    name = f"{getattr(annotation, '__module__', '')}.{getattr(annotation, '__qualname__', '')}"
    return _ANNOTATIONS.get(name, "pandas")


def to_given(table: pa.Table, kind: FrameKind) -> Any:
    """Return what a step gets: ``table`` without dictionaries and views, and the column `ROW_COLUMN` behind."""
    columns = [decoded(one_array(column)) for column in table.columns]
    rows = pa.array(np.arange(table.num_rows, dtype=np.int64))
    given = pa.Table.from_arrays([*columns, rows], names=[*table.column_names, ROW_COLUMN])
    return given if kind == "arrow" else _to_polars(given)


def from_result(
    result: Any, table: pa.Table, *, kind: FrameKind, planned: pa.Schema | None, where: str, keeps_order: bool
) -> tuple[pa.Table, np.ndarray]:
    """Return the table that a step returned, in the order of ``table``, and int64 [rows], the position of each row.

    :param table: the step's input.
    :param planned: columns to return and their types. Default: found from the result.
    :param where: entrypoint of the step, for errors.
    :param keeps_order: True if a result without `ROW_COLUMN` and with as many rows is in the order of ``table``.
    :raises StepFailed: when the result is not a table of these rows, or a value does not fit its column's type.
    """
    returned = _to_arrow(result, kind, where=where)
    if len(set(returned.column_names)) != len(returned.column_names):
        raise StepFailed("a step returned a column twice", where=where, found=", ".join(returned.column_names))
    if ROW_COLUMN in returned.column_names:
        rows = _positions(returned.column(ROW_COLUMN), table.num_rows, where=where)
        returned = returned.drop_columns([ROW_COLUMN])
    elif keeps_order and returned.num_rows == table.num_rows:
        rows = np.arange(table.num_rows, dtype=np.int64)
    else:
        raise StepFailed(
            f"a step lost the column {ROW_COLUMN!r}: which of its rows is which is unknown",
            where=where,
            found=f"{returned.num_rows} rows from {table.num_rows}, columns {', '.join(returned.column_names)}",
            expected=f"the column {ROW_COLUMN!r} it was given, less the rows it drops",
            next_step=f"return {ROW_COLUMN!r}, too; with row_wise: unchecked a step may leave it out if it keeps "
            "number and order of the rows",
        )
    if not returned.num_columns:
        raise StepFailed("a step returned no columns", where=where)
    made = _typed(returned, table, kind, planned, where=where)
    if len(rows) > 1 and (np.diff(rows) < 0).any():
        order = np.argsort(rows, kind="stable")
        return take_rows(made, order), rows[order]
    return made, rows


def _positions(column: pa.ChunkedArray, count: int, *, where: str) -> np.ndarray:
    rows = column.to_numpy() if pa.types.is_integer(column.type) and not column.null_count else np.array([-1])
    rows = rows.astype(np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= count or len(np.unique(rows)) != len(rows)):
        raise StepFailed(
            "a step added rows: it may change and drop them only",
            where=where,
            found=f"{len(column)} rows from {count}, type {column.type}, {column.null_count} nulls",
            expected=f"each value of the column {ROW_COLUMN!r} at most once",
            next_step="remove rows with the same key from a table before it is joined",
        )
    return rows


def _typed(returned: pa.Table, table: pa.Table, kind: FrameKind, planned: pa.Schema | None, *, where: str) -> pa.Table:
    """Return the columns in the planned types, or in the types that all batches get."""
    from pipeline.scoring.frame_conversion import written_type  # imports pandas

    names = returned.column_names if planned is None else planned.names
    if missing := [name for name in names if name not in returned.column_names]:
        raise StepFailed(
            "a step returned other columns than for the sample",
            where=where,
            found=", ".join(returned.column_names),
            expected=", ".join(missing),
            next_step="return the same columns for every batch, whatever its values",
        )
    as_given = _to_arrow(to_given(table.slice(0, 0), kind), kind, where=where).schema if planned is None else None
    columns = []
    for name in names:
        column = one_array(returned.column(name))
        if planned is not None:
            target = planned.field(name).type
        elif name in table.column_names and as_given is not None and as_given.field(name).type == column.type:
            target = written_type(table.column(name).type)
        else:
            target = written_type(column.type, is_made=True)
        try:
            columns.append(column if column.type == target else cast_exactly(column, target))
        except (LossyCastError, *CONVERSION_ERRORS) as error:
            raise StepFailed(
                f"the column {name!r} that a step made has another type than in the sample",
                where=where,
                found=f"{column.type}: {error}"[:300],
                expected=f"{target}, or a value that converts to it without loss",
                next_step="cast the column in the step, so that its type does not depend on the rows",
            ) from error
    return pa.Table.from_arrays(columns, names=list(names))


def _to_arrow(result: Any, kind: FrameKind, *, where: str) -> pa.Table:
    if kind == "arrow" and isinstance(result, pa.RecordBatch):
        return pa.Table.from_batches([result])
    if kind == "arrow" and isinstance(result, pa.Table):
        return result
    if kind == "polars" and type(result).__module__.partition(".")[0] == "polars" and hasattr(result, "to_arrow"):
        made: pa.Table = result.to_arrow()
        return made
    expected = "a pyarrow.Table" if kind == "arrow" else "a polars.DataFrame"
    raise StepFailed(f"a step must return {expected}, as its parameter says", where=where, found=type(result).__name__)


def _to_polars(table: pa.Table) -> Any:
    try:
        import polars as pl
    except ImportError as error:
        raise StepFailed("a step takes a Polars frame, and Polars is not installed here", found=str(error)) from error
    return pl.from_arrow(table)
