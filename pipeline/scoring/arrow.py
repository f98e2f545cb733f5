"""Some rows of an Arrow column or table, of every type: Arrow itself cannot take from view types."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

CONVERSION_ERRORS = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError)
"""What pyarrow raises for values that do not go into a type: by the values, by Python's types, by Arrow's."""


def take_rows(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """The given rows, in the given order.

    :param rows: int64 [rows], positions in ``table``.
    """
    if not table.num_columns:
        return table.slice(0, len(rows))
    return pa.Table.from_arrays([take_values(column, rows) for column in table.columns], schema=table.schema)


def take_values(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ChunkedArray:
    """As `take_rows`, for one column."""
    try:
        return column.take(pa.array(rows))
    except pa.ArrowNotImplementedError:
        # Slicing works for every type: one slice for each run of neighbours.
        starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1)
        stops = np.append(starts[1:], len(rows))
        parts = [column.slice(rows[a], b - a) for a, b in zip(starts, stops, strict=True)] if len(rows) else []
        return pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=column.type)
