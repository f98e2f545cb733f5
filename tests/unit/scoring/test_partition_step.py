"""Functions of partitions as steps: index, dtypes and columns they see, rows they return, types of the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from pipeline.errors import StepFailed
from pipeline.scoring.partition_step import (
    PARTITION,
    POSITION,
    FrameType,
    PartitionStep,
    is_async,
    result_type,
    with_places,
)
from pipeline.scoring.table_steps import ROW_COLUMN


def part(index: Any = None) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "n": np.arange(4, dtype=np.int16),
            "size": pd.Categorical(["s", "m", None, "s"], ["s", "m", "l"], ordered=True),
            "text": pd.array(["a", None, "c", "d"], "string[pyarrow]"),
            "some": pd.array([1, None, 3, 4], "Int32"),
            "money": pd.array([1, None, 3, 4], pd.ArrowDtype(pa.decimal128(9, 2))),
        },
        index=pd.Index([10, 20, 30, 40], name="id") if index is None else index,
    )


def given(*parts: pd.DataFrame) -> pa.Table:
    """Return the rows of partitions as a step gets them: dictionaries are decoded, rows are numbered."""
    frame = pd.concat([with_places(one, number) for number, one in enumerate(parts)], ignore_index=True)
    frame["size"] = frame["size"].astype(object)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    return table.append_column(ROW_COLUMN, pa.array(range(len(frame)), pa.int64()))


def call(function: Callable[..., Any], *parts: pd.DataFrame, made: pd.DataFrame | None = None) -> pa.Table:
    kind = FrameType.of(parts[0].iloc[:0])
    step = PartitionStep(function, kind, None if made is None else FrameType.of(made))
    return step(given(*parts))


@pytest.mark.parametrize(
    "index",
    [
        pd.Index([10, 20, 30, 40], name="id"),
        pd.RangeIndex(4),
        pd.date_range("2024-01-01", periods=4, tz="UTC", name="when"),
        pd.MultiIndex.from_arrays([list("aabb"), [1, 2, 1, 2]], names=["k", None]),
        pd.Index(["x", "x", "y", "z"], name="twice"),
    ],
)
def test_a_function_sees_the_partition_as_it_is(index: pd.Index[Any]) -> None:
    seen = []
    call(lambda frame: seen.append(frame) or frame, part(index))
    pd.testing.assert_frame_equal(seen[0], part(index), check_index_type=False, check_freq=False)


def test_each_call_gets_rows_of_one_partition() -> None:
    made = call(lambda frame: frame.assign(rows=len(frame))[["rows"]], part(), part().iloc[:1])
    assert made["rows"].to_pylist() == [4, 4, 4, 4, 1]
    assert made[PARTITION].to_pylist() == [0, 0, 0, 0, 1]


def test_rows_may_go_and_change_their_order() -> None:
    made = call(lambda frame: frame[frame["n"] != 1].iloc[::-1][["n"]], part())
    assert made["n"].to_pylist() == [3, 2, 0]
    assert made[ROW_COLUMN].to_pylist() == made[POSITION].to_pylist() == [3, 2, 0]


def test_a_row_that_comes_twice_is_computed_once() -> None:
    table = given(part()).slice(1, 1)
    twice = pa.concat_tables([table, table.set_column(table.num_columns - 1, ROW_COLUMN, pa.array([2], pa.int64()))])
    calls = []
    step = PartitionStep(lambda frame: calls.append(len(frame)) or frame, FrameType.of(part().iloc[:0]), None)
    assert step(twice)[ROW_COLUMN].to_pylist() == [1]
    assert calls == [1]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda frame: frame["n"], "must return a DataFrame"),
        (lambda frame: frame.reset_index(drop=True), "lost the index"),
        (lambda frame: pd.concat([frame, frame]), "lost the index"),
        (lambda frame: frame.rename(columns={"n": 3}), "cannot be written"),
        (lambda frame: frame.assign(**{PARTITION: 1}), "cannot be written"),
        (lambda frame: frame.assign(x=[1, "a", 2.0, None]), "no type in Parquet"),
    ],
)
def test_results_that_are_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(StepFailed, match=message):
        call(function, part())


def test_rows_of_an_index_with_repeated_values_cannot_go() -> None:
    repeated = part(pd.Index([1, 1, 2, 3]))
    assert call(lambda frame: frame[["n"]] + 1, repeated)["n"].to_pylist() == [1, 2, 3, 4]
    with pytest.raises(StepFailed, match="lost the index") as error:
        call(lambda frame: frame[frame["n"] > 1], repeated)
    assert "reset_index" in str(error.value)


def test_meta_decides_columns_and_dtypes() -> None:
    meta = pd.DataFrame({"x": pd.Series([], dtype="float32")})
    assert call(lambda frame: frame[["n"]].rename(columns={"n": "x"}), part(), made=meta)["x"].type == pa.float32()
    with pytest.raises(StepFailed, match="other columns than meta"):
        call(lambda frame: frame[["n"]], part(), made=meta)


def test_no_rows() -> None:
    made = call(lambda frame: frame.assign(twice=frame["n"] * 2), part().iloc[:0])
    assert (made.num_rows, made.schema.field("twice").type) == (0, pa.int16())


def test_dtypes_of_results() -> None:
    kind = FrameType.of(part().iloc[:0])
    schema = pa.schema(
        [
            ("n", pa.int16()),
            ("size", pa.string()),
            ("text", pa.string()),
            ("some", pa.float64()),
            ("new", pa.int32()),
            ("gaps", pa.uint8()),
            ("yes", pa.bool_()),
            ("at", pa.timestamp("us", "UTC")),
            ("list", pa.list_(pa.int8())),
            ("day", pa.date32()),
        ]
    )
    found = dict(result_type(schema, kind, None, nullable=["gaps", "text"]).columns)
    assert {name: str(dtype) for name, dtype in found.items()} == {
        "n": "int16",
        "size": "category",
        "text": "string",
        "some": "float64",
        "new": "int32",
        "gaps": "UInt8",
        "yes": "bool",
        "at": "datetime64[us, UTC]",
        "list": "object",
        "day": "object",
    }
    assert found["size"] == part()["size"].dtype


def test_nulls_in_a_column_that_had_none() -> None:
    kind = FrameType.of(part().iloc[:0])
    found = dict(result_type(pa.schema([("n", pa.int16())]), kind, None, nullable=["n"]).columns)
    assert found["n"] == pd.Int16Dtype()


def test_async_functions_are_known() -> None:
    class Waits:
        async def __call__(self, frame: pd.DataFrame) -> pd.DataFrame:
            return frame

    async def waits(frame: pd.DataFrame) -> pd.DataFrame:
        return frame

    assert [is_async(one) for one in (waits, Waits(), part)] == [True, True, False]
