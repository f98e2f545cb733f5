"""Arrow casts without loss, and comparison of columns bit by bit."""

from __future__ import annotations

import datetime as dt
import decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipeline.scoring.arrow import LossyCastError, cast_exactly, first_difference

NAN = float("nan")
LIST, PAIR = pa.list_(pa.float32()), pa.struct([("a", pa.int8())])


@pytest.mark.parametrize(
    ("values", "kind", "target"),
    [
        ([0.5, None, NAN, -0.0], pa.float64(), pa.float32()),
        ([0.5, None, NAN], pa.float32(), pa.float64()),
        ([1, None, 2**53], pa.int64(), pa.float64()),
        ([1.0, None, -3.0], pa.float64(), pa.int8()),
        ([1, None], pa.int64(), pa.uint8()),
        (["a", None], pa.string(), pa.string_view()),
        (["a", None], pa.large_string(), pa.dictionary(pa.int32(), pa.string())),
        ([None, None], pa.string(), pa.int64()),
        ([None], pa.null(), pa.dictionary(pa.int32(), pa.string())),
        ([b"abc", None], pa.binary(), pa.binary(3)),
        ([decimal.Decimal("1.5"), None], pa.decimal128(3, 1), pa.decimal128(12, 2)),
        ([dt.datetime(2026, 1, 1), None], pa.timestamp("us"), pa.timestamp("s")),
        ([[0.5, None], None], pa.list_(pa.float64()), LIST),
        ([{"a": 1}, None], pa.struct([("a", pa.int64())]), PAIR),
    ],
)
def test_a_cast_without_loss_keeps_every_value(values: list[Any], kind: pa.DataType, target: pa.DataType) -> None:
    result = cast_exactly(pa.array(values, kind), target)
    assert result.type == target
    assert [value if value == value else "nan" for value in result.to_pylist()] == [
        value if value == value else "nan" for value in values
    ]


@pytest.mark.fault(83)
@pytest.mark.parametrize(
    ("values", "kind", "target", "row"),
    [
        ([0.5, 0.1], pa.float64(), pa.float32(), 1),
        ([1.0, 2.5], pa.float64(), pa.int64(), 1),
        ([1.0, float(2**53)], pa.float64(), pa.int64(), 1),
        ([NAN], pa.float64(), pa.int64(), 0),
        ([1, 2**53 + 1], pa.int64(), pa.float64(), 1),
        ([1, 2**24 + 1], pa.int32(), pa.float32(), 1),
        ([1, 300], pa.int64(), pa.uint8(), 1),
        ([None, "007"], pa.string(), pa.int64(), 1),
        (["true"], pa.string(), pa.bool_(), 0),
        (["2026-01-01"], pa.string(), pa.timestamp("us"), 0),
        ([2], pa.int64(), pa.bool_(), 0),
        ([True], pa.bool_(), pa.int64(), 0),
        ([1], pa.int64(), pa.string(), 0),
        ([2.5], pa.float64(), pa.string(), 0),
        ([dt.datetime(2026, 1, 1, 0, 0, 0, 1)], pa.timestamp("us"), pa.timestamp("s"), 0),
        ([dt.datetime(2026, 1, 1)], pa.timestamp("us"), pa.timestamp("us", "UTC"), 0),
        ([dt.datetime(2026, 1, 1)], pa.timestamp("us"), pa.date32(), 0),
        ([decimal.Decimal("1.25")], pa.decimal128(3, 2), pa.decimal128(3, 1), 0),
        ([[0.5], [0.1]], pa.list_(pa.float64()), LIST, 1),
        ([{"a": 300}], pa.struct([("a", pa.int64())]), PAIR, 0),
    ],
)
def test_a_value_that_would_change_is_named(
    values: list[Any], kind: pa.DataType, target: pa.DataType, row: int
) -> None:
    with pytest.raises(LossyCastError) as caught:
        cast_exactly(pa.array(values, kind), target)
    assert (caught.value.row, caught.value.value) == (row, repr(values[row]))


def test_columns_differ_where_bits_or_nulls_differ() -> None:
    other_nan = np.array([0x7FF8000000000001], np.uint64).view(np.float64)
    assert first_difference(pa.array([1.0, 0.0]), pa.array([1.0, -0.0])) == 1
    assert first_difference(pa.array([1.0, NAN]), pa.array([1.0, None])) == 1
    assert first_difference(pa.array([NAN, None]), pa.array([*other_nan, None])) is None
    assert first_difference(pa.array([[NAN], [1.0]]), pa.array([[NAN], [2.0]])) == 1
    assert first_difference(pa.array([[NAN]]), pa.array([[NAN]])) is None
    codes = [pa.DictionaryArray.from_arrays([0, 1], values) for values in (["a", "b"], ["b", "a"])]
    assert first_difference(codes[0], codes[1]) == 0
    swapped = pa.DictionaryArray.from_arrays([1, 0], ["b", "a"])
    assert first_difference(codes[0], swapped) is None
