"""The feature matrix: every value in its place, whatever the tiles, the chunks and the order."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import pyarrow as pa
import pytest

from pipeline.models.flavors import matrix
from pipeline.models.flavors.matrix import encode
from pipeline.models.model import Feature

ROWS = (0, 1, matrix._TILE_ROWS - 1, matrix._TILE_ROWS, matrix._TILE_ROWS + 1, 2 * matrix._TILE_ROWS + 3)
WIDTHS = (1, matrix._TILE_COLUMNS - 1, matrix._TILE_COLUMNS, matrix._TILE_COLUMNS + 1, 2 * matrix._TILE_COLUMNS + 5)


def columns(rows: int, width: int) -> np.ndarray:
    """Return float32 [width, rows], no two values of which are equal, 1 % NaN."""
    values = np.arange(rows * width, dtype=np.float32).reshape(width, rows)
    values.ravel()[::101] = np.nan
    return values


def features(width: int) -> tuple[Feature, ...]:
    return tuple(Feature(f"f{number}") for number in range(width))


def table(arrays: list[pa.Array | pa.ChunkedArray]) -> pa.Table:
    return pa.table(arrays, names=[f"f{number}" for number in range(len(arrays))])


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_every_value_is_in_its_place(rows: int, width: int, order: Literal["C", "F"]) -> None:
    wanted = columns(rows, width)
    found = encode(table([pa.array(column) for column in wanted]), features(width), order=order)
    assert found.flags.c_contiguous if order == "C" else found.flags.f_contiguous
    np.testing.assert_array_equal(found.view(np.uint32), wanted.T.view(np.uint32))


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("in_chunks", [[0], [3], [66], [0, 1, 70, 129], list(range(130))])
def test_columns_in_chunks_beside_whole_columns(in_chunks: list[int], order: Literal["C", "F"]) -> None:
    """A tile then holds columns that are no neighbours."""
    wanted = columns(5000, 130)
    arrays: list[pa.Array | pa.ChunkedArray] = [pa.array(column) for column in wanted]
    for number in in_chunks:
        arrays[number] = pa.chunked_array([wanted[number, :10], wanted[number, 10:4097], wanted[number, 4097:]])
    found = encode(table(arrays), features(130), order=order)
    np.testing.assert_array_equal(found.view(np.uint32), wanted.T.view(np.uint32))


@pytest.mark.parametrize("order", ["C", "F"])
def test_other_types_are_rounded_once_without_a_warning(order: Literal["C", "F"]) -> None:
    values = [1e300, -1e300, 0.1, None, 2.0]
    whole, chunked = pa.array(values, pa.float64()), pa.chunked_array([pa.array(values, pa.float64())[:2], values[2:]])
    integers = pa.array([2**24 + 1, None, -(2**53) - 1, 0, 7], pa.int64())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = encode(
            table([whole, chunked, integers, pa.array([True, None, False, True, True])]), features(4), order=order
        )
    floats = np.array([np.inf, -np.inf, 0.1, np.nan, 2.0], np.float32)
    wanted = [floats, floats, np.array([2**24, np.nan, -(2**53), 0, 7], np.float32), np.array([1, np.nan, 0, 1, 1])]
    np.testing.assert_array_equal(found, np.array(wanted, np.float32).T)


def test_table_without_rows_or_features() -> None:
    assert encode(pa.table({"": pa.nulls(3)}), ()).shape == (3, 0)
    assert encode(table([pa.array([], pa.float32())]), features(1)).shape == (0, 1)
