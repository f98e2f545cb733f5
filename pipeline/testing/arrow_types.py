"""A column of every Arrow type that Parquet can store, with nulls, extreme values and values that look alike."""

from __future__ import annotations

import datetime as dt
import decimal
import uuid
from typing import Any

import numpy as np
import pyarrow as pa

ROWS = 12
"""Rows of each column of `typed_columns`."""


def typed_columns() -> dict[str, pa.Array]:
    """Return arrays of `ROWS` values by the text of their type. Each has a null at the end, except nulls only."""
    return {str(array.type): array for array in (*_numbers(), *_times(), *_texts(), *_nested(), *_wrapped())}


def _column(values: list[Any], arrow_type: pa.DataType) -> pa.Array:
    repeated = [values[number % len(values)] for number in range(ROWS - 1)]
    return pa.array([*repeated, None], arrow_type)


def _numbers() -> list[pa.Array]:
    columns = [pa.nulls(ROWS), _column([True, False], pa.bool_())]
    for width in (8, 16, 32, 64):
        signed, unsigned = getattr(pa, f"int{width}")(), getattr(pa, f"uint{width}")()
        columns.append(_column([0, 1, -1, 5, 2 ** (width - 1) - 1, -(2 ** (width - 1))], signed))
        columns.append(_column([0, 1, 5, 2**width - 1], unsigned))
    for name in ("float16", "float32", "float64"):
        values = np.array([0.0, -0.0, 0.1, 1.0, 5.0, np.nan, np.inf, -np.inf, np.finfo(name).max], name)
        columns.append(_column(list(values), getattr(pa, name)()))
    for kind, digits, scale in (("32", 9, 2), ("64", 18, 3), ("128", 38, 30), ("128", 9, 2), ("256", 70, 2)):
        whole = decimal.Decimal("9" * (digits - scale))
        decimals = [decimal.Decimal(text) for text in ("0", "0.1", "1", "-1.5", "5")]
        columns.append(_column([*decimals, whole], getattr(pa, f"decimal{kind}")(digits, scale)))
    return columns


def _times() -> list[pa.Array]:
    columns = []
    days = [dt.date(2024, 1, 1), dt.date(1969, 12, 31), dt.date(1, 1, 1), dt.date(9999, 12, 31)]
    columns += [_column(days, pa.date32()), _column(days, pa.date64())]
    for unit, a_second in (("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)):
        # Seconds since 1970: the first instant of 2024 and the next tick, one before 1970, the years 1700 and 2200.
        ticks = [1704067200 * a_second, 1704067200 * a_second + 1, -1, -8520336000 * a_second, 7258118400 * a_second]
        if unit != "ns":
            ticks.append(253402214400 * a_second)  # 9999-12-31
        for zone in (None, "UTC", "Europe/Berlin"):
            columns.append(_column(ticks, pa.int64()).cast(pa.timestamp(unit, zone)))
        of_day = [0, 1, 30 * 60 * a_second, 86399 * a_second + a_second - 1]
        is_short = unit in ("s", "ms")
        kind = pa.time32(unit) if is_short else pa.time64(unit)
        columns.append(_column(of_day, pa.int32() if is_short else pa.int64()).cast(kind))
        columns.append(_column([0, 1, -1, a_second], pa.int64()).cast(pa.duration(unit)))
    return columns


def _texts() -> list[pa.Array]:
    texts, data = ["a", "b", "", "Köln", "a" * 40], [b"a", b"\xff\x00", b""]
    columns = [_column(texts, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())]
    columns += [_column(data, kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view())]
    return [*columns, _column([b"abcd", b"\x00\x01\x02\x03"], pa.binary(4))]


def _nested() -> list[pa.Array]:
    item = pa.list_(pa.int64())
    view = pa.list_(pa.string_view())
    codes = pa.dictionary(pa.int8(), pa.string())
    return [
        _column([[1], [], [None, 2]], item),
        _column([[1], []], pa.large_list(pa.int64())),
        _column([["a"], []], view),
        _column([["a"], [], ["b", "a"]], pa.list_(codes)),
        _column([[1.0, 2.0]], pa.list_(pa.float32(), 2)),
        _column([{"a": "x", "b": 1}, {"a": None, "b": 2}], pa.struct([("a", codes), ("b", pa.int64())])),
        _column([{"a": "x"}], pa.struct([("a", pa.string_view())])),
        _column([[("k", "v")], []], pa.map_(pa.string(), pa.string_view())),
    ]


def _wrapped() -> list[pa.Array]:
    text, whole = _column(["a", "b"], pa.string()), _column([5, -7], pa.int64())
    columns = [
        _column(["a", "b"], pa.dictionary(index, pa.string()))
        for index in (pa.int8(), pa.int16(), pa.int32(), pa.int64())
    ]
    columns.append(whole.dictionary_encode())
    columns.append(pa.DictionaryArray.from_arrays(text.dictionary_encode().indices, ["b", "a"], ordered=True))
    ids = _column([uuid.UUID(int=number).bytes for number in (0, 1, 2**128 - 1)], pa.binary(16))
    columns.append(pa.ExtensionArray.from_storage(pa.uuid(), ids))
    columns.append(pa.ExtensionArray.from_storage(pa.json_(pa.string()), _column(["{}", "[1]"], pa.string())))
    columns.append(pa.ExtensionArray.from_storage(pa.bool8(), _column([1, 0], pa.int8())))
    return columns
