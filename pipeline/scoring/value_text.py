"""Show a value of an Arrow column as text, also a value that Python cannot hold."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

_ALL = 1 << 30


def python_value(column: pa.Array | pa.ChunkedArray, row: int) -> Any:
    """Return a value as an object of Python; as text if there is no such object.

    A date or a time may be beyond Python's, a duration too long, a time zone unknown, and text may be no UTF-8.
    """
    try:
        return column[row].as_py()
    except Exception:
        return _arrow_text(column.slice(row, 1))


def value_text(column: pa.Array | pa.ChunkedArray, row: int, *, limit: int | None = 100) -> str:
    """Return a value as code of Python; as Arrow shows it if Python cannot hold the value.

    :param limit: largest number of characters; None: no limit.
    """
    try:
        return repr(column[row].as_py())[:limit]
    except Exception:
        return _arrow_text(column.slice(row, 1))[:limit]


def _arrow_text(value: pa.Array | pa.ChunkedArray) -> str:
    array = value.chunk(0) if isinstance(value, pa.ChunkedArray) else value
    if isinstance(array.type, pa.BaseExtensionType):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    text = array.to_string(window=_ALL, container_window=_ALL) if pa.types.is_nested(array.type) else str(array)
    return " ".join(text.removeprefix("[").removesuffix("]").split())
