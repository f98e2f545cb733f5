"""Call map steps with pandas frames. The frame's index says which rows a step returned: it is the identity of a row.

The number of rows says nothing of which they are, so a result without the index is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.common.step_output import of_step
from pipeline.errors import SpecError, StepFailed
from pipeline.scoring.arrow import take_rows
from pipeline.scoring.bisection import NoRowWorksError, RowsError, bisect, blame_rows
from pipeline.scoring.frame_conversion import to_frame, to_table
from pipeline.scoring.frame_schemas import UNPLANNED, FrameSchemas, never_null_columns
from pipeline.scoring.rows import Failures, Rows
from pipeline.scoring.step_policy import call_step
from pipeline.scoring.steps import Step
from pipeline.scoring.table_steps import ROW_COLUMN, from_result, to_given

ROW_INDEX = ROW_COLUMN
"""Name of the index of a step's frame: position in the batch, int64, from 0. It identifies the remaining rows."""
MIN_ROWS = 2
"""Rows of the smallest frame, but for empty ones. A row alone is doubled: the bits of sums over columns differ in NumPy
for a single row."""


def check_source_columns(schema: pa.Schema) -> None:
    """Check that no column of a source has the name of the index of frames.

    :raises SpecError: if one has.
    """
    if ROW_INDEX in schema.names:
        raise SpecError(
            f"a source for map steps has a column {ROW_INDEX!r}, the name of the index of their frames",
            where="source.columns",
            found=ROW_INDEX,
            expected="columns of other names",
            next_step="leave the column out of source.columns, or rename it in the files",
        )


def map_rows(
    steps: Sequence[Step], rows: Rows, *, schemas: FrameSchemas = UNPLANNED, any_worked: bool = False
) -> tuple[list[Rows], Failures]:
    """Run ``steps``, on fewer rows at a time if they raise. Return the results in order, and the rows that fail.

    :param any_worked: True if the steps are known to work on some row.
    :raises StepFailed: when a step breaks its contract, or fails on every row.
    """

    def run(start: int, stop: int) -> Rows:
        return run_steps(steps, rows.slice(start, stop), schemas=schemas)

    try:
        if not len(rows):
            return [run(0, 0)], Failures()
        outcome = bisect(run, 0, len(rows), any_worked=any_worked)
    except RowsError as error:  # on no row at all: nothing to bisect
        raise StepFailed("a step fails on a frame without rows", where=error.source, found=error.message()) from error
    except NoRowWorksError as error:
        raise StepFailed(
            "a step fails on every row",
            where=error.example.source.removeprefix("step:"),
            found=f"{error.example.message(lines=6)}\non each of {error.tried} rows that were tried",
            next_step="fix the step; if only these rows are bad, drop them in the step",
        ) from error
    return [part.result for part in outcome.parts], rows.number(outcome.to_failures())


def run_steps(steps: Sequence[Step], rows: Rows, *, schemas: FrameSchemas = UNPLANNED) -> Rows:
    """Run ``steps`` one after the other. Return the rows that they keep, in input order.

    :param schemas: planned schemas of the frames. Default: found from ``rows``.
    :raises RowsError: when a step raises an exception that rows may have caused, or pandas cannot hold a value.
    :raises StepFailed: when the result of a step is not a frame of these rows.
    """
    table, position = rows.table, rows.position
    never_null = schemas.before_step(0)
    for number, step in enumerate(steps):
        planned = schemas.after_step(number)
        table, returned = run_step(step, table, never_null=never_null, planned=planned)
        position = position[returned]
        never_null = never_null_columns(table.schema if planned is None else planned)
    return Rows(table, position)


def run_step(
    step: Step, table: pa.Table, *, never_null: Collection[str] = (), planned: pa.Schema | None = None
) -> tuple[pa.Table, np.ndarray]:
    """Run one step. Return its rows in the order of ``table``, and int64 [rows], the position of each in ``table``.

    :param never_null: columns of ``table`` planned without nulls.
    :param planned: planned columns of the result. Default: found from the result, with the nullability of each.
    """
    is_doubled = 0 < table.num_rows < MIN_ROWS
    given = pa.concat_tables([table] * MIN_ROWS) if is_doubled else table
    if step.kind != "pandas":
        result, rows = _run_table_step(step, given, planned)
    else:
        result, rows = _run_frame_step(step, given, never_null, planned)
    if not is_doubled:
        return result, rows
    first = np.flatnonzero(rows < table.num_rows)
    return take_rows(result, first), rows[first]


