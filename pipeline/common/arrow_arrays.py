"""Make Arrow arrays from Python values without ``pyarrow.array``, which imports pandas at its first call.

The import takes a tenth of a second of a core, and a driver needs pandas for nothing else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import pyarrow as pa


def int64s(values: Iterable[int]) -> pa.Array:
    """Return an array of int64.

    :raises OverflowError: for a value that needs more bits.
    """
    return _plain(pa.int64(), np.fromiter(values, np.int64))


def booleans(values: Iterable[bool]) -> pa.Array:
    """Return an array of booleans."""
    flags = np.fromiter(values, np.bool_)
    return pa.Array.from_buffers(pa.bool_(), len(flags), [None, _bits(flags)])


def strings(values: Sequence[str | None]) -> pa.Array:
    """Return an array of strings; None becomes null.

    :raises UnicodeEncodeError: for text that UTF-8 cannot hold.
    """
    encoded = [b"" if value is None else value.encode() for value in values]
    offsets = np.fromiter(accumulate(map(len, encoded), initial=0), np.int32, len(encoded) + 1)
    valid = np.fromiter((value is not None for value in values), np.bool_, len(encoded))
    buffers = [None if valid.all() else _bits(valid), pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def lists(lengths: Iterable[int], values: pa.Array) -> pa.ListArray:
    """Return an array of lists, which are ``values`` cut into pieces of ``lengths``."""
    offsets = np.fromiter(accumulate(lengths, initial=0), np.int32)
    return pa.ListArray.from_arrays(_plain(pa.int32(), offsets), values)


def float_values(array: pa.Array) -> np.ndarray:
    """Return the values of an array of float16, float32 or float64 without nulls, not copied.

    ``to_numpy`` imports pandas, too.
    """
    dtype = np.dtype(f"f{array.type.bit_width // 8}")
    data = array.buffers()[1]
    if not len(array) or data is None:
        return np.empty(0, dtype)
    return np.frombuffer(data, dtype, len(array), array.offset * dtype.itemsize)


def _plain(kind: pa.DataType, values: np.ndarray) -> pa.Array:
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _bits(flags: np.ndarray) -> pa.Buffer:
    return pa.py_buffer(np.packbits(flags, bitorder="little"))
