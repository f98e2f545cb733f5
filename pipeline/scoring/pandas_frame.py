"""Make pandas frames of Arrow tables, with the dtypes that pandas has by default."""

from __future__ import annotations

import pandas as pd
import pyarrow as pa

from pipeline.errors import InputError
from pipeline.scoring.arrow import decoded
from pipeline.sources.types import as_type, inner_types, without_extensions


def default_frame(table: pa.Table, *, next_step: str) -> pd.DataFrame:
    """Return ``table`` as a frame. Its dtypes depend on the types of ``table`` only.

    :param next_step: advice for a column with a value that pandas cannot hold.
    :raises InputError: for such a value.
    """
    columns = {name: _pandas_column(table.column(name)) for name in table.column_names}
    try:
        return _frame_of(columns)
    except Exception:
        for name, column in columns.items():
            try:
                _frame_of({name: column})
            except Exception as error:
                raise InputError(
                    f"pandas cannot hold a value of the column {name!r}",
                    found=f"{column.type}: {error}"[:300],
                    next_step=next_step,
                ) from error
        raise


def pandas_type(kind: pa.DataType) -> pa.DataType:
    """Return the type from which Arrow makes objects of Python for a column of the type ``kind``.

    Arrow makes no lists of binary of a fixed size, which UUIDs are, and of narrow decimals. Inside lists, structs and
    maps, values of extension types are those of their storage.
    """
    return inner_types(without_extensions(kind), _listed_type) if pa.types.is_nested(kind) else kind


def _listed_type(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_decimal32(kind) or pa.types.is_decimal64(kind):
        return pa.decimal128(kind.precision, kind.scale)
    return kind


def _pandas_column(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if not pa.types.is_nested(column.type):
        return column
    kind = pandas_type(column.type)
    return pa.chunked_array([as_type(decoded(chunk), kind) for chunk in column.chunks], kind)


def _frame_of(columns: dict[str, pa.ChunkedArray]) -> pd.DataFrame:
    frame: pd.DataFrame = pa.table(columns).to_pandas(ignore_metadata=True)
    return frame