def _run_table_step(step: Step, given: pa.Table, planned: pa.Schema | None) -> tuple[pa.Table, np.ndarray]:
    """Run a step that takes an Arrow table or a Polars frame."""
    with blame_rows(f"step:{step.entrypoint}"), _show_warnings(), of_step(step.entrypoint):
        # Each call gets a frame of its own: Polars changes some in place.
        result = call_step(lambda: step.function(to_given(given, step.kind)), step.on_error, entrypoint=step.entrypoint)
    keeps_order = step.row_wise == "unchecked"
    return from_result(result, given, kind=step.kind, planned=planned, where=step.entrypoint, keeps_order=keeps_order)


def _run_frame_step(
    step: Step, given: pa.Table, never_null: Collection[str], planned: pa.Schema | None
) -> tuple[pa.Table, np.ndarray]:
    """Run a step that takes a pandas frame."""
    before = to_frame(given, backend=step.dtype_backend, never_null=never_null)
    # Writing into a shallow copy copies first (pandas' copy-on-write), so that `before` stays as it is.
    index = pd.Index(np.arange(given.num_rows, dtype=np.int64), name=ROW_INDEX)
    after, rows = _call_step(step, before.copy(deep=False).set_axis(index, axis=0))
    return to_table(after, table=given, before=before, rows=rows, planned=planned, where=step.entrypoint), rows


def _call_step(step: Step, frame: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Call a step. Return its frame in the order of the rows, and the position in ``frame`` of each row."""
    count = len(frame)
    with blame_rows(f"step:{step.entrypoint}"), _show_warnings(), of_step(step.entrypoint):
        # Each call gets a frame of its own: one that raised may have changed columns.
        call = partial(_call_function, step, frame) if step.on_error else partial(step.function, frame)
        result: Any = call_step(call, step.on_error, entrypoint=step.entrypoint)
    if not isinstance(result, pd.DataFrame):
        raise _broken(step, "a step must return a DataFrame", found=type(result).__name__)
    names = list(result.columns)
    if any(not isinstance(name, str) for name in names) or len(set(names)) != len(names):
        raise _broken(
            step, "a step returned columns that cannot be written", found=repr(names)[:200], expected="unique strings"
        )
    return _remaining_rows(step, result, count)


def _call_function(step: Step, frame: pd.DataFrame) -> Any:
    return step.function(frame.copy(deep=False))


def _show_warnings() -> AbstractContextManager[Any]:
    """Show warnings of the user's code, and never turn them into errors, under any filters of the process."""
    if all(action != "error" for action, *_ in warnings.filters):
        return nullcontext()  # filters belong to the process, and other threads use them
    return warnings.catch_warnings(action="default")


def _remaining_rows(step: Step, result: pd.DataFrame, count: int) -> tuple[pd.DataFrame, np.ndarray]:
    index = result.index
    if index.name != ROW_INDEX or index.nlevels != 1:
        return result, _rows_without_index(step, result, count)
    if not pd.api.types.is_integer_dtype(index.dtype):
        raise _broken(step, f"a step changed the index {ROW_INDEX!r}", found=str(index.dtype), expected="int64")
    rows = index.to_numpy(dtype=np.int64)
    if len(rows) and (rows.min() < 0 or rows.max() >= count or not index.is_unique):
        raise _broken(
            step,
            "a step added rows: it may change and drop them only",
            found=f"{len(rows)} rows from {count}, {len(rows) - index.nunique()} of them twice",
            expected=f"each value of the index {ROW_INDEX!r} at most once",
            next_step="remove rows with the same key from a table before it is joined",
        )
    if not index.is_monotonic_increasing:
        order = np.argsort(rows, kind="stable")
        return result.iloc[order], rows[order]
    return result, rows


def _rows_without_index(step: Step, result: pd.DataFrame, count: int) -> np.ndarray:
    """Return the position of each row of a frame that lost the index: by order, if the spec says so."""
    index = result.index
    is_new = isinstance(index, pd.RangeIndex) and (index.start, index.step) == (0, 1)
    if step.row_wise == "unchecked" and is_new and len(result) == count:
        return np.arange(count, dtype=np.int64)
    raise _broken(
        step,
        f"a step lost the index {ROW_INDEX!r}: which of its rows is which is unknown",
        found=f"{len(result)} rows from {count}, index {index.name or type(index).__name__!r}",
        expected=f"the index {ROW_INDEX!r} it was given, less the rows it drops",
        next_step='join a table with frame.join(table.set_index("key"), on="key"), which keeps the index; leave out '
        "ignore_index and reset_index; if the step keeps number and order of the rows, end it with "
        ".set_index(frame.index)",
    )


def _broken(step: Step, message: str, **details: str) -> StepFailed:
    return StepFailed(message, where=step.entrypoint, **details)
