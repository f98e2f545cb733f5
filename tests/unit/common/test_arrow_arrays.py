"""Arrow arrays from Python values, compared with those of ``pyarrow.array``."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from pipeline.common.arrow_arrays import booleans, float_values, int64s, lists, strings

INTS = [[], [0], [2**63 - 1, -(2**63), 5]]
FLAGS = [[], [True], [True, False] * 9 + [True]]
TEXTS = [[], [""], ["a", "", "süß", "日本"], [None], ["a", None, "", None, "b", "c", "d", "e", None, "g"]]


@pytest.mark.parametrize("values", INTS)
def test_int64s(values: list[int]) -> None:
    assert int64s(iter(values)).equals(pa.array(values, pa.int64()))


def test_integer_of_more_bits_is_an_error() -> None:
    with pytest.raises(OverflowError):
        int64s([2**63])


@pytest.mark.parametrize("values", FLAGS)
def test_booleans(values: list[bool]) -> None:
    assert booleans(iter(values)).equals(pa.array(values, pa.bool_()))


@pytest.mark.parametrize("values", TEXTS)
def test_strings(values: list[str | None]) -> None:
    made = strings(values)
    made.validate(full=True)
    assert made.equals(pa.array(values, pa.string()))
    assert made.null_count == values.count(None)


def test_text_that_is_not_unicode_is_an_error() -> None:
    with pytest.raises(UnicodeEncodeError):
        strings(["\ud800"])


def test_lists() -> None:
    made = lists(iter([2, 0, 1]), int64s([1, 2, 3]))
    made.validate(full=True)
    assert made.equals(pa.array([[1, 2], [], [3]], pa.list_(pa.int64())))
    assert lists([], int64s([])).to_pylist() == []


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_float_values_are_a_view_also_of_a_slice(dtype: type) -> None:
    values = np.array([1.5, np.inf, np.nan, -0.0, 4.0], dtype)
    array = pa.array(values)
    assert float_values(array).tobytes() == values.tobytes()
    assert float_values(array[1:4]).tobytes() == values[1:4].tobytes()
    assert float_values(array[5:]).dtype == dtype
    assert not float_values(array[5:]).size


def test_pandas_is_not_imported() -> None:
    code = (
        "import sys; from pipeline.common.arrow_arrays import *; "
        "lists([1], int64s([1])); strings(['a']); booleans([True]); "
        "float_values(pa.Array.from_buffers(pa.float32(), 1, [None, pa.py_buffer(bytes(4))])); "
        "sys.exit('pandas' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
