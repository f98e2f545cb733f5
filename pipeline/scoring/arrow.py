"""Select rows of Arrow columns and tables of every type; Arrow itself cannot take from view types."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

CONVERSION_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError)
"""Errors that pyarrow raises for values that do not fit a type."""


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
